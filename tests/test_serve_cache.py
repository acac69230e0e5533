"""The folders that the server keeps of what it has worked out."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pipeline.local_cache import ABANDONED_S
from pipeline.serve.once import forget_older, made_once


def test_of_the_folders_of_an_output_the_last_used_stay_and_others_are_not_touched(tmp_path: Path) -> None:
    for number in range(4):
        folder = made_once(tmp_path / f"mine-{number}", lambda partial: (partial / "a").touch())
        os.utime(folder, (1000 + number, 1000 + number))
    made_once(tmp_path / "theirs-0", lambda partial: (partial / "a").touch())
    os.utime(tmp_path / "theirs-0", (1, 1))
    made_once(tmp_path / "mine-0", lambda partial: (partial / "b").touch())  # a use
    forget_older(tmp_path, "mine-", kept=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine-0", "mine-3", "theirs-0"]
    assert [path.name for path in (tmp_path / "mine-0").iterdir()] == ["a"]


def test_what_a_killed_server_left_half_made_goes_after_a_day(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".tmp-dead", tmp_path / ".tmp-alive"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "rows.arrow").write_bytes(b"half")
    long_ago = time.time() - ABANDONED_S - 60
    os.utime(dead, (long_ago, long_ago))
    forget_older(tmp_path, "mine-")
    assert list(tmp_path.iterdir()) == [alive]
