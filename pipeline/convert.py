"""Converting: a checkpoint of any layout to a directory in the Hub's layout.

Enters: what names a checkpoint, and a directory. Leaves: the files written, and a warning of all that the
conversion cannot carry over to transformers.
"""

from __future__ import annotations

import logging
from pathlib import Path

from cvt_model.checkpoint import resolve_checkpoint
from cvt_model.errors import CheckpointError
from pipeline.errors import ConfigError, OutputError

logger = logging.getLogger(__name__)


def convert(source: str, destination: Path) -> tuple[Path, ...]:
    """Write `source` in float32 to `destination`, a new or empty directory; returns the files.

    Raises ConfigError for what is wrong with `source`, OutputError with `destination`.
    """
    refuse_occupied(destination)
    from cvt_model.save import differences_in_transformers, save_checkpoint  # torch

    try:
        checkpoint = resolve_checkpoint(source)
        model = checkpoint.load()
    except CheckpointError as error:
        raise ConfigError(f"SRC: {error}") from error
    preprocessing = checkpoint.preprocessing
    processor = None if isinstance(preprocessing, str) else preprocessing
    try:
        written = save_checkpoint(destination, model, processor)
    except OSError as error:
        raise OutputError(f"DST: cannot write {destination}: {error}") from error
    if isinstance(preprocessing, str):
        logger.warning("no preprocessor_config.json was written: %s", preprocessing)
    for difference in differences_in_transformers(checkpoint.config):
        logger.warning("fit for cvt_model alone: %s", difference)
    return written


def refuse_occupied(destination: Path) -> None:
    """A directory with anything in it is somebody's."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise OutputError(f"DST: {destination} exists and is not an empty directory; give a new one")
