"""How a cluster is divided between the stages.

Enters: what the config asks for and what the cluster has. Leaves: the shares of every stage. Knows no Ray.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import ComputeConfig
from pipeline.samples import CHUNK_BYTES

_GPU_CHUNK, _CPU_CHUNK = 256, 32  # images of 224 x 224 a chunk; as many more of smaller ones, up to _MOST
_MOST = 256
_LEAST_STORE = 2**28


@dataclass(frozen=True)
class Resources:
    """Each stage's share.

    Shares differ from stage to stage, so that Ray does not fuse them, and leave each room beside the
    others on one core: two stages that ask for whole cores would starve each other.
    """

    min_actors: int
    max_actors: int
    actor_gpus: float
    actor_cpus: float
    decode_cpus: float
    num_threads: int
    chunk_images: int
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
    def slots(self) -> dict[str, float]:
        """How many tasks of each stage can be at work at once."""
        decode = max(1.0, (self.cpus - self.max_actors * self.actor_cpus) / self.decode_cpus)
        slots = {"read": self.readers, "decode": decode, "model": self.max_actors, "write": self.writers}
        return {stage: min(count, self.cpus) for stage, count in slots.items()}

    @property
    def readers(self) -> int:
        """Shards read at once: they wait for storage more than for cores, and each holds a chunk."""
        return max(2, int(self.cpus))

    @property
    def writers(self) -> int:
        return max(2, int(self.cpus / 2))


def share_out(
    compute: ComputeConfig, size: tuple[int, int], *, cpus: float, gpus: float, num_nodes: int
) -> Resources:
    """The stages' shares of a cluster of so many CPU cores, GPUs and nodes.

    `size` is the height and width of the network's images.
    A cluster that grows from nothing has no GPUs yet: there `compute.actor_gpus` has to be said.
    """
    cpus = max(1.0, cpus)
    asked = compute.actor_gpus
    on_gpu = bool(gpus) if asked == "auto" else asked > 0
    fitting = max(1, num_nodes, int(cpus // 8))
    if on_gpu:
        fitting = max(1, int(gpus if asked == "auto" else gpus / asked))
    wanted = fitting if compute.actors == "auto" else compute.actors
    least, most = (wanted, wanted) if isinstance(wanted, int) else (wanted.min, wanted.max)
    share = cpus / most
    chunk_images = _GPU_CHUNK
    if not on_gpu:
        smaller = 224 * 224 / (size[0] * size[1])
        chunk_images = max(_CPU_CHUNK, 8 * int(share), min(_MOST, int(_CPU_CHUNK * smaller)))
    if compute.batch_size != "auto":
        chunk_images = compute.batch_size
    return Resources(
        min_actors=least,
        max_actors=most,
        actor_gpus=min(1.0, gpus / most) if asked == "auto" else asked,
        actor_cpus=round(min(1.0, 0.3 * share) if on_gpu else 0.4 * share, 2),
        decode_cpus=0.4 if cpus < 2 else 0.5 if cpus <= 2 else 0.9,
        num_threads=max(1, int(share)),
        chunk_images=chunk_images,
        pixel_bytes=3 * size[0] * size[1],
        cpus=cpus,
    )
