"""Labels that are known and go before what a method says: given ones, and before those what people decided.

Enters: rows of LABELS as a method made them. Leaves: the same, some replaced.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from pipeline.commits import CommitLog
from pipeline.label_source import LabelSource
from pipeline.labelled_rows import read_labels
from pipeline.labels.decide import UNKNOWN, UNKNOWN_ID, Rule
from pipeline.labels.reviews import standing
from pipeline.quality import class_order
from pipeline.schema import IMAGE_ID, LABELS

GIVEN, REVIEW = "given", "review"


class Overrides:
    """What is known of an output's images; `names` are the rule's labels and what else is known.

    Rows of a known label have a score of 1 and no margin. A rejected one is unknown, with a score of 0.
    """

    def __init__(
        self, log: CommitLog, rule: Rule, given: LabelSource | None, coarser: Mapping[str, str]
    ) -> None:
        self._given, self._coarser = given, coarser
        self._reviews = {
            image_id: self._decided(decision.label, rule.labels)
            for image_id, decision in standing(log.output).items()
        }
        found = {label for label in self._reviews.values() if label is not None}
        if given is not None:
            found |= {coarser.get(name, name) for name in read_labels(log, given).names}
        self.names = (*rule.labels, *class_order(found - set(rule.labels)))
        self._place = {name: number for number, name in reversed(list(enumerate(self.names)))}

    @property
    def columns(self) -> tuple[str, ...]:
        """What has to be read of each row."""
        return self._given.columns if self._given else ()

    def put_into(self, rows: pa.Table, table: pa.Table) -> pa.Table:
        """The rows of LABELS, made of the rows of `table`, with what is known in its place."""
        known = self._known(table)
        if not known:
            return rows
        values = rows.to_pylist()
        for number, (label, method) in known.items():
            row = {"label": UNKNOWN, "label_id": UNKNOWN_ID, "score": 0.0}
            if label is not None:
                row = {"label": label, "label_id": self._place[label], "score": 1.0}
            values[number] |= {**row, "margin": None, "runner_up": None, "method": method}
        return pa.Table.from_pylist(values, LABELS)

    def _known(self, table: pa.Table) -> dict[int, tuple[str | None, str]]:
        """By row: the label, None where it is none of the classes, and how that is known."""
        known: dict[int, tuple[str | None, str]] = {}
        if self._given is not None:
            labels = enumerate(self._given.labels_of(table).to_pylist())
            known = {n: (self._coarser.get(it, it), GIVEN) for n, it in labels if it is not None}
        if self._reviews:
            ids = enumerate(table.column(IMAGE_ID).to_pylist())
            known |= {n: (self._reviews[it], REVIEW) for n, it in ids if it in self._reviews}
        return known

    def _decided(self, label: str | None, labels: tuple[str, ...]) -> str | None:
        """The label that somebody decided for, as this version has it; None for none of its labels."""
        if label in labels:
            return label
        return None if label is None or label == UNKNOWN else self._coarser.get(label, label)
