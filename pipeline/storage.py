"""Files by URL, wherever they lie: the folder that every stage reads or writes through.

A `Storage` is a folder, local or on any fsspec file system, with the few operations that the pipeline
needs: list, read, replace a file whole, create a file only if it does not exist. It pickles as its URI and
options. pipeline/local_folder.py does them on this machine, pipeline/remote_folder.py elsewhere; what fails
becomes a StorageError that names the place, the endpoint and the remedy.
"""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from pipeline.errors import OutputError, StorageError
from pipeline.file_info import FileInfo as FileInfo
from pipeline.filesystems import endpoint_of, refusals, same_service
from pipeline.filesystems import open_filesystem as open_filesystem
from pipeline.local_folder import LocalFolder
from pipeline.redact import URI_CREDENTIALS, scrub, split_credentials
from pipeline.remote_folder import RemoteFolder
from pipeline.retry import check_reachable
from pipeline.retry import storage_errors as storage_errors

STAGING = "_staging"
NAME_TIME = "%Y%m%dT%H%M%S.%fZ"  # how the names of runs and versions begin
_MAGIC = "*?["


@contextlib.contextmanager
def storage_failures(place: str, storage: Storage | None = None) -> Iterator[None]:
    """Turn what storage raises into a StorageError that names the place and the remedy.

    That a file is missing or exists already is an answer, and passes as it is.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, NotADirectoryError, StorageError):
        raise
    except storage_errors() as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        options = storage.options if storage else {}
        told = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        endpoint = f" (endpoint {storage.endpoint})" if storage and storage.endpoint else ""
        raise StorageError(
            f"storage failed at {scrub(place)}{endpoint}: {scrub(reason, options)}{told}; check its space, "
            "permissions and connection, then run again: what is committed stays"
        ) from error


@dataclass(frozen=True)
class Storage:
    """A folder on a file system that fsspec knows; `options` are what that file system takes.

    A password or a signature in `uri` moves to the options, so that the URI can be shown. What fails for
    the moment is tried again for `patience_s`; None means as long as a restart of a server may take.
    """

    uri: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    patience_s: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shown, found = split_credentials(self.uri)
        if found:
            object.__setattr__(self, "uri", shown)
            object.__setattr__(self, "options", {**self.options, URI_CREDENTIALS: found})

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        return open_filesystem(self.uri, self.options)

    @cached_property
    def _folder(self) -> LocalFolder | RemoteFolder:
        if self.is_local:
            return LocalFolder(self.root)
        query = self.options.get(URI_CREDENTIALS, {}).get("query", "")
        return RemoteFolder(self.fs, self.root, self.uri, query, self.patience_s, self.failures)

    @property
    def fs(self) -> Any:
        return self._opened[0]

    @property
    def root(self) -> str:
        return self._opened[1]

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri or self.uri.startswith("file://")

    @property
    def endpoint(self) -> str:
        """Where requests go, for messages; empty where the storage is local."""
        return endpoint_of(self.uri, self.__dict__.get("_opened", (None,))[0], self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        uri = self.url("") if self.is_local else self.uri  # absolute: a worker may work elsewhere
        return Storage, (uri, self.options, self.patience_s)

    def path(self, relative: str) -> str:
        """`relative` as the file system's own path."""
        return self._folder.path(relative)

    def url(self, relative: str) -> str:
        """`relative` as a full URL without credentials, for messages, records and other readers."""
        return split_credentials(self._folder.url(relative))[0]

    def options_for(self, uri: str) -> dict[str, Any]:
        """The options with which `uri` is to be opened: this storage's, where it is of the same service."""
        options = dict(self.options) if same_service(self.uri, uri) else {}
        taken = options.pop(URI_CREDENTIALS, {})
        userinfo = {key: value for key, value in taken.items() if key == "userinfo"}
        return {**options, URI_CREDENTIALS: userinfo} if userinfo else options

    def failures(self, relative: str) -> AbstractContextManager[None]:
        """`storage_failures` at one of this storage's files."""
        return storage_failures(f"{self.uri.rstrip('/')}/{relative}", self)

    def check_reachable(self, timeout_s: float = 20) -> None:
        """Raise StorageError, naming the endpoint, unless the storage answers in time, whatever it says.

        Raises ConfigError for options that its client does not take. Nothing to do where it is local.
        """
        if self.is_local:
            return
        with self.failures(""):
            check_reachable(self._open_and_ask, self.uri, timeout_s)

    def _open_and_ask(self) -> None:
        """One cheap question. That there is no such thing, or that one may not ask, is an answer."""
        with refusals(self.uri, self.options), contextlib.suppress(FileNotFoundError, PermissionError):
            self.fs.info(self.root)

    def check_writable(self) -> None:
        """Raise OutputError unless a file can be created here."""
        probe = f"{STAGING}/probe-{uuid.uuid4().hex}"
        try:
            self.write_bytes(probe, b"")
            self.delete(probe)
        except OSError as error:
            reason = scrub(str(error.__cause__ or error), self.options)
            raise OutputError(
                f"output.uri: cannot write to {self.uri}: {reason}; "
                "check that the place exists, its permissions and its free space"
            ) from error

    def find(self, folder: str = "") -> list[FileInfo]:
        """Every file below `folder`, sorted by path; empty where there is no such folder."""
        with self.failures(folder):
            return self._folder.find(folder)

    def info(self, relative: str = "") -> FileInfo:
        """One file, as `find` would list it; FileNotFoundError where it does not exist."""
        with self.failures(relative):
            return self._folder.info(relative)

    def exists(self, relative: str = "") -> bool:
        """Whether there is such a file, or a folder with something in it."""
        with self.failures(relative):
            return self._folder.exists(relative)

    def is_file(self, relative: str = "") -> bool:
        """Whether there is such a file."""
        with self.failures(relative):
            return self._folder.is_file(relative)

    def open(self, relative: str) -> BinaryIO:
        """The file, open for reading as a stream of bytes, which survives failures that pass."""
        with self.failures(relative):
            return self._folder.open(relative)

    def read_bytes(self, relative: str = "") -> bytes:
        with self.failures(relative):
            return self._folder.read_bytes(relative)

    def read_range(self, relative: str, start: int, size: int) -> bytes:
        """`size` bytes from `start` on, or what the file has of them."""
        with self.failures(relative):
            return self._folder.read_range(relative, start, size)

    def local_copy(self, relative: str) -> AbstractContextManager[Path]:
        """The file on this machine, for as long as it is needed: itself where it is local."""
        return self._folder.local_copy(relative)

    @contextlib.contextmanager
    def replacing(self, relative: str) -> Iterator[Path]:
        """A local path to write; on success it becomes `relative`, whole and durable, else nothing does."""
        with self.failures(relative), self._folder.replacing(relative) as path:
            yield path

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Put `data` at `relative`, replacing what was there in one step."""
        with self.replacing(relative) as path:
            path.write_bytes(data)

    def create(self, relative: str, data: bytes) -> None:
        """Put `data` at `relative`; FileExistsError if it exists, decided by the storage itself.

        Where the answer was lost, a file of just these bytes is taken to be ours. Google's and Azure's
        clients do not tell of retries of their own, so there such a file always is: let data that must be
        unique name its creator.
        """
        with self.failures(relative):
            self._folder.create(relative, data)

    def move(self, source: str, target: str) -> None:
        """Put a file of this storage in another place of it, replacing what was there in one step."""
        with self.failures(source):
            self._folder.move(source, target)

    def delete(self, relative: str) -> None:
        """Delete one file; nothing where it does not exist."""
        with self.failures(relative):
            self._folder.delete(relative)

    def delete_folder(self, relative: str) -> None:
        """Delete a folder with all that is in it; nothing where it does not exist."""
        with self.failures(relative):
            self._folder.delete_folder(relative)


def split_glob(uri: str) -> tuple[str, str]:
    """A glob as (its longest fixed folder, the pattern below it); pattern "" where it is no glob."""
    head, separator, tail = uri.rpartition("://")
    parts = tail.split("/")
    first = next((n for n, part in enumerate(parts) if set(part) & set(_MAGIC)), None)
    if first is None:
        return uri, ""
    folder = "/".join(parts[:first]) or ("/" if first else "")
    return head + separator + folder, "/".join(parts[first:])


def unique_name(at: datetime | None = None) -> str:
    """A name for a run or a version: unique, and sorting by UTC time, that of now if no other is given."""
    return f"{at or datetime.now(UTC):{NAME_TIME}}-{uuid.uuid4().hex[:6]}"


def sha256_of(path: Path) -> str:
    """SHA-256 of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return sha256_of_stream(file)


def sha256_of_stream(stream: BinaryIO) -> str:
    """SHA-256 of what is left of a stream, in hexadecimal."""
    return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()


def parent_and_name(uri: str) -> tuple[str, str]:
    """A file's URI as (its folder, its name)."""
    head, separator, tail = uri.rpartition("://")
    path = PurePosixPath(tail)
    return head + separator + str(path.parent), path.name
