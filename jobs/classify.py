"""`cvt-pipeline classify FILE or URL…`: labels and scores for a few images, at once."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from jobs.common import FAILED, console, run_module, set_up_logging
from pipeline.classify import DEFAULT_MODEL, Classified
from pipeline.classify import classify as classify_images

SETTINGS: dict[str, object] = {}


def classify(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE…", help="files or URLs of images")],
    checkpoint: Annotated[
        str,
        typer.Option("--checkpoint", "-m", help="a directory, a weight file, a Hub id or a model's name"),
    ] = DEFAULT_MODEL,
    k: Annotated[int, typer.Option("-k", min=1, help="how many labels an image")] = 5,
    precision: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, torch or openvino")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout")] = False,
) -> None:
    """Label images with a CvT classifier; one that cannot be read costs no other, and gives exit code 1."""
    set_up_logging(verbose=False)
    results = []
    for result in classify_images(
        images, checkpoint=checkpoint, precision=precision, backend=backend, top_k=k
    ):
        results.append(result)
        if result.error is not None:
            console.print(f"[bold red]error:[/] {escape(result.error)}", highlight=False)
    if as_json:
        typer.echo(json.dumps([result.to_json() for result in results]))
    else:
        show([result for result in results if result.error is None])
    if any(result.error is not None for result in results):
        raise typer.Exit(FAILED)


def show(results: list[Classified]) -> None:
    """A table of all predictions; an image's name stands once."""
    if not results:
        return
    table = Table("image", "score", "label", "label_id")
    table.columns[0].overflow = table.columns[2].overflow = "fold"
    for result in results:
        name = result.image
        for label, label_id, score in result.predictions:
            table.add_row(*map(escape, (name, f"{score:.4f}", label, str(label_id))))
            name = ""
    console.print(table)


if __name__ == "__main__":
    run_module(classify, SETTINGS)
