"""Manifests: a CSV, JSONL or Parquet file whose rows name images by URI, with metadata beside them.

A manifest's image is identified by its URI and the metadata that the output carries, without asking
storage about each: an image that changes under the same URI is taken to be the same.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.errors import InputError, StorageError
from pipeline.redact import split_credentials
from pipeline.shards import PARQUET_SUFFIXES, Listing, Member, Work
from pipeline.storage import Storage, parent_and_name

SIGNED_URI = "\0signed_uri"
"""Where the metadata of a member holds its URI, if that has a signature, which is stored nowhere."""

URI_COLUMNS = ("uri", "url", "image_uri", "image_url", "path", "file_name", "filename", "image")


class Manifest:
    """A manifest's rows: what they name, and the metadata columns that the output carries."""

    def __init__(self, listing: Listing, image_column: str | None) -> None:
        self.url = listing.root.url(listing.files[0].path)
        self._table, self._column = _read_table(listing, image_column)
        if not self._table.num_rows:
            raise InputError(f"input.uri: the manifest {self.url} has no rows")
        self._rows: dict[tuple[str, int], int] = {}
        self._signed = False

    @property
    def metadata_schema(self) -> pa.Schema:
        """The columns beside the URI."""
        return pa.schema([column for column in self._table.schema if column.name != self._column])

    def members(self, metadata: list[pa.Field]) -> list[Member]:
        """Every row as a member, in the manifest's order."""
        names = [column.name for column in metadata]
        seen: Counter[str] = Counter()
        members: list[Member] = []
        for batch in self._table.select([self._column, *names]).to_batches(max_chunksize=10_000):
            for values in self._rows_of(batch):
                path, signature = split_credentials(_text(values.pop(self._column)), signatures_only=True)
                self._signed = self._signed or bool(signature)
                text = json.dumps(values, sort_keys=True, default=repr) if names else ""
                version = hashlib.sha256(text.encode()).hexdigest()[:16] if names else ""
                member = Member(path, 0, version, seen[path])
                self._rows[path, seen[path]] = len(members)
                seen[path] += 1
                members.append(member)
        return members

    def _rows_of(self, batch: pa.RecordBatch) -> list[dict[str, Any]]:
        try:
            return batch.to_pylist()  # type: ignore[no-any-return]
        except (UnicodeDecodeError, OverflowError) as error:
            raise InputError(
                f"input.uri: a value of the manifest {self.url} is not valid: {error}"
            ) from error

    def attach(self, work: Work, metadata: list[pa.Field]) -> Work:
        """`work` with the metadata rows of its members, packed as text for the journey."""
        if not metadata and not self._signed:
            return work
        rows = pa.array([self._rows.get((m.path, m.repeat)) for m in work.shard.members], pa.int64())
        table = self._table.select([column.name for column in metadata]).take(rows)
        if self._signed:
            table = table.append_column(SIGNED_URI, self._table.column(self._column).take(rows))
        packed = base64.b64encode(schema.pack(table)).decode()
        return dataclasses.replace(work, metadata=packed)


def unpack_metadata(text: str, num_members: int) -> list[dict[str, Any]]:
    """One dict for each member, from `Work.metadata`; empty dicts where there is none."""
    if not text:
        return [{} for _ in range(num_members)]
    with pa.ipc.open_stream(base64.b64decode(text)) as reader:
        rows: list[dict[str, Any]] = reader.read_all().to_pylist()
    for row in rows:
        if SIGNED_URI in row:
            row[SIGNED_URI] = _text(row[SIGNED_URI])
    return rows


def resolve_uri(manifest_uri: str, uri: str) -> str:
    """`uri` as it stands, or below the manifest's folder where it is a relative path."""
    if "://" in uri or uri.startswith("/"):
        return uri
    folder, _ = parent_and_name(manifest_uri)
    return f"{folder}/{uri}"


def _read_table(listing: Listing, image_column: str | None) -> tuple[pa.Table, str]:
    """The manifest and the name of its column of URIs, which are read as text, whatever they look like."""
    name = listing.files[0].path
    url = listing.root.url(name)
    try:
        names = _column_names(listing.root, name)
        column = _choose_column(names, url, image_column)
        with listing.root.open(name) as file:
            if name.lower().endswith(".csv"):
                types = pa_csv.ConvertOptions(column_types={column: pa.binary()})
                return pa_csv.read_csv(file, convert_options=types), column
            if name.lower().endswith(PARQUET_SUFFIXES):
                return pq.read_table(file), column
            text = pa.schema([pa.field(column, pa.string())])
            return pa_json.read_json(file, parse_options=pa_json.ParseOptions(text)), column
    except StorageError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"input.uri: cannot read the manifest {url}: {error}; "
            "a manifest is .csv with a header, .jsonl (an object a line) or .parquet, in UTF-8"
        ) from error


def _column_names(root: Storage, name: str) -> list[str]:
    with root.open(name) as file:
        if name.lower().endswith(".csv"):
            return list(pa_csv.open_csv(file).schema.names)
        if name.lower().endswith(PARQUET_SUFFIXES):
            return list(pq.read_schema(file).names)
        return list(json.loads(file.readline()))


def _choose_column(names: list[str], url: str, image_column: str | None) -> str:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"input.uri: {url} has several columns called {', '.join(twice)}; rename them")
    if image_column is not None and image_column not in names:
        raise InputError(
            f"input.image_column: {url} has no column {image_column}; it has {', '.join(names)}"
        )
    found = image_column or next((name for name in URI_COLUMNS if name in names), None)
    if found is None:
        raise InputError(
            f"input.image_column: no column of {url} is called {', '.join(URI_COLUMNS)}; "
            f"say which of {', '.join(names)} holds the images' URIs"
        )
    return found


def _text(uri: object) -> str:
    """A URI as text; bytes that are no UTF-8 stay what they are, as in file names."""
    if isinstance(uri, bytes):
        return uri.decode("utf-8", "surrogateescape")
    return "" if uri is None else str(uri)
