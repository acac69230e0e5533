"""The forms that a benchmark compares: ours, and transformers' model by every way that people run it.

Enters: `Inputs`. Leaves: for each form a `Run`, one call of which takes the images to features. Ours is
handed uint8 pixels in memory, and normalises them; the rivals are handed normalised float tensors, on a
GPU ones that are there already. Knows no time.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Literal

import numpy as np
import torch
from torch import nn

from cvt_model.backends import FeatureArrays
from cvt_model.choices import BackendName, Precision
from cvt_model.inference import DTYPES, InferenceModel, cpu_computes_in
from pipeline.bench.inputs import Inputs, OneOutput, Unavailable
from pipeline.bench.peak import OPENVINO_HINTS

Run = Callable[[], FeatureArrays]

# What missing packages, compilers and converters raise; the classes of onnxruntime and OpenVINO's
# converter, which are none of these, are translated where they are met.
FAILURES = (ImportError, RuntimeError, ValueError, LookupError, OSError, MemoryError)


@dataclass(frozen=True)
class Form:
    """One way to run the network, in one precision."""

    name: str
    precision: Precision

    @property
    def key(self) -> str:
        """Its name in the figures."""
        return f"{self.name}_{self.precision}"

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("ours")

    @property
    def runs_in_torch(self) -> bool:
        """Whether torch computes it in its very precision, whatever that takes."""
        return self.name in ("transformers_eager", "transformers_compiled")

    def make(self, inputs: Inputs, batch_size: int) -> Run:
        """The form, compiled where it is compiled; raises what `failures_told` tells, or Unavailable."""
        return MAKERS[self.name](inputs, self.precision, batch_size)


def is_emulated(precision: Precision, device: torch.device) -> bool:
    """Whether torch emulates this precision here, hundreds of times slower than float32."""
    return device.type == "cpu" and not cpu_computes_in(precision)


@contextmanager
def failures_told(form: Form) -> Iterator[None]:
    """Turns what a rival may raise into Unavailable with the reason; ours has no excuse."""
    try:
        yield
    except FAILURES as error:
        if form.is_ours:
            raise
        if isinstance(error, ImportError) and error.name:
            raise Unavailable(f"{error.name} is not installed") from error
        raise Unavailable(reason(error)) from error


def reason(error: BaseException) -> str:
    return shorten(f"{type(error).__name__}: {error}", width=200)


def make_ours(
    inputs: Inputs, precision: Precision, batch_size: int, backend: BackendName | Literal["auto"] = "auto"
) -> Run:
    """Our inference form, on a CPU in batches of its own choice within those images."""
    model = InferenceModel(
        inputs.checkpoint,
        precision=precision,
        backend=backend,
        device=inputs.device,
        num_threads=inputs.setting.num_threads,
        batch_size=batch_size if inputs.device.type == "cuda" else "auto",
    )
    return partial(model, inputs.pixels[: batch_size * inputs.num_batches])


def make_eager(inputs: Inputs, precision: Precision, batch_size: int) -> Run:
    """transformers' model as it is."""
    return torch_run(converted(inputs.reference, precision), inputs, precision, batch_size)


def make_compiled(inputs: Inputs, precision: Precision, batch_size: int) -> Run:
    """transformers' model under torch.compile, for this batch alone."""
    if is_emulated(precision, inputs.device):
        raise Unavailable(f"this CPU has no arithmetic in {precision}; see the eager form")
    model = torch.compile(converted(inputs.reference, precision), dynamic=False)
    run = torch_run(model, inputs, precision, batch_size)
    run()
    return run


def make_openvino(inputs: Inputs, precision: Precision, batch_size: int) -> Run:
    """transformers' model through OpenVINO: as its converter reads it, one stream on all threads."""
    if inputs.device.type == "cuda":
        raise Unavailable("measured on CPUs alone")
    import openvino as ov

    pixels = inputs.batches(torch.float32, batch_size)[0]
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": inputs.setting.num_threads,
        "INFERENCE_PRECISION_HINT": OPENVINO_HINTS[precision],
    }
    model = openvino_model(inputs.reference, pixels)
    request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()
    num_labels = inputs.checkpoint.num_labels

    def run() -> FeatureArrays:
        outputs = request.infer([pixels.numpy()], share_inputs=True, share_outputs=True)
        return split(outputs[0], num_labels)

    return run


def make_onnxruntime(inputs: Inputs, precision: Precision, batch_size: int) -> Run:
    """transformers' model through torch's ONNX exporter and onnxruntime."""
    if inputs.device.type == "cuda":
        raise Unavailable("measured on CPUs alone")
    if precision != "float32":
        raise Unavailable(f"onnxruntime has no kernels for {precision} on CPUs")
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]

    pixels = inputs.batches(torch.float32, batch_size)[0]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = inputs.setting.num_threads
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(inputs.reference, pixels, Path(folder))
        with onnxruntime_failures():
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: pixels.numpy()}
    num_labels = inputs.checkpoint.num_labels

    def run() -> FeatureArrays:
        with onnxruntime_failures():
            return split(session.run(None, feed)[0], num_labels)

    return run


MAKERS: dict[str, Callable[[Inputs, Precision, int], Run]] = {
    "ours": make_ours,
    "ours_torch": partial(make_ours, backend="torch"),
    "transformers_eager": make_eager,
    "transformers_compiled": make_compiled,
    "transformers_openvino": make_openvino,
    "transformers_onnxruntime": make_onnxruntime,
}

RIVALS = tuple(name.removeprefix("transformers_") for name in MAKERS if not name.startswith("ours"))


def plain_features(inputs: Inputs, count: int) -> FeatureArrays:
    """Features of the first images by the network of `cvt_model.model`, float32."""
    model = OneOutput(inputs.checkpoint.load(device=inputs.device), not inputs.checkpoint.has_layernorm)
    return torch_run(model, inputs, "float32", count)()


def torch_run(model: Callable[..., object], inputs: Inputs, precision: Precision, batch_size: int) -> Run:
    """A torch model over the batches, waited for once."""
    batches = inputs.batches(DTYPES[precision], batch_size)
    num_labels = inputs.checkpoint.num_labels

    @torch.inference_mode()
    def run() -> FeatureArrays:
        outputs = [model(pixels) for pixels in batches]
        return split(torch.cat(outputs).float().cpu().numpy(), num_labels)  # type: ignore[arg-type]

    return run


def split(outputs: np.ndarray, num_labels: int) -> FeatureArrays:
    """Logits and embedding side by side, apart."""
    return FeatureArrays(outputs[:, num_labels:], outputs[:, :num_labels])


def converted(model: nn.Module, precision: Precision) -> nn.Module:
    return model if precision == "float32" else copy.deepcopy(model).to(DTYPES[precision])


def openvino_model(model: nn.Module, pixels: torch.Tensor) -> object:
    """What `openvino.convert_model` gives, without its report over the network."""
    from openvino.frontend import (
        FrontEndManager,
        GeneralFailure,
        NotImplementedFailure,
        OpConversionFailure,
        OpValidationFailure,
    )
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        traced = torch.jit.trace(model, pixels, check_trace=False)  # type: ignore[no-untyped-call]
    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced)  # must outlive the conversion
    try:
        graph = frontend.convert(frontend.load(decoder))
    except (GeneralFailure, NotImplementedFailure, OpConversionFailure, OpValidationFailure) as error:
        raise Unavailable(reason(error)) from error
    graph.reshape(list(pixels.shape))
    return graph


def export_onnx(model: nn.Module, pixels: torch.Tensor, folder: Path) -> Path:
    """The model as an ONNX file for this batch."""
    path = folder / "model.onnx"
    with torch.no_grad(), warnings.catch_warnings(), errors_only("torch.onnx"):
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*", FutureWarning)
        torch.onnx.export(model, (pixels,), path, dynamo=True, verbose=False)
    return path


@contextmanager
def onnxruntime_failures() -> Iterator[None]:
    from onnxruntime.capi import (  # type: ignore[import-untyped, unused-ignore]
        onnxruntime_pybind11_state as states,
    )

    try:
        yield
    except (states.Fail, states.InvalidGraph, states.NotImplemented, states.RuntimeException) as error:
        raise Unavailable(reason(error)) from error


@contextmanager
def errors_only(name: str) -> Iterator[None]:
    """Without that logger's warnings: the exporter's are of packages that the model has no use for."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
