"""The main job, end to end: what goes in, what lies in the output, what a second run does."""

import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import BusyError, ConfigError, FingerprintError, StorageError
from pipeline.extract import _leave, extract
from pipeline.lease import acquire
from pipeline.schema import REJECT_REASONS
from pipeline.stop import Stop
from pipeline.storage import Storage
from tests.conftest import encode, make_image
from tests.running import ids_of, leftovers, make_config, rows_of, run, schema_of, write_config, write_tar

pytestmark = pytest.mark.usefixtures("ray_session")

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tif": "TIFF"}


def write_mixed(folder, count):
    """Images of every usual format, of sizes from 17 x 13 to 300 x 200, some of them grey."""
    rng = np.random.default_rng(7)
    for number in range(count):
        extension = list(FORMATS)[number % len(FORMATS)]
        size = (int(rng.integers(17, 300)), int(rng.integers(13, 200)))
        image = make_image(number, size)
        if number % 10 == 9:
            image = image.convert("L")
        path = folder / f"{number % 3}" / f"{number:03d}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image, FORMATS[extension]))


def reference(tiny_model, folder, names):
    """transformers' own processor and model: embeddings (N, D) and logits (N, C), in this process."""
    import torch
    from transformers import CvtForImageClassification
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

    processor = ConvNextImageProcessorPil.from_pretrained(tiny_model)
    model = CvtForImageClassification.from_pretrained(tiny_model).eval()
    images = [Image.open(folder / name).convert("RGB") for name in names]
    with torch.inference_mode():
        pixel_values = torch.cat([processor(i, return_tensors="pt")["pixel_values"] for i in images])
        logits = model(pixel_values).logits
        cls_token = model.cvt(pixel_values).cls_token_value
        embedding = model.layernorm(cls_token)[:, 0]
    return embedding.numpy(), logits.numpy(), cls_token[:, 0].numpy()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tiny_model, ray_session):
    """A folder of 60 images and its output."""
    folder = tmp_path_factory.mktemp("mixed")
    write_mixed(folder / "in", 60)
    tally = run(make_config(folder / "in", tiny_model, folder / "out", compute__shard_images=25))
    assert (tally.images, tally.rejects.total(), tally.planned_shards) == (60, 0, 3)
    return folder


@pytest.fixture(scope="module")
def mixed_reference(mixed, tiny_model):
    return reference(tiny_model, mixed / "in", ids_of(mixed / "out"))


def test_embeddings_and_logits_are_those_of_transformers(mixed, mixed_reference):
    rows = rows_of(mixed / "out")
    embeddings, logits, _ = mixed_reference
    assert np.abs(np.array([row["embedding"] for row in rows]) - embeddings).max() < 1e-4
    assert np.abs(np.array([row["logits"] for row in rows]) - logits).max() < 1e-4
    assert np.ptp(logits, axis=0).min() > 1e-2  # images that all look alike would prove nothing


def test_label_and_score_are_the_top_of_the_softmax(mixed, mixed_reference):
    _, logits, _ = mixed_reference
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax = exponentials / exponentials.sum(axis=1, keepdims=True)
    rows = rows_of(mixed / "out")
    assert [row["label_id"] for row in rows] == softmax.argmax(axis=1).tolist()
    assert [row["label"] for row in rows] == [f"class-{n}" for n in softmax.argmax(axis=1)]
    assert np.allclose([row["score"] for row in rows], softmax.max(axis=1), atol=1e-5)


def test_rows_tell_the_original_files_facts(mixed):
    rows = rows_of(mixed / "out")
    files = {str(p.relative_to(mixed / "in")): p for p in (mixed / "in").rglob("*") if p.is_file()}
    assert [row["image_id"] for row in rows] == sorted(files)
    for row in rows:
        data = files[row["image_id"]].read_bytes()
        image = Image.open(io.BytesIO(data))
        assert row["sha256"] == hashlib.sha256(data).digest()
        assert (row["width"], row["height"], row["format"]) == (*image.size, image.format)
        assert row["key"] == row["image_id"]
        assert row["shard"].startswith("images-")


def test_columns_and_types_are_the_documented_ones(mixed):
    found = schema_of(mixed / "out")
    assert list(zip(found.names, found.types, strict=True)) == [
        ("image_id", pa.string()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("embedding", pa.list_(pa.float32(), 48)),
        ("logits", pa.list_(pa.float32(), 7)),
        ("label", pa.string()),
        ("label_id", pa.int32()),
        ("score", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("sha256", pa.binary(32)),
    ]


def test_duckdb_pandas_polars_and_datasets_read_the_folder(mixed):
    import datasets
    import duckdb
    import pandas
    import polars

    glob = str(mixed / "out/embeddings/*.parquet")
    ids = ids_of(mixed / "out")
    vectors = np.array([row["embedding"] for row in rows_of(mixed / "out")], np.float32)
    in_duckdb = duckdb.sql(f"select image_id, embedding from '{glob}' order by image_id").fetchall()
    assert [row[0] for row in in_duckdb] == ids
    assert np.array_equal(np.array([row[1] for row in in_duckdb], np.float32), vectors)
    assert sorted(pandas.read_parquet(mixed / "out/embeddings").image_id) == ids
    in_polars = polars.read_parquet(glob).sort("image_id")
    assert in_polars["image_id"].to_list() == ids
    assert np.array_equal(in_polars["embedding"].to_numpy(), vectors)
    loaded = datasets.load_dataset(
        "parquet", data_files=glob, split="train", cache_dir=str(mixed / "datasets")
    )
    assert sorted(loaded["image_id"]) == ids


def test_a_second_run_loads_neither_ray_nor_torch_and_changes_nothing(mixed, tiny_model):
    before = {
        p: p.stat().st_mtime_ns for f in ("embeddings", "commits") for p in (mixed / "out" / f).iterdir()
    }
    config = make_config(mixed / "in", tiny_model, mixed / "out", model__precision="auto")
    code = (
        "import sys, time; from pathlib import Path\n"
        "from pipeline.load_config import load_config; from pipeline.extract import extract\n"
        "from pipeline.stop import Stop\n"
        "config = load_config(Path(sys.argv[1]))\n"
        "tally = extract(config, stop=Stop(), on_progress=print, started=time.time())\n"
        "loaded = [name for name in ('ray', 'torch', 'transformers') if name in sys.modules]\n"
        "print([tally.planned_shards, tally.done_before, tally.images, loaded])"
    )
    path = write_config(mixed / "again.yaml", config)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[0, 3, 0, []]", done.stderr
    after = {
        p: p.stat().st_mtime_ns for f in ("embeddings", "commits") for p in (mixed / "out" / f).iterdir()
    }
    assert after == before
    assert leftovers(mixed / "out") == []


def test_another_checkpoint_is_refused_and_named(mixed):
    config = make_config(mixed / "in", "cvt-tiny-random", mixed / "out")
    with pytest.raises(FingerprintError, match=r"weights_sha256: the output has .*, now "):
        run(config)


def test_another_column_choice_is_refused_and_named(mixed, tiny_model):
    config = make_config(mixed / "in", tiny_model, mixed / "out", output__logits=2)
    with pytest.raises(FingerprintError, match=r'columns.logits: the output has "full", now 2'):
        run(config)


@pytest.mark.slow
def test_another_precision_is_refused_and_auto_means_the_outputs_own(mixed, tiny_model, tmp_path):
    shutil.copytree(mixed, tmp_path / "copy")
    folder = tmp_path / "copy"
    with pytest.raises(FingerprintError, match=r'precision: the output has "float32", now "bfloat16"'):
        run(make_config(mixed / "in", tiny_model, folder / "out", model__precision="bfloat16"))
    other = tmp_path / "other"
    write_mixed(tmp_path / "few", 3)
    run(make_config(tmp_path / "few", tiny_model, other, model__precision="bfloat16"))
    (tmp_path / "few/new.png").write_bytes(encode(make_image(99)))
    tally = run(make_config(tmp_path / "few", tiny_model, other, model__precision="auto"))
    assert (tally.images, tally.done_before, len(ids_of(other))) == (1, 1, 4)


@pytest.fixture(scope="module")
def choices(mixed, tiny_model):
    """Six of the mixed images, for outputs with other columns."""
    folder = mixed / "six"
    for name in ids_of(mixed / "out")[:6]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(mixed / "in" / name, folder / name)
    return folder


@pytest.mark.slow
def test_logits_none_leaves_labels_and_cls_token_gives_the_raw_token(
    choices, tiny_model, tmp_path, mixed_reference
):
    run(make_config(choices, tiny_model, tmp_path, output__logits="none", model__embedding="cls_token"))
    rows = rows_of(tmp_path)
    assert "logits" not in rows[0]
    assert rows[0]["label"].startswith("class-")
    assert np.abs(np.array([row["embedding"] for row in rows]) - mixed_reference[2][:6]).max() < 1e-4


def test_logits_k_in_float16_gives_the_k_largest(choices, tiny_model, tmp_path, mixed_reference):
    run(make_config(choices, tiny_model, tmp_path, output__logits=3, output__dtype="float16"))
    kinds = schema_of(tmp_path)
    assert kinds.field("embedding").type == pa.list_(pa.float16(), 48)
    assert kinds.field("top_ids").type == pa.list_(pa.int32(), 3)
    assert kinds.field("top_logits").type == pa.list_(pa.float16(), 3)
    assert "logits" not in kinds.names
    embeddings, logits, _ = mixed_reference
    rows = rows_of(tmp_path)
    order = np.argsort(-logits[:6], axis=1)[:, :3]
    assert [row["top_ids"] for row in rows] == order.tolist()
    wanted = np.take_along_axis(logits[:6], order, axis=1)
    assert np.allclose(np.array([row["top_logits"] for row in rows]), wanted, rtol=2e-3, atol=2e-3)
    found = np.array([row["embedding"] for row in rows], np.float64)
    assert np.allclose(found, embeddings[:6], rtol=2e-3, atol=2e-3)


def test_a_checkpoint_without_a_head_gives_no_label_columns(choices, tiny_model, tmp_path, mixed_reference):
    from transformers import CvtModel

    CvtModel.from_pretrained(tiny_model).save_pretrained(tmp_path / "headless")
    shutil.copy(tiny_model / "preprocessor_config.json", tmp_path / "headless")
    run(make_config(choices, tmp_path / "headless", tmp_path / "out"))
    found = schema_of(tmp_path / "out").names
    assert found == ["image_id", "shard", "key", "embedding", "width", "height", "format", "sha256"]
    embeddings = np.array([row["embedding"] for row in rows_of(tmp_path / "out")])
    assert np.abs(embeddings - mixed_reference[2][:6]).max() < 1e-4  # without a LayerNorm: the raw token


@pytest.mark.slow
def test_the_back_end_changes_no_result_and_the_fingerprint_does_not_know_it(mixed, tiny_model, tmp_path):
    out = tmp_path / "out"
    choices = {"model__backend": "torch", "compute__batch_size": "auto", "compute__shard_images": 25}
    run(make_config(mixed / "in", tiny_model, out, **choices))
    for ours, theirs in zip(rows_of(out), rows_of(mixed / "out"), strict=True):
        assert ours["image_id"] == theirs["image_id"]
        assert np.allclose(ours["embedding"], theirs["embedding"], atol=1e-5)
        assert np.allclose(ours["logits"], theirs["logits"], atol=1e-5)
    again = run(make_config(mixed / "in", tiny_model, out, compute__shard_images=25))
    assert (again.planned_shards, again.images) == (0, 0)


def test_a_checkpoint_of_the_original_authors_is_run_as_they_have_it(tmp_path, write_images):
    import torch

    from cvt_model import CvtForImageClassification, resolve_checkpoint

    names = write_images(tmp_path / "in", 3)
    weights = Path(__file__).parent / "goldens" / "microsoft" / "dw_bn.pth"
    run(make_config(tmp_path / "in", weights, tmp_path / "out"))
    processor = resolve_checkpoint(weights).processor
    pixels = np.stack([processor.to_pixels(Image.open(tmp_path / "in" / name)) for name in names])
    with torch.inference_mode():
        model = CvtForImageClassification.from_pretrained(weights)
        wanted = model(processor.normalize(torch.from_numpy(pixels))).logits.numpy()
    assert np.allclose([row["logits"] for row in rows_of(tmp_path / "out")], wanted, atol=1e-5)
    fingerprint = json.loads((tmp_path / "out" / "fingerprint.json").read_text())
    assert fingerprint["model_config"]["hidden_act"] == "quick_gelu"


@pytest.mark.slow
def test_weights_that_do_not_fit_their_config_are_told_with_the_remedy(tiny_model, tmp_path, write_images):
    from safetensors.torch import load_file, save_file

    write_images(tmp_path / "in", 2)
    shutil.copytree(tiny_model, tmp_path / "model")
    state = load_file(tiny_model / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.checkpoint: .*1 missing: layernorm\.weight"):
        run(make_config(tmp_path / "in", tmp_path / "model", tmp_path / "out"))
    assert leftovers(tmp_path / "out") == []


def test_loose_files_are_rows_or_rejects_whatever_their_names(tiny_model, tmp_path):
    folder = tmp_path / "in"
    for name in ("a.png", "sub dir/ö#1.jpg", "no-extension", "data.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(make_image(len(name))))
    (folder / "notes.txt").write_text("not an image")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(encode(make_image(1, (200, 200)), "JPEG")[:900])
    (folder / "nowhere.png").symlink_to(tmp_path / "gone")
    tally = run(make_config(folder, tiny_model, tmp_path / "out", input__format="images"))
    assert ids_of(tmp_path / "out") == ["a.png", "data.json", "no-extension", "sub dir/ö#1.jpg"]
    rejects = {row["image_id"]: row["reason"] for row in rows_of(tmp_path / "out", "rejects")}
    assert rejects == {
        "cut.jpg": "truncated",
        "empty.jpg": "empty",
        "notes.txt": "not_an_image",
        "nowhere.png": "unreadable",
    }
    assert (tally.images, tally.rejects) == (4, Counter(rejects.values()))
    for row in rows_of(tmp_path / "out", "rejects"):
        assert row["reason"] in REJECT_REASONS
        assert row["message"]


def test_webdataset_samples_have_documented_ids_keys_and_metadata(tiny_model, tmp_path):
    png = [encode(make_image(number)) for number in range(8)]
    write_tar(
        tmp_path / "in/sub/b.tar",
        [
            ("one.png", png[0]),
            ("one.json", b'{"n": 1}'),
            ("one.txt", b"caption"),
            ("two.left.png", png[1]),
            ("two.right.png", png[2]),
            ("dir/three.v2.jpg", encode(make_image(3), "JPEG")),
            ("one.png", png[4]),  # a second sample with the id of the first
            ("lonely.json", b"{}"),  # a sample without an image
            ("bad.png", b"junk"),
        ],
    )
    write_tar(tmp_path / "in/a.tar", [("one.png", png[5])])
    config = make_config(
        tmp_path / "in", tiny_model, tmp_path / "out", input__metadata_columns=["json", "txt"]
    )
    run(config)
    rows = {row["image_id"]: row for row in rows_of(tmp_path / "out")}
    assert sorted(rows) == [
        "a.tar#one",
        "sub/b.tar#dir/three",
        "sub/b.tar#one",
        "sub/b.tar#two.left.png",
        "sub/b.tar#two.right.png",
    ]
    one = rows["sub/b.tar#one"]
    assert (one["shard"], one["key"], one["json"], one["txt"]) == (
        "sub/b.tar",
        "one",
        '{"n": 1}',
        "caption",
    )
    assert one["sha256"] == hashlib.sha256(png[0]).digest()
    assert rows["a.tar#one"]["json"] is None
    assert rows["sub/b.tar#two.left.png"]["key"] == "two.left.png"
    assert schema_of(tmp_path / "out").names[-2:] == ["json", "txt"]
    rejects = {row["image_id"]: row["reason"] for row in rows_of(tmp_path / "out", "rejects")}
    assert rejects == {
        "sub/b.tar#one": "duplicate_id",
        "sub/b.tar#lonely": "no_image",
        "sub/b.tar#bad": "not_an_image",
    }


def test_parquet_rows_have_documented_ids_and_keep_metadata_types(tiny_model, tmp_path):
    (tmp_path / "in").mkdir()
    images = [{"bytes": encode(make_image(n)), "path": f"{n}.png"} for n in range(5)]
    images[3] = {"bytes": None, "path": "elsewhere.png"}
    columns = {
        "image": images,
        "score_of_theirs": [0.5, 1.5, None, 3.5, 4.5],
        "tags": [["a"], [], None, ["b"], ["c"]],
    }
    pq.write_table(pa.table(columns), tmp_path / "in/p.parquet", row_group_size=2)
    config = make_config(tmp_path / "in", tiny_model, tmp_path / "out", input__metadata_columns="all")
    run(config)
    rows = rows_of(tmp_path / "out")
    assert [row["image_id"] for row in rows] == [f"p.parquet#{n}" for n in (0, 1, 2, 4)]
    assert [row["score_of_theirs"] for row in rows] == [0.5, 1.5, None, 4.5]
    assert [row["tags"] for row in rows] == [["a"], [], None, ["c"]]
    assert schema_of(tmp_path / "out").field("score_of_theirs").type == pa.float64()
    (reject,) = rows_of(tmp_path / "out", "rejects")
    assert (reject["image_id"], reject["reason"]) == ("p.parquet#3", "no_image")


@pytest.mark.slow
def test_parquet_id_column_gives_the_ids(tiny_model, tmp_path):
    data = [encode(make_image(n)) for n in range(3)]
    pq.write_table(pa.table({"uid": [70, 71, 70], "picture": data}), tmp_path / "p.parquet")
    config = make_config(tmp_path / "p.parquet", tiny_model, tmp_path / "out", input__id_column="uid")
    run(config)
    assert ids_of(tmp_path / "out") == ["70", "71"]
    assert [row["reason"] for row in rows_of(tmp_path / "out", "rejects")] == ["duplicate_id"]


def test_a_manifests_images_are_called_by_their_uris(tiny_model, tmp_path, write_images):
    write_images(tmp_path / "pictures", 4)
    uris = [str(tmp_path / "pictures/000.png"), "pictures/001.png", "pictures/gone.png", "pictures/002.png"]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "rating", "who"])
        writer.writerows([[uri, number, f"w{number}"] for number, uri in enumerate(uris)])
    config = make_config(
        tmp_path / "list.csv", tiny_model, tmp_path / "out", input__metadata_columns=["rating"]
    )
    run(config)
    assert ids_of(tmp_path / "out") == sorted([uris[0], uris[1], uris[3]])
    assert {row["image_id"]: row["rating"] for row in rows_of(tmp_path / "out")} == {
        uris[0]: 0,
        uris[1]: 1,
        uris[3]: 3,
    }
    assert schema_of(tmp_path / "out").names[-1] == "rating"
    assert [row["image_id"] for row in rows_of(tmp_path / "out", "rejects")] == ["pictures/gone.png"]


def test_only_new_and_changed_images_are_done_again(tiny_model, tmp_path, write_images):
    write_images(tmp_path / "in", 12)
    config = make_config(tmp_path / "in", tiny_model, tmp_path / "out", compute__shard_images=6)
    assert run(config).images == 12
    first = {row["image_id"]: row for row in rows_of(tmp_path / "out")}
    (tmp_path / "in/new.png").write_bytes(encode(make_image(500)))
    (tmp_path / "in/003.png").write_bytes(encode(make_image(501, (70, 70))))
    tally = run(config)
    assert (tally.images, tally.planned_shards, tally.done_before) == (2, 2, 1)
    rows = {row["image_id"]: row for row in rows_of(tmp_path / "out")}
    assert ids_of(tmp_path / "out") == sorted([*first, "new.png"])
    assert rows["003.png"]["width"] == 70
    assert rows["002.png"] == first["002.png"]
    assert leftovers(tmp_path / "out") == []
    assert run(config).planned_shards == 0


@pytest.mark.slow
def test_a_changed_shard_replaces_its_rows_and_a_cut_one_is_left_out_until_mended(tiny_model, tmp_path):
    def members(start):
        return [(f"{n:03d}.png", encode(make_image(n, (64, 64)))) for n in range(start, start + 20)]

    for number in range(3):
        write_tar(tmp_path / f"in/{number}.tar", members(100 * number))
    whole = (tmp_path / "in/1.tar").read_bytes()
    (tmp_path / "in/1.tar").write_bytes(whole[: len(whole) * 6 // 10])
    config = make_config(tmp_path / "in", tiny_model, tmp_path / "out", compute__batch_size=4)
    tally = run(config)
    assert list(tally.failed_shards) == ["1.tar"]
    assert "end" in tally.failed_shards["1.tar"] or "cut" in tally.failed_shards["1.tar"]
    assert {name.split("#")[0] for name in ids_of(tmp_path / "out")} == {"0.tar", "2.tar"}
    assert tally.images == len(ids_of(tmp_path / "out")) == 40
    assert leftovers(tmp_path / "out") == []
    (tmp_path / "in/1.tar").write_bytes(whole)
    write_tar(tmp_path / "in/2.tar", members(900))
    tally = run(config)
    assert (tally.images, tally.failed_shards, tally.done_before) == (40, {}, 1)
    wanted = [
        f"{n // 100 if n < 900 else 2}.tar#{n:03d}"
        for n in (*range(20), *range(100, 120), *range(900, 920))
    ]
    assert ids_of(tmp_path / "out") == sorted(wanted)
    assert len(list((tmp_path / "out/commits").iterdir())) == 3
    assert leftovers(tmp_path / "out") == []


def test_too_many_rejects_stop_the_run_and_a_raised_limit_lets_it_end(tiny_model, tmp_path, write_images):
    write_images(tmp_path / "in", 3)
    for number in range(7):
        (tmp_path / f"in/bad{number}.jpg").write_bytes(b"junk")
    few = make_config(tmp_path / "in", tiny_model, tmp_path / "a")
    tally = run(few)
    assert "7 of 10 samples were rejected" in tally.stopped
    assert "limits.max_reject_fraction = 0.5" in tally.stopped
    raised = make_config(tmp_path / "in", tiny_model, tmp_path / "b", limits__max_reject_fraction=0.7)
    assert run(raised).stopped == ""


def test_relative_paths_mean_the_drivers_folder_and_not_the_workers(
    tiny_model, tmp_path, write_images, monkeypatch
):
    write_images(tmp_path / "in", 3)
    shutil.copytree(tiny_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    tally = run(make_config("in", "model", "out"))
    assert tally.images == 3
    assert len(ids_of(tmp_path / "out")) == 3


@pytest.mark.slow
def test_a_broken_shard_whose_name_is_not_utf_8_is_named_in_the_report(tiny_model, tmp_path):
    write_tar(tmp_path / "in/good.tar", [("a.png", encode(make_image(0)))])
    with open(os.fsencode(str(tmp_path / "in")) + b"/bad\xff.tar", "wb") as file:  # noqa: PTH123
        file.write(b"x" * 2000)
    tally = run(make_config(tmp_path / "in", tiny_model, tmp_path / "out"))
    assert len(tally.failed_shards) == 1
    assert ids_of(tmp_path / "out") == ["good.tar#a"]
    assert len(list((tmp_path / "out/reports").iterdir())) == 2


@pytest.mark.parametrize("layout", [pytest.param("images", marks=pytest.mark.slow), "auto"])
def test_an_output_inside_the_input_folder_is_no_input(layout, tiny_model, tmp_path, write_images):
    write_images(tmp_path / "in", 4)
    config = make_config(tmp_path / "in", tiny_model, tmp_path / "in/out", input__format=layout)
    assert run(config).images == 4
    tally = run(config)
    assert (tally.planned_shards, tally.done_before, tally.rejects.total()) == (0, 1, 0)
    assert len(ids_of(tmp_path / "in/out")) == 4


def test_a_clean_up_that_fails_is_a_warning_and_gives_the_lease_back(tmp_path, monkeypatch, caplog):
    output = Storage(str(tmp_path))
    lease = acquire(output, "mine", 120)

    def refuse(self, path):
        raise StorageError(f"storage failed at {path}: no")

    monkeypatch.setattr(Storage, "delete_folder", refuse)
    _leave(output, "mine", lease)

    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == "storage failed at _staging/mine: no; the next run deletes what is left"
    assert list((tmp_path / "lease").iterdir()) == []


def test_a_run_whose_lease_was_taken_over_leaves_the_new_holders_parts(tiny_model, tmp_path, write_images):
    """As after a machine that slept: another run holds the output, and works in _staging."""
    write_images(tmp_path / "in", 8)
    out = tmp_path / "out"
    config = make_config(tmp_path / "in", tiny_model, out, compute__shard_images=2, compute__batch_size=2)
    theirs = out / "_staging/another-run/part.parquet"

    def take_over(tally):
        (held,) = (out / "lease").iterdir()
        if held.name == "00000001.json":
            holder = json.loads(held.read_text())
            (out / "lease/00000002.json").write_text(json.dumps({**holder, "run": "another-run"}))
            held.unlink()
            theirs.parent.mkdir(parents=True)
            theirs.write_bytes(b"a part of the new holder")

    with pytest.raises(BusyError, match="taken over"):
        extract(config, stop=Stop(), on_progress=take_over, started=0.0)
    assert theirs.exists()
    assert (out / "lease/00000002.json").exists()


def test_what_a_killed_runs_workers_write_late_is_gone_at_the_end(tiny_model, tmp_path, write_images):
    write_images(tmp_path / "in", 4)
    late = tmp_path / "out/_staging/killed-run/late.arrow"

    def write_late(tally):
        late.parent.mkdir(parents=True, exist_ok=True)
        late.write_bytes(b"from a worker that outlived its driver for a moment")

    config = make_config(tmp_path / "in", tiny_model, tmp_path / "out")
    assert extract(config, stop=Stop(), on_progress=write_late, started=0.0).images == 4
    assert leftovers(tmp_path / "out") == []


def test_an_index_that_is_being_built_survives_the_end_of_a_run(mixed, tiny_model, tmp_path):
    """`index` holds no lease: a run must not delete what it is writing."""
    shutil.copytree(mixed / "out", tmp_path / "out")
    with Storage(str(tmp_path / "out")).replacing("index/version/index.faiss") as local:
        local.write_bytes(b"half of it")
        run(make_config(mixed / "in", tiny_model, tmp_path / "out", compute__shard_images=25))
        with local.open("ab") as file:
            file.write(b" and the rest")
    assert (tmp_path / "out/index/version/index.faiss").read_bytes() == b"half of it and the rest"


@pytest.mark.slow
def test_a_link_that_leads_to_itself_is_a_reject_and_costs_no_other_image(
    tiny_model, tmp_path, write_images
):
    write_images(tmp_path / "in", 2)
    (tmp_path / "in/loop.png").symlink_to("loop.png")
    run(make_config(tmp_path / "in", tiny_model, tmp_path / "out"))
    assert ids_of(tmp_path / "out") == ["000.png", "001.png"]
    assert [row["reason"] for row in rows_of(tmp_path / "out", "rejects")] == ["unreadable"]


def test_a_file_that_may_not_be_read_is_a_reject_and_costs_no_other_image(
    tmp_path, write_images, monkeypatch
):
    from pipeline.read_images import read_samples
    from pipeline.samples import ReadOptions
    from pipeline.shards import Member, Shard, Work

    names = write_images(tmp_path, 3)
    honest = Path.open

    def refusing(path, *arguments, **options):
        if path.name == "001.png":
            raise PermissionError(13, "Permission denied", path)
        return honest(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    members = tuple(Member(name, 1, "") for name in names)
    shard = Shard("images-x", f"file://{tmp_path}", "images", members=members)
    samples = read_samples(Work(shard, "stem"), ReadOptions(chunk_images=2, max_image_bytes=10**6))
    assert [(sample.key, sample.reason) for sample in samples] == [
        ("000.png", None),
        ("001.png", "unreadable"),
        ("002.png", None),
    ]


def test_a_file_that_vanishes_after_the_listing_is_a_reject(
    tiny_model, tmp_path, write_images, monkeypatch
):
    """Between plan and read; nothing else suffers."""
    from pipeline import extract as module

    write_images(tmp_path / "in", 3)
    honest = module.make_plan

    def late(prepared):
        plan = honest(prepared)
        (tmp_path / "in/001.png").unlink()
        return plan

    monkeypatch.setattr(module, "make_plan", late)
    tally = run(make_config(tmp_path / "in", tiny_model, tmp_path / "out"))
    assert ids_of(tmp_path / "out") == ["000.png", "002.png"]
    assert dict(tally.rejects) == {"unreadable": 1}
