"""`cvt-pipeline finetune CONFIG.yaml [key.path=value ...]`: train a classifier on labelled images."""

from __future__ import annotations

import typer

from jobs.common import (
    DONE,
    INCOMPLETE,
    ConfigFile,
    Overrides,
    Verbose,
    console,
    run_module,
    set_up_logging,
    stop_on_signals,
)

SETTINGS: dict[str, object] = {}


def finetune(config: ConfigFile, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Train a CvT on labelled images; the output is a checkpoint. Run again, it goes on."""
    stop = stop_on_signals()
    set_up_logging(verbose=verbose)
    from pipeline.finetune.config import FinetuneConfig
    from pipeline.load_config import read_config

    settings = read_config(FinetuneConfig, config, overrides or ())
    set_up_logging(verbose=verbose, log_format=settings.run.log_format)
    from pipeline.finetune.display import summarize, training_display
    from pipeline.finetune.job import finetune as run_finetune

    with training_display(console) as display:
        trained = run_finetune(settings, stop=stop, on_progress=display, verbose=verbose)
    summarize(trained, console)
    raise typer.Exit(INCOMPLETE if trained.failed_shards else DONE)


if __name__ == "__main__":
    run_module(finetune, SETTINGS)
