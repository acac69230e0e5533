"""`cvt-pipeline verify OUTPUT`: every commit checked against its files; exit 3 if anything is off."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

import typer
from rich.markup import escape

from jobs.common import DONE, INCOMPLETE, console, run_module, set_up_logging

SETTINGS: dict[str, object] = {}


def verify(
    output: Annotated[str, typer.Argument(help="the output of an extract")],
    with_input: Annotated[
        bool, typer.Option("--input", help="hold every commit against the input as it is now, too")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result on stdout")] = False,
) -> None:
    """Check counts, sizes, checksums, schemas, ids and leftovers."""
    set_up_logging(verbose=False)
    from pipeline.load_config import open_input, open_output
    from pipeline.verify import verify as run_verify

    place = open_output(output)
    result = run_verify(place, open_input=partial(open_input, output=place) if with_input else None)
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    for problem in result.problems:
        console.print(f"[red]off:[/] {escape(problem)}", highlight=False)
    if result.input is not None:
        for note in result.input.notes:
            console.print(f"[yellow]input:[/] {escape(note)}", highlight=False)
        console.print(
            f"input: {result.input.num_unchanged:,} shards as they were done, "
            f"{result.input.num_changed:,} changed, {result.input.num_gone:,} gone",
            highlight=False,
        )
    console.print(
        f"{result.num_shards:,} shards, {result.num_rows:,} images, {result.num_rejects:,} rejects: "
        + (f"{len(result.problems):,} problems" if result.problems else "all as committed"),
        highlight=False,
    )
    raise typer.Exit(DONE if result.is_ok else INCOMPLETE)


if __name__ == "__main__":
    run_module(verify, SETTINGS)
