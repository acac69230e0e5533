"""What a server holds, in this process: views that follow an output, whatever is wrong with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import LabelConfig, ServeConfig
from pipeline.errors import SearchError
from pipeline.labels.make import make_labels
from pipeline.labels.reviews import FOLDER, Decision, record
from pipeline.serve.answers import Deciding
from pipeline.serve.review_api import Orders, _decision
from pipeline.serve.search_api import ChangedError, chosen_of
from pipeline.serve.site import Site
from pipeline.storage import Storage
from tests.test_evaluate import CLASSES, make
from tests.vector_output import commit_vectors, empty_output


def site_of(output: Storage, cache: Path) -> Site:
    return Site(output, ServeConfig(), {}, cache=cache)


def test_a_file_that_is_damaged_for_a_while_stops_no_later_refresh(tmp_path: Path) -> None:
    output = make(tmp_path / "out").output
    site = site_of(output, tmp_path / "cache")
    vectors = np.ones((5, 16), np.float32)
    stem = commit_vectors(output, "c", vectors)
    path = Path(output.path(f"embeddings/{stem}.parquet"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    output.write_bytes(f"{FOLDER}/20260101T000000.000000Z-x.json", b"{")
    assert not site.refresh()
    path.write_bytes(whole)
    assert site.refresh()
    assert len(site.view.catalogue) == 245


def test_the_labels_of_extract_are_shown_whatever_their_number(tmp_path: Path) -> None:
    for count, rows in ((1000, 3000), (20, 30)):
        names = [f"class {number % count}" for number in range(rows)]
        output = empty_output(tmp_path / f"out-{count}", sorted(set(names)))
        columns: dict[str, object] = {"label": names, "score": np.ones(rows, np.float32)}
        commit_vectors(output, "a", np.ones((rows, 4), np.float32), columns=columns)
        view = site_of(output, tmp_path / "cache").view
        assert [view.label_of(row)[0] for row in range(rows)] == names
        assert len(Orders().of(view, "class 7")) == names.count("class 7")


def decided(site: Site, row: int, action: str, label: str | None = None) -> Decision:
    (image,) = site.images(site.view, [row])
    one = Deciding.model_validate({"image_id": image["image_id"], "action": action, "label": label})
    return _decision(one, site.view, row, "ann", "2026")


def test_who_saw_another_label_accepts_nothing(tmp_path: Path) -> None:
    output = make(tmp_path / "out").output
    make_labels(output, LabelConfig())
    site = site_of(output, tmp_path / "cache")
    label, _ = site.view.label_of(0)
    assert decided(site, 0, "accept", label).label == label
    make_labels(output, LabelConfig(coarser=dict.fromkeys(CLASSES, "animal")))
    site.refresh()
    for action in ("accept", "reject"):
        with pytest.raises(ChangedError, match="the label is animal by now; look at it again"):
            decided(site, 0, action, label)
    assert decided(site, 0, "accept").label == "animal"


def test_unknown_is_no_label_to_accept_unless_it_is_a_class(tmp_path: Path) -> None:
    output = make(tmp_path / "out").output
    record(output, [Decision("a#0", "reject", None)])
    make_labels(output, LabelConfig())
    site = site_of(output, tmp_path / "cache")
    assert site.view.label_of(0)[0] == "unknown"
    for action, label in (("accept", None), ("accept", "unknown"), ("relabel", "unknown")):
        with pytest.raises(SearchError, match="unknown is no label: change it to the right one, or reject"):
            decided(site, 0, action, label)
    assert decided(site, 0, "reject", "unknown").label is None


def test_a_facet_s_name_may_have_colons() -> None:
    texts = ["meta:kind:a:b", "meta:x", "kind:"]
    assert chosen_of(texts, ["meta", "meta:kind", "kind"]) == (
        ("kind", ""),
        ("meta", "x"),
        ("meta:kind", "a:b"),
    )
    assert chosen_of(["other:x:y"], []) == (("other", "x:y"),)
    with pytest.raises(SearchError, match="it is column:value"):
        chosen_of(["kind"], ["kind"])
