"""Loose images: the files of a folder, or the URIs of a manifest, read ahead by a pool of threads.

A file that does not open is a reject. Storage that does not answer is not the image's fault: it fails
the shard, which is then done by a later run. Over HTTP, where every image may live on a host of its own,
it is a reject after all.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from pipeline.errors import ConfigError, ShardError, StorageError
from pipeline.manifest import SIGNED_URI, resolve_uri, unpack_metadata
from pipeline.redact import scrub
from pipeline.samples import ReadOptions, Sample
from pipeline.schema import RejectReason, safe_text
from pipeline.shards import Member, Work
from pipeline.storage import Storage, storage_errors

_THREADS = 16
_AHEAD = 32
_AHEAD_BYTES = 2**28
_PIECE_BYTES = 2**20
_WEB_PATIENCE_S = 5.0  # many hosts of the web are gone for good, and each would be waited for
# Errors that belong to one path, not to the storage: the image is a reject, its neighbours are read.
_OF_ONE_PATH = {
    errno.EACCES,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENXIO,
    errno.EPERM,
}
Opener = Callable[[str], BinaryIO]
"""Opens a member by its path, or by its URI."""

_NO_SUCH_URI = (ConfigError, ValueError, TypeError, AttributeError, KeyError)  # as fsspec tells it


def read_samples(work: Work, options: ReadOptions) -> Iterator[Sample]:
    """The members of a group in their order; those that the commit can copy are left out."""
    metadata = unpack_metadata(work.metadata, len(work.shard.members))
    open_member = _opener(work, options)
    waiting: deque[tuple[int, Future[Sample]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for member, columns in zip(work.shard.members, metadata, strict=True):
            if member.path in work.carried:
                continue
            waiting.append((member.size, pool.submit(_read, open_member, member, columns, options)))
            while len(waiting) >= _AHEAD or sum(size for size, _ in waiting) > _AHEAD_BYTES:
                yield waiting.popleft()[1].result()
        while waiting:
            yield waiting.popleft()[1].result()


def _opener(work: Work, options: ReadOptions) -> Opener:
    root = Storage(work.shard.uri, options.storage_options)
    if work.shard.format == "images":
        return root.open

    def open_uri(uri: str) -> BinaryIO:
        uri = resolve_uri(work.shard.uri, uri)
        patience_s = _WEB_PATIENCE_S if _is_web(uri) else None
        return Storage(uri, root.options_for(uri), patience_s).open("")

    return open_uri


def _read(
    open_member: Opener,
    member: Member,
    metadata: dict[str, Any],
    options: ReadOptions,
) -> Sample:
    """One member's bytes, or the reason why there are none."""
    name = safe_text(member.path)
    uri = metadata.pop(SIGNED_URI, None) or member.path

    def reject(reason: RejectReason, message: str) -> Sample:
        return Sample(name, name, None, metadata, reason, message, member.size or None)

    if not member.path:
        return reject("no_image", "the manifest's row has no URI")
    if member.repeat:
        return reject("duplicate_id", f"the manifest names {name} more than once; the first is kept")
    too_large = f"over limits.max_image_bytes = {options.max_image_bytes:,} bytes, not read"
    if member.size > options.max_image_bytes:
        return reject("too_large", f"{member.size:,} bytes are {too_large}")
    try:
        file = open_member(uri)
    except _NO_SUCH_URI as error:
        return reject("unreadable", f"not a URI that can be opened: {scrub(str(error))}")
    except storage_errors() as error:
        return _refused(error, uri, name, reject)
    try:
        with file:
            data = _read_at_most(file, options.max_image_bytes + 1)
    except storage_errors() as error:
        return _refused(error, uri, name, reject)
    if len(data) > options.max_image_bytes:
        return reject("too_large", f"it is {too_large}")
    return Sample(name, name, data, metadata)


def _read_at_most(file: Any, limit: int) -> bytes:
    pieces: list[bytes] = []
    while limit > 0 and (piece := file.read(min(limit, _PIECE_BYTES))):
        pieces.append(piece)
        limit -= len(piece)
    return b"".join(pieces)


def _refused(
    error: Exception, uri: str, name: str, reject: Callable[[RejectReason, str], Sample]
) -> Sample:
    """A reject where the path is at fault; ShardError where the storage is."""
    cause = error.__cause__ if isinstance(error, StorageError) else error
    if isinstance(cause, FileNotFoundError) or getattr(cause, "errno", None) in _OF_ONE_PATH:
        reason = getattr(cause, "strerror", None) or scrub(str(cause))
        return reject("unreadable", f"cannot be opened: {reason}")
    if _is_web(uri):
        return reject("unreadable", f"cannot be fetched: {scrub(str(cause))}")
    raise ShardError(f"storage failed while {name} was read: {error}") from error


def _is_web(uri: str) -> bool:
    return uri.lower().startswith(("http://", "https://"))
