"""Files by URL, wherever they lie: the folder that every stage reads or writes through.

A `Storage` is a folder, local or on any fsspec file system, with the few operations that the pipeline
needs: list, read, replace a file whole, create a file only if it does not exist. It pickles as its URI and
options. Elsewhere than on this machine, what fails for the moment is tried again (pipeline/retry.py); what
remains becomes a StorageError that names the place, the endpoint and the remedy.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

from pipeline.errors import OutputError, StorageError
from pipeline.file_info import FileInfo as FileInfo
from pipeline.file_info import local_info, remote_info, version_of, walk_local
from pipeline.filesystems import endpoint_of, refusals, same_service
from pipeline.filesystems import open_filesystem as open_filesystem
from pipeline.redact import URI_CREDENTIALS, join_query, scrub, split_credentials
from pipeline.remote_file import BLOCK_BYTES, RemoteFile
from pipeline.retry import TruncatedError, check_reachable, status_of, with_retries
from pipeline.retry import storage_errors as storage_errors

STAGING = "_staging"
_MAGIC = "*?["
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


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
        reason = str(getattr(error, "strerror", None) or error or type(error).__name__)
        options = storage.options if storage else {}
        told = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        endpoint = f" (endpoint {storage.endpoint})" if storage and storage.endpoint else ""
        raise StorageError(
            f"storage failed at {scrub(place)}{endpoint}: {scrub(reason, options)}{told}; check its space, "
            "permissions and connection, then run again: what is committed stays"
        ) from error


def _guarded(method: F) -> F:
    @functools.wraps(method)
    def guarded(self: Storage, relative: str = "", *arguments: Any) -> Any:
        with self.failures(relative):
            return method(self, relative, *arguments)

    return cast(F, guarded)


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
        query = self.options.get(URI_CREDENTIALS, {}).get("query")
        path = f"{self.root.rstrip('/')}/{relative}" if relative else self.root
        return join_query(path, query) if query else path

    def url(self, relative: str) -> str:
        """`relative` as a full URL without credentials, for messages, records and other readers."""
        return split_credentials(self.fs.unstrip_protocol(self.path(relative)))[0]

    def options_for(self, uri: str) -> dict[str, Any]:
        """The options with which `uri` is to be opened: this storage's, where it is of the same service."""
        options = dict(self.options) if same_service(self.uri, uri) else {}
        taken = options.pop(URI_CREDENTIALS, {})
        userinfo = {key: value for key, value in taken.items() if key == "userinfo"}
        return {**options, URI_CREDENTIALS: userinfo} if userinfo else options

    def failures(self, relative: str) -> contextlib.AbstractContextManager[None]:
        """`storage_failures` at one of this storage's files."""
        return storage_failures(self._place(relative), self)

    def check_reachable(self, timeout_s: float = 25) -> None:
        """Raise StorageError, naming the endpoint, unless the storage answers in time, whatever it says.

        Raises ConfigError for options that its client does not take. Nothing to do where it is local.
        """
        if self.is_local:
            return
        with self.failures(""):
            check_reachable(self._opened_and_asked, self._place(""), timeout_s)

    def _opened_and_asked(self) -> None:
        """One cheap question. That there is no such thing, or that one may not ask, is an answer."""
        with refusals(self.uri, self.options), contextlib.suppress(FileNotFoundError, PermissionError):
            self.fs.info(self.root)

    @_guarded
    def find(self, folder: str = "") -> list[FileInfo]:
        """Every file below `folder`, sorted by path; empty where there is no such folder."""
        base = self.path(folder)
        if self.is_local:
            found_local = walk_local(Path(base), Path(self.root), frozenset())
            return sorted(found_local, key=lambda info: info.path)
        found = self._retried(folder, lambda: self.fs.find(base, detail=True))
        prefix = self.root.rstrip("/") + "/"
        infos = (
            remote_info(name.removeprefix(prefix), info)
            for name, info in (found.items() if isinstance(found, dict) else ())  # adlfs: a list for a file
            if info["type"] == "file" and name != base and not name.endswith("/")
        )
        return sorted(infos, key=lambda info: info.path)

    @_guarded
    def info(self, relative: str = "") -> FileInfo:
        """One file, as `find` would list it; FileNotFoundError where it does not exist."""
        if self.is_local:
            return local_info(relative, Path(self.path(relative)).stat())
        return remote_info(relative, self._stat(relative))

    @_guarded
    def exists(self, relative: str = "") -> bool:
        """Whether there is such a file, or a folder with something in it."""
        if self.is_local:
            return bool(self.fs.exists(self.path(relative)))
        try:
            self._stat(relative)
        except FileNotFoundError:
            return False
        return True

    @_guarded
    def is_file(self, relative: str = "") -> bool:
        """Whether there is such a file."""
        if self.is_local:
            return bool(self.fs.isfile(self.path(relative)))
        try:
            return bool(self._stat(relative)["type"] == "file")
        except FileNotFoundError:
            return False

    @_guarded
    def open(self, relative: str) -> BinaryIO:
        """The file, open for reading as a stream of bytes, which survives failures that pass."""
        path = self.path(relative)
        if self.is_local:
            return cast(BinaryIO, Path(path).open("rb"))
        remote = RemoteFile(
            lambda: self.fs.open(path, "rb", block_size=BLOCK_BYTES),
            lambda file: f"{version_of(getattr(file, 'details', None) or {})} {getattr(file, 'size', '')}",
            lambda: self.failures(relative),
            self._place(relative),
            self.patience_s,
        )
        return cast(BinaryIO, remote)

    @_guarded
    def read_bytes(self, relative: str = "") -> bytes:
        if self.is_local:
            return Path(self.path(relative)).read_bytes()
        return self._retried(relative, lambda: cast(bytes, self.fs.cat_file(self.path(relative))))

    @contextlib.contextmanager
    def local_copy(self, relative: str) -> Iterator[Path]:
        """The file on this machine, for as long as it is needed: itself where it is local."""
        if self.is_local:
            yield Path(self.path(relative))
            return
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "copy"
            with self.failures(relative):
                self._retried(relative, lambda: self.fs.get_file(self.path(relative), str(local)))
            yield local

    @contextlib.contextmanager
    def replacing(self, relative: str) -> Iterator[Path]:
        """A local path to write; on success it becomes `relative`, whole and durable, else nothing does.

        Locally the file is written beside its place and renamed; elsewhere it is written to a
        temporary file and uploaded.
        """
        target = self.path(relative)
        folder = Path(target).parent if self.is_local else Path(tempfile.gettempdir())
        temporary = folder / f".tmp-{uuid.uuid4().hex}"
        try:
            with self.failures(relative):
                folder.mkdir(parents=True, exist_ok=True)
                yield temporary
                if self.is_local:
                    _fsync(temporary)
                    temporary.replace(target)
                    _fsync(folder)
                else:
                    self._retried(relative, lambda: self.fs.put_file(str(temporary), target))
        finally:
            temporary.unlink(missing_ok=True)

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Put `data` at `relative`, replacing what was there in one step."""
        with self.replacing(relative) as path:
            path.write_bytes(data)

    @_guarded
    def create(self, relative: str, data: bytes) -> None:
        """Put `data` at `relative`; FileExistsError if it exists, decided by the storage itself.

        A creation whose answer was lost is tried again, and then finds its own file: a file of just these
        bytes is then taken to be it. Google's and Azure's clients do not tell of retries of their own, so
        there such a file is always taken to be it: let data that must be unique name its creator.
        """
        if self.is_local:
            self._create_local(relative, data)
            return

        def attempt(number: int) -> None:
            try:
                self.fs.pipe_file(self.path(relative), data, mode="create")
            except storage_errors() as error:
                if not _says_it_exists(error):
                    raise
                if not (number or _was_sent_again(error)) or self.read_bytes(relative) != data:
                    raise FileExistsError(self.url(relative)) from error

        with_retries(attempt, self._place(relative), self.patience_s)

    def _create_local(self, relative: str, data: bytes) -> None:
        target = Path(self.path(relative))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".tmp-{uuid.uuid4().hex}"
        try:
            temporary.write_bytes(data)
            _fsync(temporary)
            os.link(temporary, target)
            _fsync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)

    @_guarded
    def move(self, source: str, target: str) -> None:
        """Put a file of this storage in another place of it, replacing what was there in one step."""
        if self.is_local:
            place = Path(self.path(target))
            place.parent.mkdir(parents=True, exist_ok=True)
            Path(self.path(source)).replace(place)
            _fsync(place.parent)
            return
        self._retried(source, lambda: self.fs.copy(self.path(source), self.path(target)))
        if same_service(self.uri, "az://"):
            self._retried(target, lambda: self._check_copied(source, target))
        self.delete(source)

    def _check_copied(self, source: str, target: str) -> None:
        """Azure copies in the background, where it has much to do; until then the copy is empty."""
        wanted, found = (self.fs.info(self.path(place))["size"] for place in (source, target))
        if wanted != found:
            raise TruncatedError(f"the copy has {found} of {wanted} bytes")

    @_guarded
    def delete(self, relative: str) -> None:
        """Delete one file; nothing where it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            self._retried(relative, lambda: self.fs.rm_file(self.path(relative)))

    @_guarded
    def delete_folder(self, relative: str) -> None:
        """Delete a folder with all that is in it; nothing where it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            self._retried(relative, lambda: self.fs.rm(self.path(relative), recursive=True))

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

    def _place(self, relative: str) -> str:
        return f"{self.uri.rstrip('/')}/{relative}"

    def _retried(self, relative: str, operation: Callable[[], T]) -> T:
        """The operation; where the storage is not this machine's, again while its failures pass."""
        if self.is_local:
            return operation()
        return with_retries(lambda number: operation(), self._place(relative), self.patience_s)

    def _stat(self, relative: str) -> dict[str, Any]:
        return self._retried(relative, lambda: cast(dict[str, Any], self.fs.info(self.path(relative))))


def split_glob(uri: str) -> tuple[str, str]:
    """A glob as (its longest fixed folder, the pattern below it); pattern "" where it is no glob."""
    head, separator, tail = uri.rpartition("://")
    parts = tail.split("/")
    first = next((n for n, part in enumerate(parts) if set(part) & set(_MAGIC)), None)
    if first is None:
        return uri, ""
    folder = "/".join(parts[:first]) or ("/" if first else "")
    return head + separator + folder, "/".join(parts[first:])


def unique_name() -> str:
    """A name for a run or a version: unique, and sorting by UTC time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex[:6]}"


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


def _says_it_exists(error: Exception) -> bool:
    """Whether a creation was refused for the file that is there (s3fs knows AWS's way to say so alone)."""
    return isinstance(error, FileExistsError) or status_of(error) == 412


def _was_sent_again(error: Exception) -> bool:
    """Whether the client may have sent a creation more than once before it said that the file exists."""
    answer = getattr(error.__cause__, "response", None)
    if not isinstance(answer, dict):
        return True  # it does not tell
    return bool(answer.get("ResponseMetadata", {}).get("RetryAttempts", 0))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
