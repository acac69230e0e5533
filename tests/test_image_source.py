"""`image_source`: what people name as an image, from disk and from a real web server, or why not."""

import http.server
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvt_model import ImageError, image_source
from cvt_model.image_source import as_ascii, load_image, read_http, read_source
from tests.conftest import encode, make_image
from tests.web_server import serving

PICTURE = encode(make_image(1))


class Answers(http.server.BaseHTTPRequestHandler):
    """A picture under any path, but for the few that misbehave."""

    def do_GET(self):
        match self.path:
            case "/404":
                self.send_error(404)
            case "/moved":
                self.send_response(302)
                self.send_header("Location", "/elsewhere.png")
                self.end_headers()
            case "/file":
                self.send_response(302)
                self.send_header("Location", "file:///etc/hostname")
                self.end_headers()
            case "/drop":
                self.connection.close()
            case "/short":
                self.send_response(200)
                self.send_header("Content-Length", str(len(PICTURE) + 7))
                self.end_headers()
                self.wfile.write(PICTURE)
            case "/trickle":
                self.send_response(200)
                self.end_headers()
                for _ in range(10_000):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            case _:
                self.send_response(200)
                self.send_header("X-Path", self.path)
                self.end_headers()
                self.wfile.write(PICTURE)

    def log_message(self, *_): ...


@pytest.fixture(scope="module")
def web():
    with serving(Answers) as url:
        yield url


@pytest.fixture
def deaf():
    """A port where connections are made and nothing is ever said."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/x.png"


def dead_url():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/x.png"


def reason_of(image, **options):
    with pytest.raises(ImageError) as caught:
        load_image(image, **options)
    assert caught.value.reason == "unreadable"
    return caught.value.message


@pytest.mark.parametrize("path", ["x.png", "moved", "ä ö.png?of=a b&c=%20#part", "[1]%2F.png", "trailing "])
def test_an_image_is_read_from_the_web(web, path):
    assert read_source(f"{web}/{path}") == PICTURE
    assert read_source(f"{web}/{path}".replace("http", "HTTP")) == PICTURE


def test_a_url_is_sent_in_ascii_and_otherwise_as_it_is():
    assert as_ascii("http://h/a%20b/%C3%A4?x=1&y=a+b~#p") == "http://h/a%20b/%C3%A4?x=1&y=a+b~"
    assert as_ascii("http://h:1/ä b?q=ö d") == "http://h:1/%C3%A4%20b?q=%C3%B6%20d"


@pytest.mark.parametrize(
    ("path", "mention"),
    [("404", "404"), ("drop", "closed"), ("short", "7 bytes early"), ("file", "not allowed")],
)
def test_what_the_web_does_not_give_is_an_error_in_words(web, path, mention):
    assert mention in reason_of(f"{web}/{path}")


@pytest.mark.parametrize(
    "url",
    [
        "http://", "http://[", "http://127.0.0.1:port/x.png", "http://no such host/x.png", "http://\0/",
        "https:///x", "http://" + "a" * 70 + ".invalid/x.png", "HTTP://.../x", "ftp://h/x", "s3://b/x.png",
        "simplecache::s3://b/x.png",
    ],
)  # fmt: skip
def test_what_is_no_web_address_is_an_error_in_words(url):
    assert len(reason_of(url)) > len("it cannot be read: ")


def test_a_dead_port_and_a_deaf_server_are_told_soon(deaf, web, monkeypatch):
    assert "refused" in reason_of(dead_url())
    monkeypatch.setattr(image_source, "TIMEOUT_S", 0.3)
    assert "timed out" in reason_of(deaf)
    monkeypatch.setattr(image_source, "TIMEOUT_S", 60)
    monkeypatch.setattr(image_source, "DEADLINE_S", 0.3)
    assert "not there after" in reason_of(f"{web}/trickle")


def test_urls_of_other_storage_are_left_to_who_knows_it():
    asked = []

    def read_url(url):
        asked.append(url)
        return PICTURE

    urls = ["s3://bucket/x.png", "zip://x.png::http://h/y.zip", "http://h/z.png"]
    for url in urls:
        load_image(url, read_url=read_url)
    assert asked == urls
    with pytest.raises(OSError, match="only http and https"):
        read_http("s3://bucket/x.png")


@pytest.mark.parametrize("name", ["a:b.png", "C:x.png", "http:x.png", "~x.png", "é [1]*?.png", "100%.png"])
def test_any_local_name_is_read(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(PICTURE)
    monkeypatch.chdir(tmp_path)
    for source in (name, tmp_path / name, f"file://{tmp_path / name}"):
        assert load_image(source).size == (48, 40)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_image(f"~/{name}").size == (48, 40)


def test_what_cannot_be_read_locally_is_an_error_in_words(tmp_path):
    assert "No such file" in reason_of(tmp_path / "absent.png")
    assert "directory; name the images in it" in reason_of(tmp_path)
    assert "null" in reason_of("a\0b")
    assert "directory" in reason_of("")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_of_any_kind_are_decoded(kind):
    assert load_image(kind(PICTURE)).size == (48, 40)


def test_limits_and_decoding_errors_are_those_of_open_image():
    with pytest.raises(ImageError, match="over the limit of 5"):
        load_image(PICTURE, max_pixels=5)
    with pytest.raises(ImageError, match="empty"):
        load_image(b"")


def test_a_pil_image_that_cannot_be_loaded_is_an_error_in_words(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    with Image.open(tmp_path / "cut.jpg") as image, pytest.raises(ImageError, match="cannot be read"):
        load_image(image)
    with Image.open(tmp_path / "whole.jpg") as closed:
        pass
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(closed)
    with pytest.raises(ImageError, match="no pixels"):
        load_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("thing", [5, None, np.zeros((2, 2, 3)), Path, ["a.png"]])
def test_what_is_no_image_is_a_type_error(thing):
    with pytest.raises(TypeError, match="expected a path, a URL, bytes or a PIL image"):
        load_image(thing)
