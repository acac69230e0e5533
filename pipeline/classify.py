"""Labels for a few images, at once: files and URLs in, predictions out. Imports no Ray and no Arrow.

Enters: what names images, and a checkpoint. Leaves: a result for each, in their order, predictions or
the reason why there are none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cvt_model.errors import ImageError
from cvt_model.image_source import read_http
from cvt_model.presets import DEFAULT_MODEL as DEFAULT_MODEL
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from cvt_model.classifier import Prediction

FEW = 32  # up to so many images the answer comes sooner where each has all threads for itself
BATCH_SIZE = 4  # for more: small batches side by side; measuring the best one would take longer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classified:
    """An image and its predictions, best first; none where there is an error."""

    image: str
    predictions: tuple[Prediction, ...] = ()
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        if self.error is not None:
            return {"image": self.image, "error": self.error}
        return {"image": self.image, "predictions": [it._asdict() for it in self.predictions]}


def classify(
    images: Sequence[str], *, checkpoint: str, precision: str, backend: str, top_k: int
) -> Iterator[Classified]:
    """The `top_k` best labels of every image, a local file or any URL that fsspec opens.

    Runs on the CPU, also beside a GPU: a few images are done there before a GPU has its kernels.
    Raises ConfigError where the checkpoint or a choice cannot be used.
    """
    from cvt_model.classifier import CvtClassifier  # torch

    try:
        classifier = CvtClassifier(
            checkpoint,
            dtype=precision,  # type: ignore[arg-type]  # from a command line: checked there
            backend=backend,  # type: ignore[arg-type]
            device="cpu",
            batch_size=1 if len(images) <= FEW else BATCH_SIZE,
            read_url=read_url,
        )
    except ValueError as error:  # a CheckpointError is one
        raise ConfigError(str(error)) from error
    if classifier.checkpoint.path is None:
        logger.warning(
            "%s has random weights, so its labels mean nothing; name a trained model with --checkpoint",
            checkpoint,
        )
    for image, result in zip(images, classifier.stream(images, top_k), strict=True):
        if isinstance(result, ImageError):
            yield Classified(image, error=result.message)
        else:
            yield Classified(image, tuple(result))


def read_url(url: str) -> bytes:
    """The bytes behind any URL that fsspec opens; OSError in words where they cannot be had."""
    if url.lower().startswith(("http://", "https://")):
        return read_http(url)  # without aiohttp, which takes as long to import as an image to classify
    from pipeline.storage import Storage

    try:
        return Storage(url).read_bytes()
    except ConfigError as error:  # no such file system, or not installed
        raise OSError(str(error)) from error
