"""Files by URL: the only module that opens them.

A `Storage` is a folder, local or on any fsspec file system, with the few operations that the pipeline
needs: list, read, replace a file whole, create a file only if it does not exist. It pickles as its URI.
Retries of transient failures are the file systems' own and bounded; what remains is an OSError, which
becomes an error that names the place.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError, OutputError, StorageError

STAGING = "_staging"
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}
_MAGIC = "*?["
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class FileInfo:
    """A file as a listing tells it: path relative to the storage's root, bytes, ETag or mtime.

    `modified` is when it was last written, in epoch seconds; None where the storage does not tell.
    """

    path: str
    size: int
    version: str
    modified: float | None = None


@cache
def storage_errors() -> tuple[type[Exception], ...]:
    """OSError, and what the installed clients of object stores raise beside it."""
    names = {
        "botocore.exceptions": ("BotoCoreError", "ClientError"),
        "aiohttp": ("ClientError",),
        "azure.core.exceptions": ("AzureError",),
        "google.auth.exceptions": ("GoogleAuthError",),
    }
    found: list[type[Exception]] = [OSError]
    for module, classes in names.items():
        with contextlib.suppress(ImportError):
            found += [getattr(importlib.import_module(module), name) for name in classes]
    return tuple(found)


@contextlib.contextmanager
def storage_failures(place: str) -> Iterator[None]:
    """Turn what storage raises into a StorageError that names the place and the remedy.

    That a file is missing or exists already is an answer, and passes as it is.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, NotADirectoryError, StorageError):
        raise
    except storage_errors() as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"storage failed at {place}: {reason}; check its space, permissions and connection, then run "
            "again: what is committed stays"
        ) from error


def _guarded(method: F) -> F:
    @functools.wraps(method)
    def guarded(self: Storage, relative: str = "", *arguments: Any) -> Any:
        with storage_failures(f"{self.uri.rstrip('/')}/{relative}"):
            return method(self, relative, *arguments)

    return cast(F, guarded)


@dataclass(frozen=True)
class Storage:
    """A folder on a file system that fsspec knows; `options` are what that file system takes."""

    uri: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)

    @cached_property
    def fs(self) -> Any:
        return open_filesystem(self.uri, self.options)[0]

    @cached_property
    def root(self) -> str:
        return open_filesystem(self.uri, self.options)[1]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            Storage,
            (self.url(""), self.options),
        )  # absolute: a worker may have another working directory

    def path(self, relative: str) -> str:
        """`relative` as the file system's own path."""
        return f"{self.root.rstrip('/')}/{relative}" if relative else self.root

    def url(self, relative: str) -> str:
        """`relative` as a full URL, for messages, records and other readers."""
        return cast(str, self.fs.unstrip_protocol(self.path(relative)))

    @_guarded
    def find(self, folder: str = "") -> list[FileInfo]:
        """Every file below `folder`, sorted by path; empty where there is no such folder."""
        base = self.path(folder)
        if self.is_local:
            found_local = _walk_local(Path(base), Path(self.root), frozenset())
            return sorted(found_local, key=lambda info: info.path)
        found = self.fs.find(base, detail=True)
        prefix = self.root.rstrip("/") + "/"
        infos = (
            FileInfo(name.removeprefix(prefix), int(info["size"] or 0), _version(info))
            for name, info in found.items()
            if info["type"] == "file" and name != base and not name.endswith("/")
        )
        return sorted(infos, key=lambda info: info.path)

    @_guarded
    def info(self, relative: str) -> FileInfo:
        """One file, as `find` would list it; FileNotFoundError where it does not exist."""
        if self.is_local:
            status = Path(self.path(relative)).stat()
            return FileInfo(relative, status.st_size, str(status.st_mtime_ns))
        info = self.fs.info(self.path(relative))
        return FileInfo(relative, int(info["size"] or 0), _version(info))

    @_guarded
    def exists(self, relative: str) -> bool:
        return bool(self.fs.exists(self.path(relative)))

    @_guarded
    def open(self, relative: str) -> BinaryIO:
        """The file, open for reading as a stream of bytes."""
        return cast(BinaryIO, self.fs.open(self.path(relative), "rb"))

    @_guarded
    def read_bytes(self, relative: str) -> bytes:
        return cast(bytes, self.fs.cat_file(self.path(relative)))

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
            with storage_failures(f"{self.uri.rstrip('/')}/{relative}"):
                folder.mkdir(parents=True, exist_ok=True)
                yield temporary
                if self.is_local:
                    _fsync(temporary)
                    temporary.replace(target)
                    _fsync(folder)
                else:
                    self.fs.put_file(str(temporary), target)
        finally:
            temporary.unlink(missing_ok=True)

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Put `data` at `relative`, replacing what was there in one step."""
        with self.replacing(relative) as path:
            path.write_bytes(data)

    @_guarded
    def create(self, relative: str, data: bytes) -> None:
        """Put `data` at `relative`; FileExistsError if it exists, decided by the storage itself."""
        if not self.is_local:
            self.fs.pipe_file(self.path(relative), data, mode="create")
            return
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
        else:
            self.fs.copy(self.path(source), self.path(target))
            self.delete(source)

    @_guarded
    def delete(self, relative: str) -> None:
        """Delete one file; nothing where it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(relative))

    @_guarded
    def delete_folder(self, relative: str) -> None:
        """Delete a folder with all that is in it; nothing where it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path(relative), recursive=True)

    def check_writable(self) -> None:
        """Raise OutputError unless a file can be created here."""
        probe = f"{STAGING}/probe-{uuid.uuid4().hex}"
        try:
            self.write_bytes(probe, b"")
            self.delete(probe)
        except OSError as error:
            raise OutputError(
                f"output.uri: cannot write to {self.uri}: {error}; "
                "check that the place exists, its permissions and its free space"
            ) from error


def open_filesystem(uri: str, options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """The file system of `uri` and the path in it; ConfigError where it cannot be used."""
    protocol = uri.split("://", 1)[0] if "://" in uri else "file"
    if protocol == "memory":
        raise ConfigError(
            f"{uri}: memory:// lives in one process, so the workers would not see it; use a folder"
        )
    if protocol == "file":
        local = uri.removeprefix("file://")
        return fsspec.filesystem("file"), str(Path(local).expanduser().absolute())
    try:
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False, **(options or {}))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'cvt-pipeline[{extra}]'" if extra else str(error)
        raise ConfigError(f"{uri}: no support for {protocol}:// is installed; {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"{uri}: {error}") from error
    return fs, path


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


def _version(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated"):
        if info.get(key):
            return str(info[key]).strip('"')
    return ""


def _walk_local(folder: Path, root: Path, ancestors: frozenset[tuple[int, int]]) -> Iterator[FileInfo]:
    """Files below `folder`, links followed once; sockets, pipes and devices are no files.

    A link that leads nowhere is listed: it is a file that somebody expects, and cannot be read.
    """
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    here = (status.st_dev, status.st_ino)
    if here in ancestors:
        return  # a link that leads back to a folder it lies in
    for entry in entries:
        try:
            status = entry.stat()
        except OSError:  # a link that leads nowhere, or to itself
            with contextlib.suppress(FileNotFoundError):  # or a file that has just gone away
                status = entry.stat(follow_symlinks=False)
                yield _local_info(entry, root, status)
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _walk_local(Path(entry.path), root, ancestors | {here})
        elif stat.S_ISREG(status.st_mode):
            yield _local_info(entry, root, status)


def _local_info(entry: os.DirEntry[str], root: Path, status: os.stat_result) -> FileInfo:
    relative = entry.path[len(str(root)) :].lstrip("/")
    return FileInfo(relative, status.st_size, str(status.st_mtime_ns))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
