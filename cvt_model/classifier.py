"""Labels for images, in one line: what transformers' `pipeline("image-classification")` is there.

What enters: a checkpoint's name, then images as people name them. What leaves: predictions. It must not
know storage or clusters; for whole corpora there is the pipeline.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Literal, NamedTuple, get_args, overload

import numpy as np
import torch

from cvt_model.backends import Pixels
from cvt_model.checkpoint import resolve_checkpoint
from cvt_model.choices import BackendName, Precision
from cvt_model.errors import CheckpointError, ImageError
from cvt_model.image_file import DEFAULT_MAX_PIXELS
from cvt_model.image_source import IMAGE_TYPES, ImageInput, load_image, read_http
from cvt_model.inference import InferenceModel

NUM_READERS = 8  # threads that read and decode; slow servers are waited for side by side
MIN_CHUNK = 32  # images held as pixels at a time, at least


class Prediction(NamedTuple):
    """A class of an image and its probability; `_asdict()` is ready for JSON."""

    label: str
    label_id: int
    score: float


class CvtClassifier:
    """Classifies images: paths, http(s) URLs, bytes or PIL images, one or many, mixed as they come.

        classify = CvtClassifier("cvt-13")
        classify("cat.jpg")                      # [Prediction("tabby", 281, 0.83), …], best first
        classify(["cat.jpg", image], top_k=1)    # a list of such lists, in this order

    Scores are the softmax of the logits in float32; the sigmoid where the checkpoint's labels do not
    exclude each other (`problem_type` multi_label_classification) or where there is but one.

    Args:
        checkpoint: whatever `resolve_checkpoint` takes.
        dtype: torch's or its name; `auto` is bfloat16 on a GPU and float32 on a CPU.
        backend: `torch`, `openvino` or `auto`, as `InferenceModel` has them.
        device: a torch device; unless given a GPU where there is one.
        batch_size: 1 answers soonest, for a few images: each has all threads for itself. More, or `auto`
            (the fastest here, measured once in about ten seconds), is for many: batches run side by side.
        num_threads: of the CPU; unless given all that this process may use.
        max_pixels: images of more are refused unread; None takes any.
        read_url: reads URLs, those of other storage too if you like; raises OSError where it cannot.

    Raises CheckpointError where the checkpoint cannot classify, ValueError where a choice cannot be met.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        *,
        dtype: torch.dtype | Precision | Literal["auto"] = "auto",
        backend: BackendName | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
        batch_size: int | Literal["auto"] = 1,
        num_threads: int | None = None,
        max_pixels: int | None = DEFAULT_MAX_PIXELS,
        read_url: Callable[[str], bytes] = read_http,
    ) -> None:
        if batch_size != "auto" and batch_size < 1:
            raise ValueError(f"batch_size: found {batch_size}; choose 1 or more, or auto")
        precision = precision_of(dtype)
        self.checkpoint = resolve_checkpoint(os.fspath(checkpoint))
        if not self.checkpoint.num_labels:
            raise CheckpointError(
                f"{checkpoint}: has no classifier, so it knows no labels; name a checkpoint with one, such "
                "as cvt-13, or use CvtModel for features"
            )
        self.model = InferenceModel(
            self.checkpoint,
            precision=precision,
            backend=backend,
            device=device,
            batch_size=batch_size,
            num_threads=num_threads,
            num_streams=1 if batch_size == 1 else None,
        )
        self._max_pixels, self._read_url = max_pixels, read_url

    @overload  # a str is an Iterable of str as well; it is one image
    def __call__(self, images: ImageInput, top_k: int | None = 5) -> list[Prediction]: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, images: Iterable[ImageInput], top_k: int | None = 5) -> list[list[Prediction]]: ...

    def __call__(
        self, images: ImageInput | Iterable[ImageInput], top_k: int | None = 5
    ) -> list[Prediction] | list[list[Prediction]]:
        """The `top_k` best classes (None: all) of an image, or of each of several in their order.

        Raises ImageError, which names the image, for the first that cannot be read or decoded; `stream`
        gives the others all the same. TypeError for what is no image at all.
        """
        single = isinstance(images, IMAGE_TYPES)
        results = []
        for result in self.stream([images] if single else images, top_k):  # type: ignore[list-item, arg-type]
            if isinstance(result, ImageError):
                raise result
            results.append(result)
        return results[0] if single else results

    def stream(
        self, images: Iterable[ImageInput], top_k: int | None = 5
    ) -> Iterator[list[Prediction] | ImageError]:
        """As calling, one result after the other; in the place of a bad image its ImageError.

        Only a few dozen images are held at a time, however many there are.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: found {top_k}; choose 1 or more, or None for all classes")
        side_by_side = self.model.num_streams if self.model.backend == "openvino" else 1
        chunk_size = max(MIN_CHUNK, self.model.batch_size * side_by_side)
        numbered = enumerate(images)
        with ThreadPoolExecutor(NUM_READERS) as readers:
            while chunk := list(islice(numbered, chunk_size)):
                loaded = list(readers.map(self._load, *zip(*chunk, strict=True)))
                good = [pixels for pixels in loaded if not isinstance(pixels, ImageError)]
                predictions = iter(self._predict(np.stack(good), top_k) if good else ())
                for pixels in loaded:
                    yield pixels if isinstance(pixels, ImageError) else next(predictions)

    def _load(self, index: int, image: ImageInput) -> Pixels | ImageError:
        """Pixels for the network, or an error that names the image."""
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else f"images[{index}]"
        try:
            image_rgb = load_image(image, read_url=self._read_url, max_pixels=self._max_pixels)
            return self.checkpoint.processor.to_pixels(image_rgb)
        except ImageError as error:
            named = ImageError(error.reason, f"{name}: {error.message}")
            named.__cause__ = error
            return named
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from error

    def _predict(self, pixels_BHWC: Pixels, top_k: int | None) -> list[list[Prediction]]:
        config = self.checkpoint.config
        logits_BK = torch.from_numpy(self.model(pixels_BHWC).logits)
        independent = config.problem_type == "multi_label_classification" or config.num_labels == 1
        scores_BK = logits_BK.sigmoid() if independent else logits_BK.softmax(dim=1)
        ranked_BK, label_ids_BK = scores_BK.sort(dim=1, descending=True, stable=True)
        return [
            [
                Prediction(config.id2label[label_id], label_id, score)
                for label_id, score in zip(label_ids[:top_k], scores[:top_k], strict=True)
            ]
            for label_ids, scores in zip(label_ids_BK.tolist(), ranked_BK.tolist(), strict=True)
        ]


def precision_of(dtype: torch.dtype | str) -> Precision | Literal["auto"]:
    """A precision by torch's dtype or its name; ValueError where there is none."""
    name = str(dtype).removeprefix("torch.")
    for precision in (*get_args(Precision), "auto"):
        if name == precision:
            return precision  # type: ignore[no-any-return]
    raise ValueError(f"{name} is no precision; choose float32, bfloat16, float16 or auto")
