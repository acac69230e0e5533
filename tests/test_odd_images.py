"""No malformed image loses another image, and nothing in the input kills the run."""

import numpy as np
import pytest

from pipeline.schema import REJECT_REASONS
from tests.odd_images import write_odd_images
from tests.running import leftovers, make_config, rows_of, run


@pytest.fixture(scope="module")
def odd(tmp_path_factory, tiny_model, ray_session):
    """The corpus's expectations, its rows and its rejects by image_id, and the run's tally."""
    folder = tmp_path_factory.mktemp("odd")
    images = write_odd_images(folder / "in")
    config = make_config(
        folder / "in",
        tiny_model,
        folder / "out",
        input__format="images",
        limits__max_reject_fraction=1,
        limits__image_timeout_s=3600,
        compute__batch_size=64,
        compute__shard_images=800,
    )
    tally = run(config)
    assert leftovers(folder / "out") == []
    return images, rows_of(folder / "out"), rows_of(folder / "out", "rejects"), tally


def test_every_odd_file_is_a_row_or_a_reject_and_none_is_both(odd):
    images, rows, rejects, tally = odd
    assert len(images) > 3000
    assert sorted(row["image_id"] for row in [*rows, *rejects]) == sorted(image.path for image in images)
    assert (tally.images, tally.rejects.total()) == (len(rows), len(rejects))
    assert (tally.failed_shards, tally.stopped) == ({}, "")


def test_every_reject_has_a_known_reason_and_a_message(odd):
    _, _, rejects, _ = odd
    assert {row["reason"] for row in rejects} <= set(REJECT_REASONS)
    assert [row["image_id"] for row in rejects if not row["message"].strip()] == []


def test_odd_files_meet_their_expectations(odd):
    images, rows, rejects, _ = odd
    reasons = {row["image_id"]: row["reason"] for row in rejects} | {row["image_id"]: None for row in rows}
    wrong = [
        (image.path, image.good, image.reason, reasons[image.path])
        for image in images
        if (image.good is not None and image.good != (reasons[image.path] is None))
        or (image.reason is not None and reasons[image.path] not in (None, image.reason))
    ]
    assert wrong == []


def test_embeddings_of_odd_images_are_finite(odd):
    _, rows, _, _ = odd
    assert np.isfinite(np.array([row["embedding"] for row in rows])).all()
    assert np.isfinite(np.array([row["logits"] for row in rows])).all()
    assert min(row["width"] * row["height"] for row in rows) > 0
