"""List, identify, plan: which shards there are, which of them are new, changed, deleted or done.

Enters: a listing of the input and the live commits of the output. Leaves: a Plan. A shard's identity is
(URI, size, ETag or mtime); its digest covers that and the fingerprint. Reads no image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fsspec.utils import glob_translate

from pipeline.config import Source
from pipeline.errors import EmptyInputError, InputError
from pipeline.storage import FileInfo, Storage, parent_and_name, split_glob, storage_errors

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PARQUET_SUFFIXES = (".parquet", ".pq")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
MANIFEST_SUFFIXES = (".csv", ".jsonl", ".ndjson")
_DIGEST_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Member:
    """A loose image of a group: its path or URI, and what identifies its content.

    `repeat` counts earlier members with the same path (a manifest may name an image twice).
    """

    path: str
    size: int
    version: str
    repeat: int = 0


@dataclass(frozen=True)
class Shard:
    """What is read, committed and redone as a whole: an archive, a Parquet file or a group of images.

    `uri` is the file's own, or for a group the folder (or manifest) that its members' paths start from.
    """

    name: str
    uri: str
    format: str
    size: int = 0
    version: str = ""
    members: tuple[Member, ...] = ()

    @property
    def size_bytes(self) -> int:
        return self.size or sum(member.size for member in self.members)

    def stem(self, fingerprint: str) -> str:
        """`<shard>-<digest>`, the name of its files; differs whenever identity or fingerprint does."""
        content = json.dumps([dataclasses.astuple(self), fingerprint])
        digest = hashlib.sha256(content.encode()).hexdigest()[:_DIGEST_LENGTH]
        return f"{file_name(self.name)}-{digest}"


@dataclass(frozen=True)
class Listing:
    """The input as it is now: the root that relative paths start from, the layout and the files."""

    root: Storage
    format: str
    files: tuple[FileInfo, ...]


@dataclass(frozen=True)
class Work:
    """A shard to do: its file stem, the commits that it replaces, the members that it can copy.

    `metadata` holds a manifest's columns for the members, as `manifest.py` packs them.
    """

    shard: Shard
    stem: str
    supersedes: tuple[str, ...] = ()
    carried: frozenset[str] = frozenset()
    metadata: str = ""

    @property
    def size_bytes(self) -> int:
        """Bytes to read; the rows of carried members are copied."""
        read = (member.size for member in self.shard.members if member.path not in self.carried)
        return self.shard.size or sum(read)

    @property
    def size_of_json(self) -> int:
        """About how many bytes `to_json` gives."""
        return 500 + len(self.metadata) + sum(len(member.path) + 120 for member in self.shard.members)

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "carried": sorted(self.carried)})

    @classmethod
    def from_json(cls, text: str) -> Work:
        values = json.loads(text)
        return cls(
            shard_from_json(values["shard"]),
            values["stem"],
            tuple(values["supersedes"]),
            frozenset(values["carried"]),
            values["metadata"],
        )


def shard_from_json(values: dict[str, Any]) -> Shard:
    """A shard as `dataclasses.asdict` wrote it."""
    members = tuple(Member(**member) for member in values["members"])
    return Shard(**{**values, "members": members})


def escape(name: str) -> str:
    """`name` as a file name: every byte outside [A-Za-z0-9.-] as `_xx`, cut to 150 characters."""
    raw = name.encode("utf-8", "surrogateescape")
    safe = re.sub(rb"[^A-Za-z0-9.-]", lambda match: b"_%02x" % match.group()[0], raw)
    return safe.decode()[:150]


def file_name(name: str) -> str:
    """`escape(name)`, with an x before a leading `_` or `.`: many Parquet readers skip such files."""
    safe = escape(name)
    return f"x{safe}" if safe.startswith(("_", ".")) else safe


def name_part(stem: str) -> str:
    """The escaped shard name in a file stem."""
    return stem[: -_DIGEST_LENGTH - 1]


def list_input(
    config: Source, output: Storage | None = None, options: Mapping[str, Any] | None = None
) -> Listing:
    """List the input and judge its layout. `options` are those of its file system.

    What lies in the `output` folder, which may be inside the input, is left out. Raises EmptyInputError
    where nothing is there to read, InputError where it cannot be told what is.
    """
    try:
        root, files = _find(config.uri, options or {})
    except storage_errors() as error:
        raise InputError(f"input.uri: cannot list {config.uri}: {error}") from error
    if output is not None:
        files = _without_output(root, files, output)
    if not files:
        raise EmptyInputError(f"input.uri: {config.uri} matches no file; check the path and the spelling")
    layout = config.format if config.format != "auto" else _judge(config.uri, files)
    suffixes = {"webdataset": TAR_SUFFIXES, "parquet": PARQUET_SUFFIXES}.get(layout)
    if suffixes and len(files) > 1:
        files = [file for file in files if file.path.lower().endswith(suffixes)]
        if not files:
            raise EmptyInputError(
                f"input.uri: {config.uri} has no file that ends in {', '.join(suffixes)}, "
                f"as input.format: {layout} needs"
            )
    if layout == "manifest" and len(files) > 1:
        raise InputError(f"input.uri: a manifest is one file; {config.uri} matches {len(files)}")
    return Listing(root, layout, tuple(files))


def _find(uri: str, options: Mapping[str, Any]) -> tuple[Storage, list[FileInfo]]:
    folder, pattern = split_glob(uri)
    literal = Storage(uri, options)
    if pattern and not (literal.is_local and literal.exists("")):
        root = Storage(folder, options)
        matches = re.compile(glob_translate(pattern)).fullmatch
        return root, [file for file in root.find() if _matches(matches, file.path)]
    if literal.is_file():
        parent, name = parent_and_name(literal.url(""))
        root = Storage(parent, literal.options)
        return root, [root.info(name)]
    if not literal.exists():
        raise EmptyInputError(
            f"input.uri: {uri} does not exist; check the path, the bucket and the spelling"
        )
    return literal, literal.find()


def _without_output(root: Storage, files: list[FileInfo], output: Storage) -> list[FileInfo]:
    here, there = output.url("").rstrip("/") + "/", root.url("").rstrip("/") + "/"
    if here == there:
        raise InputError("output.uri: is the input's own folder; choose a folder of its own")
    if not here.startswith(there):
        return files
    prefix = here.removeprefix(there)
    return [file for file in files if not file.path.startswith(prefix)]


def _matches(matches: Any, path: str) -> bool:
    """Whether a glob matches the path itself or a folder that it lies in."""
    parts = path.split("/")
    return any(matches("/".join(parts[:n])) for n in range(len(parts), 0, -1))


def _judge(uri: str, files: list[FileInfo]) -> str:
    names = [file.path.lower() for file in files]
    if len(names) == 1 and names[0].endswith(MANIFEST_SUFFIXES):
        return "manifest"
    found = {
        layout
        for layout, suffixes in (("webdataset", TAR_SUFFIXES), ("parquet", PARQUET_SUFFIXES))
        if any(name.endswith(suffixes) for name in names)
    }
    if len(found) > 1 or (found and any(name.endswith(IMAGE_SUFFIXES) for name in names)):
        raise InputError(
            f"input.format: {uri} holds files of several layouts; "
            "say which is meant: images, webdataset or parquet"
        )
    return found.pop() if found else "images"
