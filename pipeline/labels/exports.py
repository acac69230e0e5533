"""Labels for other tools: CSV, JSON lines, Hugging Face datasets, Label Studio, an image folder's manifest.

Enters: a published version of labels. Leaves: one file that the tool reads as it is. Rows stream.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from xml.sax.saxutils import quoteattr

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.commits import CommitLog
from pipeline.errors import ConfigError, InputError
from pipeline.labels.decide import UNKNOWN_ID
from pipeline.labels.make import FILE, LABELS
from pipeline.published import SUMMARY, served_version
from pipeline.storage import Storage, parent_and_name

ROWS = 16_384
BY_SUFFIX = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "datasets", ".json": "label-studio"}
FORMATS = ("csv", "jsonl", "datasets", "label-studio", "image-folder")

Tables = Iterator[pa.Table]


def check_kind(target: str, kind: str | None) -> str:
    """The kind of a file, by its suffix where it is not named. Raises ConfigError for one not known."""
    kind = kind or BY_SUFFIX.get(Path(target).suffix.lower())
    if kind not in FORMATS:
        raise ConfigError(f"--as: found {kind or 'nothing'}; allowed: {', '.join(FORMATS)}")
    return kind


def export_labels(output: Storage, target: str, kind: str, options: Mapping[str, Any]) -> int:
    """Write the served labels to `target`, as a kind of FORMATS; returns how many rows that were.

    Beside Label Studio's tasks the interface that they fit is written, as `.xml`. Raises InputError where
    there are no labels.
    """
    version = served_version(output, LABELS)
    if version is None:
        raise InputError(f"{output.uri} has no labels yet; run: cvt-pipeline label {output.uri}")
    summary = json.loads(output.read_bytes(f"{LABELS}/{version}/{SUMMARY}"))
    folder, name = parent_and_name(target)
    with (
        output.local_copy(f"{LABELS}/{version}/{FILE}") as path,
        pq.ParquetFile(path) as file,
        Storage(folder, options).replacing(name) as local,
    ):
        tables = (pa.Table.from_batches([batch]) for batch in file.iter_batches(ROWS))
        _WRITERS[kind](local, tables, summary, output)
        num_rows = cast(int, file.metadata.num_rows)
    if kind == "label-studio":
        interface = label_studio_interface(summary["label_names"])
        Storage(folder, options).write_bytes(str(Path(name).with_suffix(".xml")), interface.encode())
    return num_rows


def _write_csv(path: Path, tables: Tables, summary: dict[str, Any], output: Storage) -> None:
    with pa_csv.CSVWriter(path, schema.LABELS) as writer:
        for table in tables:
            writer.write_table(table)


def _write_jsonl(path: Path, tables: Tables, summary: dict[str, Any], output: Storage) -> None:
    with path.open("w", encoding="utf-8") as file:
        for table in tables:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())


def _write_datasets(path: Path, tables: Tables, summary: dict[str, Any], output: Storage) -> None:
    """Parquet whose schema tells Hugging Face datasets that `label` is a ClassLabel; -1 of none of them."""
    names = _told_apart(summary["label_names"])
    values = {"image_id": "string", "score": "float32", "margin": "float32", "runner_up": "string"}
    features: dict[str, Any] = {name: {"dtype": kind, "_type": "Value"} for name, kind in values.items()}
    features["method"] = {"dtype": "string", "_type": "Value"}
    features["label"] = {"names": names, "_type": "ClassLabel"}
    told = json.dumps({"info": {"features": features}})
    fields = [schema.LABELS.field(name).with_nullable(True) for name in features if name != "label"]
    kinds = pa.schema([*fields, pa.field("label", pa.int64())], {"huggingface": told})
    with pq.ParquetWriter(path, kinds) as writer:
        for table in tables:
            columns = {name: table.column(name) for name in features if name != "label"}
            writer.write_table(
                pa.table({**columns, "label": table.column("label_id").cast("int64")}, kinds)
            )


def _told_apart(names: list[str]) -> list[str]:
    """Class names of which none comes twice, as ClassLabel wants them: `crane` and `crane (517)`."""
    first = {name: number for number, name in reversed(list(enumerate(names)))}
    return [name if first[name] == number else f"{name} ({number})" for number, name in enumerate(names)]


def _write_label_studio(path: Path, tables: Tables, summary: dict[str, Any], output: Storage) -> None:
    """Tasks with a prediction each, of a labelling interface with `<Image name="image" value="$image"/>`
    and `<Choices name="label" toName="image">`; an unknown one has no prediction."""
    places = _Places(output)
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        before = ""
        for table in tables:
            for row in table.to_pylist():
                task = _task(row, places.url(row[schema.IMAGE_ID]), summary)
                file.write(before + json.dumps(task, ensure_ascii=False))
                before = ",\n"
        file.write("]\n")


def _task(row: dict[str, Any], url: str, summary: dict[str, Any]) -> dict[str, Any]:
    choice = {
        "from_name": "label",
        "to_name": "image",
        "type": "choices",
        "value": {"choices": [row["label"]]},
    }
    model = f"cvt-pipeline {summary['method']} {summary['version']}"
    said = {"model_version": model, "score": row["score"], "result": [choice]}
    known = row["label_id"] != UNKNOWN_ID
    data = {"image": url, schema.IMAGE_ID: row[schema.IMAGE_ID]}
    return {"data": data, "predictions": [said] if known else []}


def label_studio_interface(names: list[str]) -> str:
    """The labelling interface that the tasks fit, as Label Studio's XML."""
    choices = "".join(f"<Choice value={quoteattr(name)}/>" for name in dict.fromkeys(names))
    return (
        '<View><Image name="image" value="$image"/>'
        f'<Choices name="label" toName="image" choice="single">{choices}</Choices></View>\n'
    )


def _write_image_folder(path: Path, tables: Tables, summary: dict[str, Any], output: Storage) -> None:
    """`metadata.jsonl` of Hugging Face's image folder, to lie in the folder that the images lie in."""
    if not _Places(output).are_loose:
        raise InputError(
            f"--as image-folder: the images of {output.uri} are not the files of one folder; use datasets"
        )
    with path.open("w", encoding="utf-8") as file:
        for table in tables:
            for row in table.to_pylist():
                named = {"file_name": row.pop(schema.IMAGE_ID), **row}
                file.write(json.dumps(named, ensure_ascii=False) + "\n")


class _Places:
    """Where originals lie: loose images in one folder, or at the URIs of a manifest; others in archives."""

    def __init__(self, output: Storage) -> None:
        log = CommitLog(output)
        commits = log.stream(log.live)
        kinds = {(it.shard.format, it.shard.uri if it.shard.format == "images" else "") for it in commits}
        self._kind, self._root = kinds.pop() if len(kinds) == 1 else ("several", "")

    @property
    def are_loose(self) -> bool:
        return self._kind == "images"

    def url(self, image_id: str) -> str:
        """The original's URL; its id alone of a member of an archive, which has none."""
        return f"{self._root.rstrip('/')}/{image_id}" if self.are_loose else image_id


_WRITERS: dict[str, Callable[[Path, Tables, dict[str, Any], Storage], None]] = {
    "csv": _write_csv,
    "jsonl": _write_jsonl,
    "datasets": _write_datasets,
    "label-studio": _write_label_studio,
    "image-folder": _write_image_folder,
}
