"""`cvt-pipeline demo`: the whole way on photographs that come with the installation, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from jobs.common import (
    FAILED,
    INCOMPLETE,
    console,
    process_started,
    run_module,
    set_up_logging,
    stop_on_signals,
)

SETTINGS: dict[str, object] = {}
SHARE_WANTED = 0.95


def demo(
    folder: Annotated[Path, typer.Argument(help="where to put everything")] = Path("demo-output"),
) -> None:
    """Make a corpus of photographs, embed it, index it, search it, and show how well that went."""
    stop = stop_on_signals()
    set_up_logging(verbose=False)
    from pipeline.classify import DEFAULT_MODEL
    from pipeline.demo import demo as run_demo
    from pipeline.progress import run_display
    from pipeline.report import summarize

    console.print(
        f"model: {DEFAULT_MODEL}, a small CvT trained on CIFAR-10, which comes with the installation"
    )
    with run_display(console) as progress:
        result = run_demo(folder, stop=stop, on_progress=progress, started=process_started())
    summarize(result.tally, console, next_step="search --image FILE")
    if result.tally.failed_shards or result.tally.stopped:
        raise typer.Exit(INCOMPLETE)
    console.print(
        f"{result.num_photographs} photographs in {result.num_images} variants, "
        f"{result.num_broken} broken files among them\n"
        f"[bold]{result.share_found:.1%}[/] of the variants find another variant of their own "
        f"photograph first (wanted: {SHARE_WANTED:.0%})\n"
        f"gallery: {escape(str(result.gallery.resolve()))}",
        highlight=False,
    )
    raise typer.Exit(0 if result.share_found >= SHARE_WANTED else FAILED)


if __name__ == "__main__":
    run_module(demo, SETTINGS)
