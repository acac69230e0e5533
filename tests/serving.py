"""What the tests of `serve` share: an output of pictures, a server, and questions to it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DedupConfig, LabelConfig
from pipeline.dedup import find_duplicates
from pipeline.index.build import build_index
from pipeline.labels.make import make_labels
from pipeline.storage import Storage
from tests.labelled_images import pictures
from tests.running import CLI, made_once, make_config, run, write_tar

_BAD = ("<script>alert(1)</script>", "'; DROP TABLE rows; --", "\r\nX-Evil: 1", "ü/日本/../..%2f")


NUM_IMAGES = 61


def served_output(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """`make_output`, once for all processes of the session; who changes it makes a copy."""
    return made_once(tmp_path_factory, "served", lambda folder: make_output(folder, checkpoint)) / "out"


def make_output(folder: Path, checkpoint: Path, count: int = NUM_IMAGES - 1) -> Path:
    """An output of two tars with labels, an index and groups of duplicates; its metadata is not kind."""
    made = pictures(count)
    members: list[tuple[str, bytes]] = []
    for number, (label, data) in enumerate(made):
        key = f"{label}/{number:03d}"
        facts = {"kind": label, "number": number, "note": _BAD[number % len(_BAD)]}
        members += [
            (f"{key}.png", data),
            (f"{key}.cls", label.encode()),
            (f"{key}.json", json.dumps(facts).encode()),
        ]
    members += [("twin/a.png", made[0][1]), ("twin/a.cls", b"columns"), ("broken.png", b"no image")]
    half = len(members) // 6 * 3
    write_tar(folder / "in" / "a.tar", members[:half])
    write_tar(folder / "in" / "b.tar", members[half:])
    config = make_config(folder / "in", checkpoint, folder / "out", input__metadata_columns=["cls", "json"])
    run(config)
    out = folder / "out"
    place = Storage(str(out))
    build_index(place)
    find_duplicates(place, DedupConfig())
    make_labels(place, LabelConfig(method="probe", labels="cls"))
    return out


@dataclass
class Answer:
    """What a server said."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass
class Server:
    """A `cvt-pipeline serve` that listens."""

    process: subprocess.Popen[str]
    address: str
    token: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return urllib.parse.urlsplit(self.address).port or 0

    def ask(
        self,
        path: str,
        parameters: Mapping[str, Any] | list[tuple[str, Any]] = (),  # type: ignore[assignment]
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        method: str | None = None,
    ) -> Answer:
        """GET, or POST of a body: bytes, or what becomes JSON."""
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {**self.headers, **({"Content-Type": kind} if data is not None else {}), **(headers or {})}
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        request = urllib.request.Request(self.address + path + query, data, sent, method=method)
        try:
            with urllib.request.build_opener(_Stay).open(request, timeout=60) as answer:
                return Answer(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers), error.read())

    def get(self, path: str, **parameters: Any) -> Any:
        """The JSON of a question that is answered."""
        answer = self.ask(path, parameters)
        assert answer.status == 200, answer.body
        return answer.json()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def serving(
    output: Path, *settings: str, cache: Path, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A server of this output on a free port, ended at the end."""
    words = [str(CLI), "serve", str(output), "serve.port=0", *settings]
    surroundings = {**os.environ, "XDG_CACHE_HOME": str(cache), **(env or {})}
    process = subprocess.Popen(words, env=surroundings, stderr=subprocess.PIPE, text=True)
    said = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"(http://\S+?)/(?:\?token=(\S+))?$", line):
                break
        else:
            raise AssertionError("".join(said))
        yield Server(process, found[1], found[2] or "")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def output(ray_session: None, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return served_output(tmp_path_factory, tiny_model)


@pytest.fixture(scope="module")
def server(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(output, cache=tmp_path_factory.mktemp("cache")) as running:
        yield running
