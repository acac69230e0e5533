"""Every commit held against its files, every file against the commits, and the commits against the input.

Enters: an output. Leaves: a Verification, whose `problems` say what is off and what mends it. Changes
nothing. Files are read by threads, a few at a time, so that memory does not grow with the output; of
image ids it keeps 8 bytes each, on disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.commits import COMMITS, EMBEDDINGS, REJECTS, Commit, CommitLog, DataFile
from pipeline.errors import OutputError
from pipeline.fingerprint import require_fingerprint
from pipeline.status import run_at_work
from pipeline.storage import Storage, sha256_of_stream
from pipeline.verify_ids import SeenIds
from pipeline.verify_input import InputCheck, OpenInput

_REDO = "delete its record in commits/ and run extract again"
_THREADS = 8
A = TypeVar("A")
B = TypeVar("B")


@dataclass
class Verification:
    """What was looked at, and what is off. `input` is None where the input was not asked about."""

    num_shards: int = 0
    num_rows: int = 0
    num_rejects: int = 0
    problems: list[str] = field(default_factory=list)
    input: InputCheck | None = None

    @property
    def is_ok(self) -> bool:
        return not self.problems and (self.input is None or not self.input.notes)

    def to_json(self) -> dict[str, Any]:
        values = {
            "shards": self.num_shards,
            "images": self.num_rows,
            "rejects": self.num_rejects,
            "problems": self.problems,
            "ok": self.is_ok,
        }
        return values if self.input is None else {**values, "input": self.input.to_json()}


@dataclass
class _Checked:
    """What one commit's files turned out to be."""

    stem: str
    commit: Commit | None = None
    problems: list[str] = field(default_factory=list)
    schemas: dict[str, pa.Schema] = field(default_factory=dict)  # of files of embeddings, by path


def verify(output: Storage, *, open_input: OpenInput | None = None) -> Verification:
    """Check counts, sizes, checksums, schemas, ids and leftovers of an output.

    With `open_input`, which opens a URI of the input, every commit is held against the input as it is
    now too.
    """
    fingerprint = require_fingerprint(output)
    result = Verification(input=None if open_input is None else InputCheck(open_input))
    sizes = {info.path: info.size for kind in (EMBEDDINGS, REJECTS) for info in output.find(kind)}
    log = CommitLog(output)
    orphans = set(sizes)
    damaged: set[str] = set()
    first: pa.Schema | None = None
    with SeenIds() as ids:
        checker = _Checker(output, sizes, fingerprint.digest, ids)
        for checked in _in_order(checker.check, sorted(log.live)):
            result.problems += checked.problems
            damaged.update([checked.stem] if checked.problems else [])
            if checked.commit is None:
                continue
            _count(result, checked.commit)
            orphans -= {file.path for file in (checked.commit.embeddings, checked.commit.rejects) if file}
            for path, found in checked.schemas.items():
                first = first or found
                if not found.equals(first):
                    result.problems.append(f"{path}: its columns are not those of the other files; {_REDO}")
        result.problems += _repeated(output, sorted(log.live - damaged), ids.repeated())
    if not run_at_work(output):  # which has files that are not committed yet
        for path in sorted(orphans):
            result.problems.append(f"{path}: no commit names it; the next extract deletes it")
        for stem in sorted(log.superseded & log.listed):
            result.problems.append(f"{COMMITS}/{stem}.json: superseded; the next extract deletes it")
    return result


def _count(result: Verification, commit: Commit) -> None:
    result.num_shards += 1
    result.num_rows += commit.num_rows
    result.num_rejects += commit.num_rejects
    if result.input is not None:
        result.input.check(commit.shard)


def _in_order(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`function` of each item, by threads, in the items' order; a few are under way at a time."""
    under_way: deque[Future[B]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) >= 2 * _THREADS:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


class _Checker:
    """Checks a commit by its stem; called from several threads."""

    def __init__(self, output: Storage, sizes: dict[str, int], fingerprint: str, ids: SeenIds) -> None:
        self._output, self._sizes, self._fingerprint, self._ids = output, sizes, fingerprint, ids

    def check(self, stem: str) -> _Checked:
        checked = _Checked(stem)
        try:
            (checked.commit,) = CommitLog(self._output).read([stem])  # forgotten again, unlike in one log
        except OutputError as error:
            checked.problems.append(str(error))
        except FileNotFoundError:  # a run at work has replaced it
            return checked
        else:
            checked.problems += self._check(checked.commit, checked.schemas)
        if checked.problems and not self._output.exists(f"{COMMITS}/{stem}.json"):
            return _Checked(stem)
        return checked

    def _check(self, commit: Commit, schemas: dict[str, pa.Schema]) -> Iterator[str]:
        record = f"{COMMITS}/{commit.stem}.json"
        if commit.fingerprint != self._fingerprint:
            yield f"{record}: made with another fingerprint than the output's; {_REDO}"
        if commit.num_samples != commit.num_rows + commit.num_rejects:
            yield f"{record}: {commit.num_samples} samples are not rows + rejects; {_REDO}"
        yield from self._check_file(commit.embeddings, commit.num_rows, schemas)
        if commit.rejects is not None:
            yield from self._check_file(commit.rejects, commit.num_rejects, None)
        elif commit.num_rejects:
            yield f"{record}: names no file for its {commit.num_rejects} rejects; {_REDO}"

    def _check_file(
        self, file: DataFile, num_rows: int, schemas: dict[str, pa.Schema] | None
    ) -> Iterator[str]:
        """`schemas`, of a file of embeddings, takes the one that is found; rejects have theirs."""
        size = self._size(file.path)
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
            rows = parquet.metadata.num_rows
            if rows != num_rows or file.num_rows != num_rows:
                yield f"{file.path}: has {rows} rows, its record says {num_rows}; {_REDO}"
            if schemas is not None:
                schemas[file.path] = parquet.schema_arrow
                for batch in parquet.iter_batches(columns=[schema.IMAGE_ID]):
                    self._ids.add(batch.column(0).to_pylist())
            elif not parquet.schema_arrow.equals(schema.REJECTS):
                yield f"{file.path}: its columns are not those of rejects; {_REDO}"

    def _size(self, path: str) -> int | None:
        """A file's bytes, also where it has come since the listing; None where it is missing."""
        if path in self._sizes:
            return self._sizes[path]
        try:
            return self._output.info(path).size
        except FileNotFoundError:
            return None


def _repeated(output: Storage, stems: list[str], marks: set[int]) -> Iterator[str]:
    """The ids that stand in several rows, named: a second look at the files, only where there are any."""
    if not marks:
        return
    first: dict[str, str] = {}
    for stem in stems:
        path = f"{EMBEDDINGS}/{stem}.parquet"
        if not output.exists(path):
            continue
        with output.open(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(columns=[schema.IMAGE_ID]):
                for image_id in batch.column(0).to_pylist():
                    if hash(image_id) not in marks:
                        continue
                    if image_id in first:
                        yield (
                            f"{path}: image_id {image_id} is also in another row, of {first[image_id]}; "
                            "choose an input.id_column whose values are unique"
                        )
                    first.setdefault(image_id, path)
