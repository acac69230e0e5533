"""Shares of a cluster: every stage has room beside the others, whatever the machine."""

from typing import Any

from pipeline.config import ComputeConfig
from pipeline.resources import (
    ACTOR_CPUS,
    DECODE_CPUS,
    READ_CPUS,
    WRITE_CPUS,
    Node,
    Resources,
    share_out,
)

SIZE = (224, 224)


def shares(*nodes: Node, size: tuple[int, int] = SIZE, **compute: Any) -> Resources:
    return share_out(ComputeConfig.model_validate(compute), size, nodes)


def test_a_decoder_a_reader_a_writer_and_two_actors_fit_on_one_core():
    assert READ_CPUS + DECODE_CPUS + 2 * ACTOR_CPUS + WRITE_CPUS <= 1
    assert len({READ_CPUS, DECODE_CPUS, ACTOR_CPUS, WRITE_CPUS}) == 4, "equal neighbours would be fused"


def test_one_actor_a_gpu_and_on_cpus_one_for_every_eight_cores_or_node():
    assert shares(Node(64, 8)).max_actors == 8
    assert shares(Node(64)).max_actors == 8
    assert shares(Node(2)).max_actors == 1
    assert shares(Node(2), Node(2), Node(2)).max_actors == 3


def test_a_head_without_cores_is_no_place_for_a_model():
    share = shares(Node(0), Node(16, 1), Node(16, 1))
    assert (share.max_actors, share.num_threads) == (2, 16)
    assert shares(Node(0), Node(4), Node(4)).max_actors == 2


def test_an_actor_takes_no_more_threads_than_a_node_has_cores():
    assert shares(Node(2), Node(2), Node(2), actors=1).num_threads == 2
    assert shares(Node(8), actors=2).num_threads == 4


def test_nodes_without_the_labels_are_not_counted():
    nodes = Node(8, 1, {"pool": "gpu"}), Node(8, 1)
    assert shares(*nodes).max_actors == 2
    assert shares(*nodes, actor_labels={"pool": "gpu"}).max_actors == 1


def test_decoders_are_as_many_as_cores():
    assert shares(Node(2)).decoders == 2
    assert shares(Node(16, 1), Node(16, 1)).decoders == 32


def test_a_range_of_actors_is_a_pool_that_grows():
    share = shares(Node(16, 4), actors={"min": 1, "max": 4})
    assert (share.min_actors, share.max_actors, share.actor_gpus) == (1, 4, 1.0)


def test_several_actors_share_a_gpu_as_the_config_says():
    assert shares(Node(16, 1), actors=2).actor_gpus == 0.5
    share = shares(Node(16, 1), actor_gpus=0.25)
    assert (share.max_actors, share.actor_gpus) == (4, 0.25)


def test_a_cluster_that_starts_without_gpus_gets_them_where_the_config_says_so():
    share = shares(Node(0), actor_gpus=1, actors={"min": 1, "max": 8})
    assert (share.actor_gpus, share.chunk_images) == (1.0, 256)
    assert shares(Node(16, 1), actor_gpus=0).actor_gpus == 0


def test_chunks_are_larger_for_smaller_images_and_as_large_as_the_batch_that_is_asked_for():
    assert shares(Node(2), size=(32, 32)).chunk_images == 256
    assert shares(Node(2)).chunk_images == shares(Node(2), size=(384, 384)).chunk_images == 32
    assert shares(Node(2), batch_size=48).chunk_images == 48


def test_on_cpus_a_run_begins_with_a_small_chunk():
    assert shares(Node(2)).first_images == 8
    assert shares(Node(0.5)).first_images == 4
    assert shares(Node(16, 1)).first_images == shares(Node(16, 1)).chunk_images
    assert shares(Node(2), batch_size=48).first_images == 48


def test_what_lies_between_the_stages_grows_with_the_machine_and_not_with_the_corpus():
    small, large = shares(Node(2)).store_bytes, shares(Node(64, 8)).store_bytes
    assert 2**28 <= small <= 2**29
    assert small < large < 64 * 2**30
