"""Labelled sources of every layout become samples that can be had by number."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cvt_model.image_processor import CvtImageProcessor
from pipeline.errors import ConfigError, InputError, LimitError
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.sample_set import open_samples
from pipeline.finetune.sources import list_sources, prepare, stems_of
from pipeline.index.tasks import in_this_process
from pipeline.storage import Storage
from tests.labelled_images import (
    CLASSES,
    NETWORK,
    PREPROCESSING,
    picture,
    pictures,
    write_folders,
    write_parquet,
    write_webdataset,
)
from tests.running import write_tar

PROCESSOR = CvtImageProcessor.from_dict(PREPROCESSING)


def configure(source, output, **sections):
    values = {
        "input": {"uri": str(source), **sections.pop("input", {})},
        "model": {"config": NETWORK, "preprocessing": PREPROCESSING},
        "output": {"uri": str(output)},
        "validation": {"fraction": 0.25},
    }
    return FinetuneConfig.model_validate({**values, **sections})


def prepared(config):
    """The samples of a configuration's sources: what was found, and both parts."""
    output = Storage(config.output.uri)
    sources = list_sources(config, PROCESSOR, output)
    found = prepare(sources, output, in_this_process, config, lambda done, total: None)
    stems = stems_of(sources, found)
    parts = open_samples(output, stems, found.classes).values()
    return found, *parts


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_folders(folder / "in", 40),
        lambda folder: write_parquet(folder / "in" / "a.parquet", 40),
        lambda folder: write_webdataset(folder / "in" / "a.tar", 40),
        lambda folder: write_webdataset(folder / "in" / "a.tar", 40, labels_last=True),
    ],
    ids=["folders", "parquet", "webdataset", "labels after the images"],
)
def test_every_layout_gives_the_same_images_with_their_labels(tmp_path, write):
    config = configure(write(tmp_path), tmp_path / "out")
    found, train, validation = prepared(config)
    assert found.classes == list(CLASSES)
    assert not found.rejects
    originals = {data: CLASSES.index(label) for label, data in pictures(40)}
    pixels = {
        PROCESSOR.to_pixels(Image.open(io.BytesIO(data)).convert("RGB")).tobytes(): label
        for data, label in originals.items()
    }
    seen = {bytes(train.data(n)): int(train.labels[n]) for n in range(len(train))}
    judged = {bytes(validation.data(n)): int(validation.labels[n]) for n in range(len(validation))}
    assert len(seen) + len(judged) == 40
    assert seen.items() <= originals.items()
    assert judged.items() <= pixels.items()
    assert 3 <= len(judged) <= 20


def test_an_image_stays_on_its_side_when_others_come(tmp_path):
    few, _, before = prepared(configure(write_folders(tmp_path / "in", 30), tmp_path / "out"))
    more, _, after = prepared(configure(write_folders(tmp_path / "in", 60), tmp_path / "other"))
    assert few.classes == more.classes
    sides = [{bytes(part.data(n)) for n in range(len(part))} for part in (before, after)]
    assert sides[0] <= sides[1]


def test_a_validation_source_of_its_own_is_only_judged_by(tmp_path):
    config = configure(
        write_folders(tmp_path / "in", 30),
        tmp_path / "out",
        validation={"uri": str(write_parquet(tmp_path / "test.parquet", 12, seed=9))},
    )
    _, train, validation = prepared(config)
    assert (len(train), len(validation)) == (30, 12)


def test_what_was_prepared_is_not_prepared_again(tmp_path, monkeypatch):
    config = configure(write_folders(tmp_path / "in", 12), tmp_path / "out", validation={"fraction": 0.5})
    prepared(config)
    monkeypatch.setattr("pipeline.finetune.sources.prepare_shard", lambda *_: pytest.fail("again"))
    prepared(config)


@pytest.mark.parametrize(
    ("limit", "low", "high"), [("max_pixels", 1000, 9000), ("max_image_bytes", 3000, 30_000)]
)
def test_a_limit_that_is_another_now_decides_anew(tmp_path, monkeypatch, limit, low, high):
    folder = write_folders(tmp_path / "in", 30)
    picture(CLASSES[0], np.random.default_rng(0)).resize((60, 60)).save(folder / "rows" / "large.png")

    def num_rejects(limits):
        return prepared(configure(folder, tmp_path / "out", limits=limits))[0].rejects.total()

    assert num_rejects({limit: low}) == 1
    assert num_rejects({limit: high}) == 0
    assert num_rejects({limit: low}) == 1, "or the training would meet it"
    assert num_rejects({limit: high}) == 0
    monkeypatch.setattr("pipeline.finetune.sources.prepare_shard", lambda *_: pytest.fail("again"))
    assert num_rejects({limit: 2 * high}) == 0


def test_images_that_cannot_be_used_are_counted_and_left_out(tmp_path, caplog):
    folder = write_folders(tmp_path / "in", 30)
    (folder / "rows" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    (folder / "no-label.png").write_bytes(pictures(1)[0][1])
    found, train, validation = prepared(configure(folder, tmp_path / "out"))
    assert dict(found.rejects) == {"truncated": 1, "no_label": 1} or found.rejects.total() == 2
    assert len(train) + len(validation) == 30
    assert "rows/broken.png" in caplog.text
    assert "no-label.png" in caplog.text


def test_too_many_rejects_end_it(tmp_path):
    folder = write_folders(tmp_path / "in", 6)
    for number in range(10):
        (folder / "rows" / f"broken{number}.png").write_bytes(b"not an image")
    with pytest.raises(LimitError, match="10 of 16 images"):
        prepared(configure(folder, tmp_path / "out"))


def test_a_shard_that_is_cut_off_is_left_out_by_name(tmp_path):
    write_webdataset(tmp_path / "in" / "a.tar", 30)
    whole = write_webdataset(tmp_path / "in" / "b.tar", 30, seed=1).read_bytes()
    (tmp_path / "in" / "b.tar").write_bytes(whole[: len(whole) // 2])
    found, train, validation = prepared(configure(tmp_path / "in", tmp_path / "out"))
    assert [text.partition(":")[0] for text in found.failed_shards.values()] == ["b.tar"]
    assert len(train) + len(validation) == 30
    assert not list((tmp_path / "out" / "samples").glob("b.tar*"))


def test_where_no_shard_can_be_read_their_failures_are_told(tmp_path):
    good = write_folders(tmp_path / "good", 12)
    (tmp_path / "bad").mkdir()
    for name in ("a.tar", "b.tar"):
        (tmp_path / "bad" / name).write_bytes(b"not an archive" * 100)
    with pytest.raises(InputError, match=r"to learn from; .* cannot be read: 2 \(a\.tar: .*; b\.tar: "):
        prepared(configure(tmp_path / "bad", tmp_path / "out"))
    config = configure(good, tmp_path / "other", validation={"uri": str(tmp_path / "bad")})
    with pytest.raises(InputError, match=r"to judge by; .* cannot be read: 2 \(a\.tar: "):
        prepared(config)


def test_numbers_are_classes_by_value_or_by_the_names_that_the_file_tells(tmp_path):
    table = pq.read_table(write_parquet(tmp_path / "plain.parquet", 33))
    numbers = pa.array([(0, 2, 10)[CLASSES.index(label)] for label in table["label"].to_pylist()])
    pq.write_table(table.set_column(1, "label", numbers), tmp_path / "plain.parquet")
    found, *_ = prepared(configure(tmp_path / "plain.parquet", tmp_path / "out1"))
    assert found.classes == ["0", "2", "10"]
    features = {"label": {"names": list("kjihgfedcba"), "_type": "ClassLabel"}}
    named = table.set_column(1, "label", numbers).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(named, tmp_path / "named.parquet")
    found, *_ = prepared(configure(tmp_path / "named.parquet", tmp_path / "out2"))
    assert found.classes == ["k", "i", "a"], "in the order of their numbers"


def test_what_the_file_calls_no_label_and_what_lies_in_hidden_folders_has_no_label(tmp_path):
    table = pq.read_table(write_parquet(tmp_path / "a.parquet", 33))
    labels = [CLASSES.index(label) for label in table["label"].to_pylist()]
    labels[-5:] = [-1] * 5
    features = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    schema = {"huggingface": json.dumps({"info": {"features": features}})}
    named = table.set_column(1, "label", pa.array(labels)).replace_schema_metadata(schema)
    pq.write_table(named, tmp_path / "a.parquet")
    folder = write_folders(tmp_path / "in", 33)
    for hidden in (".ipynb_checkpoints", "rows/.ipynb_checkpoints"):
        (folder / hidden).mkdir()
        (folder / hidden / "a.png").write_bytes(pictures(1)[0][1])
    for source, num_rejects in ((tmp_path / "a.parquet", 5), (folder, 2)):
        found, *_ = prepared(configure(source, tmp_path / f"out{num_rejects}"))
        assert found.classes == list(CLASSES)
        assert found.rejects == {"no_label": num_rejects}


def test_a_missing_label_column_is_named_with_those_there_are(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", 6)
    config = configure(source, tmp_path / "out", input={"label_column": "species"})
    with pytest.raises(ConfigError, match=r"input\.label_column: .* has no column species; .*image, label"):
        prepared(config)


@pytest.mark.parametrize(
    ("labels", "message"),
    [({"rows": 4}, "two are needed"), ({}, "no image has a label")],
    ids=["one class", "none"],
)
def test_too_few_classes_are_refused(tmp_path, labels, message):
    data = [data for _, data in pictures(4)]
    names = [name for name, count in labels.items() for _ in range(count)] or [None] * 4
    members = []
    for number, (name, image) in enumerate(zip(names, data, strict=True)):
        members.append((f"{number}.png", image))
        if name:
            members.append((f"{number}.cls", name.encode()))
    write_tar(tmp_path / "in" / "a.tar", members)
    limits = {"max_reject_fraction": 1.0}
    with pytest.raises(InputError, match=message):
        prepared(configure(tmp_path / "in", tmp_path / "out", limits=limits, validation={"fraction": 0.1}))


def test_numbers_of_a_part_reach_over_files_and_batches(tmp_path):
    for name in "abc":
        write_parquet(tmp_path / "in" / f"{name}.parquet", 300, seed=ord(name))
    found, train, validation = prepared(configure(tmp_path / "in", tmp_path / "out"))
    every = {data: label for name in "abc" for label, data in pictures(300, seed=ord(name))}
    for number in np.random.default_rng(0).choice(len(train), 100, replace=False).tolist():
        assert every[bytes(train.data(number))] == found.classes[train.labels[number]]
    assert len(train) + len(validation) == 900
