"""`bench`: what is measured alone, and what figures are made of it. Nothing here asks how fast it is."""

import json
import re
import signal
import statistics
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from cvt_model.checkpoint import resolve_checkpoint
from cvt_model.image_file import open_image
from jobs.bench import bench
from pipeline import schema
from pipeline.bench import corpus, ground, whole
from pipeline.bench.corpus import Photograph, as_jpegs, load_photographs, write_tars
from pipeline.bench.decoding import NUM_PASSES, Decoding
from pipeline.bench.ground import MODES, WholeBench
from pipeline.bench.hub_pipeline import refuse_others
from pipeline.bench.inputs import Unavailable
from pipeline.bench.one_run import environment, run_extract
from pipeline.bench.processes import usable_cores
from pipeline.bench.stages import read, read_seconds, run_model, write_seconds
from pipeline.bench.whole import bench_whole
from pipeline.bench.whole_figures import TAR_IMAGES, Round, ceiling, figures, images_for_a_run
from pipeline.bench.whole_report import HEADINGS, markdown
from pipeline.decode import DecodeOptions
from pipeline.embed import EmbedOptions
from pipeline.errors import ConfigError, PipelineError
from pipeline.samples import ReadOptions
from pipeline.storage import Storage
from tests.conftest import encode, make_image
from tests.running import CLI, make_config

READ = ReadOptions(chunk_images=4, max_image_bytes=10**9)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Batch sizes measured in tests are not remembered for anybody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def make_photographs(count, size=(300, 240)):
    return [Photograph(".jpg", encode(make_image(number, size), "JPEG")) for number in range(count)]


def ids(chunks):
    return [
        name for chunk in chunks for name in schema.unpack(chunk.column("rows")[0])["image_id"].to_pylist()
    ]


# --- the corpus


def test_tars_repeat_the_photographs_in_turn_and_take_no_more_disk_for_it(tmp_path):
    photographs = make_photographs(7)
    tars = write_tars(tmp_path / "tars", photographs, 3 * TAR_IMAGES * 7 + 5)
    assert len(tars) == 22
    assert len({tar.stat().st_ino for tar in tars}) == 8, "seven contents and a shorter last one"
    chunks = read(tars, ReadOptions(TAR_IMAGES, 10**9))
    assert len(set(ids(chunks))) == len(ids(chunks)) == 3 * TAR_IMAGES * 7 + 5
    data = [d for chunk in chunks for d in schema.unpack(chunk.column("rows")[0])["data"].to_pylist()]
    assert data == [photographs[number % 7].data for number in range(len(data))]


def test_photographs_are_taken_from_all_of_a_folder_and_what_does_not_decode_is_left_out(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(corpus, "MAX_PHOTOGRAPHS", 5)
    for number in range(10):
        path = tmp_path / f"class-{number // 5}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(make_image(number)) if number != 4 else b"no image")
    (tmp_path / "notes.txt").write_text("not looked at")
    found = load_photographs(tmp_path)
    assert [photo.data for photo in found] == [encode(make_image(number)) for number in (0, 2, 6, 8)]
    assert "4.png" in caplog.text
    assert "notes" not in caplog.text


def test_large_photographs_are_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_PIXELS", 2 * 48 * 40)
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(encode(make_image(number)))
    assert len(load_photographs(tmp_path)) == 3


def test_without_a_folder_there_are_photographs_of_the_usual_size():
    found = load_photographs(None)
    assert len(found) == len(corpus.PHOTOGRAPH_FILES)
    assert {open_image(photo.data, None).image_rgb.size for photo in found} <= {(500, 375), (375, 500)}


def test_large_copies_are_jpegs_that_stand_as_their_originals_do():
    wide, tall = (Photograph(".png", encode(make_image(0, size))) for size in ((60, 40), (40, 60)))
    copies = [open_image(copy.data, None) for copy in as_jpegs([wide, tall], (400, 300))]
    assert [(copy.width, copy.height, copy.format) for copy in copies] == [
        (400, 300, "JPEG"),
        (300, 400, "JPEG"),
    ]


@pytest.mark.parametrize("content", ["absent", "empty", "damaged"])
def test_a_folder_without_images_is_refused(tmp_path, content):
    folder = tmp_path / content
    if content != "absent":
        folder.mkdir()
    if content == "damaged":
        (folder / "0.jpg").write_bytes(b"no image")
    with pytest.raises(ConfigError, match="--images: "):
        load_photographs(folder)


# --- the stages


def test_every_stage_is_handed_what_the_one_before_it_made(tiny_model, tmp_path):
    photographs = as_jpegs(make_photographs(6), (400, 300))
    tars = write_tars(tmp_path / "tars", photographs, 6)
    assert min(read_seconds(tars, READ)) > 0
    checkpoint = resolve_checkpoint(str(tiny_model))
    chunks = read(tars, READ)
    assert [len(ids([chunk])) for chunk in chunks] == [4, 2]
    decodings = {
        mode: Decoding(chunks, checkpoint.processor, DecodeOptions(10**8, 60, mode == "fast"))
        for mode in MODES
    }
    found = run_model(embed_options(checkpoint), 4, decodings, "exact")
    assert ids(found.chunks) == ids(chunks)
    assert min(found.images_per_s) > 0
    assert len(found.cosines) == 6
    assert 0.9 < min(found.cosines) < max(found.cosines) < 1 - 1e-9, "fast pixels are others"
    assert 0 < found.pixel_difference < 10
    same = {"exact": decodings["exact"], "fast": decodings["exact"]}
    assert run_model(embed_options(checkpoint), 4, same, "exact").pixel_difference == 0
    output = tmp_path / "written"
    assert len(write_seconds(found.chunks, output)) == NUM_PASSES
    (file,) = Storage(str(output)).find("_staging/bench/embeddings")
    rows = schema_rows(output / file.path)
    assert [row["image_id"] for row in rows] == ids(chunks)
    assert np.linalg.norm(rows[0]["embedding"]) > 0


def embed_options(checkpoint):
    return EmbedOptions(
        checkpoint=checkpoint.source,
        weights_sha256=checkpoint.weights_sha256,
        precision="float32",
        backend="torch",
        batch_size=2,
        embedding="pooled",
        logits="full",
        dtype="float32",
        num_threads=1,
    )


def schema_rows(path):
    import pyarrow.parquet as pq

    return pq.read_table(path, partitioning=None).to_pylist()


# --- the run and the rival


def test_a_run_is_on_this_machine_and_by_its_config_alone(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
    monkeypatch.setenv("CVT_PIPELINE__MODEL__PRECISION", "bfloat16")
    monkeypatch.setenv("KEPT", "1")
    env = environment(3)
    assert not [name for name in env if name.startswith(("RAY_ADDRESS", "CVT_PIPELINE__"))]
    assert json.loads(env["RAY_OVERRIDE_RESOURCES"]) == {"CPU": 3}
    assert env["KEPT"] == "1"


def test_a_run_that_fails_says_why(tmp_path):
    config = make_config(tmp_path / "nothing-here", "cvt-tiny-random", tmp_path / "output")
    with pytest.raises(PipelineError, match=r"(?s)exit code 2:.*nothing-here"):
        run_extract(config, tmp_path, environment(1))


def test_what_transformers_cannot_compute_is_no_rival(tiny_model):
    checkpoint = resolve_checkpoint(str(tiny_model))
    refuse_others(checkpoint)
    with pytest.raises(Unavailable, match="CLS token"):
        refuse_others(resolve_checkpoint("cvt-tiny-random"))
    quick = replace(checkpoint, config=checkpoint.config.model_copy(update={"hidden_act": "quick_gelu"}))
    with pytest.raises(Unavailable, match="quick_gelu"):
        refuse_others(quick)


# --- the figures


def test_on_a_cpu_times_add_and_on_a_gpu_the_slower_one_limits():
    assert ceiling(60, 30, on_gpu=False) == pytest.approx(20)
    assert ceiling(60, 30, on_gpu=True) == 30


def test_a_run_lasts_half_a_minute_in_whole_tars():
    assert images_for_a_run(0.1) == 240
    assert images_for_a_run(15) == 480
    assert images_for_a_run(1e9) == 100_020


def seen(run, decode=60.0, rival=None):
    """A round that found these speeds."""
    one = Round()
    one.speeds["decode_images_per_s"] = [decode, decode - 10, decode + 30]
    one.speeds["model_images_per_s"] = [30.0]
    one.note_ceiling(on_gpu=False)
    one.note_run(run)
    if rival:
        one.note_rival(rival)
    one.facts["startup_s"] = run / 2
    return one


def test_figures_are_medians_over_rounds_and_ratios_are_of_one_round():
    found = figures([seen(10.0, rival=[2.0, 5.0, 4.0]), seen(18.0, rival=[6.0]), seen(16.0, decode=30.0)])
    assert found["decode_images_per_s"] == 60 == statistics.median([60, 50, 90] * 2 + [30, 20, 60])
    assert (found["decode_images_per_s_min"], found["decode_images_per_s_max"]) == (20, 90)
    assert found["run_images_per_s"] == 16
    assert found["fraction_of_ceiling"] == pytest.approx(0.9)  # of 10/20, 18/20 and 16/15
    assert found["ratio_pipeline"] == pytest.approx(2.75)  # of 10/4 and 18/6
    assert found["ceiling_images_per_s"] == pytest.approx(20)
    assert found["startup_s"] == 8
    assert found["write_images_per_s"] is found["decode_ratio_fast"] is None


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        (("--decode", "sideways"), "--decode: found 'sideways'"),
        (("--precision", "int8"), "--precision: found 'int8'"),
        (("--threads", "4096"), "--threads: 4096"),
        (("--images", "/nowhere"), "--images: /nowhere"),
        (("--folder", "/nowhere"), "--folder: /nowhere"),
        (("--checkpoint", "/nowhere"), "/nowhere"),
        (("--json", "--markdown"), "--json or --markdown"),
        (("--threads", "1", "model", "--checkpoint", "x", "--batch-size", "1"), "--threads: .*bench model"),
    ],
)
def test_arguments_that_name_nothing_are_refused(words, mention):
    done = CliRunner().invoke(bench, words)
    assert isinstance(done.exception, ConfigError)
    assert re.search(mention, str(done.exception))
    assert done.stdout == ""


# --- all of it


@pytest.fixture(scope="module")
def found(tiny_model, tmp_path_factory):
    """What the command prints of a tiny model on two cores, rival and all."""
    pytest.importorskip("openvino")
    folder, images = tmp_path_factory.mktemp("bench"), tmp_path_factory.mktemp("images")
    for number, photo in enumerate(make_photographs(9)):
        (images / f"{number}.jpg").write_bytes(photo.data)
    words = ["--checkpoint", tiny_model, "--images", images, "--folder", folder, "--num-images", 64]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ground, "RIVAL_S", 0.0)
        done = CliRunner().invoke(bench, [*map(str, words), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert list(folder.iterdir()) == [], "nothing is left behind"
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_documented_names_are_there_and_fit_together(found):
    documented = whole.__doc__ or ""
    names = re.findall(r"^((?:\w+, )*\w+)(?:  |$)", documented, re.MULTILINE)
    assert len(names) > 15
    for name in ", ".join(names).split(", "):
        assert found[name], name
    assert (found["num_images"], found["num_photographs"], found["rounds"]) == (64, 9, 1)
    assert (found["precision"], found["decode"], found["weights"]) == (
        "float32",
        "exact",
        "of the checkpoint",
    )
    assert found["hardware"]["threads"] == len(usable_cores())
    run, decode, model = (found[f"{name}_images_per_s"] for name in ("run", "decode", "model"))
    assert found["ceiling_images_per_s"] == pytest.approx(1 / (1 / decode + 1 / model))
    assert found["fraction_of_ceiling"] == pytest.approx(run / found["ceiling_images_per_s"])
    assert found["ratio_pipeline"] == pytest.approx(run / found["pipeline_images_per_s"])
    assert found["decode_images_per_s_min"] <= decode <= found["decode_images_per_s_max"]
    assert found["unavailable"] == {}


@pytest.mark.slow
def test_the_table_has_all_and_says_what_is_missing(found):
    text = markdown(found)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {len(HEADINGS) + 1}
    assert f"{found['fraction_of_ceiling']:.0%} of the ceiling" in text
    assert f"{found['ratio_pipeline']:.2f} times as fast as transformers' pipeline" in text
    without = {**found, "unavailable": {"pipeline_images_per_s": "why"}}
    without |= dict.fromkeys(("ratio_pipeline", *(n for n in found if n.startswith("pipeline_images"))))
    assert "| transformers' pipeline | - |" in markdown(without)
    assert "not measured: pipeline_images_per_s: why" in markdown(without)
    assert "times as fast as transformers'" not in markdown(without)


@pytest.mark.slow
def test_one_core_is_enough_and_the_rival_can_be_left_out(tiny_model, tmp_path):
    for number, photo in enumerate(make_photographs(3)):
        (tmp_path / f"{number}.jpg").write_bytes(photo.data)
    bench = WholeBench(
        str(tiny_model), tmp_path, decode="fast", num_images=9, num_threads=1, with_rival=False
    )
    before = usable_cores()
    found = bench_whole(bench)
    assert found["hardware"]["threads"] == 1
    assert found["num_images"] == 9
    assert found["ratio_pipeline"] is None
    assert found["unavailable"] == {"pipeline_images_per_s": "it was not asked for"}
    assert usable_cores() == before
    json.dumps(found)


@pytest.mark.slow
def test_a_benchmark_that_is_stopped_leaves_nothing(tmp_path):
    words = [CLI, "bench", "--folder", tmp_path, "--no-rival"]
    process = subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = next(line for line in process.stderr if "the model alone" in line)
    assert said
    assert list(tmp_path.iterdir()), "its corpus is there by now"
    process.send_signal(signal.SIGTERM)
    process.stderr.read()
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
