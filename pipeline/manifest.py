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
from pipeline.errors import InputError
from pipeline.shards import Listing, Member, Work
from pipeline.storage import parent_and_name

URI_COLUMNS = ("uri", "url", "image_uri", "image_url", "path", "file_name", "filename", "image")


class Manifest:
    """A manifest's rows: what they name, and the metadata columns that the output carries."""

    def __init__(self, listing: Listing, image_column: str | None) -> None:
        self.url = listing.root.url(listing.files[0].path)
        self._table = _read_table(listing)
        self._column = image_column or _find_column(self._table.schema, self.url)
        if self._column not in self._table.column_names:
            raise InputError(
                f"input.image_column: {self.url} has no column {self._column}; "
                f"it has {', '.join(self._table.column_names)}"
            )
        self._rows: dict[tuple[str, int], int] = {}

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
            for values in batch.to_pylist():
                uri = values.pop(self._column)
                path = "" if uri is None else str(uri)
                text = json.dumps(values, sort_keys=True, default=repr) if names else ""
                version = hashlib.sha256(text.encode()).hexdigest()[:16] if names else ""
                member = Member(path, 0, version, seen[path])
                self._rows[path, seen[path]] = len(members)
                seen[path] += 1
                members.append(member)
        return members

    def attach(self, work: Work, metadata: list[pa.Field]) -> Work:
        """`work` with the metadata rows of its members, packed as text for the journey."""
        if not metadata:
            return work
        rows = [self._rows.get((member.path, member.repeat)) for member in work.shard.members]
        table = self._table.select([column.name for column in metadata]).take(pa.array(rows, pa.int64()))
        packed = base64.b64encode(schema.pack(table)).decode()
        return dataclasses.replace(work, metadata=packed)


def unpack_metadata(text: str, num_members: int) -> list[dict[str, Any]]:
    """One dict for each member, from `Work.metadata`; empty dicts where there is none."""
    if not text:
        return [{} for _ in range(num_members)]
    with pa.ipc.open_stream(base64.b64decode(text)) as reader:
        rows: list[dict[str, Any]] = reader.read_all().to_pylist()
        return rows


def resolve_uri(manifest_uri: str, uri: str) -> str:
    """`uri` as it stands, or below the manifest's folder where it is a relative path."""
    if "://" in uri or uri.startswith("/"):
        return uri
    folder, _ = parent_and_name(manifest_uri)
    return f"{folder}/{uri}"


def _read_table(listing: Listing) -> pa.Table:
    name = listing.files[0].path
    try:
        with listing.root.open(name) as file:
            if name.lower().endswith(".csv"):
                return pa_csv.read_csv(file)
            if name.lower().endswith((".parquet", ".pq")):
                return pq.read_table(file)
            return pa_json.read_json(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"input.uri: cannot read the manifest {listing.root.url(name)}: {error}; "
            "a manifest is .csv with a header, .jsonl (an object a line) or .parquet"
        ) from error


def _find_column(table_schema: pa.Schema, url: str) -> str:
    found = next((name for name in URI_COLUMNS if name in table_schema.names), None)
    if found is None:
        raise InputError(
            f"input.image_column: no column of {url} is called {', '.join(URI_COLUMNS)}; "
            f"say which of {', '.join(table_schema.names)} holds the images' URIs"
        )
    return found
