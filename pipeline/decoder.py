"""Decoding that survives its images: in a child process, tried again where that dies, told where it must.

Enters: the encoded images of a chunk. Leaves: for each the pixels and what the original was, or a reason
and a message. A decoder that crashes, hangs (in C code too) or takes all memory costs its own image, after
bounded tries, and nothing else. Knows no Arrow.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from cvt_model.image_processor import CvtImageProcessor
from pipeline.decoder_child import Child, ChildEnded, SharedMemory
from pipeline.errors import DecoderError

_TRIES = 3  # of an image whose decoder dies: something else may have killed it
_PATIENT_TRIES = 2  # of one that hangs or takes all memory, which cost more
_START_TRIES = 5
_ALIGNMENT = 4096


@dataclass(frozen=True)
class DecodeOptions:
    """How images are decoded, and what one may cost."""

    max_pixels: int
    image_timeout_s: float = 60
    fast: bool = False


class Decoded(NamedTuple):
    """What an image was; its pixels are in their place among the chunk's."""

    width: int
    height: int
    format: str
    sha256: bytes


class Failed(NamedTuple):
    """Why there are no pixels: one of `schema.REJECT_REASONS`, and words for people."""

    reason: str
    message: str


class Decoder:
    """Decodes chunks, one at a time, by a child process that is started when there is work."""

    def __init__(self, processor: CvtImageProcessor, options: DecodeOptions) -> None:
        self.settings = (processor, options)
        assert processor.output_size is not None, "the config says which size pixels have"
        self.image_bytes = math.prod(processor.output_size) * 3
        self._message = {"processor": processor.model_dump(mode="json"), **asdict(options)}
        self._timeout_s = options.image_timeout_s
        # The child's own timer comes first; this is for a decoder that blocks or catches its signal.
        self._patience_s = options.image_timeout_s * 1.1 + 3
        self._memory = SharedMemory()
        self._child: Child | None = None

    def decode(self, data: memoryview, offsets: Sequence[int]) -> tuple[list[Decoded | Failed], memoryview]:
        """Decode the images that lie in `data` between one offset and the next.

        Returns their outcomes and all their pixels in a row, `image_bytes` for each, which are this
        decoder's own until it decodes again; those of a failed image mean nothing. Raises DecoderError
        where no child can be started.
        """
        count, start = len(offsets) - 1, offsets[0]
        total = offsets[-1] - start
        first_place = -(-total // _ALIGNMENT) * _ALIGNMENT
        size = first_place + count * self.image_bytes
        self._memory.reserve(size)
        self._memory.map[:total] = data[start : offsets[-1]]
        images = [
            (number, begin - start, end - start, first_place + number * self.image_bytes)
            for number, (begin, end) in enumerate(pairwise(offsets))
        ]
        outcomes = self._outcomes(deque(images))
        return outcomes, memoryview(self._memory.map)[first_place:size]

    def close(self) -> None:
        """End the child and give its memory back."""
        self._end_child()
        self._memory.close()

    def _outcomes(self, todo: deque[tuple[int, int, int, int]]) -> list[Decoded | Failed]:
        outcomes: list[Decoded | Failed] = []
        endings: list[ChildEnded] = []  # of the first image's decoders
        try:
            while todo:
                try:
                    # An image that ended its decoder is tried again alone, the rest when it is done.
                    for outcome in self._ask(list(todo)[: 1 if endings else None]):
                        outcomes.append(outcome)
                        todo.popleft()
                        endings.clear()
                except ChildEnded as ending:
                    self._end_child()
                    endings.append(ending)
                    if failed := self._given_up(endings):
                        outcomes.append(failed)
                        todo.popleft()
                        endings.clear()
        finally:
            if todo:  # interrupted: what the child still says is for nobody
                self._end_child()
        return outcomes

    def _ask(self, images: list[tuple[int, int, int, int]]) -> Iterator[Decoded | Failed]:
        """Outcomes in the images' order, until the child ends."""
        child = self._child = self._live_child()
        child.send({"size": self._memory.size, "images": images})
        for number, *_ in images:
            found, kind, *values = child.receive(self._patience_s)
            assert found == number, "the child answers in order"
            if kind == "memory":
                # Its memory may be another image's leak: a fresh child tries again.
                raise ChildEnded("memory", f"took more than its {values[0] / 1e9:.1f} GB of memory")
            if kind == "rejected":
                yield Failed(*values)
            else:
                width, height, name, sha256 = values
                yield Decoded(width, height, name, bytes.fromhex(sha256))

    def _given_up(self, endings: list[ChildEnded]) -> Failed | None:
        """The reject, once an image was tried often enough."""
        kind = endings[-1].kind
        alike = sum(ending.kind == kind for ending in endings)
        if len(endings) < _TRIES and (kind == "crash" or alike < _PATIENT_TRIES):
            return None
        if kind == "timeout":
            return Failed(
                "timeout",
                f"it was not decoded within {self._timeout_s:g} s, {alike} times; take it out of the "
                "input, convert it, or raise limits.image_timeout_s",
            )
        ways = Counter(ending.how for ending in endings)
        told = ", then ".join(f"{how}{_times(count)}" for how, count in ways.items())
        return Failed("crashed", f"its decoder {told}; take it out of the input, or convert it elsewhere")

    def _live_child(self) -> Child:
        if self._child is not None and not self._child.has_ended():
            return self._child
        self._end_child()
        for number in range(1, _START_TRIES + 1):
            try:
                return Child(self._message, self._memory)
            except (ChildEnded, OSError) as error:
                last = error
                time.sleep(0.1 * number)
        raise DecoderError(
            f"the process that decodes images did not come up, {_START_TRIES} times in a row; "
            f"the last one {last}{_words_of_start()}"
        ) from last

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


_lock = threading.Lock()
_decoder: Decoder | None = None


@contextlib.contextmanager
def borrowed_decoder(processor: CvtImageProcessor, options: DecodeOptions) -> Iterator[Decoder]:
    """This process's decoder, for one thread at a time; it lives on, so that its start is paid once."""
    global _decoder
    with _lock:
        if _decoder is not None and _decoder.settings != (processor, options):
            _decoder.close()
            _decoder = None
        if _decoder is None:
            _decoder = Decoder(processor, options)
        yield _decoder


def _times(count: int) -> str:
    return "" if count == 1 else f", {count} times in a row"


def _words_of_start() -> str:
    """What a child says that fails to import its modules: the last line of its traceback."""
    words: list[Any] = [sys.executable, "-c", "import pipeline.decoder_process"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        tried = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        lines = tried.stderr.strip().splitlines()
        return f": {lines[-1]}" if lines else ""
    return ""
