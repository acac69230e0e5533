"""Google's and Azure's object stores as far as our storage asks their real clients (gcsfs, adlfs).

Small fakes after the clients' source and the services' references: objects in a dictionary, conditional
creation, listings, ranges. `trouble` says what becomes of the next requests: a status that is answered
instead, or LOST, where the request is carried out and the connection dropped before the answer.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

LOST = "lost"
MODIFIED = 1_700_000_000
BUCKET = "bucket"


class Store(ThreadingHTTPServer):
    """A server with its objects: name -> (bytes, generation)."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.trouble: list[int | str] = []
        self.asked: list[str] = []
        self.generation = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, name: str, data: bytes) -> None:
        self.generation += 1
        self.objects[name] = (data, self.generation)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news; an error of this server is."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(f"{self.command} {self.path}")
        trouble = self.server.trouble.pop(0) if self.server.trouble else None
        if isinstance(trouble, int):
            self.respond(trouble, b"{}")
            return
        status, data, headers = self.carry_out(unquote(url.path), query, body)
        if trouble == LOST:
            self.close_connection = True
            self.connection.close()
            return
        self.respond(status, data, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

    def respond(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def carry_out(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        raise NotImplementedError

    def cut(self, data: bytes) -> tuple[int, bytes, dict[str, str]]:
        """What the Range header asks of an object."""
        asked = self.headers.get("x-ms-range") or self.headers.get("Range")
        if not asked:
            return 200, data, {}
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()  # type: ignore[union-attr]
        start, stop = int(first), min(len(data), int(last) + 1 if last else len(data))
        if start >= len(data):
            return 416, b"not satisfiable", {}
        return 206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}


class GoogleHandler(_Handler):
    """The JSON API of Google Cloud Storage."""

    def carry_out(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        objects, root = self.server.objects, f"/storage/v1/b/{BUCKET}"
        if path == f"/upload{root}/o":
            header, data = body.removesuffix(b"\n--==0==--").split(b"\n\n", 2)[1:]
            name = json.loads(header.split(b"\n--==0==")[0])["name"]
            if query.get("ifGenerationMatch") == "0" and name in objects:
                return 412, b'{"error": {"message": "conditionNotMet"}}', {}
            self.server.put(name, data)
            return 200, json.dumps(self.resource(name)).encode(), {}
        if path == root:
            return 200, json.dumps({"name": BUCKET, "kind": "storage#bucket"}).encode(), {}
        if path == f"{root}/o":
            names = sorted(name for name in objects if name.startswith(query.get("prefix", "")))
            if query.get("delimiter"):
                names = [n for n in names if "/" not in n[len(query.get("prefix", "")) :]]
            return 200, json.dumps({"items": [self.resource(name) for name in names]}).encode(), {}
        name = path.removeprefix("/download").removeprefix(f"{root}/o/").partition("/rewriteTo/")[0]
        if name not in objects:
            return 404, b"{}", {}
        if "/rewriteTo/" in path:
            target = path.rpartition(f"/b/{BUCKET}/o/")[2]
            self.server.put(target, objects[name][0])
            return 200, json.dumps({"done": True, "resource": self.resource(target)}).encode(), {}
        if self.command == "DELETE":
            del objects[name]
            return 204, b"", {}
        if query.get("alt") == "media":
            return self.cut(objects[name][0])
        return 200, json.dumps(self.resource(name)).encode(), {}

    def resource(self, name: str) -> dict[str, Any]:
        data, generation = self.server.objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": BUCKET,
            "size": str(len(data)),
            "generation": str(generation),
            "etag": f"etag-of-metadata-{len(self.server.asked)}",
            "updated": "2023-11-14T22:13:20.000Z",
            "timeCreated": "2023-11-14T22:13:20.000Z",
        }


class AzureHandler(_Handler):
    """The REST API of Azure Blob Storage, below /account as emulators have it."""

    def carry_out(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        objects = self.server.objects
        name = path.removeprefix("/account/").partition("/")[2]
        if not name and query.get("comp") == "list":
            return 200, self.listing(query.get("prefix", "")), {"Content-Type": "application/xml"}
        if not name:
            return 200, b"", self.properties(0)
        if self.command == "PUT":
            if self.headers.get("If-None-Match") == "*" and name in objects:
                return 409, b"", {"x-ms-error-code": "BlobAlreadyExists"}
            source = self.headers.get("x-ms-copy-source")
            data = (
                objects[unquote(urlsplit(source).path).removeprefix(f"/account/{BUCKET}/")][0]
                if source
                else body
            )
            self.server.put(name, data)
            headers = self.properties(objects[name][1])
            return (202, b"", headers | {"x-ms-copy-status": "success"}) if source else (201, b"", headers)
        if name not in objects:
            return 404, b"", {"x-ms-error-code": "BlobNotFound"}
        data, generation = objects[name]
        if self.command == "DELETE":
            del objects[name]
            return 202, b"", {}
        headers = self.properties(generation) | {"x-ms-blob-type": "BlockBlob"}
        if self.command == "HEAD":
            return 200, data, headers
        status, part, ranges = self.cut(data)
        return status, part, headers | ranges

    def properties(self, generation: int) -> dict[str, str]:
        return {
            "ETag": f'"0x{generation}"',
            "Last-Modified": formatdate(MODIFIED, usegmt=True),
            "x-ms-version": "2024-11-04",
            "Content-Type": "application/octet-stream",
        }

    def listing(self, prefix: str) -> bytes:
        blobs = []
        for name, (data, generation) in sorted(self.server.objects.items()):
            if name.startswith(prefix):
                properties = f"<Last-Modified>{formatdate(MODIFIED, usegmt=True)}</Last-Modified>"
                properties += f"<Etag>0x{generation}</Etag><Content-Length>{len(data)}</Content-Length>"
                properties += "<BlobType>BlockBlob</BlobType>"
                blobs.append(
                    f"<Blob><Name>{escape(name)}</Name><Properties>{properties}</Properties></Blob>"
                )
        return (
            '<?xml version="1.0" encoding="utf-8"?><EnumerationResults ContainerName="bucket">'
            f"<Blobs>{''.join(blobs)}</Blobs><NextMarker /></EnumerationResults>"
        ).encode()


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[Store]:
    """A store, served until the end of the block."""
    store = Store(handler)
    thread = threading.Thread(target=store.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
