"""The demo, in this process, and as a person starts it."""

import re
import time

import pytest

from pipeline.demo import demo
from pipeline.stop import Stop
from tests.running import cli, ids_of, same_signal_handlers


def test_the_demo_finds_photographs_again_and_shows_it(ray_session, tmp_path):
    with same_signal_handlers():
        result = demo(tmp_path / "here", stop=Stop(), on_progress=lambda tally: None, started=time.time())
    assert result.share_found >= 0.95
    assert len(ids_of(tmp_path / "here/features")) == result.num_images > 100
    page = result.gallery.read_text()
    assert page.count("data:image/jpeg;base64,") > 50
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.slow
def test_the_command_says_how_well_that_went_and_where_to_look(tmp_path):
    done = cli("demo", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    share = re.search(r"([\d.]+)% of the variants", done.stderr)
    assert share is not None, done.stderr
    assert float(share[1]) >= 95
    assert str(tmp_path / "here/gallery.html") in done.stderr
