"""An evaluation as a page: the classifier, its probabilities, the neighbours, the classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.quality_page import calibration_bars, class_table, confusion_matrix, page
from pipeline.report_parts import count, pairs, safe, section

MOST_NAMED = 10


def ids_told(values: dict[str, Any]) -> str:
    """What labels that are numbers were taken for; empty where they are names."""
    named = values["labels_are_ids_of"]
    if named is None:
        return ""
    some = [f"{number} = {label}" for number, label in list(named.items())[:MOST_NAMED]]
    more = ", …" if len(named) > MOST_NAMED else ""
    return f"numbers, taken as the classifier's ids: {', '.join(some)}{more}"


def evaluation_page(values: dict[str, Any]) -> str:
    """The page of an evaluation's values."""
    with_classifier = values["top1"] is not None
    columns = {"knn_accuracy": f"{values['k']}-NN", "map_at_100": "mAP@100"}
    if with_classifier:
        columns = {"precision": "precision", "recall": "recall", **columns, "f1": "F1"}
    body = (
        section(
            "Confusion",
            confusion_matrix(values["confusion"], values["classes"], values["said_otherwise"]),
            "labels down, what the classifier says across",
            wide=True,
        ),
        section("Classes", class_table(values["per_class"], columns), "the weakest first", wide=True),
        section(
            "Calibration",
            calibration_bars(values["calibration_bins"] or ()),
            "is it right when it is sure?",
        ),
        section("What was judged", _facts(values)),
    )
    tiles = [
        (f"{values['k']}-NN", f"{values['knn_accuracy']:.2%}", f"of {count(values['queries'])} images"),
        ("recall@1", f"{values['recall_at_1']:.2%}", "the nearest has the label"),
        ("recall@10", f"{values['recall_at_10']:.2%}", "one of the ten nearest has it"),
        ("mAP@100", f"{values['map_at_100']:.3f}", "of the hundred nearest"),
    ]
    if with_classifier:
        tiles = [
            ("top 1", f"{values['top1']:.2%}", f"of {count(values['labelled'])} images"),
            _top5(values["top5"]),
            *tiles[:1],
            *tiles[2:],
            ("calibration error", f"{values['calibration_error']:.3f}", "0 is perfect"),
        ]
    return page(values["output"], "evaluate", "", values["made_at"], tiles, "".join(body))


def _top5(share: float | None) -> tuple[str, str, str]:
    if share is None:
        return "top 5", "–", "the output keeps fewer candidates (output.logits)"
    return "top 5", f"{share:.2%}", "label among the five first"


def _cautions(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What makes the figures mean something else than they seem to."""
    if told := ids_told(values):
        yield "labels", told
    if values["not_indexed"]:
        yield "not in the index", f"{count(values['not_indexed'])} labelled images; run cvt-pipeline index"


def _facts(values: dict[str, Any]) -> str:
    other = values["reference"] != values["output"]
    rows = [
        ("images", f"{count(values['images'])}, {count(values['labelled'])} of them labelled"),
        ("neighbours from", values["reference"] if other else "the output itself, without the image"),
        ("asked for neighbours", count(values["queries"])),
        *_cautions(values),
        ("model", values["model"]),
        ("precision", values["precision"]),
        ("fingerprint", values["fingerprint"]),
    ]
    return pairs((safe(key), safe(value)) for key, value in rows)
