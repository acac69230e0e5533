"""The gallery: self-contained, escaped, and whole where originals are gone."""

from __future__ import annotations

import base64
import io

from PIL import Image

from pipeline.gallery import THUMBNAIL_PX, Row, gallery_page, thumbnail
from pipeline.search import Hit
from tests.conftest import encode, make_image

PHOTO = encode(make_image(3, (640, 480)))


def test_a_thumbnail_is_a_small_jpeg_of_the_same_shape() -> None:
    source = thumbnail(PHOTO)

    assert source is not None
    header, _, data = source.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert header == "data:image/jpeg;base64"
    assert image.size == (THUMBNAIL_PX, THUMBNAIL_PX * 480 // 640)


def test_what_cannot_be_shown_has_a_placeholder() -> None:
    hits = [Hit("gone.jpg", 0.5, "shard", "gone.jpg"), Hit("broken.jpg", 0.4, "shard", "broken.jpg")]
    stored = {"broken.jpg": b"not an image"}

    page = gallery_page("t", "n", [Row("q", None, hits)], lambda shard, key: stored.get(key))

    assert page.count("no preview") == 3
    assert "gone.jpg" in page
    assert "0.5000" in page


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing() -> None:
    name = '"><script>alert(1)</script>.jpg'
    hits = [Hit(name, 0.9, "shard", name, label="<b>cat</b>")]

    page = gallery_page(name, name, [Row(name, PHOTO, hits)], lambda shard, key: PHOTO)

    assert page.count("data:image/jpeg;base64,") == 2
    assert "<script" not in page
    assert "<b>cat" not in page
    assert "http" not in page
    assert 'alt="&quot;&gt;&lt;script' in page
