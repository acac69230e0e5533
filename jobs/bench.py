"""`cvt-pipeline bench model --checkpoint X --batch-size N`: our forms of the model against others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from jobs.common import console, run_verb, set_up_logging
from pipeline.errors import ConfigError

bench = typer.Typer(
    no_args_is_help=True, help="What this machine can do: our forms against other people's, side by side."
)


@bench.callback()
def _group() -> None:
    """Keeps typer from taking the only command for the verb itself."""


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
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="a published model's name with drawn weights"),
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="peak memory too, each form in a process of its own")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the figures on stdout")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print the table on stdout")] = False,
) -> None:
    """Our forms against transformers: eager, compiled, through OpenVINO and onnxruntime, interleaved."""
    set_up_logging(verbose=False)
    if as_json and as_markdown:
        raise ConfigError("give --json or --markdown, stdout takes one of them")
    from pipeline.bench.model import ModelBench, bench_model
    from pipeline.bench.report import markdown
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
        lambda text: console.print(text, style="dim", highlight=False),
    )
    show(figures)
    if as_json:
        typer.echo(json.dumps(figures))
    elif as_markdown:
        typer.echo(markdown(figures))


def show(figures: dict[str, Any]) -> None:
    """The table for people, on stderr."""
    from pipeline.bench.report import HEADINGS, rows, summary

    table = Table(*HEADINGS, box=None, pad_edge=False)
    for row in rows(figures):
        table.add_row(*map(escape, row))
    console.print(table)
    for line in summary(figures):
        console.print(escape(line), highlight=False)


if __name__ == "__main__":
    run_verb(bench)
