"""Shares of a cluster: every stage has room beside the others, whatever the machine."""

import pytest

from pipeline.config import ComputeConfig
from pipeline.resources import Resources, share_out

SIZE = (224, 224)


def shares(compute: dict | None = None, size: tuple[int, int] = SIZE, **cluster: float) -> Resources:
    given = {"cpus": 2.0, "gpus": 0.0, "num_nodes": 1, **cluster}
    return share_out(ComputeConfig.model_validate(compute or {}), size, **given)


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8, 16, 64])
@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_a_decoder_a_reader_and_a_writer_fit_beside_the_actors(cpus, gpus):
    share = shares(cpus=cpus, gpus=gpus, num_nodes=1)
    assert share.max_actors * share.actor_cpus + share.decode_cpus + 0.1 + 0.05 <= cpus
    assert share.max_actors * share.actor_gpus <= gpus


def test_one_actor_a_gpu_and_on_cpus_one_for_every_eight_cores_or_node():
    assert shares(cpus=64, gpus=8).max_actors == 8
    assert shares(cpus=64).max_actors == 8
    assert shares(cpus=2).max_actors == 1
    assert shares(cpus=6, num_nodes=3).max_actors == 3


def test_a_range_of_actors_is_a_pool_that_grows():
    share = shares({"actors": {"min": 1, "max": 4}}, cpus=16, gpus=4)
    assert (share.min_actors, share.max_actors, share.actor_gpus) == (1, 4, 1.0)


def test_several_actors_share_a_gpu_as_the_config_says():
    assert shares({"actors": 2}, cpus=16, gpus=1).actor_gpus == 0.5
    share = shares({"actor_gpus": 0.25}, cpus=16, gpus=1)
    assert (share.max_actors, share.actor_gpus) == (4, 0.25)


def test_a_cluster_that_starts_without_gpus_gets_them_where_the_config_says_so():
    share = shares({"actor_gpus": 1, "actors": {"min": 1, "max": 8}}, cpus=0, gpus=0, num_nodes=0)
    assert (share.actor_gpus, share.chunk_images) == (1.0, 256)
    assert shares({"actor_gpus": 0}, cpus=16, gpus=1).actor_gpus == 0


def test_chunks_are_larger_for_smaller_images_and_as_large_as_the_batch_that_is_asked_for():
    assert shares(size=(32, 32)).chunk_images == 256
    assert shares().chunk_images == shares(size=(384, 384)).chunk_images == 32
    assert shares({"batch_size": 48}).chunk_images == 48


def test_what_lies_between_the_stages_grows_with_the_machine_and_not_with_the_corpus():
    small, large = shares().store_bytes, shares(cpus=64, gpus=8).store_bytes
    assert 2**28 <= small <= 2**29
    assert small < large < 64 * 2**30
