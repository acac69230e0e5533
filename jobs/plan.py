"""`cvt-pipeline plan CONFIG.yaml [key.path=value ...]`: what extract would do, without doing it."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from jobs.common import ConfigFile, Into, Overrides, console, run_module, set_up_logging

SETTINGS: dict[str, object] = {}


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    into: Into = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result on stdout")] = False,
) -> None:
    """Shards new, changed, deleted and done; images and bytes to read and to write."""
    set_up_logging(verbose=False)
    from pipeline.load_config import load_config
    from pipeline.prepare import summarize_plan

    values = summarize_plan(load_config(config, overrides or (), into=into))
    if as_json:
        typer.echo(json.dumps(values))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in values.items():
        if name != "refusal":
            table.add_row(name, "unknown" if value is None else f"{value:,}")
    console.print(table)
    if values["refusal"]:
        console.print(f"[red]refused:[/] {values['refusal']}", highlight=False)


if __name__ == "__main__":
    run_module(plan, SETTINGS)
