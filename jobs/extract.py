"""`cvt-pipeline extract CONFIG.yaml [key.path=value ...]`: the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from jobs.common import (
    DONE,
    INCOMPLETE,
    ConfigFile,
    Into,
    Overrides,
    Verbose,
    console,
    process_started,
    run_module,
    set_up_logging,
    speaks_json,
    stop_on_signals,
)

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.stop import Stop
    from pipeline.tally import Tally

SETTINGS: dict[str, object] = {}


def extract(
    config: ConfigFile,
    overrides: Overrides = None,
    into: Into = None,
    verbose: Verbose = False,
) -> None:
    """Embed every new image of the input and commit the results, shard by shard."""
    stop = stop_on_signals()
    set_up_logging(verbose=verbose)
    from pipeline.load_config import load_config

    settings = load_config(config, overrides or (), into=into)
    set_up_logging(verbose=verbose, log_format=settings.run.log_format)
    tally = carry_out(settings, stop, verbose=verbose, next_step="index")
    if stop.signum is not None:
        raise typer.Exit(128 + stop.signum)
    raise typer.Exit(INCOMPLETE if tally.stopped or tally.failed_shards else DONE)


def carry_out(settings: Config, stop: Stop, *, verbose: bool, next_step: str | None) -> Tally:
    """Extract, with a bar or log lines on the way and a summary at the end."""
    from pipeline.extract import extract as run_extract
    from pipeline.progress import run_display
    from pipeline.report import log_summary, summarize

    with run_display(console) as progress:
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
        summarize(tally, console, next_step=next_step)
    return tally


if __name__ == "__main__":
    run_module(extract, SETTINGS)
