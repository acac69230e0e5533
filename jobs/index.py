"""`cvt-pipeline index OUTPUT [key=value ...]`: build or update the similarity index, and publish it."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape

from jobs.common import console, run_module, set_up_logging

SETTINGS: dict[str, object] = {}


def index(
    output: Annotated[str, typer.Argument(help="the output of an extract")],
    overrides: Annotated[list[str] | None, typer.Argument(help="index.key=value")] = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="serve the version before the served one again")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print index.json on stdout")] = False,
) -> None:
    """Bring the index up to the committed images, measure its recall, and serve it from now on."""
    set_up_logging(verbose=False)
    from pipeline.config import IndexConfig
    from pipeline.index.build import build_index, roll_back_index
    from pipeline.load_config import load_section, open_output

    config = load_section(IndexConfig, overrides or (), "index")
    place = open_output(output)
    record = roll_back_index(place, config) if rollback else build_index(place, config)
    if as_json:
        typer.echo(json.dumps(record.to_json()))
    size = record.size_bytes / 1e6
    console.print(
        f"index {record.version}: {record.type}, {record.num_vectors:,} vectors of {record.dim}, "
        f"{size:,.1f} MB, recall@10 {record.recall_at_10:.3f}, {record.latency_ms:.2f} ms a query, "
        f"built in {record.build_s:.1f} s with {record.peak_memory_bytes / 1e6:,.0f} MB "
        f"({escape(record.reason)})\n"
        f"next: cvt-pipeline search {escape(place.uri)} --image FILE",
        highlight=False,
    )


if __name__ == "__main__":
    run_module(index, SETTINGS)
