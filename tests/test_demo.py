"""The demo, as a person starts it."""

import re

from tests.running import cli, ids_of


def test_the_demo_finds_photographs_again_and_shows_it(tmp_path):
    done = cli("demo", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    share = re.search(r"([\d.]+)% of the variants", done.stderr)
    assert share is not None, done.stderr
    assert float(share[1]) >= 95
    page = (tmp_path / "here/gallery.html").read_text()
    assert str(tmp_path / "here/gallery.html") in done.stderr
    assert page.count("data:image/jpeg;base64,") > 50
    assert "http://" not in page
    assert "https://" not in page
    assert len(ids_of(tmp_path / "here/features")) > 100
