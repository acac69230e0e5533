"""Export: the inference form as a file that other runtimes execute, ONNX or OpenVINO's IR.

What enters: a `Checkpoint` and a path. What leaves: one graph from pixels of the processor's size, any
number of images, to float32 `embedding` (B, C) and, where there is a classifier, `logits` (B, K). Its
metadata are what its users need besides: `id2label` and `preprocessor_config` as JSON, `weights_sha256`.
It must not know command lines.
"""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from cvt_model.checkpoint import Checkpoint
from cvt_model.choices import EmbeddingKind
from cvt_model.fused import FusedCvt

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

PixelKind = Literal["uint8", "normalized"]

OPSET = 20  # the first with GELU as one operator
MAX_ONNX_BYTES = 1_500_000_000  # a protobuf holds 2 GiB, and torch splits weights off from 1.5 GiB on


def export_onnx(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    pixels: PixelKind = "uint8",
    embedding: EmbeddingKind = "pooled",
) -> Path:
    """Write the network as one self-contained ONNX file of opset 20, in float32; returns its path.

    Its input is `pixels`, uint8 (B, H, W, 3), as `CvtImageProcessor.to_pixels` makes them. With
    `pixels="normalized"` it is `pixel_values`, float32 (B, 3, H, W), as transformers' processors do.
    Raises CheckpointError, FileExistsError, and ValueError where a package is missing, images keep their
    sizes, or the weights exceed what one ONNX file holds.
    """
    require("onnx", "onnx", "onnxscript")
    size = sized(checkpoint)
    with new_file(Path(path)) as temporary:
        fused = inference_form(checkpoint, embedding, normalize=pixels == "uint8")
        num_bytes = sum(weight.nbytes for weight in fused.parameters())
        if num_bytes > MAX_ONNX_BYTES:
            raise ValueError(
                f"{path}: the weights take {num_bytes / 1e9:.1f} GB, more than one ONNX file may hold; "
                "write OpenVINO's format (.xml)"
            )
        network = Graph(fused) if pixels == "uint8" else NormalizedGraph(fused)
        program = trace(network, *size)
        strip_traces(program)
        program.model.metadata_props.update(metadata(checkpoint))
        program.save(temporary)
    return Path(path)


def export_openvino(
    checkpoint: Checkpoint, path: str | os.PathLike[str], *, embedding: EmbeddingKind = "pooled"
) -> tuple[Path, Path]:
    """Write the network as OpenVINO IR, float32 weights: PATH (`.xml`) and its `.bin`; returns both.

    Its input is `pixels`, uint8 (B, H, W, 3), as `CvtImageProcessor.to_pixels` makes them. Raises
    CheckpointError, FileExistsError, and ValueError where openvino is missing or images keep their sizes.
    """
    require("cpu", "openvino")
    import openvino as ov

    from cvt_model.openvino_graph import build_graph

    path = Path(path)
    if path.suffix != ".xml":
        raise ValueError(f"{path}: the name of an OpenVINO model ends in .xml")
    weights, size = path.with_suffix(".bin"), sized(checkpoint)
    with new_file(path) as temporary, new_file(weights) as temporary_weights:
        fused = inference_form(checkpoint, embedding)
        model = build_graph(fused, *size)
        for key, value in metadata(checkpoint).items():
            model.set_rt_info(value, key)
        ov.save_model(model, temporary, compress_to_fp16=False)
        temporary.with_suffix(".bin").replace(temporary_weights)
    return path, weights


class Graph(nn.Module):
    """The inference form without the logits that a network without a classifier does not have."""

    def __init__(self, fused: FusedCvt) -> None:
        super().__init__()
        self.fused = fused
        self.outputs = ("embedding", "logits")[: 2 if fused.num_labels else 1]

    def forward(self, pixels_BHWC: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.fused(pixels_BHWC)[: len(self.outputs)])


class NormalizedGraph(Graph):
    """The same from float32 (B, 3, H, W), of an inference form that normalises nothing."""

    def forward(self, pixel_values_BCHW: Tensor) -> tuple[Tensor, ...]:
        return super().forward(pixel_values_BCHW.permute(0, 2, 3, 1))


def inference_form(checkpoint: Checkpoint, embedding: EmbeddingKind, *, normalize: bool = True) -> FusedCvt:
    processor = checkpoint.processor
    if not normalize:
        processor = processor.model_copy(update={"do_rescale": False, "do_normalize": False})
    return FusedCvt(checkpoint.config, checkpoint.load().state_dict(), processor, embedding).eval()


def sized(checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width of the pixels, which a graph is made for."""
    size = checkpoint.processor.output_size
    if size is None:
        raise ValueError(f"{checkpoint.source}: images keep their sizes (do_resize is false)")
    return size


def trace(graph: Graph, height: int, width: int) -> "ONNXProgram":
    """The graph of this module for any number of images; nothing of the exporter's chatter is said."""
    if isinstance(graph, NormalizedGraph):
        name, images = "pixel_values", torch.zeros(2, 3, height, width)
    else:
        name, images = "pixels", torch.zeros(2, height, width, 3, dtype=torch.uint8)
    with quiet():
        program = torch.onnx.export(
            graph,
            (images,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[name],
            output_names=list(graph.outputs),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
    assert program is not None  # it is with dynamo=True
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps back warnings that tell a user nothing: of torchvision, and of torch's own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def strip_traces(program: "ONNXProgram") -> None:
    """Take out the exporter's stack traces: larger than the graph, and paths of this machine."""
    graph = program.model.graph
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


def metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What a file says of itself; a network without a classifier has no labels."""
    values: dict[str, Any] = {"preprocessor_config": checkpoint.processor.to_dict()}
    if checkpoint.num_labels:
        values["id2label"] = checkpoint.config.id2label
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    return {**texts, "weights_sha256": checkpoint.weights_sha256}


def require(extra: str, *packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} not installed, which this export needs; "
            f"pip install 'cvt-pipeline[{extra}]'"
        )


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to, of the same name in a folder beside `path`; moved to `path` at the end.

    Nobody reads a half-written file, and a failure leaves nothing. Raises FileExistsError.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; give a new name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        temporary.replace(path)
