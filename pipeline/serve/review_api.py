"""Reviewing labels and looking at duplicates."""

from __future__ import annotations

import json
import threading
from collections import Counter, OrderedDict
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow.parquet as pq
from fastapi import APIRouter, Query, Response

from pipeline.dedup import DEDUP
from pipeline.errors import SearchError
from pipeline.labels.decide import UNKNOWN
from pipeline.labels.reviews import Decision
from pipeline.published import SUMMARY, served_version
from pipeline.serve.answers import Deciding, Decisions, Groups, LabelCounts, LabelName, Page, Taken
from pipeline.serve.catalogue import Rows
from pipeline.serve.live import State, View
from pipeline.serve.search_api import PROBLEMS, ChangedError, answer, page_of, row_of
from pipeline.serve.site import Site

_ORDERS = 8
_SHOWN_TWINS = 24


class Orders:
    """The rows of a label, those of which it is least sure first."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[State, str], Rows] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, view: View, label: str) -> Rows:
        """The rows of a label. Raises SearchError where there is none of that name."""
        labels = view.labels
        if labels is None:
            raise SearchError("there are no labels to review; run: cvt-pipeline label OUTPUT --from probe")
        if label not in labels.facet.values:
            raise SearchError(f"no image has the label {label}")
        with self._lock:
            key = (view.state, label)
            if key not in self._known:
                rows = np.flatnonzero(labels.facet.codes == labels.facet.values.index(label))
                self._known[key] = rows[np.argsort(labels.margins[rows], kind="stable")]
                while len(self._known) > _ORDERS:
                    self._known.popitem(last=False)
            return self._known[key]


def label_counts(site: Site) -> dict[str, Any] | None:
    """How many images each label has, and how many of them were decided; None without labels."""
    view = site.view
    if view.labels is None:
        return None
    codes = view.labels.facet.codes[site.decided_rows(view)]
    decided = Counter(codes.tolist())
    values = view.labels.facet.values
    counts = np.bincount(view.labels.facet.codes[view.labels.facet.codes >= 0], minlength=len(values))
    entries = [
        {"label": str(value), "count": count, "decided": decided[number]}
        for number, (value, count) in enumerate(zip(values, counts.tolist(), strict=True))
    ]
    entries.sort(key=lambda entry: (-entry["count"], entry["label"]))
    decisions = Counter(decision.action for decision in site.reviews.held().values())
    return {"version": view.labels.version, "labels": entries, "decisions": dict(decisions)}


def review_routes(site: Site) -> APIRouter:
    """The paths below /api by which labels are reviewed, and duplicates looked at."""
    api = APIRouter(prefix="/api", tags=["review"], responses=PROBLEMS)
    orders = Orders()

    @api.get("/labels", response_model=LabelCounts, summary="All labels and how far their review is")
    def labels() -> Response:
        counts = label_counts(site)
        if counts is None:
            raise SearchError(
                "there are no labels; run: cvt-pipeline label OUTPUT --from probe --labels FILE"
            )
        return answer(counts)

    @api.get("/review", response_model=Page, summary="Images of a label, the least sure first")
    def review(
        label: Annotated[LabelName, Query()],
        show: Literal["open", "decided", "all"] = "open",
        after: Annotated[int, Query(ge=0, le=2**53)] = 0,
        limit: Annotated[int, Query(ge=1, le=200)] = 60,
    ) -> Response:
        view = site.view
        rows = orders.of(view, label)
        if show != "all":
            decided = site.decided_rows(view)[rows]
            rows = rows[decided if show == "decided" else ~decided]
        return page_of(site, view, rows, after, limit)

    @api.post("/review", response_model=Taken, summary="Decide; durable when it is answered")
    def decide(said: Decisions) -> Response:
        view, now = site.view, datetime.now(UTC).isoformat()
        rows = [row_of(view, one.image_id) for one in said.decisions]
        decisions = [
            _decision(one, view, row, said.reviewer, now)
            for one, row in zip(said.decisions, rows, strict=True)
        ]
        site.decide(decisions)
        return answer({"images": site.images(view, rows)})

    @api.get("/duplicates", response_model=Groups, summary="Groups of duplicates, the largest first")
    def duplicates(
        after: Annotated[int, Query(ge=0, le=2**53)] = 0,
        limit: Annotated[int, Query(ge=1, le=50)] = 12,
    ) -> Response:
        version = served_version(site.output, DEDUP)
        nothing = {"version": None, "threshold": None, "total": 0, "images_in_groups": 0}
        if version is None:
            return answer({**nothing, "groups": [], "next": None})
        summary = json.loads(site.output.read_bytes(f"{DEDUP}/{version}/{SUMMARY}"))
        groups = _groups(site, version, after, limit)
        more = after + limit if after + limit < summary["groups"] else None
        facts = {
            "version": version,
            "threshold": summary["threshold"],
            "total": summary["groups"],
            "images_in_groups": summary["images_in_groups"],
        }
        return answer({**facts, "groups": groups, "next": more})

    return api


def _decision(one: Deciding, view: View, row: int, reviewer: str, now: str) -> Decision:
    """What was said of a row. SearchError for what makes no sense, ChangedError for a label of before."""
    before, _ = view.label_of(row)
    if one.action in ("accept", "reject") and one.label not in (None, before):
        raise ChangedError(f"{one.image_id}: the label is {before or 'none'} by now; look at it again")
    label = {"accept": before, "relabel": (one.label or "").strip() or None}.get(one.action)
    if one.action in ("accept", "relabel") and label is None:
        what = "a label to accept" if one.action == "accept" else "the label that is right"
        raise SearchError(f"{one.image_id}: {one.action} needs {what}")
    if label == UNKNOWN and view.labels is not None and view.labels.unknown_is_none:
        raise SearchError(f"{UNKNOWN} is no label: change it to the right one, or reject it")
    undoes = one.undoes or "" if one.action == "undo" else ""
    return Decision(one.image_id, one.action, label, before, reviewer, now, undoes)


def _groups(site: Site, version: str, after: int, limit: int) -> list[dict[str, Any]]:
    """Groups from one number on, with those of their images that are still there."""
    view = site.view
    with site.output.local_copy(f"{DEDUP}/{version}/groups.parquet") as path:
        wanted = [("group", ">=", after), ("group", "<", after + limit)]
        members = pq.read_table(path, filters=wanted).to_pylist()
    groups: dict[int, list[dict[str, Any]]] = {}
    for member in members:
        groups.setdefault(member["group"], []).append(member)
    answers = []
    for number, twins in groups.items():
        shown = []
        for twin in twins[:_SHOWN_TWINS]:
            row = view.catalogue.row_of(twin["image_id"])
            if row is not None:
                facts = {"similarity": twin["similarity"], "representative": twin["representative"]}
                shown.append({**site.images(view, [row])[0], **facts})
        answers.append({"group": number, "size": len(twins), "images": shown})
    return answers
