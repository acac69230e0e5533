"""`cvt-pipeline verify OUTPUT`: every commit checked against its files; exit 3 if anything is off."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape

from jobs.common import DONE, INCOMPLETE, console, run_module, set_up_logging

SETTINGS: dict[str, object] = {}


def verify(
    output: Annotated[str, typer.Argument(help="the output of an extract")],
    as_json: Annotated[bool, typer.Option("--json", help="print the result on stdout")] = False,
) -> None:
    """Check counts, sizes, checksums, schemas, ids and leftovers."""
    set_up_logging(verbose=False)
    from pipeline.storage import Storage
    from pipeline.verify import verify as run_verify

    result = run_verify(Storage(output))
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    for problem in result.problems:
        console.print(f"[red]off:[/] {escape(problem)}", highlight=False)
    console.print(
        f"{result.num_shards:,} shards, {result.num_rows:,} images, {result.num_rejects:,} rejects: "
        + (f"{len(result.problems):,} problems" if result.problems else "all as committed"),
        highlight=False,
    )
    raise typer.Exit(INCOMPLETE if result.problems else DONE)


if __name__ == "__main__":
    run_module(verify, SETTINGS)
