"""Loose images: the files of a folder, or the URIs of a manifest, read ahead by a pool of threads.

A file that does not open is a reject. Storage that does not answer is not the image's fault: it fails
the shard, which is then done by a later run. Over HTTP, where every image may live on a host of its own,
it is a reject after all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipeline.errors import ConfigError, ShardError
from pipeline.manifest import resolve_uri, unpack_metadata
from pipeline.readers import ReadOptions, Sample
from pipeline.schema import RejectReason, safe_text
from pipeline.shards import Member, Work
from pipeline.storage import Storage, open_filesystem, storage_errors

_THREADS = 16
_AHEAD = 32
_MISSING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def read_samples(work: Work, options: ReadOptions) -> Iterator[Sample]:
    """The members of a group in their order; those that the commit can copy are left out."""
    metadata = unpack_metadata(work.metadata, len(work.shard.members))
    open_member = _opener(work)
    waiting: deque[Future[Sample]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for member, columns in zip(work.shard.members, metadata, strict=True):
            if member.path in work.carried:
                continue
            waiting.append(pool.submit(_read, open_member, member, columns, options))
            if len(waiting) >= _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _opener(work: Work) -> Callable[[Member], Any]:
    root = Storage(work.shard.uri)
    if work.shard.format == "images":
        return lambda member: root.open(member.path)

    def open_uri(member: Member) -> Any:
        fs, path = open_filesystem(resolve_uri(work.shard.uri, member.path))
        return fs.open(path, "rb")

    return open_uri


def _read(
    open_member: Callable[[Member], Any],
    member: Member,
    metadata: dict[str, Any],
    options: ReadOptions,
) -> Sample:
    """One member's bytes, or the reason why there are none."""
    name = safe_text(member.path)

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
        with open_member(member) as file:
            data = file.read(options.max_image_bytes + 1)
    except _MISSING as error:
        return reject("unreadable", f"cannot be opened: {error.strerror or error}")
    except ConfigError as error:
        return reject("unreadable", str(error))
    except storage_errors() as error:
        if member.path.startswith(("http://", "https://")):
            return reject("unreadable", f"cannot be fetched: {error}")
        raise ShardError(f"storage failed while {name} was read: {error}") from error
    if len(data) > options.max_image_bytes:
        return reject("too_large", f"it is {too_large}")
    return Sample(name, name, data, metadata)
