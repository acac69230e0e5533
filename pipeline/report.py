"""What a run did: `reports/<run>.json` for programs, a page for people, a summary for the terminal."""

from __future__ import annotations

import html
import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.config import Config
from pipeline.progress import format_duration
from pipeline.storage import Storage
from pipeline.tally import Tally

REPORTS = "reports"
_PACKAGES = ("cvt-pipeline", "ray", "torch", "pyarrow", "pillow", "faiss-cpu")


def report_values(tally: Tally, config: Config) -> dict[str, Any]:
    """The report as JSON values. Names are a contract with programs that read it."""
    return {
        "run": tally.run,
        "output": tally.output,
        "started_at": datetime.fromtimestamp(tally.started, UTC).isoformat(timespec="seconds"),
        "seconds": round(tally.seconds, 3),
        "startup_s": None if tally.startup_s is None else round(tally.startup_s, 3),
        "images": tally.images,
        "rejects": tally.rejects.total(),
        "rejects_by_reason": dict(tally.rejects.most_common()),
        "images_per_s": round(tally.images_per_s, 3),
        "limiting_stage": tally.limiting_stage,
        "stage_s": {name: round(seconds, 3) for name, seconds in tally.stage_s.items()},
        "stage_slots": tally.stage_slots,
        "shards": {
            "done_before": tally.done_before,
            "planned": tally.planned_shards,
            "committed": tally.committed_shards,
            "failed": tally.failed_shards,
        },
        "stopped": tally.stopped or None,
        "fingerprint": tally.fingerprint,
        "config": config.model_dump(mode="json"),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
    }


def write_report(output: Storage, tally: Tally, config: Config) -> None:
    """Put the report beside the results, as JSON and as a page."""
    values = report_values(tally, config)
    output.write_bytes(f"{REPORTS}/{tally.run}.json", json.dumps(values, indent=1).encode())
    output.write_bytes(f"{REPORTS}/{tally.run}.html", report_page(values).encode())


def report_page(values: dict[str, Any]) -> str:
    """A self-contained page of a report's values."""
    shards = values["shards"]
    facts = {
        "images": f"{values['images']:,}",
        "rejects": f"{values['rejects']:,}",
        "images/s": f"{values['images_per_s']:,.1f}",
        "seconds": f"{values['seconds']:,.1f}",
        "shards committed": f"{shards['committed']:,} of {shards['planned']:,}",
        "shards done before": f"{shards['done_before']:,}",
        "limiting stage": values["limiting_stage"] or "-",
    }
    tiles = "".join(f"<div><b>{html.escape(v)}</b>{html.escape(k)}</div>" for k, v in facts.items())
    stopped = f"<p class=bad>stopped: {html.escape(values['stopped'])}</p>" if values["stopped"] else ""
    sections = [
        ("Rejects by reason", values["rejects_by_reason"]),
        ("Failed shards", shards["failed"]),
        ("Seconds of work by stage", values["stage_s"]),
        ("Versions", values["versions"]),
    ]
    tables = "".join(f"<h2>{title}</h2>{_rows(rows)}" for title, rows in sections if rows)
    config = html.escape(json.dumps(values["config"], indent=1))
    return _PAGE.format(
        run=html.escape(values["run"]),
        output=html.escape(values["output"]),
        tiles=tiles,
        stopped=stopped,
        tables=tables,
        fingerprint=html.escape(values["fingerprint"]),
        config=config,
    )


def summarize(tally: Tally, console: Console, next_step: str) -> None:
    """The last words of a run on the terminal: what there is, where, and what to do next."""
    table = Table(box=None, show_header=False, pad_edge=False)
    if tally.planned_shards:
        table.add_row("shards", f"{tally.committed_shards:,} of {tally.planned_shards:,} committed")
    if tally.done_before:
        table.add_row("", f"{tally.done_before:,} were done before")
    table.add_row("images", f"{tally.images:,}")
    table.add_row("rejects", f"{tally.rejects.total():,}")
    for reason, count in tally.rejects.most_common():
        table.add_row("", f"{count:,} {reason}")
    if tally.images_per_s:
        table.add_row("images/s", f"{tally.images_per_s:,.1f}, limited by {tally.limiting_stage}")
    table.add_row("seconds", format_duration(tally.seconds))
    table.add_row("output", escape(tally.output))
    console.print(table)
    for name, error in list(tally.failed_shards.items())[:20]:
        console.print(f"[red]left out:[/] {escape(name)}: {escape(error)}", highlight=False)
    if len(tally.failed_shards) > 20:
        console.print(f"[red]left out:[/] {len(tally.failed_shards) - 20:,} more; the report names all")
    if tally.stopped:
        console.print(f"[red]stopped:[/] {escape(tally.stopped)}", highlight=False)
    elif not tally.planned_shards:
        console.print("nothing to do: every shard of the input is committed")
    else:
        console.print(f"next: cvt-pipeline {next_step} {escape(tally.output)}", highlight=False)


def _rows(values: dict[str, Any]) -> str:
    cells = (
        f"<tr><td>{html.escape(str(key))}<td>{html.escape(str(value))}" for key, value in values.items()
    )
    return f"<table>{''.join(cells)}</table>"


_PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>Run {run}</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem }}
.tiles div {{ border: 1px solid #8884; border-radius: .5rem; padding: .75rem; color: #888 }}
.tiles b {{ display: block; font-size: 1.3rem; color: CanvasText }}
table {{ border-collapse: collapse }} td {{ padding: .15rem 1.5rem .15rem 0; vertical-align: top }}
pre {{ background: #8881; padding: 1rem; border-radius: .5rem; overflow: auto }}
.bad {{ color: #c33 }}
</style>
<h1>Run {run}</h1><p>{output}</p>{stopped}<div class=tiles>{tiles}</div>{tables}
<h2>Fingerprint</h2><code>{fingerprint}</code><h2>Configuration</h2><pre>{config}</pre>
"""
