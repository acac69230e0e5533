"""`cvt-pipeline extract CONFIG.yaml [key.path=value ...]`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common import (
    DONE,
    INCOMPLETE,
    console,
    process_started,
    run_module,
    set_up_logging,
    speaks_json,
    stop_on_signals,
)

SETTINGS: dict[str, object] = {}


def extract(
    config: Annotated[Path, typer.Argument(help="YAML file; see the README for its keys")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, over the file")] = None,
    into: Annotated[
        str | None,
        typer.Option(help="another output: a URL, a path, or a name beside output.uri"),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show what Ray has to say")] = False,
) -> None:
    """Embed every new image of the input and commit the results, shard by shard."""
    stop = stop_on_signals()
    set_up_logging(verbose=verbose)
    from pipeline.extract import extract as run_extract
    from pipeline.load_config import load_config
    from pipeline.progress import ProgressDisplay
    from pipeline.report import log_summary, summarize

    settings = load_config(config, overrides or (), into=into)
    set_up_logging(verbose=verbose, log_format=settings.run.log_format)
    with ProgressDisplay(console) as progress:
        tally = run_extract(
            settings,
            stop=stop,
            on_progress=progress,
            started=process_started(),
            verbose=verbose,
        )
    if speaks_json():
        log_summary(tally)
    else:
        summarize(tally, console, next_step="index")
    if stop.signum is not None:
        raise typer.Exit(128 + stop.signum)
    raise typer.Exit(INCOMPLETE if tally.stopped or tally.failed_shards else DONE)


if __name__ == "__main__":
    run_module(extract, SETTINGS)
