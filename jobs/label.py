"""`cvt-pipeline label OUTPUT [--from head]`: labels for every image, from what extract has stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from jobs.common import console, run_module, set_up_logging

if TYPE_CHECKING:
    from pipeline.config import LabelConfig
    from pipeline.storage import Storage

SETTINGS: dict[str, object] = {}
_MOST_LABELS = 12


def label(
    output: Annotated[str, typer.Argument(help="the output of an extract")],
    overrides: Annotated[list[str] | None, typer.Argument(help="label.key=value")] = None,
    method: Annotated[
        str,
        typer.Option(
            "--from",
            help="head: the classifier's own classes; neighbours: votes of labelled images; probe: a "
            "linear classifier trained on labelled images",
        ),
    ] = "head",
    labels: Annotated[
        str | None,
        typer.Option(
            help="labels that are known: a .csv, .jsonl or .parquet file with image_id and label, a "
            "metadata column of the output, or folder"
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="another output, of the same model, that --labels are of")
    ] = None,
    coarser: Annotated[
        Path | None, typer.Option("--map", help="YAML file: a coarser label for each class")
    ] = None,
    export: Annotated[
        str | None, typer.Option(help="write the labels to this file too, for another tool")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="csv, jsonl, datasets (Parquet with a ClassLabel), label-studio or image-folder; by the "
            "file's suffix if not given",
        ),
    ] = None,
    served: Annotated[
        bool, typer.Option("--served", help="with --export: the labels that are there, none are made")
    ] = False,
    suggest: Annotated[
        int | None,
        typer.Option(min=1, help="instead: so many images to label next, uncertain ones unlike each other"),
    ] = None,
    suspects: Annotated[
        bool, typer.Option("--suspects", help="instead: which of --labels are probably wrong, ranked")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the summary on stdout")] = False,
) -> None:
    """Label every image without running the model again."""
    set_up_logging(verbose=False)
    from pipeline.config import LabelConfig
    from pipeline.errors import ConfigError
    from pipeline.labels.exports import check_kind, export_labels
    from pipeline.labels.make import make_labels
    from pipeline.load_config import load_section, open_output, read_mapping

    export_kind = None if export is None else check_kind(export, kind)
    if export is None and (served or kind):
        raise ConfigError("--export: name the file that labels are to be written to")
    if suspects and suggest is not None:
        raise ConfigError("--suggest, --suspects: one question at a time; run label twice")
    given: dict[str, Any] = {"method": method, "labels": labels, "reference": reference}
    if coarser is not None:
        given["coarser"] = read_mapping(coarser, "--map")
    given = {name: value for name, value in given.items() if value is not None}
    config = load_section(LabelConfig, overrides or (), "label", given)
    place = open_output(output)
    if suggest is not None or suspects:
        summary = _look(place, config, suggest)
        if as_json:
            typer.echo(json.dumps(summary))
        return
    if not served:
        summary = make_labels(place, config)
        if as_json:
            typer.echo(json.dumps(summary))
        _tell(place, summary)
    if export is not None and export_kind is not None:
        num_rows = export_labels(place, export, export_kind, place.options_for(export))
        console.print(f"exported {num_rows:,} rows: {escape(export)}", highlight=False)


def _look(place: Storage, config: LabelConfig, suggest: int | None) -> dict[str, Any]:
    """What is to be labelled next, or looked at again."""
    from pipeline.labels import suggest as suggestions
    from pipeline.labels import suspects
    from pipeline.load_config import storage_options_of

    options = storage_options_of("input", shared=False)
    if suggest is not None:
        summary = suggestions.suggest(place, config, suggest, options)
        folder, files = suggestions.FOLDER, (suggestions.FILE, suggestions.SHEET)
        found = f"{summary['suggestions']:,} images to label next"
    else:
        summary = suspects.find_suspects(place, config, options)
        folder, files = suspects.FOLDER, (suspects.FILE, suspects.SHEET)
        found = f"{summary['flagged']:,} of {summary['labelled']:,} labels are probably wrong"
    paths = [place.url(f"{folder}/{summary['version']}/{name}") for name in files]
    console.print(f"{found}\nlist: {escape(paths[0])}\npage: {escape(paths[1])}", highlight=False)
    return summary


def _tell(place: Storage, summary: dict[str, Any]) -> None:
    """What was made, in a few lines."""
    counts = list(summary["labels"].items())
    most = ", ".join(f"{escape(name)} {count:,}" for name, count in counts[:_MOST_LABELS])
    more = f", … ({len(counts):,} labels)" if len(counts) > _MOST_LABELS else ""
    lines = [
        f"labels {summary['version']}: {summary['images']:,} images by {summary['method']}",
        most + more,
    ]
    if "calibration" in summary:
        found = summary["calibration"]
        lines.append(
            f"calibrated on {found['rows']:,} images: temperature {found['temperature']:.2f}, calibration "
            f"error {found['error_before']:.3f}, with it {found['error_after']:.3f}"
        )
    if "cross_validation" in summary:
        found = summary["cross_validation"]
        lines.append(
            f"trained on {summary['trained_on']:,} images; accuracy {found['accuracy']:.1%} "
            f"({found['accuracy_low']:.1%} to {found['accuracy_high']:.1%}) by cross-validation"
        )
        curve = summary["learning_curve"]
        lines.append("by labels: " + ", ".join(f"{it['labels']:,}: {it['accuracy']:.1%}" for it in curve))
    path = f"labels/{summary['version']}/labels.parquet"
    lines.append(f"rows: {escape(place.url(path))}")
    console.print("\n".join(lines), highlight=False)


if __name__ == "__main__":
    run_module(label, SETTINGS)
