"""`cvt-pipeline status OUTPUT`: what an output holds, and how a run on it gets on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from jobs.common import console, run_module, set_up_logging

SETTINGS: dict[str, object] = {}
_STATES = {
    "running": "[green]running[/]",
    "starting": "[green]starting[/]",
    "stalled": "[red]stalled or killed[/]; the next run takes over when its lease has expired",
    "dead": "[red]killed[/]; the next extract goes on where it was",
}


def status(
    output: Annotated[str, typer.Argument(help="the output of an extract")],
    as_json: Annotated[bool, typer.Option("--json", help="print the result on stdout")] = False,
) -> None:
    """Totals of an output, the run at work on it, its last run and its index."""
    set_up_logging(verbose=False)
    from pipeline.load_config import open_output
    from pipeline.status import status as read_status

    values = read_status(open_output(output))
    if as_json:
        typer.echo(json.dumps(values))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in [*_totals(values), *_run(values["run"]), *_last_run(values)]:
        table.add_row(name, value)
    console.print(table)


def _totals(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from pipeline.report_parts import size

    yield "output", escape(values["output"])
    yield "shards", f"{values['shards']:,}, last committed at {values['last_commit_at'] or 'no time'}"
    yield "images", f"{values['images']:,}"
    yield "rejects", f"{values['rejects']:,}{_reasons(values['rejects_by_reason'])}"
    yield "size", size(values["size_bytes"])
    yield "model", escape(f"{values['checkpoint']}, {values['precision']}")
    yield "fingerprint", values["fingerprint"]
    yield "index", values["index"] or "none; cvt-pipeline index makes it"


def _run(run: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """The run that holds the output, or left word and no result."""
    if run is None:
        return
    yield "", ""
    yield "run", f"{escape(run['run'])}, {_STATES[run['state']]}"
    yield "", escape(f"process {run['pid']} on {run['host']}, since {run['since']}")
    yield "", f"last heard of at {run['heard_of_at']}"
    progress = run["progress"]
    if progress is None:
        return
    from pipeline.progress import format_duration

    done = progress["shards_committed"] + progress["shards_failed"]
    failed = f", {progress['shards_failed']:,} failed" if progress["shards_failed"] else ""
    yield "  shards", f"{done:,} of {progress['shards_planned']:,}{failed}"
    yield "  images", f"{progress['images_seen']:,}"
    recent, overall = progress["images_per_s_last_minute"], progress["images_per_s"]
    yield "  images/s", f"{recent:,.1f} over the last minute, {overall:,.1f} in all"
    rejects = progress["rejects_seen"]
    yield "  rejects", f"{rejects:,}{_reasons(progress['rejects_seen_by_reason'])}"
    left = progress["seconds_left"]
    yield "  time left", "not known yet" if left is None else f"about {format_duration(left)}"
    yield "  limited by", progress["limiting_stage"] or "start-up"


def _last_run(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    last = values["last_run"]
    if last is not None:
        yield "", ""
        shards = last["shards"]
        yield "last run", f"{escape(last['run'])}: {'[red]stopped[/]' if last['stopped'] else 'finished'}"
        yield "  shards", f"{shards['committed']:,} of {shards['planned']:,} committed"
        yield "  images", f"{last['images']:,}, {last['images_per_s']:,.1f} images/s"
        if last["stopped"]:
            yield "  stopped", escape(last["stopped"])
        failed = list(shards["failed"])
        if failed:
            more = f" and {len(failed) - 5:,} more" if len(failed) > 5 else ""
            yield "  failed", escape(", ".join(failed[:5])) + more
    if values["unfinished_runs"]:
        leftovers = f"{', '.join(values['unfinished_runs'][:5])}; the next extract clears them away"
        yield "leftovers", escape(f"of {leftovers}")


def _reasons(counts: dict[str, int]) -> str:
    named = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return f": {named}" if named else ""


if __name__ == "__main__":
    run_module(status, SETTINGS)
