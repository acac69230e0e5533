"""`ray job submit` against a cluster of its own: exit codes, a stop, and a run that goes on with it.

Needs Ray's job server, which comes with the extra `cluster`.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray._private.utils import get_dashboard_dependency_error

from tests.disturbed import NUM_TARS, assert_same_rows, config_for, corpus, num_commits, undisturbed
from tests.ray_cluster import local_cluster
from tests.running import cli, leftovers, rows_of, write_tar

__all__ = ["corpus", "undisturbed"]  # fixtures
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        get_dashboard_dependency_error() is not None,
        reason="Ray's job server is not installed: ray[default]",
    ),
]


@pytest.fixture(scope="module")
def cluster():
    """One node with a job server, whose PATH begins with this environment's programs."""
    with local_cluster(
        {"num_cpus": 2, "include_dashboard": True},
        RAY_JOB_STOP_WAIT_TIME_S="12",
        PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin",
    ) as started:
        yield started


def ray_job(cluster, verb, *words, timeout_s=300):
    """`ray job VERB WORDS` to its end."""
    return subprocess.run(
        ["ray", "job", verb, "--address", f"http://{cluster.dashboard}", *map(str, words)],
        env=cluster.env,
        timeout=timeout_s,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_submitted_run_is_stopped_cleanly_and_the_next_goes_on(
    cluster, corpus, tiny_model, undisturbed, tmp_path
):
    config_for(corpus, tiny_model, tmp_path)
    words = ("--working-dir", tmp_path, "--", "python", "-m", "jobs.extract", "config.yaml")
    submitted = ray_job(cluster, "submit", "--no-wait", "--submission-id", "first", *words)
    assert submitted.returncode == 0, submitted.stderr
    deadline = time.time() + 300
    while num_commits(tmp_path) < 2:
        assert time.time() < deadline, ray_job(cluster, "logs", "first").stdout[-3000:]
        time.sleep(0.02)
    stopped = ray_job(cluster, "stop", "first")
    told = ray_job(cluster, "logs", "first").stdout
    out = tmp_path / "out"
    assert "was stopped" in stopped.stdout + stopped.stderr, stopped.stdout + told
    assert "stopped by signal 15" in told, told[-3000:]
    assert 2 <= num_commits(tmp_path) < NUM_TARS, told[-3000:]
    assert leftovers(out) == [], told[-3000:]
    assert cli("verify", out).returncode == 0
    again = ray_job(cluster, "submit", *words)
    assert again.returncode == 0, again.stdout[-3000:]
    assert "succeeded" in again.stdout + again.stderr
    assert_same_rows((rows_of(out), rows_of(out, "rejects")), undisturbed, again.stdout[-3000:])
    assert leftovers(out) == []


def test_a_failed_shard_fails_the_job_and_its_message_has_the_exit_code(cluster, tiny_model, tmp_path):
    whole = write_tar(tmp_path / "in/whole.tar", [("a.png", b"junk")])
    (tmp_path / "in/torn.tar").write_bytes(whole.read_bytes()[:700])
    config = config_for(tmp_path / "in", tiny_model, tmp_path)
    failed = ray_job(
        cluster, "submit", "--", "cvt-pipeline", "extract", config, "limits.max_reject_fraction=1"
    )
    told = failed.stdout + failed.stderr
    assert failed.returncode == 1, told  # Ray's own code for every failed job
    assert "Job entrypoint command failed with exit code 3" in told
    assert "torn.tar" in told
