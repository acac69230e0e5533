"""One benchmark of the whole: its images on disk, its settings, and a round of measuring.

Enters: `WholeBench`. Leaves: `Round`s of what was seen. Computes no figures.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa
import torch

from cvt_model.choices import Precision, resolve_backend, resolve_precision
from pipeline.bench.corpus import LARGE, NUM_LARGE, Photograph, as_jpegs, write_files, write_tars
from pipeline.bench.decoding import Decoding, decode_seconds
from pipeline.bench.hub_pipeline import hub_pipeline_speeds
from pipeline.bench.inputs import Unavailable, save_random
from pipeline.bench.machine import hardware, versions
from pipeline.bench.one_run import environment, run_extract
from pipeline.bench.processes import alone
from pipeline.bench.rounds import ratio
from pipeline.bench.stages import read, read_seconds, run_model, write_seconds
from pipeline.bench.whole_figures import Round, images_for_a_run
from pipeline.config import Config
from pipeline.decode import DecodeOptions
from pipeline.embed import EmbedOptions
from pipeline.prepare import find_checkpoint
from pipeline.resources import Node, share_out
from pipeline.samples import ReadOptions

MODES = ("exact", "fast")
RIVAL_S = 10.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class WholeBench:
    """What is to be measured."""

    checkpoint: str
    images: Path | None = None  # a folder of photographs; None: those of scikit-image
    precision: str = "auto"
    decode: str = "exact"
    num_images: int | None = None  # of the run; None: half a minute of work
    rounds: int = 1  # of everything, so that what is compared is interleaved
    num_threads: int | None = None  # cores for all of it; None: all that this process may use
    random_weights: bool = False
    with_rival: bool = True
    folder: Path | None = None  # where corpus and outputs are meanwhile; None: the system's


class Ground:
    """What all rounds have in common: the images on disk, the config, the division of the machine."""

    def __init__(
        self, bench: WholeBench, folder: Path, photographs: Sequence[Photograph], cores: Sequence[int]
    ) -> None:
        self.bench, self.folder, self.photographs, self.cores = bench, folder, photographs, cores
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.on_gpu = self.device.type == "cuda"
        self.source = bench.checkpoint
        if bench.random_weights:
            self.source = str(folder / "checkpoint")
            save_random(bench.checkpoint, Path(self.source))
        precision = cast(Literal["auto"] | Precision, bench.precision)
        self.precision = resolve_precision(precision, on_gpu=self.on_gpu)
        self.config = self.make_config("output")
        self.checkpoint = find_checkpoint(self.config)
        self.num_gpus = torch.cuda.device_count()
        size = self.checkpoint.processor.output_size
        assert size is not None, "find_checkpoint refuses such a processor"
        resources = share_out(self.config.compute, size, [Node(len(cores), self.num_gpus)])
        self.read_options = ReadOptions(resources.chunk_images, self.config.limits.max_image_bytes)
        self.env = environment(len(cores))
        self.sample = write_tars(folder / "sample", photographs, len(photographs))
        large = as_jpegs(photographs[:NUM_LARGE], LARGE)
        self.large = write_tars(folder / "large", large, len(large))
        self.files = write_files(folder / "files", photographs)
        self.num_images = bench.num_images

    def make_config(self, output: str) -> Config:
        return Config.model_validate(
            {
                "input": {
                    "uri": str(self.folder / "corpus"),
                    "format": "webdataset",
                    "decode": self.bench.decode,
                },
                "model": {"checkpoint": self.source, "precision": self.precision},
                "output": {"uri": str(self.folder / output)},
            }
        )

    def describe(self) -> dict[str, Any]:
        """What is measured where."""
        bench = self.bench
        return {
            "checkpoint": bench.checkpoint,
            "weights": "random" if bench.random_weights else "of the checkpoint",
            "images": str(bench.images) if bench.images else "photographs of scikit-image",
            "num_photographs": len(self.photographs),
            "rounds": bench.rounds,
            "precision": self.precision,
            "decode": bench.decode,
            "backend": resolve_backend("auto", on_gpu=self.on_gpu),
            "hardware": hardware(self.device, len(self.cores)),
            "versions": versions(),
        }

    def measure(self, number: int, say: Say) -> Round:
        """Every stage alone, then a run, then the rival."""
        seen = Round()
        self.measure_read(seen)
        decodings = self.decodings()
        say("decoding alone, on one core and on all")
        self.measure_decode(seen, decodings)
        say(f"the model alone, in {self.precision}")
        chunks = self.measure_model(seen, decodings)
        say("writing alone")
        self.measure_write(seen, chunks)
        num_images = self.make_corpus(seen.note_ceiling(on_gpu=self.on_gpu))
        say(f"a run over {num_images} images, in a process of its own")
        self.measure_run(seen, number)
        if self.bench.with_rival:
            say("transformers' pipeline on the same images")
        self.measure_rival(seen)
        return seen

    def measure_read(self, seen: Round) -> None:
        count, size = len(self.photographs), sum(len(photo.data) for photo in self.photographs)
        seconds = read_seconds(self.sample, self.read_options)
        seen.speeds["read_images_per_s"] = [count / second for second in seconds]
        seen.speeds["read_bytes_per_s"] = [size / second for second in seconds]

    def decodings(self) -> dict[str, Decoding]:
        """By mode: the images, and the large ones."""
        limits, found = self.config.limits, {}
        for suffix, tars in (("", self.sample), ("_12mp", self.large)):
            chunks = read(tars, self.read_options)
            for mode in MODES:
                options = DecodeOptions(limits.max_pixels, limits.image_timeout_s, mode == "fast")
                found[mode + suffix] = Decoding(chunks, self.checkpoint.processor, options)
        return found

    def measure_decode(self, seen: Round, decodings: Mapping[str, Decoding]) -> None:
        count, mode = len(self.photographs), self.bench.decode
        (alone_s,) = decode_seconds(decodings, self.cores[:1])
        for name, of_mode in (("decode", "exact"), ("decode_fast", "fast")):
            seen.speeds[f"{name}_images_per_s_core"] = [count / second for second in alone_s[of_mode]]
        for suffix in ("", "_12mp"):
            fast_s, exact_s = alone_s[f"fast{suffix}"], alone_s[f"exact{suffix}"]
            seen.ratios[f"decode_ratio_fast{suffix}"] = ratio(fast_s, exact_s)
        each_s = decode_seconds({mode: decodings[mode]}, self.cores)
        passes = zip(*(seconds[mode] for seconds in each_s), strict=True)
        seen.speeds["decode_images_per_s"] = [sum(count / second for second in one) for one in passes]

    def measure_model(self, seen: Round, decodings: Mapping[str, Decoding]) -> list[pa.Table]:
        """Returns what the model made of the images."""
        config, chunk_images = self.config, self.read_options.chunk_images
        options = EmbedOptions(
            checkpoint=self.checkpoint.source,
            weights_sha256=self.checkpoint.weights_sha256,
            precision=self.precision,
            backend=config.model.backend,
            batch_size=config.compute.batch_size,
            embedding=config.model.embedding,
            logits=config.output.logits,
            dtype=config.output.dtype,
            num_threads=len(self.cores),
        )
        modes = {mode: decodings[mode] for mode in MODES}
        found = alone(run_model, options, chunk_images, modes, self.bench.decode)
        models = max(1, self.num_gpus)
        seen.speeds["model_images_per_s"] = [models * speed for speed in found.images_per_s]
        seen.facts |= {
            "chunk_images": chunk_images,
            "cosine_fast_mean": statistics.fmean(found.cosines),
            "cosine_fast_min": min(found.cosines),
            "pixel_difference_fast": found.pixel_difference,
        }
        return found.chunks

    def measure_write(self, seen: Round, chunks: Sequence[pa.Table]) -> None:
        folder = self.folder / "written"
        seconds = write_seconds(chunks, folder)
        seen.speeds["write_images_per_s"] = [len(self.photographs) / second for second in seconds]
        shutil.rmtree(folder)

    def make_corpus(self, ceiling_images_per_s: float) -> int:
        """The run's tars, the same in every round; returns how many images they hold."""
        self.num_images = self.num_images or images_for_a_run(ceiling_images_per_s)
        if not (self.folder / "corpus").exists():
            write_tars(self.folder / "corpus", self.photographs, self.num_images)
        return self.num_images

    def measure_run(self, seen: Round, number: int) -> None:
        config = self.make_config(f"output-{number}")
        report = run_extract(config, self.folder, self.env)
        shutil.rmtree(config.output.uri)
        seen.note_run(report["images_per_s"])
        seen.facts["num_images"] = report["images"]
        for name in ("startup_s", "limiting_stage", "stage_s", "stage_slots"):
            seen.facts[name] = report[name]

    def measure_rival(self, seen: Round) -> None:
        seen.facts["unavailable"] = {}
        try:
            if not self.bench.with_rival:
                raise Unavailable("it was not asked for")
            threads = len(self.cores)
            seen.note_rival(alone(hub_pipeline_speeds, self.source, self.files, threads, RIVAL_S))
        except Unavailable as reason:
            seen.facts["unavailable"] = {"pipeline_images_per_s": str(reason)}
