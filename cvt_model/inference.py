"""A checkpoint that is ready to run: back end, precision and batch size that suit this machine.

What enters: a `Checkpoint`, then uint8 pixels. What leaves: embeddings and logits as arrays. It must not
know images, files or clusters.
"""

import importlib.metadata
import logging
import os
from typing import Literal

import numpy as np
import torch

from cvt_model.backends import (
    Backend,
    CudaGraphBackend,
    FeatureArrays,
    OpenVinoBackend,
    Pixels,
    TorchBackend,
)
from cvt_model.calibration import choose_batch_size, cpu_name, images_per_s
from cvt_model.checkpoint import Checkpoint
from cvt_model.choices import BackendName, EmbeddingKind, Precision, resolve_backend, resolve_precision
from cvt_model.fused import FusedCvt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# OpenVINO's are small, so that a few dozen images keep every stream busy; larger ones gain nothing there.
BATCH_SIZES = {"openvino": (1, 2, 4), "torch": (1, 4, 16, 32), "cuda": (32, 64, 128, 256)}
DEFAULT_BATCH_SIZE = {"openvino": 2, "torch": 16, "cuda": 128}

logger = logging.getLogger(__name__)


class InferenceModel:
    """A network for inference: call it with uint8 pixels (B, H, W, 3) of its processor's size.

    Args:
        checkpoint: what `resolve_checkpoint` returned.
        precision: `auto` is bfloat16 on a GPU and float32 on a CPU. A CPU without arithmetic in bfloat16
            or float16 computes in float32 instead, which is faster there and no less exact.
        backend: `auto` is torch on a GPU, and on a CPU OpenVINO where it is installed, else torch.
        device: a torch device; unless given a GPU where there is one.
        num_threads: of the CPU; unless given all that this process may use.
        batch_size: images at once; `auto` measures a few sizes, once for a machine and a network, and
            remembers. Where memory does not suffice it is halved; results stay what they were.
        num_streams: batches side by side on a CPU through OpenVINO; unless given one for each thread,
            which is best for many images. One stream answers soonest for a few.
        embedding: `pooled`, the vector that the classifier sees, or `cls_token`, the raw CLS token. A
            checkpoint without a head gives the CLS token, or the mean of the tokens, as they are.

    Raises CheckpointError where weights or preprocessing cannot be used, ValueError where a back end
    cannot do what is asked.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        precision: Precision | Literal["auto"] = "auto",
        backend: BackendName | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
        num_threads: int | None = None,
        batch_size: int | Literal["auto"] = "auto",
        num_streams: int | None = None,
        embedding: EmbeddingKind = "pooled",
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.on_gpu = self.device.type != "cpu"
        self.backend = resolve_backend(backend, on_gpu=self.on_gpu)
        self.precision = resolve_precision(precision, on_gpu=self.on_gpu)
        self.num_threads = num_threads or available_cores()
        self.num_streams = num_streams or self.num_threads
        size = checkpoint.processor.output_size
        if size is None:
            raise ValueError(f"{checkpoint.source}: images keep their sizes (do_resize is false)")
        self.size = size
        if self.precision == "float32":  # TF32 would cost three decimal digits
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        self._fused = FusedCvt(
            checkpoint.config,
            checkpoint.load().state_dict(),
            checkpoint.processor,
            embedding,
            DTYPES[self._torch_precision()],
        ).to(self.device)
        self._running: Backend | None = None
        self.batch_size = self._measured(checkpoint) if batch_size == "auto" else batch_size
        self(self._noise(1))  # makes the back end and warms it up

    def __call__(self, pixels_BHWC: Pixels) -> FeatureArrays:
        """Features of any number of images, in their order; MemoryError where not one image fits."""
        while True:
            try:
                if self._running is None:
                    self._running = self._make(self.batch_size)
                return self._running(pixels_BHWC)
            except (torch.OutOfMemoryError, MemoryError) as error:
                self._running = None  # its memory must be free before the next one takes its own
                if self.batch_size == 1:
                    raise MemoryError("memory does not suffice for one image at a time") from error
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.batch_size //= 2
            logger.warning("out of memory; going on with batches of %d images", self.batch_size)

    def _make(self, batch_size: int) -> Backend:
        if self.backend == "openvino":
            return OpenVinoBackend(
                self._fused,
                size=self.size,
                precision=self.precision,
                batch_size=batch_size,
                num_threads=self.num_threads,
                num_streams=self.num_streams,
            )
        if self.device.type == "cuda":
            return CudaGraphBackend(self._fused, self.device, batch_size=batch_size, size=self.size)
        return self._eager(batch_size)

    def _eager(self, batch_size: int) -> TorchBackend:
        return TorchBackend(self._fused, self.device, batch_size=batch_size, num_threads=self.num_threads)

    def _measured(self, checkpoint: Checkpoint) -> int:
        """The fastest batch size; on a GPU as torch runs it, since compiling each would take minutes."""

        def measure(batch_size: int) -> float:
            make = self._eager if self.on_gpu else self._make
            side_by_side = self.num_streams if self.backend == "openvino" else 1
            try:
                return images_per_s(make(batch_size), self._noise(batch_size * side_by_side))
            except torch.OutOfMemoryError as error:
                raise MemoryError from error

        kind = "cuda" if self.on_gpu else self.backend
        circumstances = {
            "device": self._device_name(),
            "backend": f"{self.backend} {importlib.metadata.version(self.backend)}",
            "precision": self.precision,
            "num_threads": self.num_threads,
            "num_streams": self.num_streams,
            "size": self.size,
            "batch_sizes": BATCH_SIZES[kind],
            "network": {**checkpoint.config.to_dict(), "id2label": None, "label2id": None},
        }
        return choose_batch_size(BATCH_SIZES[kind], DEFAULT_BATCH_SIZE[kind], measure, circumstances)

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type if self.on_gpu else cpu_name()

    def _noise(self, length: int) -> Pixels:
        shape = (length, *self.size, 3)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def _torch_precision(self) -> Precision:
        """What torch computes in: OpenVINO converts by itself, from float32."""
        if self.on_gpu or self.precision == "float32":
            return self.precision
        if self.backend == "openvino":
            return "float32"
        if cpu_computes_in(self.precision):
            return self.precision
        logger.info("this CPU has no arithmetic in %s: computing in float32", self.precision)
        return "float32"


def cpu_computes_in(precision: Precision) -> bool:
    """Whether this CPU's vector units have the precision, so that torch does not emulate it."""
    kernels = torch.ops.mkldnn
    supported = {
        "bfloat16": kernels._is_mkldnn_bf16_supported,
        "float16": kernels._is_mkldnn_fp16_supported,
    }
    return precision == "float32" or bool(supported[precision]())


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
