"""Every commit held against its files, and every file against the commits.

Enters: an output. Leaves: a Verification, whose `problems` say what is off and what mends it. Changes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.commits import EMBEDDINGS, REJECTS, Commit, CommitLog, DataFile
from pipeline.errors import OutputError
from pipeline.fingerprint import require_fingerprint
from pipeline.storage import Storage, sha256_of_stream

_REDO = "delete its record in commits/ and run extract again"


@dataclass
class Verification:
    """What was looked at, and what is off."""

    num_shards: int = 0
    num_rows: int = 0
    num_rejects: int = 0
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "shards": self.num_shards,
            "images": self.num_rows,
            "rejects": self.num_rejects,
            "problems": self.problems,
            "ok": not self.problems,
        }


def verify(output: Storage) -> Verification:
    """Check counts, sizes, checksums, schemas, ids and leftovers of an output."""
    fingerprint = require_fingerprint(output)
    log = CommitLog(output)
    result = Verification()
    sizes = {info.path: info.size for kind in (EMBEDDINGS, REJECTS) for info in output.find(kind)}
    checker = _Checker(output, sizes, fingerprint.digest)
    for stem in sorted(log.live):
        try:
            (commit,) = log.read([stem])
        except OutputError as error:
            result.problems.append(str(error))
            continue
        result.num_shards += 1
        result.num_rows += commit.num_rows
        result.num_rejects += commit.num_rejects
        result.problems += checker.check(commit)
    for path in sorted(sizes.keys() - checker.named):
        result.problems.append(f"{path}: no commit names it; the next extract deletes it")
    for stem in sorted(log.superseded & log.listed):
        result.problems.append(f"commits/{stem}.json: superseded; the next extract deletes it")
    return result


class _Checker:
    """Checks one commit at a time; remembers ids as hashes, and the first schema."""

    def __init__(self, output: Storage, sizes: dict[str, int], fingerprint: str) -> None:
        self._output, self._sizes, self._fingerprint = output, sizes, fingerprint
        self._ids: set[int] = set()
        self._schema: pa.Schema | None = None
        self.named: set[str] = set()

    def check(self, commit: Commit) -> Iterator[str]:
        record = f"commits/{commit.stem}.json"
        if commit.fingerprint != self._fingerprint:
            yield f"{record}: made with another fingerprint than the output's; {_REDO}"
        if commit.num_samples != commit.num_rows + commit.num_rejects:
            yield f"{record}: {commit.num_samples} samples are not rows + rejects; {_REDO}"
        files: list[tuple[DataFile | None, int, pa.Schema | None]] = [
            (commit.embeddings, commit.num_rows, None)
        ]
        if commit.rejects or commit.num_rejects:
            files.append((commit.rejects, commit.num_rejects, schema.REJECTS))
        for file, num_rows, expected in files:
            if file is None:
                yield f"{record}: names no file for its {num_rows} rejects; {_REDO}"
            else:
                self.named.add(file.path)
                yield from self._check_file(file, num_rows, expected)

    def _check_file(self, file: DataFile, num_rows: int, expected: pa.Schema | None) -> Iterator[str]:
        size = self._sizes.get(file.path)
        if size is None:
            yield f"{file.path}: missing; {_REDO}"
            return
        with self._output.open(file.path) as stream:
            digest = sha256_of_stream(stream)
            if size != file.size_bytes or digest != file.sha256:
                yield f"{file.path}: not the file that was committed (size or checksum); {_REDO}"
                return
            stream.seek(0)
            parquet = pq.ParquetFile(stream)
            found = parquet.schema_arrow
            if parquet.metadata.num_rows != num_rows or file.num_rows != num_rows:
                rows = parquet.metadata.num_rows
                yield f"{file.path}: has {rows} rows, its record says {num_rows}; {_REDO}"
            expected = expected or self._schema
            if expected is None:
                self._schema = found
            elif not found.equals(expected):
                yield f"{file.path}: its columns are not those of the other files; {_REDO}"
            yield from self._check_ids(file.path, parquet)

    def _check_ids(self, path: str, parquet: pq.ParquetFile) -> Iterator[str]:
        if not path.startswith(EMBEDDINGS):
            return
        for batch in parquet.iter_batches(columns=[schema.IMAGE_ID]):
            for image_id in batch.column(0).to_pylist():
                mark = hash(image_id)
                if mark in self._ids:
                    yield (
                        f"{path}: image_id {image_id} is also in another row; "
                        "choose an input.id_column whose values are unique"
                    )
                self._ids.add(mark)
