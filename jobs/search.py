"""`cvt-pipeline search OUTPUT (--image … | --id ID | --ids FILE | --vector FILE)`: nearest images."""

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
    image: Annotated[
        list[str] | None, typer.Option(help="query image: a file, a URL or a folder of images")
    ] = None,
    image_id: Annotated[
        list[str] | None, typer.Option("--id", help="query by an indexed image's id")
    ] = None,
    ids: Annotated[Path | None, typer.Option("--ids", help="a text file of ids, one a line")] = None,
    vector: Annotated[
        Path | None, typer.Option(help="query vectors: .npy, or Parquet with a column embedding")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="how many neighbours")] = 10,
    where: Annotated[
        str | None, typer.Option(help="only images for which this SQL expression is true")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout")] = False,
    html: Annotated[Path | None, typer.Option(help="write a self-contained gallery here")] = None,
    to: Annotated[Path | None, typer.Option(help="write all hits into this Parquet file")] = None,
) -> None:
    """Find the images nearest to images, to indexed images or to vectors."""
    set_up_logging(verbose=False)
    kinds = {"--image": image, "--id": image_id, "--ids": ids, "--vector": vector}
    if sum(value is not None for value in kinds.values()) != 1:
        raise ConfigError(
            "give one query, or several of one kind: --image FILE, URL or folder, --id ID, --ids FILE.txt, "
            "or --vector FILE.npy"
        )
    if to is not None and (html is not None or as_json):
        raise ConfigError("--to writes hits into a Parquet file; --html and --json print them: give one")
    from pipeline.load_config import open_output, storage_options_of
    from pipeline.query import Queries, find, gallery, read_ids_file, write_hits

    names = tuple(image_id or ()) if ids is None else read_ids_file(ids)
    queries = Queries(tuple(image or ()), names, vector)
    place = open_output(output)
    if to is not None:
        num_queries, num_hits = write_hits(place, queries, to, k=k, where=where)
        console.print(f"{num_queries:,} queries, {num_hits:,} hits: {escape(str(to))}", highlight=False)
        return
    options = storage_options_of("input", shared=False)
    answers = list(find(place, queries, k=k, where=where, input_options=options))
    if html is not None:
        try:
            html.write_text(gallery(answers), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--html: cannot write {html}: {error.strerror}") from error
        console.print(f"gallery: {escape(str(html))}", highlight=False)
    if as_json:
        typer.echo(json.dumps([answer.to_json() for answer in answers]))
    elif html is None:
        for answer in answers:
            table = Table("score", "image_id", "label", "shard", "key")
            if len(answers) > 1:
                table.title = escape(answer.query)
            for hit in answer.hits:
                row = (f"{hit.score:.4f}", hit.image_id, hit.label or "", hit.shard or "", hit.key or "")
                table.add_row(*map(escape, row))
            console.print(table)


if __name__ == "__main__":
    run_module(search, SETTINGS)
