"""`input.decode: fast`, from the config to a search by image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cvt_model.checkpoint import resolve_checkpoint
from cvt_model.image_decoder import decode_image
from cvt_model.inference import InferenceModel
from pipeline.errors import FingerprintError
from pipeline.index.build import build_index
from pipeline.search import Searcher
from pipeline.storage import Storage
from tests.conftest import encode, make_image
from tests.running import make_config, rows_of, run


def test_a_fast_output_is_marked_so_and_searched_by_images_that_are_decoded_so(
    ray_session: None, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(6):
        (tmp_path / f"in/{seed}.jpg").write_bytes(encode(make_image(seed, (640, 480)), "JPEG"))
    out = tmp_path / "out"
    tally = run(make_config(tmp_path / "in", tiny_model, out, input__decode="fast"))
    assert (tally.stopped, tally.failed_shards) == ("", {})

    checkpoint = resolve_checkpoint(str(tiny_model))
    model = InferenceModel(checkpoint, precision="float32")
    photos = [(tmp_path / f"in/{seed}.jpg").read_bytes() for seed in range(6)]
    pixels = {
        fast: np.stack(
            [decode_image(data, checkpoint.processor, None, fast=fast).pixels for data in photos]
        )
        for fast in (False, True)
    }
    stored = np.stack([row["embedding"] for row in rows_of(out)])
    assert np.abs(stored - model(pixels[True]).embedding).max() < 1e-4
    assert np.abs(stored - model(pixels[False]).embedding).max() > 1e-3
    assert json.loads((out / "fingerprint.json").read_text())["preprocessing"]["decode"] == "fast"

    build_index(Storage(str(out)))
    searcher = Searcher(Storage(str(out)))
    for number, data in enumerate(photos):
        assert np.abs(searcher.embed(data) - stored[number]).max() < 1e-4
        best = searcher.by_image(data, k=1)[0]
        assert (best.image_id, best.score) == (f"{number}.jpg", pytest.approx(1, abs=1e-6))

    with pytest.raises(FingerprintError, match=r"preprocessing\.decode"):
        run(make_config(tmp_path / "in", tiny_model, out))
