"""Where the files of an index lie, and how one of them comes to this machine.

`index/<version>/` is what readers see; `index/_vectors/` holds the segments that versions share,
`index/_build/` what a build needs until it ends, `index/_lease/` who builds. A file is known by its
SHA-256, so a copy in the local cache is right for ever.
"""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from cvt_model.cache import cache_folder
from pipeline.errors import SearchError
from pipeline.local_cache import PARTIAL, make_room
from pipeline.storage import Storage, sha256_of

INDEX, CURRENT = "index", "index/CURRENT"
VECTORS, BUILD, LEASE = f"{INDEX}/_vectors", f"{INDEX}/_build", f"{INDEX}/_lease"
CACHE_BYTES = 50_000_000_000
CACHE_VARIABLE = "CVT_PIPELINE_INDEX_CACHE"


@dataclass(frozen=True)
class FileRef:
    """A file of the output: its path there, its bytes and their SHA-256."""

    path: str
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: str, local: Path) -> FileRef:
        return cls(path, local.stat().st_size, sha256_of(local))


def fetch(output: Storage, file: FileRef, *, check: bool = False) -> Path:
    """The file on this machine: itself where it is local, else a copy in the cache.

    What was downloaded is compared with its checksum; a local file is where `check` says so, its size
    always. Raises SearchError where it is missing or not what was written.
    """
    try:
        if output.is_local:
            path = Path(output.path(file.path))
            whole = path.stat().st_size == file.size_bytes
            if whole and check:
                whole = sha256_of(path) == file.sha256
        else:
            path, whole = _cached(output, file)
    except FileNotFoundError:
        whole = False
    if not whole:
        raise damaged(output, file.path)
    return path


def damaged(output: Storage, path: str) -> SearchError:
    return SearchError(f"{output.url(path)} is missing or damaged; run: cvt-pipeline index {output.uri}")


def _cached(output: Storage, file: FileRef) -> tuple[Path, bool]:
    folder = Path(os.environ.get(CACHE_VARIABLE) or cache_folder() / "index")
    path = folder / file.sha256
    if path.is_file() and path.stat().st_size == file.size_bytes:
        os.utime(path)
        return path, True
    folder.mkdir(parents=True, exist_ok=True)
    make_room(folder, file.size_bytes, CACHE_BYTES)
    partial = folder / f"{PARTIAL}{uuid.uuid4().hex}"
    try:
        with output.open(file.path) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        if partial.stat().st_size != file.size_bytes or sha256_of(partial) != file.sha256:
            return path, False
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path, True
