"""The description of a checkpoint in the Hub's layout: its config and its preprocessing.

What enters: a directory. What leaves: a `CvtConfig`, a `CvtImageProcessor` or why there is none.
It must not know weights.
"""

from pathlib import Path

from cvt_model.config import CvtConfig
from cvt_model.errors import CheckpointError
from cvt_model.image_processor import CvtImageProcessor
from cvt_model.weights import read_json


def read_config(directory: Path) -> CvtConfig:
    """The network's shape; raises CheckpointError."""
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{directory} is not a checkpoint: it has no config.json; give a directory that "
            "save_pretrained wrote, or a complete copy of a Hub repository"
        )
    try:
        return CvtConfig.from_dict(read_json(file))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def read_preprocessing(directory: Path) -> CvtImageProcessor | str:
    """The preprocessing, from either file that transformers writes it to.

    The reason instead where there is none or none that we have: the network is of use without.
    """
    file = directory / "preprocessor_config.json"
    combined = directory / "processor_config.json"
    try:
        if file.is_file():
            return CvtImageProcessor.from_dict(read_json(file))
        section = read_json(combined).get("image_processor") if combined.is_file() else None
        if isinstance(section, dict):
            file = combined
            return CvtImageProcessor.from_dict(section)
    except CheckpointError as error:
        return str(error)
    except ValueError as error:
        return f"{file}: {error}"
    return (
        f"{directory} has no preprocessor_config.json, without which images cannot be prepared as in "
        "training; copy it from the model that this one was trained from, or write one with "
        "ConvNextImageProcessor(...).save_pretrained"
    )
