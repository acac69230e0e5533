"""`cvt-pipeline classify` from outside: what is said where, exit codes, and what is never imported."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import transformers

from cvt_model import CvtClassifier
from pipeline.classify import FEW, classify
from pipeline.errors import ConfigError
from tests.conftest import encode, make_image
from tests.running import cli
from tests.tiny_cvt import reference_model, save_checkpoint
from tests.web_server import serving_folder

REPOSITORY = Path(__file__).parent.parent
SLOW_TO_IMPORT = {
    "ray",
    "pyarrow",
    "pandas",
    "faiss",
    "fsspec",
    "aiohttp",
    "transformers",
    "scipy",
    "requests",
}


@pytest.fixture
def pictures(tmp_path, write_images):
    write_images(tmp_path, 3)
    (tmp_path / "a:b [red] ä.png").write_bytes(encode(make_image(7)))
    (tmp_path / "bad.png").write_bytes(b"junk")
    return tmp_path


@pytest.fixture
def web(pictures):
    """The pictures on a web server."""
    with serving_folder(pictures) as url:
        yield url


def expected_json(checkpoint, image, source, top_k=5):
    predictions = CvtClassifier(str(checkpoint), device="cpu")(image, top_k)
    return {"image": source, "predictions": [prediction._asdict() for prediction in predictions]}


def run_inside(images, checkpoint, **options):
    defaults = {"precision": "auto", "backend": "auto", "top_k": 5}
    results = classify(images, checkpoint=str(checkpoint), **{**defaults, **options})
    return [result.to_json() for result in results]


def test_files_and_urls_are_labelled_as_json_without_importing_the_pipelines_weight(
    pictures, web, tiny_model
):
    sources = ["000.png", f"{web}/001.png", "a:b [red] ä.png"]
    words = [sys.executable, "-X", "importtime", "-m", "jobs.classify", *sources]
    done = subprocess.run(
        [*words, "--json", "-k", "2", "-m", tiny_model],
        cwd=pictures,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "", "XDG_CACHE_HOME": str(pictures)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    images = [make_image(0), make_image(1), make_image(7)]
    assert json.loads(done.stdout) == [
        expected_json(tiny_model, image, source, 2) for image, source in zip(images, sources, strict=True)
    ]
    imported = {name.partition(".")[0] for name in re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE)}
    assert "torch" in imported
    assert not imported & SLOW_TO_IMPORT
    assert "random weights" not in done.stderr


def test_one_bad_image_of_three_costs_no_other_and_gives_exit_1(pictures, tiny_model):
    done = cli("classify", "000.png", "bad.png", "002.png", "--json", "-m", tiny_model, cwd=pictures)
    assert done.returncode == 1, done.stderr
    first, bad, last = json.loads(done.stdout)
    assert first == expected_json(tiny_model, make_image(0), "000.png")
    assert last == expected_json(tiny_model, make_image(2), "002.png")
    assert bad.keys() == {"image", "error"}
    assert "bad.png: the file appears to be" in bad["error"]
    assert f"error: {bad['error']}" in done.stderr
    assert "Traceback" not in done.stderr


def test_people_get_a_table_beside_empty_data_and_are_told_of_random_weights(pictures):
    random = ("--checkpoint", "cvt-tiny-random")
    done = cli("classify", "a:b [red] ä.png", "absent [x].png", *random, cwd=pictures)
    assert (done.returncode, done.stdout) == (1, "")
    for words in (
        "a:b [red] ä.png",
        "LABEL_",
        "absent [x].png: it cannot be read: No such file or directory",
        "cvt-tiny-random has random weights",
        "--checkpoint",
    ):
        assert words in done.stderr
    (best,) = run_inside([str(pictures / "a:b [red] ä.png")], "cvt-tiny-random", top_k=1)
    assert f"{best['predictions'][0]['score']:.4f}" in done.stderr


def test_what_cannot_be_done_at_all_is_exit_2(pictures):
    done = cli("classify", "000.png", "--precision", "int8", cwd=pictures)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: int8 is no precision; choose float32" in done.stderr
    assert cli("classify", "000.png", "-k", "0", cwd=pictures).returncode == 2
    assert cli("classify").returncode == 2


def test_a_model_that_cannot_be_used_is_refused_with_the_remedy(pictures, tmp_path):
    save_checkpoint(tmp_path / "headless", reference_model(transformers.CvtModel))
    for checkpoint, mention in (
        (tmp_path / "headless", "no classifier"),
        ("no/such/place", "no such file"),
    ):
        with pytest.raises(ConfigError, match=mention):
            run_inside([str(pictures / "000.png")], checkpoint)
    with pytest.raises(ConfigError, match="tensorrt"):
        run_inside([str(pictures / "000.png")], "cvt-tiny-random", backend="tensorrt")


def test_any_url_that_fsspec_opens_is_read(pictures, tiny_model):
    with zipfile.ZipFile(pictures / "all.zip", "w") as archive:
        archive.write(pictures / "001.png", "inside/1.png")
    urls = [
        f"zip://{name}::file://{pictures}/all.zip" for name in ("inside/1.png", "inside/2.png", "inside")
    ]
    one, *errors = run_inside([*urls, "gopher://h/x.png", str(pictures)], tiny_model)
    assert one == expected_json(tiny_model, make_image(1), urls[0])
    for error, source in zip(errors, [*urls[1:], "gopher://h/x.png", str(pictures)], strict=True):
        assert error["error"].startswith(f"{source}: ")
    assert "gopher" in errors[-2]["error"]
    assert "directory" in errors[-1]["error"]


def test_many_images_get_the_same_answers_as_few(pictures, tiny_model):
    path = str(pictures / "002.png")
    (alone,) = run_inside([path], tiny_model)
    for result in run_inside([path] * (FEW + 3), tiny_model):
        assert result["image"] == path
        for one, other in zip(result["predictions"], alone["predictions"], strict=True):
            assert one == pytest.approx(other, abs=1e-6)
