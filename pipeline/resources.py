"""How a cluster is divided between the stages.

Enters: what the config asks for and what the cluster has. Leaves: the shares of every stage. Knows no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.config import ComputeConfig
from pipeline.samples import CHUNK_BYTES

_GPU_CHUNK, _CPU_CHUNK = 256, 32  # images of 224 x 224 a chunk; as many more of smaller ones, up to _MOST
_MOST = 256
_LEAST_STORE = 2**28


# Of a core, as Ray counts them: unequal, so that Ray does not fuse two stages, and small enough that an
# actor, a decoder, a reader and a writer have room on one core. Their number is bounded otherwise.
READ_CPUS, DECODE_CPUS, ACTOR_CPUS, WRITE_CPUS = 0.1, 0.4, 0.15, 0.05


@dataclass(frozen=True)
class Resources:
    """Each stage's share; `cpus` are those of the whole cluster, `num_threads` those of an actor."""

    min_actors: int
    max_actors: int
    actor_gpus: float
    num_threads: int
    chunk_images: int
    first_images: int  # of the first chunks of a run: what keeps the model's cores busy for a moment
    pixel_bytes: int  # of one image, decoded
    cpus: float

    @property
    def store_bytes(self) -> float:
        """What may lie between the stages at once: chunks for every core and actor, and some to wait.

        Without a bound Ray reads ahead until its object store is full, the more the larger the corpus.
        """
        chunk_bytes = CHUNK_BYTES + self.chunk_images * self.pixel_bytes
        return max(_LEAST_STORE, (2 * self.cpus + 4 * self.max_actors) * chunk_bytes)

    @property
    def most_waiting(self) -> int:
        """Chunks that may wait for a stage, beside those at work there: enough for it never to starve."""
        return max(4, 2 * int(self.cpus), 2 * self.max_actors)

    @property
    def slots(self) -> dict[str, float]:
        """How many tasks of each stage can be at work at once."""
        slots = {
            "read": self.readers,
            "decode": self.decoders,
            "model": self.max_actors,
            "write": self.writers,
        }
        return {stage: min(count, self.cpus) for stage, count in slots.items()}

    @property
    def decoders(self) -> int:
        """As many as there are cores: where the model needs them too, decoding waits for it in the end."""
        return max(1, int(self.cpus))

    @property
    def readers(self) -> int:
        """Shards read at once: one gives more than two cores can decode, from object storage too."""
        return max(1, int(self.cpus / 2))

    @property
    def writers(self) -> int:
        return max(2, int(self.cpus / 2))


class Node(NamedTuple):
    """A machine of the cluster: CPU cores, GPUs, labels."""

    cpus: float
    gpus: float = 0
    labels: Mapping[str, str] = {}

    def takes(self, compute: ComputeConfig) -> bool:
        """Whether a model may run here: labels, cores and, where they are asked for, GPUs."""
        asked = 0 if compute.actor_gpus == "auto" else compute.actor_gpus
        labelled = compute.actor_labels.items() <= self.labels.items()
        return labelled and self.cpus > 0 and self.gpus >= min(1, asked)


def share_out(compute: ComputeConfig, size: tuple[int, int], nodes: Sequence[Node]) -> Resources:
    """The stages' shares of a cluster.

    `size` is the height and width of the network's images. A cluster that grows from nothing has no GPUs
    yet: there `compute.actor_gpus` has to be said.
    """
    homes = [node for node in nodes if node.takes(compute)] or [Node(1)]
    asked, gpus = compute.actor_gpus, sum(node.gpus for node in homes)
    on_gpu = bool(gpus) if asked == "auto" else asked > 0
    fitting = sum(max(1, int(node.cpus // 8)) for node in homes)
    if on_gpu:
        fitting = max(1, int(gpus if asked == "auto" else gpus / asked))
    wanted = fitting if compute.actors == "auto" else compute.actors
    least, most = (wanted, wanted) if isinstance(wanted, int) else (wanted.min, wanted.max)
    share = min(sum(node.cpus for node in homes) / most, max(node.cpus for node in homes))
    chunk_images = first_images = _GPU_CHUNK
    if not on_gpu:
        smaller = 224 * 224 / (size[0] * size[1])
        chunk_images = max(_CPU_CHUNK, 8 * int(share), min(_MOST, int(_CPU_CHUNK * smaller)))
        first_images = max(4, 4 * int(share))
    if compute.batch_size != "auto":
        chunk_images = first_images = compute.batch_size
    return Resources(
        min_actors=least,
        max_actors=most,
        actor_gpus=min(1.0, gpus / most) if asked == "auto" else asked,
        num_threads=max(1, int(share)),
        chunk_images=chunk_images,
        first_images=first_images,
        pixel_bytes=3 * size[0] * size[1],
        cpus=max(1.0, sum(node.cpus for node in nodes)),
    )
