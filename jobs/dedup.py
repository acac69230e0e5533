"""`cvt-pipeline dedup OUTPUT [dedup.threshold=0.95]`: groups of images that are the same, or nearly so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from jobs.common import console, run_module, set_up_logging

SETTINGS: dict[str, object] = {}


def dedup(
    output: Annotated[str, typer.Argument(help="the output of an extract, with an index")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dedup.key=value")] = None,
    sample: Annotated[
        Path | None,
        typer.Option(help="write pairs of every similarity here, as HTML, to choose a threshold by"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the summary on stdout")] = False,
) -> None:
    """Find exact duplicates by their bytes and near-duplicates by their embeddings."""
    set_up_logging(verbose=False)
    from pipeline.config import DedupConfig
    from pipeline.dedup import find_duplicates
    from pipeline.dedup_sample import write_sample
    from pipeline.load_config import load_section, open_output, storage_options_of

    config = load_section(DedupConfig, overrides or (), "dedup")
    place = open_output(output)
    if sample is not None:
        counts = write_sample(place, sample, storage_options_of("input", shared=False))
        if as_json:
            typer.echo(json.dumps(counts))
        console.print(f"pairs by similarity: {escape(str(sample))}", highlight=False)
        console.print("next: cvt-pipeline dedup OUTPUT dedup.threshold=…", highlight=False)
        return
    summary = find_duplicates(place, config)
    if as_json:
        typer.echo(json.dumps(summary.to_json()))
    console.print(
        f"dedup {summary.version}: {summary.images:,} images; {summary.groups:,} groups with "
        f"{summary.images_in_groups:,} images at a cosine of {summary.threshold} and more; "
        f"{summary.removable:,} could go ({summary.share_removable:.1%}), {summary.same_bytes:,} of them "
        f"the same bytes\ngroups: {escape(place.url(f'dedup/{summary.version}/groups.parquet'))}",
        highlight=False,
    )


if __name__ == "__main__":
    run_module(dedup, SETTINGS)
