"""Which network a training begins with, and as what it is kept.

Enters: the `model` section and the classes. Leaves: a network with its preprocessing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cvt_model.checkpoint import Checkpoint, resolve_checkpoint
from cvt_model.config import CvtConfig
from cvt_model.errors import CheckpointError
from cvt_model.image_processor import CvtImageProcessor
from cvt_model.initialization import attend_to_self
from cvt_model.model import CvtForImageClassification
from pipeline.errors import ConfigError
from pipeline.finetune.augment import pixels_of
from pipeline.finetune.config import NetworkConfig
from pipeline.storage import Storage

LAST = "last"  # the folder of the last weights, in that of the best


@dataclass(frozen=True)
class Start:
    """What a training begins with; nothing is loaded yet."""

    checkpoint: Checkpoint | None  # None: from scratch
    config: CvtConfig  # whatever its classes are
    processor: CvtImageProcessor
    attend_to_self: bool = False

    @property
    def identity(self) -> str:
        """Tells one beginning from another: the weights' hash, and the network's shape."""
        weights = self.checkpoint.weights_sha256 if self.checkpoint else "scratch"
        return f"{weights} {self.attend_to_self} {self.config.to_dict()}"

    @property
    def pixels(self) -> int:
        """Pixels a side of the network's images."""
        return pixels_of(self.processor)

    def classes(self, found: Sequence[str]) -> tuple[str, ...]:
        """The classes in the order of their ids: the checkpoint's own, where it has just these."""
        return self._own if self.checkpoint and sorted(self._own) == sorted(found) else tuple(found)

    @property
    def _own(self) -> tuple[str, ...]:
        return tuple(self.config.id2label[number] for number in range(self.config.num_labels))

    def has_head_of(self, classes: Sequence[str]) -> bool:
        """Whether the checkpoint's classifier is one for these classes."""
        classifies = self.checkpoint is not None and self.checkpoint.has_layernorm
        return classifies and self._own == tuple(classes)

    def build(self, classes: Sequence[str], seed: int) -> CvtForImageClassification:
        """The network for these classes in float32; what the checkpoint does not give is drawn by seed."""
        torch.manual_seed(seed)
        config = with_classes(self.config, classes)
        model = CvtForImageClassification(config)
        if self.attend_to_self:
            attend_to_self(model)
        if self.checkpoint is not None:
            loaded = self.checkpoint.load()
            state = loaded.state_dict()
            if not self.checkpoint.has_layernorm:
                state = {f"cvt.{name}": value for name, value in state.items()}
            if not self.has_head_of(classes):
                state = {name: value for name, value in state.items() if not name.startswith("classifier.")}
            kept = model.state_dict()
            model.load_state_dict({**kept, **state})
        return model


def find_start(model: NetworkConfig) -> Start:
    """The beginning that the config names. Raises ConfigError where it cannot be used."""
    checkpoint = None
    try:
        if model.checkpoint:
            checkpoint = resolve_checkpoint(model.checkpoint)
            config = checkpoint.config
        else:
            config = CvtConfig.from_dict(model.config or {})
        if model.preprocessing is None and checkpoint is not None:
            processor = checkpoint.processor
        else:
            processor = CvtImageProcessor.from_dict(model.preprocessing or {})
        if model.drop_path_rate is not None:
            config = CvtConfig.from_dict({**config.to_dict(), "drop_path_rate": model.drop_path_rate})
        pixels_of(processor)
    except CheckpointError as error:
        raise ConfigError(f"model.checkpoint: {error}") from error
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
    if config.num_channels != 3:
        raise ConfigError(f"model: the network takes {config.num_channels} channels; images here have 3")
    local = checkpoint is None and model.initialization == "attend_to_self"
    return Start(checkpoint, config, processor, local)


def check_apart(start: Start, output: Storage) -> None:
    """The files that a training begins with are none that it writes. Raises ConfigError."""
    if start.checkpoint is None or not output.is_local:
        return
    read = {file.parent.resolve() for file in start.checkpoint.weight_files}
    written = {Path(output.path(folder)).resolve() for folder in ("", LAST)}
    if read & written:
        raise ConfigError(
            f"output.uri: {output.uri} holds model.checkpoint, which the trained network would replace; "
            "choose another folder"
        )


def with_classes(config: CvtConfig, classes: Sequence[str]) -> CvtConfig:
    """The same network for these classes, in the order of their ids."""
    values = config.to_dict()
    del values["label2id"]
    return CvtConfig.from_dict({**values, "id2label": dict(enumerate(classes)), "problem_type": None})
