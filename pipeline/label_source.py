"""Labels that an output's images are known to have: a file of them, a column of the output, or folders.

Enters: what the user named, and rows of embeddings/. Leaves: a label for each row, or none. Knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.fingerprint import Fingerprint
from pipeline.schema import IMAGE_ID, KEY
from pipeline.storage import Storage, storage_errors

FOLDER = "folder"
LABEL = "label"
SUFFIXES = (".csv", ".parquet", ".pq", ".jsonl", ".ndjson")
_HOW = (
    "give a .csv, .jsonl or .parquet file with the columns image_id and label, the name of a metadata "
    "column of the output, or folder (the first one of an image's path in the input or its archive)"
)


@dataclass(frozen=True)
class LabelSource:
    """Where labels are: `columns` have to be read of each row, `labels_of` takes a table of them."""

    columns: tuple[str, ...]
    labels_of: Callable[[pa.Table], pa.Array]  # strings, null where a row has no label


def open_labels(named: str, fingerprint: Fingerprint, output: Storage) -> LabelSource:
    """The labels that `named` stands for, of an output's images. Raises InputError where there are none."""
    if named.lower().endswith(SUFFIXES):
        return _of_file(Storage(named, output.options_for(named)))
    if named == FOLDER:
        return LabelSource((KEY,), lambda table: _folders(table.column(KEY)))
    metadata = [name for name, _ in fingerprint.columns["metadata"]]
    if named not in metadata:
        has = f"its metadata columns: {', '.join(metadata)}" if metadata else "it has no metadata columns"
        raise InputError(f"--labels: the output has no column {named} ({has}); {_HOW}")
    return LabelSource((named,), lambda table: _text(table.column(named), f"column {named}"))


def _of_file(file: Storage) -> LabelSource:
    """The labels of a file, as a look-up that is made once: files are long, and batches many."""
    table, uri = _read(file), file.uri
    missing = [name for name in (IMAGE_ID, LABEL) if name not in table.column_names]
    if missing:
        raise InputError(
            f"--labels: {uri} has no column {' and no column '.join(missing)}; it has "
            f"{', '.join(table.column_names)}"
        )
    twice = [name for name in (IMAGE_ID, LABEL) if table.column_names.count(name) > 1]
    if twice:
        raise InputError(f"--labels: {uri} has several columns {' and '.join(twice)}; keep one of each")
    known = _by_id(table, uri)

    def labels_of(rows: pa.Table) -> pa.Array:
        return pa.array(map(known.get, rows.column(IMAGE_ID).to_pylist()), pa.string())

    return LabelSource((IMAGE_ID,), labels_of)


def _by_id(table: pa.Table, uri: str) -> dict[str, str]:
    """The label of each image that has one. Raises InputError where an image has two."""
    ids = _text(table.column(IMAGE_ID), f"{uri}, column {IMAGE_ID}")
    labels = _text(table.column(LABEL), f"{uri}, column {LABEL}")
    are_numbers = pa.types.is_integer(table.schema.field(LABEL).type)
    if are_numbers and (named := class_names(table.schema, LABEL)):
        name_of = {str(number): name for number, name in enumerate(named)}
        labels = pa.array(map(name_of.get, labels.to_pylist()), pa.string())  # -1 says that there is none
    labels = labels.dictionary_encode()
    names = labels.dictionary.to_pylist()  # each a single object, however many images have it
    known: dict[str, str] = {}
    for image_id, number in zip(ids.to_pylist(), labels.indices.to_pylist(), strict=True):
        if image_id is None or number is None:
            continue
        label = known.setdefault(image_id, names[number])
        if label != names[number]:
            raise InputError(
                f"--labels: {uri} has two labels of {image_id}, {label} and {names[number]}; leave one"
            )
    return known


def class_names(columns: pa.Schema, column: str) -> tuple[str, ...]:
    """The names of a column's class numbers, as Hugging Face's `datasets` writes them into a schema."""
    try:
        features = json.loads((columns.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[column]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _read(file: Storage) -> pa.Table:
    kind = file.uri.lower()
    try:
        with file.open("") as stream:
            if kind.endswith(".csv"):
                text = dict.fromkeys((IMAGE_ID, LABEL), pa.string())
                return pa_csv.read_csv(stream, convert_options=pa_csv.ConvertOptions(column_types=text))
            if kind.endswith((".jsonl", ".ndjson")):
                return _read_json(stream)
            return pq.read_table(stream)
    except (pa.ArrowException, *storage_errors()) as error:
        raise InputError(f"--labels: cannot read {file.uri}: {error}; {_HOW}") from error


def _read_json(stream: BinaryIO) -> pa.Table:
    """JSON lines; ids and labels that look like a time are the text that they are."""
    table = pa_json.read_json(stream)
    fields = [field for field in table.schema if field.name in (IMAGE_ID, LABEL)]
    times = [pa.field(field.name, pa.string()) for field in fields if pa.types.is_timestamp(field.type)]
    if not times:
        return table
    stream.seek(0)
    return pa_json.read_json(stream, parse_options=pa_json.ParseOptions(explicit_schema=pa.schema(times)))


def _folders(keys: pa.ChunkedArray) -> pa.Array:
    """`cat` of `cat/1.jpg`, as finetune labels loose images; null of an image without a folder.

    Raises InputError for a manifest's URIs and absolute paths, whose first folder is no class.
    """
    found = []
    for key in keys.to_pylist():
        folder, slash, _ = key.partition("/")
        if "://" in key or (slash and folder in ("", ".", "..")):
            raise InputError(
                f"--labels folder: {key} is no path below the input, so its first folder is no label; name "
                "a metadata column of the manifest, or a file of labels"
            )
        found.append(folder if slash else None)
    return pa.array(found, pa.string())


def _text(values: pa.ChunkedArray, where: str) -> pa.Array:
    """Labels as text, without blanks around them; null where nothing is left.

    Raises InputError for lists, structs and bytes that are no text.
    """
    values = values.combine_chunks()
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        trimmed = pc.utf8_trim_whitespace(values.cast(pa.string()))
    except pa.ArrowException as error:
        raise InputError(
            f"--labels: {where} holds {values.type} ({error}); labels and ids are numbers or UTF-8 text"
        ) from error
    nothing = ["", "nan"] if pa.types.is_floating(values.type) else [""]
    return pc.if_else(pc.is_in(trimmed, value_set=pa.array(nothing)), None, trimmed)
