"""What a benchmark of the model is made from: a checkpoint, images, and transformers' model of the same.

Enters: a `Setting`, small enough to be handed to a fresh process. Leaves: `Inputs`. Knows tensors and
files; knows neither forms nor time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cvt_model.backends import Pixels
from cvt_model.checkpoint import resolve_checkpoint
from cvt_model.errors import CheckpointError, ImageError
from cvt_model.image_processor import CvtImageProcessor, open_image
from cvt_model.microsoft_spec import IMAGENET
from cvt_model.presets import ARCHITECTURES
from cvt_model.save import differences_in_transformers, save_checkpoint
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from cvt_model.model import CvtForImageClassification

BATCHES_PER_RUN = {"cpu": 1, "cuda": 8}  # a GPU is waited for once in so many batches
SEED = 0

logger = logging.getLogger(__name__)


class Unavailable(Exception):  # noqa: N818 - no failure: a fact about this machine
    """A form that cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What every form has in common."""

    source: str  # what `resolve_checkpoint` takes
    batch_size: int
    num_threads: int
    images: Path | None  # a folder of photographs; None: random pixels


class Inputs:
    """The checkpoint and its images, on this machine's GPU where it has one.

    Raises ConfigError where the checkpoint or the images cannot be used.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.num_batches = BATCHES_PER_RUN[self.device.type]
        try:
            self.checkpoint = resolve_checkpoint(setting.source)
            self.processor = self.checkpoint.processor
        except CheckpointError as error:
            raise ConfigError(f"--checkpoint: {error}") from error
        size = self.processor.output_size
        if size is None:
            raise ConfigError(
                f"--checkpoint: {setting.source}: images keep their sizes (do_resize is false), so that "
                "they make no batch; give a checkpoint whose preprocessing resizes"
            )
        self.size = size
        count = setting.batch_size * self.num_batches
        self.pixels = random_pixels(count, size)  # uint8 (count, H, W, 3)
        if setting.images is not None:
            self.pixels = photographs(count, setting.images, self.processor)
        torch.set_num_threads(setting.num_threads)
        torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32, for all of them
        torch.backends.cudnn.allow_tf32 = False

    def batches(self, dtype: torch.dtype, batch_size: int) -> list[Tensor]:
        """Normalised pixels (batch_size, 3, H, W) on the device, as many batches as make a run."""
        count = batch_size * self.num_batches
        pixels = torch.from_numpy(self.pixels[:count]).to(self.device)
        return list(torch.split(self.processor.normalize(pixels, dtype), batch_size))

    @cached_property
    def reference(self) -> nn.Module:
        """transformers' model with our weights, float32: (B, 3, H, W) to (B, K + C), logits first.

        Raises Unavailable without transformers, and where it computes something else.
        """
        differences = differences_in_transformers(self.checkpoint.config)
        if differences:
            raise Unavailable(differences[0])
        try:
            import transformers
        except ImportError as error:
            raise Unavailable("transformers is not installed") from error
        config = transformers.CvtConfig.from_dict(self.checkpoint.config.to_dict())
        headless = not self.checkpoint.has_layernorm
        model: Any
        with torch.device("meta"):
            if headless:
                model = transformers.CvtModel(config, add_pooling_layer=False)
            else:
                model = transformers.CvtForImageClassification(config)
        state = self.checkpoint.load(device=self.device).state_dict()
        model.load_state_dict(state, strict=True, assign=True)
        for module in model.modules():
            if hasattr(module, "loss_type"):  # tracing asks for it, with a warning where it is None
                module.loss_type = "ForSequenceClassification"
        return OneOutput(model, headless).eval()


class OneOutput(nn.Module):
    """transformers' model with one tensor as its output: logits, then the embedding.

    Its forward pass is its own; the classifier alone hands on what it sees, a vector an image.
    """

    def __init__(self, model: Any, headless: bool) -> None:
        super().__init__()
        self.model, self.headless = model, headless
        if isinstance(getattr(model, "classifier", None), nn.Linear):
            model.classifier = WithInput(model.classifier)

    def forward(self, pixels: Tensor) -> Tensor:
        # Without a CLS token transformers' classifier fails unless hidden states are asked for too.
        output = self.model(pixels, output_hidden_states=not self.model.config.cls_token[-1])
        if not self.headless:
            logits: Tensor = output.logits
            return logits
        if output.cls_token_value is None:
            return torch.mean(output.last_hidden_state, dim=(2, 3))
        token: Tensor = output.cls_token_value[:, 0]
        return token


class WithInput(nn.Module):
    """A linear map that returns its result and its input side by side."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, vectors: Tensor) -> Tensor:
        return torch.cat((self.linear(vectors), vectors), dim=1)


def random_pixels(count: int, size: tuple[int, int]) -> Pixels:
    return np.random.default_rng(SEED).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def photographs(count: int, folder: Path, processor: CvtImageProcessor) -> Pixels:
    """The first `count` images of a folder, in order of name, again from the first where it has fewer."""
    if not folder.is_dir():
        raise ConfigError(f"--images: {folder} is no folder")
    prepared: list[Pixels] = []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        try:
            image = open_image(path.read_bytes(), max_pixels=None).image_rgb
        except ImageError as error:
            logger.warning("--images: left out %s: %s", path.name, error)
            continue
        prepared.append(processor.to_pixels(image))
        if len(prepared) == count:
            break
    if not prepared:
        raise ConfigError(f"--images: {folder} holds no image that can be read")
    return np.stack([prepared[number % len(prepared)] for number in range(count)])


def save_random(name: str, folder: Path) -> None:
    """Write a published architecture with seeded random weights, in the Hub's layout.

    Every tensor is random, BatchNorm's statistics too, on a scale that keeps activations alive: with
    fresh weights all images have nearly equal outputs, and no disagreement would show.
    """
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"--checkpoint: {name} is no published architecture, which --random-weights needs; "
            f"one of {', '.join(ARCHITECTURES)}"
        )
    from cvt_model.model import CvtForImageClassification

    architecture = ARCHITECTURES[name]
    model = CvtForImageClassification(architecture.config)
    draw_weights(model)
    save_checkpoint(folder, model, CvtImageProcessor(size=architecture.image_size, **IMAGENET))


def draw_weights(model: CvtForImageClassification) -> None:
    generator = torch.Generator().manual_seed(SEED)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif tensor.ndim > 1:  # a kernel, a matrix or a CLS token
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
        elif name.endswith("weight"):  # of a norm
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(std=0.1, generator=generator)
