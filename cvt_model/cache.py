"""Where this machine keeps what can be made again: batch sizes that were measured, compiled kernels."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/cvt-pipeline`, by default in `~/.cache`; it need not exist."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "cvt-pipeline"
