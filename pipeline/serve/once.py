"""Folders of a cache that are made once, whole or not at all, and then only read."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.local_cache import PARTIAL, being_written

Array = npt.NDArray[Any]

_KEPT = 3


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` where it is not there. Two processes may make it at once; one is kept."""
    if not folder.is_dir():
        partial = folder.parent / f"{PARTIAL}{uuid.uuid4().hex}"
        partial.mkdir(parents=True)
        try:
            make(partial)
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    folder.touch()
    return folder


def cached_arrays(folder: Path, make: Callable[[], Mapping[str, Array]]) -> dict[str, Array]:
    """Arrays by name, mapped from `folder`; computed by `make` where it is not there."""

    def write(partial: Path) -> None:
        for name, array in make().items():
            np.save(partial / f"{name}.npy", array)

    made_once(folder, write)
    return {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}


def forget_older(cache: Path, prefix: str, kept: int = _KEPT) -> None:
    """Delete all but the folders of a prefix that were used last; who has them mapped keeps them.

    With them goes what a process left half made that died a day ago or earlier.
    """
    folders = sorted(cache.glob(f"{prefix}*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in (*folders[kept:], *_abandoned(cache)):
        shutil.rmtree(folder, ignore_errors=True)


def _abandoned(cache: Path) -> Iterator[Path]:
    for partial in cache.glob(f"{PARTIAL}*"):
        with contextlib.suppress(FileNotFoundError):  # its maker has just ended
            if not being_written(partial, partial.stat().st_mtime):
                yield partial
