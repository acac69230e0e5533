"""Exported labels, read back by the tools that they are for, or held against their published format."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import LabelConfig
from pipeline.errors import ConfigError, InputError
from pipeline.labels import exports as exports_module
from pipeline.labels.exports import check_kind, export_labels, label_studio_interface
from pipeline.labels.make import make_labels
from pipeline.storage import Storage
from tests.conftest import WriteImages
from tests.running import cli, make_config, run
from tests.test_evaluate import CLASSES, Made, make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An output whose labels are made, some of them unknown."""
    found = make(tmp_path_factory.mktemp("exports") / "out")
    summary = make_labels(found.output, LabelConfig(threshold=0.7))
    assert 10 < summary["unknown"] < 230
    return found


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports_module, "ROWS", 50)


def rows_of(output: Storage) -> list[dict[str, Any]]:
    version = output.read_bytes("labels/CURRENT").decode()
    rows: list[dict[str, Any]] = pq.read_table(output.path(f"labels/{version}/labels.parquet")).to_pylist()
    return rows


def exported(output: Storage, path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The labels that were exported."""
    assert export_labels(output, str(path), check_kind(str(path), kind), {}) == len(rows_of(output))
    return rows_of(output)


def test_csv_has_every_column(made: Made, tmp_path: Path) -> None:
    rows = exported(made.output, tmp_path / "labels.csv")
    with (tmp_path / "labels.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    for mine, theirs in zip(found, rows, strict=True):
        for name, value in theirs.items():
            if isinstance(value, float):
                assert float(mine[name]) == pytest.approx(value, rel=1e-6)
            else:
                assert mine[name] == ("" if value is None else str(value))


def test_json_lines_are_the_rows(made: Made, tmp_path: Path) -> None:
    rows = exported(made.output, tmp_path / "labels.jsonl")
    assert [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()] == rows


def test_datasets_reads_classes_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    found = make(tmp_path / "out")
    facts = json.loads(found.output.read_bytes("fingerprint.json"))
    facts["model_config"]["id2label"]["4"] = CLASSES[0]
    found.output.write_bytes("fingerprint.json", json.dumps(facts).encode())
    make_labels(found.output, LabelConfig())
    exported(found.output, tmp_path / "labels.parquet")
    read = datasets.Dataset.from_parquet(str(tmp_path / "labels.parquet"), cache_dir=str(tmp_path / "c"))
    assert read.features["label"].names == [*CLASSES[:4], f"{CLASSES[0]} (4)", *CLASSES[5:]]
    assert label_studio_interface(["crane", "bee", "crane"]).count('"crane"') == 1


def test_datasets_reads_the_classes_by_their_names(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    rows = exported(made.output, tmp_path / "labels.parquet")
    found = datasets.Dataset.from_parquet(str(tmp_path / "labels.parquet"), cache_dir=str(tmp_path / "c"))
    feature = found.features["label"]
    assert isinstance(feature, datasets.ClassLabel)
    assert feature.names == list(CLASSES)
    names = [feature.int2str(n) if n >= 0 else "unknown" for n in found["label"]]
    assert names == [row["label"] for row in rows]
    assert list(found["image_id"]) == [row["image_id"] for row in rows]


def test_label_studio_has_a_task_an_image_with_its_prediction(made: Made, tmp_path: Path) -> None:
    """By https://labelstud.io/guide/predictions: data, predictions, results named as in the interface."""
    rows = exported(made.output, tmp_path / "tasks.json")
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    interface = ElementTree.fromstring(label_studio_interface([*CLASSES, 'a "b" <c> & d']))
    written = ElementTree.fromstring((tmp_path / "tasks.xml").read_text())
    assert [it.get("value") for it in written.iter("Choice")] == list(CLASSES)
    (image,), (choices,) = interface.findall("Image"), interface.findall("Choices")
    assert choices[-1].get("value") == 'a "b" <c> & d'
    for task, row in zip(tasks, rows, strict=True):
        assert image.get("value") == "$image"
        assert task["data"] == {"image": row["image_id"], "image_id": row["image_id"]}
        if row["label"] == "unknown":
            assert task["predictions"] == []
            continue
        (prediction,) = task["predictions"]
        (result,) = prediction["result"]
        assert 0 <= prediction["score"] <= 1
        assert (result["from_name"], result["to_name"]) == (choices.get("name"), choices.get("toName"))
        assert result["to_name"] == image.get("name")
        assert (result["type"], result["value"]) == ("choices", {"choices": [row["label"]]})


def test_an_image_folder_is_labelled_by_its_manifest(
    tiny_model: Path,
    write_images: WriteImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray_session: None,
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    names = write_images(tmp_path / "in", 6)
    run(make_config(tmp_path / "in", tiny_model, tmp_path / "out"))
    output = Storage(str(tmp_path / "out"))
    make_labels(output, LabelConfig())
    wanted = {
        row["image_id"]: row for row in exported(output, tmp_path / "in/metadata.jsonl", "image-folder")
    }
    found = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "in"), split="train", cache_dir=str(tmp_path / "c")
    ).cast_column("image", datasets.Image(decode=False))
    seen = {Path(row["image"]["path"]).name: row["label"] for row in found}
    assert seen == {name: wanted[name]["label"] for name in names}

    exported(output, tmp_path / "tasks.json")
    for task in json.loads((tmp_path / "tasks.json").read_text()):
        with Image.open(task["data"]["image"].removeprefix("file://")) as image:
            assert image.size == (48, 40)


def test_what_cannot_be_exported_is_said(made: Made, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="are not the files of one folder; use datasets"):
        exported(made.output, tmp_path / "metadata.jsonl", "image-folder")
    assert not (tmp_path / "metadata.jsonl").exists()
    with pytest.raises(ConfigError, match="--as: found nothing; allowed: csv, jsonl"):
        check_kind("labels.txt", None)
    made_none = Storage(str(tmp_path / "none"))
    with pytest.raises(InputError, match="has no labels yet; run: cvt-pipeline label"):
        export_labels(made_none, str(tmp_path / "x.csv"), "csv", {})


def test_the_command_exports_what_is_served(made: Made, tmp_path: Path) -> None:
    served = made.output.read_bytes("labels/CURRENT")
    done = cli("label", made.output.uri, "--served", "--export", tmp_path / "labels.csv")
    assert done.returncode == 0, done.stderr
    assert "exported 240 rows" in done.stderr
    assert made.output.read_bytes("labels/CURRENT") == served
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == 241
    wrong = cli("label", made.output.uri, "--served")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--export: name the file" in wrong.stderr
