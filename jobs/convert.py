"""`cvt-pipeline convert SRC DST`: a checkpoint of any layout to the Hub's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from jobs.common import console, run_module, set_up_logging

SETTINGS: dict[str, object] = {}


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="a directory, a weight file (.safetensors, .bin, .pth of the original authors, .h5 of "
            "TensorFlow), a Hub id or a model's name",
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="a new directory")],
) -> None:
    """Write a checkpoint of any layout in the Hub's layout, which transformers reads too."""
    set_up_logging(verbose=False)
    from pipeline.convert import convert as convert_checkpoint

    for path in convert_checkpoint(source, destination):
        console.print(f"wrote {escape(str(path))}", highlight=False)


if __name__ == "__main__":
    run_module(convert, SETTINGS)
