"""What every verb needs: exit codes, signals, logging. Knows nothing of how anything is done."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler

from jobs.json_lines import JsonFormatter, JsonLines, speak_json
from pipeline.errors import (
    BusyError,
    DecoderError,
    Interrupted,
    LimitError,
    PipelineError,
    StorageError,
    WorkersDiedError,
)
from pipeline.stop import Stop

LOG_FORMAT_VARIABLE = "CVT_PIPELINE__RUN__LOG_FORMAT"
DONE, FAILED, BAD_INPUT, INCOMPLETE, BUSY = 0, 1, 2, 3, 4

# The arguments of every verb that takes a config.
ConfigFile = Annotated[Path, typer.Argument(help="YAML file; see the README for its keys")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value, over the file")]
Into = Annotated[
    str | None,
    typer.Option(help="another output: a URL, a path, or a name beside output.uri"),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show what Ray has to say")]

console = Console(stderr=True, soft_wrap=True, width=None if sys.stderr.isatty() else 200)


def exit_code(error: PipelineError) -> int:
    """The documented exit code of an error; what the user can mend before a run is 2."""
    if isinstance(error, Interrupted):
        return 128 + error.signum
    failed = dict.fromkeys((StorageError, DecoderError, WorkersDiedError), FAILED)
    codes = {BusyError: BUSY, LimitError: INCOMPLETE, **failed}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), BAD_INPUT)


def run_verb(command: Callable[[], object]) -> None:
    """Run a typer app or command, tell its errors in words, and exit with their code."""
    code: object = DONE
    try:
        command()
    except SystemExit as end:  # typer's own way out
        code = DONE if end.code is None else end.code
    except PipelineError as error:
        if speaks_json():
            logging.getLogger("jobs").error("%s", error)
        else:
            console.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
        code = exit_code(error)
    _leave(code if isinstance(code, int) else FAILED)


def _leave(code: int) -> NoReturn:
    """End the process with all that was said, and without taking down the interpreter.

    In a few of a hundred short runs a native thread of a library that is still winding up then aborts
    the process ("terminate called without an active exception"), and its exit code with it. Nothing is
    left to do by then: Ray is closed, files are in place.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


def run_module(verb: Callable[..., None], settings: dict[str, object]) -> None:
    """What `python -m jobs.<verb>` does."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(context_settings=settings)(verb)
    run_verb(app)


def stop_on_signals() -> Stop:
    """A Stop that SIGINT and SIGTERM set."""
    stop = Stop()
    stop.install()
    return stop


def set_up_logging(*, verbose: bool, log_format: str | None = None) -> None:
    """Log lines to stderr: `text` is rich on a terminal and plain elsewhere, `json` an object a line.

    In `json` all that `console` prints becomes such lines too. Without `log_format` the environment's
    CVT_PIPELINE__RUN__LOG_FORMAT counts, which the configuration of a run then confirms or overrules.
    """
    as_json = (log_format or os.environ.get(LOG_FORMAT_VARIABLE, "text")) == "json"
    handler: logging.Handler
    if as_json:
        speak_json(console)
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter())
    elif console.is_terminal:
        handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(as_json)
    sys.excepthook = _log_crash if as_json else sys.__excepthook__
    for package in ("pipeline", "jobs", "cvt_model"):
        quiet = logging.WARNING if console.is_terminal else logging.INFO  # a terminal has the bar
        logging.getLogger(package).setLevel(logging.DEBUG if verbose else quiet)


def speaks_json() -> bool:
    """Whether stderr takes JSON lines."""
    return isinstance(console.file, JsonLines)


def _log_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("jobs").critical("%s", error or kind.__name__, exc_info=(kind, error, trace))


def process_started() -> float:
    """Epoch seconds at which this process began, from the kernel where it tells."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:  # noqa: PTH123
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="ascii") as file:  # noqa: PTH123
            uptime = float(file.read().split()[0])
        return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()


def _escape(text: str) -> str:
    return text.replace("[", "\\[")
