"""What people with bad intentions send to `cvt-pipeline serve`, and that it comes to nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS

from pipeline.errors import SearchError
from pipeline.serve import fetch_url as fetching
from pipeline.serve.fetch_url import fetch_url
from tests.labelled_images import pictures
from tests.serving import NUM_IMAGES, Server, output, serving
from tests.web_server import serving as web_serving

__all__ = ["output"]  # a fixture


@pytest.fixture(scope="module")
def server(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = ("serve.max_upload_bytes=200000", "serve.upload_timeout_s=5", "serve.where_timeout_s=2")
    allowed = ("serve.allow_urls=true", *limits)
    with serving(output, *allowed, cache=tmp_path_factory.mktemp("cache")) as running:
        yield running
        assert running.get("/api/overview")["rows"] == NUM_IMAGES  # after all that, it still answers


def raw(server: Server, *lines: str, body: bytes = b"") -> tuple[int, bytes]:
    """The status and the whole answer to a request that no client would send."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as link:
        link.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + body)
        answer = b"".join(iter(lambda: link.recv(65536), b""))
    return int(answer.split(b" ", 2)[1]), answer


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2f..%2fconfig.py",
        "/static/....//app.py",
        "/static//etc/passwd",
        "/static/index.html%00.js",
        "/reports/..%2ffingerprint.json.html",
        "/reports/%2e%2e%2f%2e%2e%2fetc%2fpasswd%00.html",
        "/api/thumbnail?id=../../../../etc/passwd",
        "/api/thumbnail?id=file:///etc/passwd",
        "/api/uploads/thumbnail?upload=../../../etc/passwd",
        "/api/search?upload=..%2f..%2f" + "a" * 58,
        "/api/image?id=%00%ff%fe",
    ],
)
def test_no_path_reaches_the_file_system(server: Server, path: str) -> None:
    status, answer = raw(server, f"GET {path} HTTP/1.1", "Host: localhost")
    assert status in (400, 404, 422), answer
    assert b"root:" not in answer
    assert b"import" not in answer


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x.png",
        "http://localhost/x.png",
        "http://[::1]/x.png",
        "http://[::ffff:127.0.0.1]/",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
        "http://192.168.1.1/",
        "http://100.64.0.1/",
        "http://0.0.0.0/",
        "http://0x7f000001/",
        "http://2130706433/",
        "http://127.1/",
        "http://[fe80::1%25eth0]/",
        "http://[fec0::1]/",
        "http://[::7f00:1]/",
        "http://[::ffff:0:10.0.0.1]/",
        "http://[64:ff9b::169.254.169.254]/latest/meta-data/",
        "http://[64:ff9b:1::1]/",
        "http://[2002:7f00:1::]/",
        "http://224.0.0.1/",
        "http://example.com:22/",
        "http://user:secret@example.com/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "https://",
        "http://exa mple/\r\nX: y",
        "http://[",
    ],
)
def test_no_url_leads_to_what_is_not_public(server: Server, url: str) -> None:
    answer = server.ask("/api/uploads/url", body={"url": url})
    assert answer.status == 400, answer.body
    reasons = ("not a public one", "only http:// and https:// URLs", "this is no URL", "host is not known")
    assert any(reason in answer.json()["error"] for reason in reasons), answer.body  # nobody was asked
    assert "secret" not in answer.body.decode()


def test_urls_are_not_fetched_unless_that_is_allowed(tmp_path: Path, output: Path) -> None:
    with serving(output, cache=tmp_path) as careful:
        answer = careful.ask("/api/uploads/url", body={"url": "http://example.com/cat.jpg"})
        assert answer.status == 400
        assert "serve.allow_urls=true" in answer.json()["error"]


class _Web(BaseHTTPRequestHandler):
    """`/picture`, `/away` to a private address, `/round` to itself, `/large`, `/drip`."""

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        places = {"/away": "http://127.0.0.1/secret", "/round": "/round", "/near": "/picture"}
        self.send_response(302 if self.path in places else 200)
        if self.path in places:
            self.send_header("Location", places[self.path])
        self.end_headers()
        if self.path == "/picture":
            self.wfile.write(pictures(1)[0][1])
        if self.path == "/large":
            self.wfile.write(b"x" * 5000)
        while self.path == "/drip":
            try:
                self.wfile.write(b"x")
            except OSError:
                return
            time.sleep(0.05)


def test_a_fetch_follows_to_public_places_alone_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = fetching.public_addresses

    def as_if_public(host: str, port: int) -> list[str]:
        return ["127.0.0.1"] if host == "pictures.test" else judged(host, port)

    monkeypatch.setattr(fetching, "public_addresses", as_if_public)
    with web_serving(_Web) as address:
        port = int(address.rpartition(":")[2])
        monkeypatch.setattr(fetching, "_PORTS", {"http": port})
        url = f"http://pictures.test:{port}"
        assert fetch_url(f"{url}/near", 10_000, 5) == pictures(1)[0][1]
        for path, words, timeout_s in (
            ("/round", "leads on", 60),
            ("/large", "more than 4,000", 60),
            ("/drip", "in time", 1),  # which never ends by itself
        ):
            with pytest.raises(SearchError, match=words):
                fetch_url(url + path, 4000, timeout_s)
        monkeypatch.setattr(fetching, "_PORTS", {"http": port, "https": 443})
        with pytest.raises(SearchError, match=r"usual ports|public"):
            fetch_url(f"{url}/away", 4000, 5)


def memory_of(server: Server) -> int:
    """The server's resident memory in kB."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that is `side` x `side` pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_by_its_header(server: Server) -> None:
    before = memory_of(server)
    data = bomb(32_000)
    assert len(data) < 200_000
    started = time.monotonic()
    answer = server.ask("/api/uploads", body=data)
    assert answer.status == 400
    assert "pixels" in answer.json()["error"]
    assert time.monotonic() - started < 120  # the first start of the decoder's process is in it
    assert memory_of(server) - before < 300_000


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(500), b"<svg/>", bytes(1000)]
)
def test_garbage_is_no_image(server: Server, data: bytes) -> None:
    answer = server.ask("/api/uploads", body=data, method="POST")
    assert answer.status == 400
    assert "Traceback" not in answer.body.decode()


@pytest.mark.parametrize("name", ["image_id", "label", "reviewer"])
def test_half_a_character_is_refused(server: Server, name: str) -> None:
    image_id = server.get("/api/images", limit=1)["images"][0]["image_id"]
    said = {"image_id": image_id, "action": "relabel", "label": "x", name: "\ud800"}
    body = {"decisions": [{k: v for k, v in said.items() if k != "reviewer"}]}
    answer = server.ask("/api/review", body=body | ({"reviewer": "\ud800"} if name == "reviewer" else {}))
    assert answer.status == 422
    assert answer.json()["detail"][0]["loc"][-1] == name
    blank = {"image_id": image_id, "action": "relabel", "label": "   "}
    assert server.ask("/api/review", body={"decisions": [blank]}).status == 400


def test_uploads_end_at_their_bytes_told_or_not(server: Server) -> None:
    assert server.ask("/api/uploads", body=bytes(200_001)).status == 413
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    try:
        link.request("POST", "/api/uploads", body=iter([bytes(50_000)] * 10), encode_chunked=True)
        assert link.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # refused while we were still sending
    finally:
        link.close()
    lied = raw(server, "POST /api/uploads HTTP/1.1", "Host: localhost", "Content-Length: -5")
    assert lied[0] in (400, 413)


def test_uploads_end_at_their_time(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as link:
        link.sendall(b"POST /api/uploads HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n")
        started, answer = time.monotonic(), b""
        link.settimeout(0.2)
        while not answer and time.monotonic() - started < 120:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                link.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                answer = link.recv(65536)
        assert b" 408 " in answer.splitlines()[0]


@pytest.mark.parametrize(
    "where",
    [
        "true; DROP TABLE rows",
        "true) OR (SELECT 1) = (1",
        "image_id IN (SELECT image_id FROM rows)",
        "EXISTS (FROM read_text('/etc/passwd'))",
        "read_text('/etc/passwd') IS NOT NULL",
        "getenv('HOME') = ''",
        "true UNION SELECT 1",
        "length(repeat('x', 1000000000)) > 0",
        "list_sum(range(1000000000000)) > 0",
        "current_setting('home_directory') = ''",
        "(" * 5000,
        "COPY rows TO '/tmp/stolen'",
        "ATTACH '/tmp/x.db'",
        "width = (WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n FROM t) SELECT max(n) FROM t)",
        "-- nothing",
        "",
        "\x00",
    ],
)
def test_a_filter_is_one_expression_that_reads_rows_alone(server: Server, where: str) -> None:
    started = time.monotonic()
    for path in ("/api/images", "/api/facets"):
        answer = server.ask(path, {"where": where})
        assert answer.status in (400, 422), answer.body
        assert "Traceback" not in answer.body.decode()
        assert "root:" not in answer.body.decode()
    assert time.monotonic() - started < 120


def test_no_header_comes_of_what_was_asked(server: Server) -> None:
    for path in ("/api/image", "/api/search", "/api/thumbnail"):
        answer = server.ask(path, {"id": "x\r\nX-Evil: 1\r\n\r\n<script>"})
        assert answer.status == 404
        assert "x-evil" not in {name.lower() for name in answer.headers}
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_page_of_another_name_or_site_is_not_served(server: Server) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost@evil.example"):
        assert raw(server, "GET /api/overview HTTP/1.1", f"Host: {host}")[0] in (400, 403), host
    (image,) = server.get("/api/images", limit=1)["images"]
    body = {"decisions": [{"image_id": image["image_id"], "action": "reject"}]}
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        assert server.ask("/api/review", body=body, headers=headers).status == 403
    assert server.get("/api/image", id=image["image_id"])["decision"] is None
    assert (
        server.ask("/api/overview", headers={"Origin": "https://evil.example"}).headers.get(
            "access-control-allow-origin"
        )
        is None
    )


def test_every_answer_bears_the_policy(server: Server) -> None:
    for path in ("/", "/static/app.js", "/api/overview", "/nothing", "/openapi.json"):
        headers = server.ask(path).headers
        assert "script-src 'self'" in headers["content-security-policy"], path
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-frame-options"] == "DENY"


def test_a_failure_of_ours_is_told_without_our_insides(tmp_path: Path, output: Path) -> None:
    shutil.copytree(output, tmp_path / "out")
    with serving(tmp_path / "out", cache=tmp_path / "cache") as broken:
        (image,) = broken.get("/api/images", limit=1)["images"]
        shutil.rmtree(tmp_path / "out" / "labels" / "reviews", ignore_errors=True)
        (tmp_path / "out" / "labels" / "reviews").write_text("in the way")
        body = {"decisions": [{"image_id": image["image_id"], "action": "reject"}]}
        answer = broken.ask("/api/review", body=body)
        assert answer.status == 503
        assert str(tmp_path) not in answer.body.decode()
        assert "Traceback" not in answer.body.decode()
        shutil.rmtree(tmp_path / "out" / "dedup")
        (tmp_path / "out" / "dedup").mkdir()
        (tmp_path / "out" / "dedup" / "CURRENT").write_text("2026-gone")
        answer = broken.ask("/api/duplicates")
        assert answer.status in (500, 503)
        assert "Traceback" not in answer.body.decode()
        assert "2026-gone" not in answer.body.decode()
        assert broken.get("/api/images", limit=1)["images"]


def test_nothing_that_the_api_takes_or_not_is_an_error_of_the_server(server: Server) -> None:
    wanted = ("not_a_server_error", "response_schema_conformance", "content_type_conformance")
    schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 12
    for operation in operations:

        @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS.get_by_names(wanted), timeout=30)

        check()


def test_the_openapi_describes_every_path_of_the_page(server: Server) -> None:
    described = server.get("/openapi.json")["paths"]
    script = b"".join(
        server.ask(f"/static/{name}.js").body
        for name in ("api", "dom", "search", "review", "duplicates", "overview")
    )
    asked = {path for path in described if path.startswith("/api/")}
    assert len(asked) >= 11
    for path in sorted(asked - {"/api/image"}):
        assert path.encode() in script, path
    assert all(json.dumps(entry) for entry in described.values())
