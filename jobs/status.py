"""`cvt-pipeline status OUTPUT`: what an output holds."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from jobs.common import console, run_module, set_up_logging

SETTINGS: dict[str, object] = {}


def status(
    output: Annotated[str, typer.Argument(help="the output of an extract")],
    as_json: Annotated[bool, typer.Option("--json", help="print the result on stdout")] = False,
) -> None:
    """Totals of an output, its last run and its index."""
    set_up_logging(verbose=False)
    from pipeline.status import status as read_status
    from pipeline.storage import Storage

    values = read_status(Storage(output))
    if as_json:
        typer.echo(json.dumps(values))
        return
    last_run = values.pop("last_run") or {}
    values["last_run"] = last_run.get("run")
    values["last_run_stopped"] = last_run.get("stopped")
    values["last_run_failed_shards"] = ", ".join((last_run.get("shards") or {}).get("failed") or {})
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in values.items():
        if value not in (None, "", [], {}):
            table.add_row(name, escape(f"{value:,}" if isinstance(value, int) else str(value)))
    console.print(table)


if __name__ == "__main__":
    run_module(status, SETTINGS)
