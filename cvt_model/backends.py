"""What runs the inference form: torch, torch on a GPU, or OpenVINO, each at one batch size.

What enters: uint8 pixels (B, H, W, 3), any number of them. What leaves: float32 embeddings and logits as
arrays. Each back end cuts its input into batches of the size that it was made for. They must not know
checkpoints, nor how a batch size is chosen.
"""

import logging
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cvt_model.cache import cache_folder
from cvt_model.fused import Features, FusedCvt

Pixels = npt.NDArray[np.uint8]
Vectors = npt.NDArray[np.float32]
Forward = Callable[[Tensor], Features]

logger = logging.getLogger(__name__)


class FeatureArrays(NamedTuple):
    """Embeddings (B, C) and logits (B, K), float32; K is 0 where the model has no classifier."""

    embedding: Vectors
    logits: Vectors

    @classmethod
    def empty(cls, length: int, fused: FusedCvt) -> "FeatureArrays":
        widths = (fused.embed_dim, fused.num_labels)
        return cls(*(np.empty((length, width), np.float32) for width in widths))


class Backend(Protocol):
    """A way to run a network: uint8 pixels (B, H, W, 3) in, features in the same order out."""

    def __call__(self, pixels_BHWC: Pixels) -> FeatureArrays: ...


class TorchBackend:
    """The inference form as torch runs it, a batch after the other; `num_threads` of the CPU."""

    def __init__(self, fused: FusedCvt, device: torch.device, *, batch_size: int, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._fused, self._device, self._batch_size = fused, device, batch_size

    @torch.inference_mode()
    def __call__(self, pixels_BHWC: Pixels) -> FeatureArrays:
        features = FeatureArrays.empty(len(pixels_BHWC), self._fused)
        for batch in batches(len(pixels_BHWC), self._batch_size):
            pixels = torch.from_numpy(np.ascontiguousarray(pixels_BHWC[batch]))
            computed: Features = self._fused(pixels.to(self._device))
            for array, tensor in zip(features, computed, strict=True):
                array[batch] = tensor.cpu().numpy()
        return features


class CudaGraphBackend:
    """The inference form compiled and captured once for a fixed batch, which the last one is padded to.

    While the GPU runs a batch, the next one is copied into pinned memory.
    """

    def __init__(
        self, fused: FusedCvt, device: torch.device, *, batch_size: int, size: tuple[int, int]
    ) -> None:
        self._fused, self._batch_size = fused, batch_size
        shape = (batch_size, *size, 3)
        self._staging = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        with torch.inference_mode(), torch.cuda.device(device):
            forward = compiled(fused, self._pixels)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._features: Features = forward(self._pixels)

    @torch.inference_mode()
    def __call__(self, pixels_BHWC: Pixels) -> FeatureArrays:
        length = len(pixels_BHWC)
        results = [torch.empty((length, x.shape[1]), pin_memory=True) for x in self._features]
        copied = [torch.Event("cuda") for _ in self._staging]
        for number, batch in enumerate(batches(length, self._batch_size)):
            slot, count = number % len(self._staging), batch.stop - batch.start
            copied[slot].synchronize()  # of the batch before the last; at once where there is none
            staging = self._staging[slot][:count]
            staging.numpy()[:] = pixels_BHWC[batch]
            self._pixels[:count].copy_(staging, non_blocking=True)
            copied[slot].record()
            self._graph.replay()
            for result, tensor in zip(results, self._features, strict=True):
                result[batch].copy_(tensor[:count], non_blocking=True)
        torch.cuda.synchronize()
        return FeatureArrays(*(result.numpy() for result in results))


class OpenVinoBackend:
    """The inference form through OpenVINO: `num_streams` batches at once, on a share of the threads each.

    Small batches that run side by side stay in each core's cache, and share one copy of the weights. The
    last batch is padded. `precision` is what is asked for; a CPU that lacks its arithmetic takes float32.
    """

    def __init__(
        self,
        fused: FusedCvt,
        *,
        size: tuple[int, int],
        precision: str,
        batch_size: int,
        num_threads: int,
        num_streams: int,
    ) -> None:
        import openvino as ov

        from cvt_model.openvino_graph import build_graph

        hints = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
        self._fused, self._batch_size = fused, batch_size
        compiled_model = ov.Core().compile_model(
            build_graph(fused, *size, batch_size),
            "CPU",
            {
                "PERFORMANCE_HINT": "THROUGHPUT",
                "NUM_STREAMS": num_streams,
                "INFERENCE_NUM_THREADS": num_threads,
                "INFERENCE_PRECISION_HINT": hints[precision],
                # Pinned threads of two actors on one machine would share the first cores.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self._queue = ov.AsyncInferQueue(compiled_model, num_streams)

    def __call__(self, pixels_BHWC: Pixels) -> FeatureArrays:
        features = FeatureArrays.empty(len(pixels_BHWC), self._fused)

        def keep(request: object, batch: slice) -> None:
            for name, array in features._asdict().items():
                if array.shape[1]:
                    tensor = request.get_tensor(name).data  # type: ignore[attr-defined]
                    array[batch] = tensor[: batch.stop - batch.start]

        self._queue.set_callback(keep)
        for batch in batches(len(pixels_BHWC), self._batch_size):
            self._queue.start_async({"pixels": padded(pixels_BHWC[batch], self._batch_size)}, batch)
        self._queue.wait_all()
        return features


def batches(length: int, batch_size: int) -> Iterator[slice]:
    for start in range(0, length, batch_size):
        yield slice(start, min(start + batch_size, length))


def padded(pixels_BHWC: Pixels, length: int) -> Pixels:
    """`length` images, the last one again and again where there are fewer."""
    missing = length - len(pixels_BHWC)
    if missing == 0:
        return np.ascontiguousarray(pixels_BHWC)
    return np.concatenate([pixels_BHWC, np.repeat(pixels_BHWC[-1:], missing, axis=0)])


def compiled(fused: FusedCvt, pixels: Tensor) -> Forward:
    """The module compiled for exactly this input and warmed up; as it is where the compiler cannot work.

    Kernels are kept in our cache folder, so that a second start takes seconds.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    forward: Forward = torch.compile(fused, dynamic=False, fullgraph=True)
    try:
        return warmed_up(forward, pixels)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what dynamo's and inductor's errors are
        reason = str(error).strip().partition("\n")[0]
        logger.warning("torch.compile does not work here, so the model runs slower: %s", reason)
        return warmed_up(fused, pixels)


def warmed_up(forward: Forward, pixels: Tensor) -> Forward:
    """`forward` after three calls on a stream of its own, as capture asks for."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward(pixels)
    torch.cuda.current_stream().wait_stream(stream)
    return forward
