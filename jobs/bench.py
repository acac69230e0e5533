"""`cvt-pipeline bench`: the machine's ceilings, and what a run reaches; `bench model`: the model alone."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from jobs.common import console, run_verb, set_up_logging
from pipeline.errors import ConfigError

DEFAULT_CHECKPOINT = "cvt-tiny-random"

bench = typer.Typer(help="What this machine can do, and what we reach of it.")

AsJson = Annotated[bool, typer.Option("--json", help="print the figures on stdout")]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="print the table on stdout")]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="a published model's name with drawn weights")
]


@bench.callback(invoke_without_command=True)
def whole(
    context: typer.Context,
    checkpoint: Annotated[
        str, typer.Option(help="a directory, a weight file, a Hub id or a model's name such as cvt-13")
    ] = DEFAULT_CHECKPOINT,
    images: Annotated[
        Path | None, typer.Option(help="a folder of photographs; else those of scikit-image")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    decode: Annotated[
        str, typer.Option(help="of the run: exact or fast; alone both are measured")
    ] = "exact",
    num_images: Annotated[
        int | None, typer.Option(min=1, help="of the run; else as many as take half a minute")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="how often everything is measured, in turn")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="cores for all of it; else all of this process's")
    ] = None,
    no_rival: Annotated[bool, typer.Option("--no-rival", help="without transformers' pipeline")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="on whose disk corpus and output are meanwhile; else TMPDIR")
    ] = None,
    random_weights: RandomWeights = False,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Each stage alone (read, decode, model, write), a real run, and transformers' pipeline beside it."""
    given = [name for name in context.params if is_given(context, name)]
    if context.invoked_subcommand is not None:
        if given:
            option = given[0].removeprefix("as_").replace("_", "-")
            raise ConfigError(
                f"--{option}: options of `bench {context.invoked_subcommand}` follow its name"
            )
        return
    set_up_logging(verbose=False)
    refuse_both(as_json, as_markdown)
    from pipeline.bench.ground import WholeBench
    from pipeline.bench.whole import bench_whole
    from pipeline.bench.whole_report import HEADINGS, markdown, rows, summary

    if "checkpoint" not in given:
        say(f"no --checkpoint: {DEFAULT_CHECKPOINT}, which is far smaller than a published CvT")
    wanted = WholeBench(
        checkpoint=checkpoint,
        images=images,
        precision=precision,
        decode=decode,
        num_images=num_images,
        rounds=rounds,
        num_threads=threads,
        random_weights=random_weights,
        with_rival=not no_rival,
        folder=folder,
    )
    with unwinding_on_sigterm():
        figures = bench_whole(wanted, say)
    show(HEADINGS, rows(figures), summary(figures))
    print_figures(figures, markdown(figures), as_json, as_markdown)


@bench.command()
def model(
    checkpoint: Annotated[
        str, typer.Option(help="a directory, a weight file, a Hub id or a model's name such as cvt-13")
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="images that each form is handed at once")],
    rounds: Annotated[int, typer.Option(min=1, help="how often each form is measured")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="of the CPU; unless given all of this process's cores")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="float32, bfloat16 or float16, again for several; else the first two"),
    ] = None,
    rival: Annotated[
        list[str] | None,
        typer.Option(help="eager, compiled, openvino or onnxruntime, again for several; else all"),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="a folder of photographs; else random pixels")] = None,
    random_weights: RandomWeights = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="peak memory too, each form in a process of its own")
    ] = False,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Our forms against transformers: eager, compiled, through OpenVINO and onnxruntime, interleaved."""
    set_up_logging(verbose=False)
    refuse_both(as_json, as_markdown)
    from pipeline.bench.model import ModelBench, bench_model
    from pipeline.bench.report import HEADINGS, markdown, rows, summary
    from pipeline.bench.rivals import RIVALS

    figures = bench_model(
        ModelBench(
            checkpoint=checkpoint,
            batch_size=batch_size,
            precisions=precision or ("float32", "bfloat16"),
            rivals=rival or RIVALS,
            rounds=rounds,
            num_threads=threads,
            images=images,
            random_weights=random_weights,
            with_memory=memory,
        ),
        say,
    )
    show(HEADINGS, rows(figures), summary(figures))
    print_figures(figures, markdown(figures), as_json, as_markdown)


@contextlib.contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end what is under way as an exception does: processes are ended, folders removed."""
    before = signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_both(as_json: bool, as_markdown: bool) -> None:
    if as_json and as_markdown:
        raise ConfigError("give --json or --markdown, stdout takes one of them")


def say(text: str) -> None:
    console.print(escape(text), style="dim", highlight=False)


def show(headings: Sequence[str], rows: Iterable[Sequence[str]], lines: Iterable[str]) -> None:
    """The table for people, on stderr."""
    table = Table(*headings, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    for line in lines:
        console.print(escape(line), highlight=False)


def print_figures(figures: dict[str, Any], table: str, as_json: bool, as_markdown: bool) -> None:
    """For programs and files, on stdout."""
    if as_json:
        typer.echo(json.dumps(figures))
    elif as_markdown:
        typer.echo(table)


if __name__ == "__main__":
    run_verb(bench)
