"""Input, output, index and reports on object storage, against a real S3 server on this machine."""

import json
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.storage import Storage
from tests.conftest import encode, make_image
from tests.running import cli, write_tar
from tests.s3_server import (
    BUCKET,
    READER_KEY,
    READER_SECRET,
    SECRETS,
    options_alone,
    s3,
    told,
    write_s3_config,
)

__all__ = ["options_alone", "s3"]  # fixtures
pytestmark = pytest.mark.usefixtures("options_alone")


def options_in_environment(options):
    """What verbs without a config take their options from."""
    return {"CVT_PIPELINE__STORAGE_OPTIONS": json.dumps(options)}


@pytest.fixture(scope="module")
def extracted(s3, options_alone, tmp_path_factory, tiny_model):
    """Three tars on S3, extracted to S3: the config, all that was said, and the folder with Ray's logs."""
    folder = tmp_path_factory.mktemp("s3-run")
    fs = s3.filesystem()
    for number in range(3):
        members = [(f"{n}.png", encode(make_image(10 * number + n))) for n in range(8)]
        members.append(("bad.png", b"junk"))
        fs.put_file(str(write_tar(folder / f"{number}.tar", members)), f"{BUCKET}/in/{number}.tar")
    config = write_s3_config(folder, f"s3://{BUCKET}/in/", tiny_model, f"s3://{BUCKET}/out/", s3.options())
    rays = Path(tempfile.mkdtemp(prefix="ray-"))  # short: its sockets' paths have to be
    done = cli("extract", config, "--verbose", env={"RAY_TMPDIR": str(rays)})
    assert done.returncode == 0, done.stderr
    yield config, done, rays
    shutil.rmtree(rays)


def test_every_image_is_there_once_and_nothing_of_the_run_is_left(s3, extracted):
    assert sorted(s3.rows("out/embeddings")) == [
        f"{number}.tar#{n}" for number in range(3) for n in range(8)
    ]
    assert sorted(s3.rows("out/rejects")) == [f"{number}.tar#bad" for number in range(3)]
    fs = s3.filesystem()
    assert [
        p for f in ("_staging", "lease") for p in fs.find(f"{BUCKET}/out/{f}") if not p.endswith(f)
    ] == []


def test_verify_index_and_search_work_on_s3_and_no_secret_is_anywhere(s3, extracted, tmp_path):
    _, run, rays = extracted
    env, out = options_in_environment(s3.options()), f"s3://{BUCKET}/out"

    def on_s3(verb, *words):
        done = cli(verb, out, *words, "--json", env=env)
        assert done.returncode == 0, done.stderr
        told(done.stdout + done.stderr)
        return json.loads(done.stdout)

    told(run.stdout + run.stderr)
    assert on_s3("verify")["images"] == 24
    assert on_s3("status")["images"] == 24
    assert on_s3("index")["num_vectors"] == 24
    page = tmp_path / "page.html"
    hit = on_s3("search", "--id", "1.tar#3", "--html", page)[0]["hits"][0]
    assert (hit["image_id"], hit["shard"], hit["key"]) == ("1.tar#3", "1.tar", "3")
    assert page.read_text().count("data:image/jpeg") >= 10
    s3.filesystem().pipe_file(f"{BUCKET}/query.png", encode(make_image(13)))
    hits = on_s3("search", "--image", f"s3://{BUCKET}/query.png", "-k", 1)[0]["hits"]
    assert [hit["image_id"] for hit in hits] == ["1.tar#3"]
    fs = s3.filesystem()
    written = {name: fs.cat_file(name) for name in fs.find(f"{BUCKET}/out")}
    for kind in ("commits/", "embeddings/", "fingerprint.json", "index/", ".html", "reports/"):
        assert [name for name in written if kind in name], kind
    logs = [path for path in rays.rglob("*") if path.is_file()]
    assert [path for path in logs if path.name == "ray-data.log"]
    written |= {str(path): path.read_bytes() for path in [page, *logs]}
    for name, data in written.items():
        assert not [secret for secret in SECRETS if secret.encode() in data], name


@pytest.mark.slow
def test_a_second_run_on_s3_does_nothing_and_a_changed_object_is_done_again(s3, extracted, tmp_path):
    config, _, _ = extracted
    before = s3.rows("out/embeddings")
    again = cli("extract", config)
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stderr
    members = [(f"{n}.png", encode(make_image(900 + n))) for n in range(5)]
    s3.filesystem().put_file(str(write_tar(tmp_path / "2.tar", members)), f"{BUCKET}/in/2.tar")
    plan = json.loads(cli("plan", config, "--json").stdout)
    assert (plan["shards_changed"], plan["shards_done"], plan["shards_new"]) == (1, 2, 0)
    changed = cli("extract", config)
    assert changed.returncode == 0, changed.stderr
    rows = s3.rows("out/embeddings")
    kept = [f"{number}.tar#{n}" for number in range(2) for n in range(8)]
    assert sorted(rows) == [*kept, *(f"2.tar#{n}" for n in range(5))]
    assert [rows[name] for name in kept] == [before[name] for name in kept]
    assert rows["2.tar#0"]["sha256"] != before["2.tar#0"]["sha256"]


def test_credentials_are_also_found_where_s3_clients_look(s3, extracted, tmp_path):
    verified = cli("verify", f"s3://{BUCKET}/out", "--json", env=s3.environment())
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["rejects"] >= 2


def test_of_creators_at_the_same_instant_one_wins(s3):
    storage = Storage(f"s3://{BUCKET}/create", s3.options())
    creators = 4

    def create(name, number, together):
        together.wait()
        try:
            storage.create(name, f"creator {number}".encode())
        except FileExistsError:
            return None
        return number

    with ThreadPoolExecutor(creators) as pool:
        for name in "abc":
            together = threading.Barrier(creators)
            found = list(pool.map(lambda number: create(name, number, together), range(creators)))  # noqa: B023
            (winner,) = [number for number in found if number is not None]
            assert storage.read_bytes(name) == f"creator {winner}".encode()
    with pytest.raises(FileExistsError):
        storage.create("a", b"later")


def test_an_output_that_may_only_be_read_is_told_before_any_work(s3, extracted, tmp_path, tiny_model):
    before = s3.filesystem().find(BUCKET, detail=True)
    options = s3.options(READER_KEY, READER_SECRET)
    config = write_s3_config(tmp_path, f"s3://{BUCKET}/in", tiny_model, f"s3://{BUCKET}/denied", options)
    done = cli("extract", config)
    assert done.returncode == 2, done.stderr
    assert f"output.uri: cannot write to s3://{BUCKET}/denied: Access Denied" in told(done.stderr)
    assert s3.filesystem().find(BUCKET, detail=True) == before


@pytest.mark.parametrize("end", ["input", "output"])
def test_memory_is_refused_with_the_reason(tmp_path, tiny_model, end):
    uris = {"input": tmp_path / "in", "output": tmp_path / "out", end: "memory://bucket"}
    config = write_s3_config(tmp_path, uris["input"], tiny_model, uris["output"], {})
    done = cli("plan", config)
    assert done.returncode == 2, done.stderr
    assert "memory:// lives in one process, so the workers would not see it; use a folder" in told(
        done.stderr
    )


@pytest.mark.parametrize("end", ["input", "output"])
def test_a_missing_bucket_is_told_in_words(s3, extracted, tmp_path, tiny_model, end):
    uris = {"input": f"s3://{BUCKET}/in", "output": f"s3://{BUCKET}/o", end: "s3://no-such-bucket/x"}
    config = write_s3_config(tmp_path, uris["input"], tiny_model, uris["output"], s3.options())
    done = cli("extract", config)
    assert done.returncode == 2, done.stderr
    assert f"{end}.uri: " in told(done.stderr)
    assert "s3://no-such-bucket/x" in done.stderr


@pytest.mark.parametrize("kind", ["wrong", "absent"])
def test_credentials_that_do_not_fit_are_told_in_words(s3, extracted, tmp_path, tiny_model, kind):
    options = s3.options(secret="wr0ng-5e8a7d")
    if kind == "absent":
        del options["key"], options["secret"]
    config = write_s3_config(tmp_path, f"s3://{BUCKET}/in", tiny_model, f"{tmp_path}/o", options)
    done = cli("extract", config)
    assert done.returncode == 2, done.stderr
    assert f"input.uri: cannot list s3://{BUCKET}/in" in told(done.stderr)
    assert "wr0ng" not in done.stderr
    assert not (tmp_path / "o/embeddings").exists()
