"""`cvt-pipeline search OUTPUT (--image FILE or URL | --id ID | --vector FILE.npy)`: nearest images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from jobs.common import console, run_module, set_up_logging
from pipeline.errors import ConfigError

SETTINGS: dict[str, object] = {}


def search(
    output: Annotated[str, typer.Argument(help="the output of an extract, with an index")],
    image: Annotated[str | None, typer.Option(help="query image: a file or a URL")] = None,
    image_id: Annotated[str | None, typer.Option("--id", help="query by an indexed image's id")] = None,
    vector: Annotated[Path | None, typer.Option(help="query vector: a .npy file")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="how many neighbours")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout")] = False,
    html: Annotated[Path | None, typer.Option(help="write a self-contained gallery here")] = None,
) -> None:
    """Find the images nearest to an image, to an indexed image or to a vector."""
    set_up_logging(verbose=False)
    if sum(query is not None for query in (image, image_id, vector)) != 1:
        raise ConfigError("give one query: --image FILE or URL, --id ID, or --vector FILE.npy")
    from pipeline.load_config import open_output, storage_options_of
    from pipeline.query import find

    answer = find(
        open_output(output),
        image=image,
        image_id=image_id,
        vector=vector,
        k=k,
        input_options=storage_options_of("input", shared=False),
    )
    if html is not None:
        try:
            html.write_text(answer.page(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--html: cannot write {html}: {error.strerror}") from error
        console.print(f"gallery: {escape(str(html))}", highlight=False)
    if as_json:
        typer.echo(json.dumps([answer.to_json()]))
    elif html is None:
        table = Table("score", "image_id", "label", "shard", "key")
        for hit in answer.hits:
            row = (f"{hit.score:.4f}", hit.image_id, hit.label or "", hit.shard or "", hit.key or "")
            table.add_row(*map(escape, row))
        console.print(table)


if __name__ == "__main__":
    run_module(search, SETTINGS)
