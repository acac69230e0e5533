"""The command line: one verb a module, each an argument list and one call.

Human output goes to stderr, data to stdout. Exit codes: 0 done; 2 bad config or arguments; 3 finished with
failed shards, stopped by a limit, or something found off; 4 another run holds the output; 130 and 143
stopped by a signal; 1 anything else.
"""

from __future__ import annotations

import importlib
import sys

import typer

from jobs.common import run_verb

VERBS = (
    *("classify", "run", "extract", "plan", "status", "verify", "index", "search", "label", "dedup"),
    *("serve", "evaluate", "finetune", "convert", "demo", "bench"),
)


def main() -> None:
    """Entry point of `cvt-pipeline`."""
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)
    app.callback()(lambda: None)
    for name in [verb] if verb in VERBS else VERBS:
        module = importlib.import_module(f"jobs.{name}")
        command = getattr(module, name)
        if isinstance(command, typer.Typer):  # a verb with verbs of its own
            app.add_typer(command, name=name)
        else:
            app.command(name, context_settings=module.SETTINGS)(command)
    run_verb(app)


HELP = "CvT embeddings and labels for large image corpora: Ray in the middle, Parquet and FAISS at the end."
