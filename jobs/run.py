"""`cvt-pipeline run CONFIG.yaml [key.path=value ...]`: the nightly job, extract and all that follows it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from jobs.common import (
    DONE,
    INCOMPLETE,
    ConfigFile,
    Into,
    Overrides,
    Verbose,
    console,
    exit_code,
    run_module,
    set_up_logging,
    speaks_json,
    stop_on_signals,
)
from jobs.extract import carry_out

if TYPE_CHECKING:
    from pipeline.steps import Step

SETTINGS: dict[str, object] = {}
_COLOURS = {"done": "green", "failed": "red", "skipped": "yellow"}

logger = logging.getLogger("jobs")  # not __main__, as which `python -m` runs this


def run(
    config: ConfigFile,
    overrides: Overrides = None,
    into: Into = None,
    verbose: Verbose = False,
) -> None:
    """The nightly job: extract, then index, label and dedup where the config has their sections."""
    stop = stop_on_signals()
    set_up_logging(verbose=verbose)
    from pipeline.load_config import load_config
    from pipeline.nightly import nightly

    settings = load_config(config, overrides or (), into=into)
    set_up_logging(verbose=verbose, log_format=settings.run.log_format)
    tally = carry_out(settings, stop, verbose=verbose, next_step=None if settings.index else "index")
    steps = []
    for step in nightly(settings, tally, stop):
        steps.append(step)
        if len(steps) > 1:  # the extract's has told its own
            _tell(step)
    if stop.signum is not None:
        raise typer.Exit(128 + stop.signum)
    raise typer.Exit(_code(steps))


def _code(steps: Sequence[Step]) -> int:
    """The first failure decides: the code of its error, or INCOMPLETE of a step that left something out."""
    failed = next((step for step in steps if step.status == "failed"), None)
    if failed is None:
        return DONE
    return exit_code(failed.error) if failed.error else INCOMPLETE


def _tell(step: Step) -> None:
    from pipeline.progress import format_duration
    from pipeline.steps import outcome

    values = step.to_json()
    text = outcome(values)
    if speaks_json():
        level = logging.INFO if step.status == "done" else logging.WARNING
        logger.log(level, "%s %s: %s", step.name, step.status, text, extra={"values": values})
        return
    took = f", in {format_duration(step.seconds)}" if step.status == "done" else ""
    colour = _COLOURS[step.status]
    console.print(f"[{colour}]{step.name} {step.status}:[/] {escape(text)}{took}", highlight=False)


if __name__ == "__main__":
    run_module(run, SETTINGS)
