"""S3 that fails, and runs that meet on it: a completed run or words, and never a wrong output."""

import json
import re
import socket
import time

import pytest

from tests.disturbed import assert_same_rows, corpus, start, undisturbed
from tests.flaky_proxy import FATES, FlakyProxy
from tests.running import cli
from tests.s3_server import BUCKET, free_port, options_alone, s3, told, write_s3_config

__all__ = ["corpus", "options_alone", "s3", "undisturbed"]  # fixtures
pytestmark = pytest.mark.usefixtures("options_alone")


@pytest.fixture(scope="module")
def many(s3, corpus):
    """The URI of the twelve tars on S3."""
    for path in sorted(corpus.iterdir()):
        s3.filesystem().put_file(str(path), f"{BUCKET}/many/{path.name}")
    return f"s3://{BUCKET}/many/"


def assert_undisturbed(s3, name, config, undisturbed, log):
    """The output has the rows of an undisturbed run, each once, and every commit is as it says."""
    found = [list(s3.rows(f"{name}/{folder}").values()) for folder in ("embeddings", "rejects")]
    for rows in found:
        rows.sort(key=lambda row: row["image_id"])
    assert_same_rows(found, undisturbed, log)
    left = [s3.filesystem().find(f"{BUCKET}/{name}/{folder}") for folder in ("_staging", "lease")]
    assert [path for paths in left for path in paths if path.endswith((".json", ".parquet"))] == []
    environment = {"CVT_PIPELINE__STORAGE_OPTIONS": json.dumps(s3.options())}
    verified = cli("verify", f"s3://{BUCKET}/{name}", env=environment)
    assert verified.returncode == 0, verified.stderr


@pytest.mark.slow
def test_of_two_runs_at_the_same_instant_one_works_and_the_other_names_it(
    s3, many, undisturbed, tmp_path, tiny_model
):
    configs = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        output = f"s3://{BUCKET}/two/"
        configs.append(write_s3_config(tmp_path / name, many, tiny_model, output, s3.options()))
    processes = [start(config) for config in configs]
    codes = [process.wait(300) for process in processes]
    logs = [told(config.with_suffix(".log").read_text()) for config in configs]
    assert sorted(codes) == [0, 4], logs
    loser = logs[codes.index(4)]
    holder = (
        rf"is held by run (\S+) \(process {processes[codes.index(0)].pid} on \S+\) since \d{{4}}-\d\d-\d\dT"
    )
    found = re.search(holder, loser)
    assert found, loser
    assert s3.filesystem().exists(f"{BUCKET}/two/reports/{found[1]}.json")
    assert_undisturbed(s3, "two", configs[0], undisturbed, logs)


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_loses_nothing(s3, many, undisturbed, tmp_path, tiny_model):
    config = write_s3_config(tmp_path, many, tiny_model, f"s3://{BUCKET}/killed/", s3.options())
    process = start(config)
    log = config.with_suffix(".log")
    fs, deadline = s3.filesystem(), time.time() + 90
    while len(fs.find(f"{BUCKET}/killed/commits")) < 2:
        assert process.poll() is None, log.read_text()
        assert time.time() < deadline, log.read_text()
        time.sleep(0.05)
    s3.kill()
    try:
        time.sleep(4)
        assert process.poll() is None, log.read_text()
    finally:
        s3.start()
        s3.wait_until_up()
    code = process.wait(300)
    assert code in (0, 1, 3), log.read_text()
    told(log.read_text())
    if code:  # an error in words; the next run goes on
        assert s3.endpoint in log.read_text(), log.read_text()
        again = cli("extract", config)
        assert again.returncode == 0, again.stderr
    assert_undisturbed(s3, "killed", config, undisturbed, log.read_text())


@pytest.mark.slow
def test_throttling_resets_lost_answers_and_stalls_change_nothing(
    s3, many, undisturbed, tmp_path, tiny_model
):
    proxy = FlakyProxy(s3.ports["s3"], rate=0.12, seed=0, stall_s=2)
    try:
        options = s3.options(endpoint=proxy.endpoint)
        config = write_s3_config(tmp_path, many, tiny_model, f"s3://{BUCKET}/flaky/", options)
        done = cli("extract", config, timeout_s=300)
    finally:
        proxy.close()
    assert done.returncode == 0, f"{proxy.fates}\n{done.stderr}"
    assert all(proxy.fates[fate] for fate in FATES), proxy.fates
    assert_undisturbed(s3, "flaky", config, undisturbed, f"{proxy.fates}\n{told(done.stderr)}")


def test_a_dead_endpoint_is_named_soon(s3, many, tmp_path, tiny_model):
    """At once: an output where nobody listens, and one that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoints = [f"http://127.0.0.1:{port}" for port in (free_port(), silent.getsockname()[1])]
        began, runs = time.time(), []
        for number, endpoint in enumerate(endpoints):
            (tmp_path / str(number)).mkdir()
            options = s3.options(endpoint=endpoint)
            config = write_s3_config(tmp_path / str(number), many, tiny_model, f"s3://{BUCKET}/o", options)
            runs.append((start(config), config.with_suffix(".log"), endpoint))
        try:
            for process, log, endpoint in runs:
                code = process.wait(150)
                assert time.time() - began < 60, log.read_text()  # 20 s, and the start of two runs at once
                assert code == 1, log.read_text()
                assert f"storage failed at s3://{BUCKET}/o" in told(log.read_text())
                assert f"(endpoint {endpoint})" in log.read_text()
        finally:
            for process, _, _ in runs:
                process.kill()
