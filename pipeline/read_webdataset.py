"""WebDataset archives: .tar, .tar.gz, .tgz, read once, front to back.

A sample is the members of one key: the path up to the first dot of the file name; a name without a dot,
or with nothing before it, is no member of a sample, as in the webdataset library. Members of a key
usually stand together, and are then known together; where keys interleave, an image is handed on when
its neighbours end, and what comes later for its key (a second image, metadata) follows as an Amendment,
so that no archive has to be held or read twice. Samples without an image are told at the end.

Python's tarfile takes a damaged header for the end of the archive; so the end must be marked by a block
of zeros, as tar writes it, and followed by nothing else. Anything less fails the shard.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, BinaryIO, cast

from PIL import Image

from pipeline import schema
from pipeline.errors import ShardError
from pipeline.samples import Amendment, ReadOptions, Sample
from pipeline.schema import RejectReason, safe_text
from pipeline.shards import Work
from pipeline.storage import Storage, parent_and_name, storage_errors

METADATA_EXTENSIONS = ("json", "txt", "cls")
_BLOCK = 512
_STUBS = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow names these, and decodes none
_FOREIGN = {
    "heic",
    "heif",
    "jxl",
    "svg",
}  # images all the same: rejects with a reason, not bystanders


@dataclass
class _Image:
    """An image member: its bytes, or the reason why there are none."""

    extension: str
    data: bytes | None
    reason: RejectReason | None = None
    message: str = ""
    size_bytes: int = 0


@dataclass
class _Sample:
    """The members of one key that stand together."""

    key: str
    images: list[_Image] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class _Seen:
    """What is remembered of a key whose images were handed on.

    `lone_extension` is that of its first image where that stood alone, and so bears the bare key.
    """

    lone_extension: str | None
    keys: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


class _ForwardFile:
    """What tarfile needs of a file, over a stream that only goes forward; remembers the last block."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._position, self.last = raw, 0, b""
        self._ended = False

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(size)
        while size > len(data) and (more := self._raw.read(size - len(data))):
            data += more
        if not data and size:
            if self._ended:  # tarfile would ask for ever in the middle of a sparse map
                raise EOFError(f"the archive is cut off at byte {self._position:,}")
            self._ended = True
        self._position += len(data)
        self.last = data
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = 0) -> int:
        if whence or position < self._position:
            raise tarfile.StreamError("the archive is read front to back only")
        while self._position < position and self.read(min(2**20, position - self._position)):
            pass
        return self._position


ReadMember = Callable[[tarfile.TarFile, tarfile.TarInfo], bytes]


def content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a member that is a file."""
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def read_samples(
    work: Work, options: ReadOptions, *, read: ReadMember = content
) -> Iterator[Sample | Amendment]:
    """Samples in the archive's order, then amendments. Raises ShardError for a damaged archive.

    `read` gives what stands for an image in its sample's data.
    """
    folder, name = parent_and_name(work.shard.uri)
    prefix = f"{safe_text(work.shard.name)}#"
    try:
        with Storage(folder, options.storage_options).open(name) as file:
            zipped = not name.lower().endswith(".tar")
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if zipped else file
            yield from _Grouper(prefix, options).group(_members(_ForwardFile(stream), options, read))
    except (
        tarfile.TarError,
        zlib.error,
        EOFError,
        ValueError,  # and the rest: what tarfile raises for headers that are damaged or made to do harm
        IndexError,
        OverflowError,
        RecursionError,
        *storage_errors(),  # type: ignore[misc]
    ) as error:
        raise ShardError(f"not readable to its end: {error or type(error).__name__}") from error


def _members(stream: _ForwardFile, options: ReadOptions, read: ReadMember) -> Iterator[_Sample]:
    """The archive's members of interest, gathered while they stand together."""
    current: _Sample | None = None
    with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r:") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # tarfile remembers every member; a shard may have millions
            key, extension = _split(member.name)
            if member.isdir() or not extension or not key.rpartition("/")[2]:
                continue
            image, column = _is_image(extension), extension in options.metadata_names
            if current is None or current.key != key:
                if current is not None:
                    yield current
                current = _Sample(key)
            if column:
                current.metadata[extension] = _text(archive, member, options)
            elif image:
                current.images.append(_image(archive, member, extension, options, read))
    if current is not None:
        yield current
    _check_end(stream)


def _check_end(stream: _ForwardFile) -> None:
    where = f"at byte {max(0, stream.tell() - len(stream.last)):,}"
    if len(stream.last) < _BLOCK:
        raise ShardError(f"the archive is cut off {where}: its end-of-archive mark is missing")
    if any(stream.last):
        raise ShardError(f"the archive is damaged {where}: a header is not valid")
    while block := stream.read(2**20):
        if block.count(0) != len(block):
            raise ShardError(
                f"there is data after the end-of-archive mark {where}; "
                "archives must be joined with tar --concatenate, not cat"
            )


class _Grouper:
    """Turns runs of members into samples; remembers keys and extensions, never bytes."""

    def __init__(self, prefix: str, options: ReadOptions) -> None:
        self._prefix, self._options = prefix, options
        self._seen: dict[str, _Seen] = {}
        self._metadata: dict[str, dict[str, str]] = {}
        self._late: dict[str, dict[str, Any]] = {}

    def group(self, runs: Iterator[_Sample]) -> Iterator[Sample | Amendment]:
        for run in runs:
            yield from self._images(run)
        for key in self._metadata:
            message = "the archive has metadata for this key, and no image"
            yield Sample(self._prefix + key, key, None, {}, "no_image", message)
        for key, columns in self._late.items():
            yield Amendment(key, columns)

    def _images(self, run: _Sample) -> Iterator[Sample]:
        seen = self._seen.get(run.key)
        if seen is None and not run.images:
            self._metadata.setdefault(run.key, {}).update(run.metadata)
            return
        if seen is None:
            extensions = {image.extension for image in run.images}
            lone = run.images[0].extension if len(extensions) == 1 else None
            seen = self._seen[run.key] = _Seen(lone, metadata=self._metadata.pop(run.key, {}))
        metadata = seen.metadata = seen.metadata | run.metadata
        for key in seen.keys if run.metadata else ():
            self._late.setdefault(key, {}).update(run.metadata)
        for image in run.images:
            key = self._key_of(run.key, image.extension, seen)
            if key not in seen.keys:
                seen.keys.append(key)
            size = image.size_bytes
            yield Sample(self._prefix + key, key, image.data, metadata, image.reason, image.message, size)

    def _key_of(self, key: str, extension: str, seen: _Seen) -> str:
        """The key; with the extension where the sample has several images, be it told only now."""
        if extension == seen.lone_extension:
            return key
        if seen.lone_extension is not None:
            first = f"{key}.{seen.lone_extension}"
            columns = {schema.KEY: first, schema.IMAGE_ID: self._prefix + first}
            self._late.setdefault(key, {}).update(columns)
        return f"{key}.{extension}"


def _split(name: str) -> tuple[str, str]:
    """A member's path as (key, lower-case extension): split at the first dot of the file name."""
    folder, slash, base = safe_text(name).removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


@cache
def _image_extensions() -> frozenset[str]:
    Image.init()
    known = Image.registered_extensions().items()
    readable = {name[1:] for name, kind in known if kind in Image.OPEN and kind not in _STUBS}
    return frozenset(readable | _FOREIGN)


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in _image_extensions()


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo, options: ReadOptions) -> str:
    if member.size > options.max_image_bytes:
        raise ShardError(
            f"{safe_text(member.name)} has {member.size:,} bytes of metadata, "
            f"over limits.max_image_bytes = {options.max_image_bytes:,}"
        )
    file = archive.extractfile(member) if member.isfile() else None
    return file.read().decode("utf-8", "backslashreplace") if file else ""


def _image(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    extension: str,
    options: ReadOptions,
    read: ReadMember,
) -> _Image:
    if not member.isfile():
        message = f"the member is a link to {member.linkname}, not a file"
        return _Image(extension, None, "unreadable", message)
    if member.size > options.max_image_bytes:
        limit = f"over limits.max_image_bytes = {options.max_image_bytes:,}, not read"
        message = f"{member.size:,} bytes are {limit}"
        return _Image(extension, None, "too_large", message, member.size)
    return _Image(extension, read(archive, member), size_bytes=member.size)
