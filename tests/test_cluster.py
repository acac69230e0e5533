"""Runs on a cluster of three nodes: one dies in the middle, pools grow, labels bind."""

import subprocess
import time

import pytest

from tests.disturbed import (
    NUM_TARS,
    assert_same_rows,
    corpus,
    num_commits,
    undisturbed,
    wait_for_commits,
)
from tests.ray_cluster import local_cluster
from tests.running import CLI, cli, leftovers, make_config, rows_of, write_config

__all__ = ["corpus", "undisturbed"]  # fixtures
NODE = {"num_cpus": 2}
LONG_S = 300  # no figure of ours: a machine that others are busy on too


@pytest.fixture(scope="module")
def cluster():
    """A head and two workers of two CPUs each; the first worker has a label."""
    with local_cluster(NODE, {**NODE, "labels": {"pool": "models"}}, NODE) as started:
        yield started


def start(cluster, corpus, tiny_model, folder, **compute):
    """An extract on the cluster, whose output goes to a file beside its config."""
    values = {f"compute__{key}": value for key, value in {"batch_size": 4, **compute}.items()}
    config = write_config(folder / "config.yaml", make_config(corpus, tiny_model, folder / "out", **values))
    with (folder / "config.log").open("ab") as log:
        return subprocess.Popen([str(CLI), "extract", str(config)], stdout=log, stderr=log, env=cluster.env)


def models_on(cluster, node):
    """How many processes of a node hold a model, or are about to."""
    return sum("Embed" in work for work in cluster.work_of(node))


def watch(cluster, process, timeout_s=LONG_S):
    """The models on each node, as often as it changed, until the run has ended."""
    seen = [(0,) * len(cluster.raylets)]
    deadline = time.time() + timeout_s
    while process.poll() is None and time.time() < deadline:
        now = tuple(models_on(cluster, node) for node in range(len(cluster.raylets)))
        if now != seen[-1]:
            seen.append(now)
        time.sleep(0.05)
    if process.poll() is None:
        process.kill()
    return seen


def assert_undisturbed(process, folder, wanted, told=""):
    """The run ended well, its output has the rows of one that nothing disturbed, and nothing else."""
    returned = process.wait(LONG_S)
    told = f"{told}\n{(folder / 'config.log').read_text()[-3000:]}"
    assert returned == 0, told
    out = folder / "out"
    assert_same_rows((rows_of(out), rows_of(out, "rejects")), wanted, told)
    assert leftovers(out) == [], told
    verified = cli("verify", out)
    assert verified.returncode == 0, f"{told}\n{verified.stderr}"


def busy_worker(cluster):
    """A node other than the head's that holds a model and is at other work too, and what that is."""
    deadline = time.time() + LONG_S
    while time.time() < deadline:
        for node in (1, 2):
            work = cluster.work_of(node)
            if any("Embed" in word for word in work) and any(
                word.startswith("MapBatches") for word in work
            ):
                return node, work
    raise AssertionError([cluster.work_of(node) for node in range(3)])


@pytest.mark.slow
def test_a_node_that_dies_in_the_middle_costs_nothing(corpus, tiny_model, undisturbed, tmp_path):
    with local_cluster(NODE, NODE, NODE) as cluster:
        process = start(cluster, corpus, tiny_model, tmp_path)
        wait_for_commits(process, tmp_path, 2, timeout_s=LONG_S)
        doomed, lost = busy_worker(cluster)
        before = num_commits(tmp_path)
        cluster.kill(doomed)
        assert 2 <= before < NUM_TARS - 1, before
        assert_undisturbed(process, tmp_path, undisturbed, f"{before} commits before, lost: {lost}")


@pytest.mark.slow
def test_models_run_on_the_nodes_with_their_labels_alone(
    cluster, corpus, tiny_model, undisturbed, tmp_path
):
    process = start(cluster, corpus, tiny_model, tmp_path, actors=1, actor_labels={"pool": "models"})
    seen = watch(cluster, process)
    assert_undisturbed(process, tmp_path, undisturbed, str(seen))
    assert {node for models in seen for node, count in enumerate(models) if count} == {1}, seen


@pytest.mark.slow
def test_nodes_of_one_core_get_through(corpus, tiny_model, undisturbed, tmp_path):
    with local_cluster(*[{"num_cpus": 1}] * 3) as cluster:
        process = start(cluster, corpus, tiny_model, tmp_path)
        seen = watch(cluster, process)
        assert_undisturbed(process, tmp_path, undisturbed, str(seen))


@pytest.mark.slow
def test_a_pool_grows_where_work_waits_and_no_further(cluster, corpus, tiny_model, undisturbed, tmp_path):
    process = start(cluster, corpus, tiny_model, tmp_path, actors={"min": 1, "max": 2})
    seen = watch(cluster, process)
    assert_undisturbed(process, tmp_path, undisturbed, str(seen))
    totals = [sum(models) for models in seen]
    assert totals[:3] == [0, 1, 2], seen
    assert max(totals) == 2, seen
