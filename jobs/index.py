"""`cvt-pipeline index OUTPUT [key=value ...]`: build or update the similarity index, and publish it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from jobs.common import console, run_module, set_up_logging

SETTINGS: dict[str, object] = {}


def index(
    output: Annotated[str, typer.Argument(help="the output of an extract")],
    overrides: Annotated[list[str] | None, typer.Argument(help="index.key=value")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print index.json on stdout")] = False,
) -> None:
    """Build the index of all committed images, measure its recall, and serve it from now on."""
    set_up_logging(verbose=False)
    from pipeline.config import IndexConfig
    from pipeline.index.build import build_index
    from pipeline.load_config import load_section, open_output

    load_section(IndexConfig, overrides or (), "index")
    place = open_output(output)
    record = build_index(place)
    if as_json:
        typer.echo(json.dumps(asdict(record)))
    console.print(
        f"index {record.version}: {record.type}, {record.num_vectors:,} vectors of {record.dim}, "
        f"recall@10 {record.recall_at_10:.3f}, {record.latency_ms:.2f} ms a query\n"
        f"next: cvt-pipeline search {escape(place.uri)} --image FILE",
        highlight=False,
    )


if __name__ == "__main__":
    run_module(index, SETTINGS)
