"""Converting: a checkpoint of any layout to a directory in the Hub's layout, or to other runtimes' formats.

Enters: what names a checkpoint, and a path. Leaves: the files written, and a warning of all that the
conversion cannot carry over to transformers.
"""

from __future__ import annotations

import logging
from pathlib import Path

from cvt_model.checkpoint import Checkpoint, resolve_checkpoint
from cvt_model.choices import Precision
from cvt_model.errors import CheckpointError
from pipeline.errors import ConfigError, OutputError

EXPORTS = (".onnx", ".xml")

logger = logging.getLogger(__name__)


def convert(source: str, destination: Path, dtype: Precision = "float32") -> tuple[Path, ...]:
    """Write `source` to `destination`; returns the files.

    That is a new `.onnx` or `.xml` (OpenVINO) file with the inference form in float32, else a new or empty
    directory in the Hub's layout, its weights in `dtype`. Raises ConfigError for what is wrong with
    `source` or not installed, OutputError for what is wrong with `destination`.
    """
    refuse_occupied(destination)
    is_export = destination.suffix in EXPORTS
    if is_export and dtype != "float32":
        raise ConfigError(f"--dtype: a {destination.suffix} file is written in float32; leave it out")
    try:
        checkpoint = resolve_checkpoint(source)
        return export(checkpoint, destination) if is_export else save(checkpoint, destination, dtype)
    except CheckpointError as error:
        raise ConfigError(f"SRC: {error}") from error


def save(checkpoint: Checkpoint, destination: Path, dtype: Precision) -> tuple[Path, ...]:
    """Write a directory in the Hub's layout."""
    import torch

    from cvt_model.save import differences_in_transformers, save_checkpoint

    model = checkpoint.load(getattr(torch, dtype))
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


def export(checkpoint: Checkpoint, destination: Path) -> tuple[Path, ...]:
    """Write the inference form for onnxruntime or OpenVINO."""
    from cvt_model.export import export_onnx, export_openvino  # torch

    try:
        if destination.suffix == ".onnx":
            return (export_onnx(checkpoint, destination),)
        return export_openvino(checkpoint, destination)
    except FileExistsError as error:
        raise OutputError(f"DST: {error}") from error
    except OSError as error:
        raise OutputError(f"DST: cannot write {destination}: {error}") from error
    except CheckpointError:
        raise
    except ValueError as error:  # what is not installed, or cannot be exported
        raise ConfigError(str(error)) from error


def refuse_occupied(destination: Path) -> None:
    """A directory with anything in it is somebody's, and so is a file."""
    if destination.suffix in EXPORTS and destination.exists():
        raise OutputError(f"DST: {destination} exists; give a new name")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise OutputError(f"DST: {destination} exists and is not an empty directory; give a new one")
