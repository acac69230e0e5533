"""`cvt-pipeline evaluate OUTPUT --labels WHERE`: how good labels and neighbours are, by known labels."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape

from jobs.common import console, run_module, set_up_logging

SETTINGS: dict[str, object] = {}


def evaluate(
    output: Annotated[str, typer.Argument(help="the output of an extract, with an index")],
    labels: Annotated[
        str,
        typer.Option(
            help="a .csv, .jsonl or .parquet file with image_id and label, a metadata column of the "
            "output, or folder"
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="another output, of the same model, to look for neighbours in; else the output"),
    ] = None,
    reference_labels: Annotated[
        str | None, typer.Option(help="its labels, as --labels; the same if not given")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="neighbours that vote")] = 20,
    queries: Annotated[
        int, typer.Option(min=1, help="images that are asked for neighbours, at most")
    ] = 10_000,
    as_json: Annotated[bool, typer.Option("--json", help="print the values on stdout")] = False,
) -> None:
    """Judge the classifier, its probabilities and the neighbours by labels that are known."""
    set_up_logging(verbose=False)
    from pipeline.evaluate import Reference
    from pipeline.evaluate import evaluate as run_evaluation
    from pipeline.evaluation_page import ids_told
    from pipeline.fingerprint import require_fingerprint
    from pipeline.label_source import open_labels
    from pipeline.load_config import open_output

    place = open_output(output)
    known = open_labels(labels, require_fingerprint(place), place)
    other = None
    if reference is not None:
        there = open_output(reference)
        other = Reference(there, open_labels(reference_labels or labels, require_fingerprint(there), there))
    values = run_evaluation(place, known, other, k=k, most_queries=queries)
    if as_json:
        typer.echo(json.dumps(values))
    parts = [f"{values['labelled']:,} labelled images"]
    if values["top1"] is not None:
        top5 = "" if values["top5"] is None else f", top-5 {values['top5']:.2%}"
        parts.append(f"top-1 {values['top1']:.2%}{top5}")
        parts.append(f"calibration error {values['calibration_error']:.3f}")
    parts.append(f"{k}-NN {values['knn_accuracy']:.2%}, mAP@100 {values['map_at_100']:.3f}")
    if told := ids_told(values):
        console.print(f"labels are {escape(told)}", highlight=False)
    console.print(f"{'; '.join(parts)}\nby class: {escape(values['report'])}", highlight=False)


if __name__ == "__main__":
    run_module(evaluate, SETTINGS)
