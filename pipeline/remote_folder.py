"""A folder on a remote file system of fsspec: what a Storage does where its files are elsewhere.

What fails for the moment is tried again as a whole operation (pipeline/retry.py), with what that takes: a
creation recognises its own file, a stream goes on where it was. Errors are the clients' own.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from pipeline.file_info import FileInfo, remote_info, version_of
from pipeline.filesystems import same_service, upload
from pipeline.redact import join_query
from pipeline.remote_file import BLOCK_BYTES, RemoteFile
from pipeline.retry import TruncatedError, status_of, storage_errors, with_retries

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFolder:
    """Files below `root`, a path of `fs`; Storage says what each operation promises.

    `uri` names it in messages, `query` is the signature that every path needs, `failures` is for what
    fails outside of Storage's calls.
    """

    fs: Any
    root: str
    uri: str
    query: str
    patience_s: float | None
    failures: Callable[[str], AbstractContextManager[None]]

    def path(self, relative: str) -> str:
        path = f"{self.root.rstrip('/')}/{relative}" if relative else self.root
        return join_query(path, self.query) if self.query else path

    def url(self, relative: str) -> str:
        return cast(str, self.fs.unstrip_protocol(self.path(relative)))

    def find(self, folder: str) -> list[FileInfo]:
        base = self.path(folder)
        found = self._retried(folder, lambda: self.fs.find(base, detail=True))
        prefix = self.root.rstrip("/") + "/"
        infos = (
            remote_info(name.removeprefix(prefix), info)
            for name, info in (found.items() if isinstance(found, dict) else ())  # adlfs: a list for a file
            if info["type"] == "file" and name != base and not name.endswith("/")
        )
        return sorted(infos, key=lambda info: info.path)

    def info(self, relative: str) -> FileInfo:
        return remote_info(relative, self._stat(relative))

    def exists(self, relative: str) -> bool:
        try:
            self._stat(relative)
        except FileNotFoundError:
            return False
        return True

    def is_file(self, relative: str) -> bool:
        try:
            return bool(self._stat(relative)["type"] == "file")
        except FileNotFoundError:
            return False

    def open(self, relative: str) -> BinaryIO:
        path = self.path(relative)
        remote = RemoteFile(
            lambda: self.fs.open(path, "rb", block_size=BLOCK_BYTES),
            lambda file: f"{version_of(getattr(file, 'details', None) or {})} {getattr(file, 'size', '')}",
            lambda: self.failures(relative),
            self._place(relative),
            self.patience_s,
        )
        return cast(BinaryIO, remote)

    def read_bytes(self, relative: str) -> bytes:
        return self._retried(relative, lambda: cast(bytes, self.fs.cat_file(self.path(relative))))

    def read_range(self, relative: str, start: int, size: int) -> bytes:
        place, end = self.path(relative), start + size
        return self._retried(relative, lambda: cast(bytes, self.fs.cat_file(place, start=start, end=end)))

    @contextlib.contextmanager
    def local_copy(self, relative: str) -> Iterator[Path]:
        with _temporary() as local:
            with self.failures(relative):
                self._retried(relative, lambda: self.fs.get_file(self.path(relative), str(local)))
            yield local

    @contextlib.contextmanager
    def replacing(self, relative: str) -> Iterator[Path]:
        target = self.path(relative)
        with _temporary() as local:
            yield local
            size = local.stat().st_size
            self._retried(relative, lambda: upload(self.fs, "put_file", size, str(local), target))

    def create(self, relative: str, data: bytes) -> None:
        """A creation whose answer was lost is tried again, and then finds its own file."""

        def attempt(number: int) -> None:
            try:
                upload(self.fs, "pipe_file", len(data), self.path(relative), data, mode="create")
            except storage_errors() as error:
                if not _says_it_exists(error):
                    raise
                if not (number or _was_sent_again(error)) or self.read_bytes(relative) != data:
                    raise FileExistsError(self._place(relative)) from error

        with_retries(attempt, self._place(relative), self.patience_s)

    def move(self, source: str, target: str) -> None:
        self._retried(source, lambda: self.fs.copy(self.path(source), self.path(target)))
        if same_service(self.uri, "az://"):
            self._retried(target, lambda: self._check_copied(source, target))
        self.delete(source)

    def delete(self, relative: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._retried(relative, lambda: self.fs.rm_file(self.path(relative)))

    def delete_folder(self, relative: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._retried(relative, lambda: self.fs.rm(self.path(relative), recursive=True))

    def _check_copied(self, source: str, target: str) -> None:
        """Azure copies in the background, where it has much to do; until then the copy is empty."""
        wanted, found = (self.fs.info(self.path(place))["size"] for place in (source, target))
        if wanted != found:
            raise TruncatedError(f"the copy has {found} of {wanted} bytes")

    def _place(self, relative: str) -> str:
        return f"{self.uri.rstrip('/')}/{relative}"

    def _stat(self, relative: str) -> dict[str, Any]:
        return self._retried(relative, lambda: cast(dict[str, Any], self.fs.info(self.path(relative))))

    def _retried(self, relative: str, operation: Callable[[], T]) -> T:
        return with_retries(lambda number: operation(), self._place(relative), self.patience_s)


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    """A path in a folder of its own on this machine, which is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="cvt-pipeline-") as folder:
        yield Path(folder) / "file"


def _says_it_exists(error: Exception) -> bool:
    """Whether a creation was refused for the file that is there (s3fs knows AWS's way to say so alone)."""
    return isinstance(error, FileExistsError) or status_of(error) == 412


def _was_sent_again(error: Exception) -> bool:
    """Whether the client may have sent a creation more than once before it said that the file exists."""
    answer = getattr(error.__cause__, "response", None)
    if not isinstance(answer, dict):
        return True  # it does not tell
    return bool(answer.get("ResponseMetadata", {}).get("RetryAttempts", 0))
