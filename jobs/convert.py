"""`cvt-pipeline convert SRC DST`: a checkpoint of any layout to the Hub's, to ONNX or to OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from jobs.common import console, run_module, set_up_logging

SETTINGS: dict[str, object] = {}
DType = Literal["float32", "bfloat16", "float16"]


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="a directory, a weight file (.safetensors, .bin, .pth of the original authors, .h5 of "
            "TensorFlow), a Hub id or a model's name",
        ),
    ],
    destination: Annotated[
        Path,
        typer.Argument(
            metavar="DST",
            help="a new directory; a new .onnx file; a new .xml file of OpenVINO (and its .bin)",
        ),
    ],
    dtype: Annotated[
        DType, typer.Option(help="of a directory's weights: float32, or half of its bytes")
    ] = "float32",
) -> None:
    """Write a checkpoint of any layout in the Hub's, which transformers reads too, or for other runtimes.

    An ONNX or OpenVINO file takes uint8 pixels (any number, H, W, 3) and normalises them itself.
    """
    set_up_logging(verbose=False)
    from pipeline.convert import convert as convert_checkpoint

    for path in convert_checkpoint(source, destination, dtype):
        console.print(f"wrote {escape(str(path))}", highlight=False)


if __name__ == "__main__":
    run_module(convert, SETTINGS)
