"""Poison: images that end their decoder, hang it or take all it has cost themselves and nothing else.

The decoders are real: a plug-in of Pillow, found through PYTHONPATH as an installed one would be, that does
what the image's bytes say.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvt_model.image_decoder import decode_image
from cvt_model.image_processor import CvtImageProcessor
from pipeline import decoder as decoder_module
from pipeline.decoder import Decoded, DecodeOptions, Decoder, Failed, borrowed_decoder
from pipeline.decoder_child import Child, SharedMemory
from pipeline.errors import DecoderError
from tests.conftest import encode, make_image
from tests.disturbed import descendants, is_alive
from tests.running import cli, make_config, rows_of, write_config, write_tar

PROCESSOR = CvtImageProcessor(size=32, crop_pct=0.875)
MAX_PIXELS = 10**7
TIMEOUT_S = 3.0  # a busy machine may keep a sound image waiting for a while
GOOD = [encode(make_image(seed, (60, 40)), kind) for seed, kind in enumerate(["PNG", "JPEG", "BMP"])]

PLUG_IN = """
import ctypes, os, signal, sys, time
from pathlib import Path
import numpy as np
from PIL import Image, ImageFile

os.nice = lambda increment: 0  # else a busy machine gives it no time at all

def segfault(): os.kill(os.getpid(), signal.SIGSEGV)
def null_pointer(): ctypes.string_at(0)
def abort(): os.abort()
def killed(): os.kill(os.getpid(), signal.SIGKILL)
def exit_now(): os._exit(0)
def leave(): sys.exit("a stray exit")
def sleep_in_c(): ctypes.PyDLL(None).sleep(1000)  # holding the interpreter's lock
def sleep_in_python():
    while True: time.sleep(0.01)
def sleep_with_a_handler():
    signal.signal(signal.SIGALRM, lambda *_: None)
    while True: time.sleep(0.01)
def deaf_from_now_on():
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
def sleep_deaf():
    deaf_from_now_on()
    sleep_in_c()
def eat_memory(): return [np.zeros(2**30, np.uint8) for _ in range(1000)]
def scribble():
    for fd in range(3, 4096):
        try: os.write(fd, b"nonsense\\n")
        except OSError: pass
def bear_and_die():
    hears, told = os.pipe()
    if os.fork() == 0:
        with LOG.with_name("orphans").open("a") as log: print(os.getpid(), file=log)
        os.write(told, b"x")
        time.sleep(1000)
    os.read(hears, 1)
    segfault()
def prints():
    print("garbage\\n" * 1000, flush=True)
    os.write(1, b"[0, 1]\\n"); os.write(2, b"[0, 1]\\n")
def dies_twice():
    if tries() <= 2: segfault()
def dies_once():
    if tries() <= 1: os.abort()
def hangs_once():
    if tries() <= 1: sleep_in_c()

LOG = Path(os.environ["POISON_LOG"])
def tries(): return len(LOG.read_text().splitlines())

class PoisonFile(ImageFile.ImageFile):
    format = "POISON"
    def _open(self):
        self._size, self._mode = (40, 30), "RGB"
        self.word = self.fp.read().decode().split(":")[1]
    def load(self):
        if self._im is None:
            with LOG.open("a") as log: print(os.getpid(), file=log)
            globals()[self.word]()
            self._im = Image.core.fill("RGB", self._size, (10, 20, 30))
        return Image.Image.load(self)

Image.register_open("POISON", PoisonFile, lambda prefix: prefix.startswith(b"POISON:"))
"""


def poison(word: str) -> bytes:
    return f"POISON:{word}:".encode()


class Plugged:
    """A decoder whose child has the plug-in, and the pids that met poison, one for each try."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log"
        self._log.write_text("")
        self._decoders: list[Decoder] = []
        self.decoder = self.with_options()

    def with_options(self, image_timeout_s: float = 60, **options: Any) -> Decoder:
        self.decoder = Decoder(PROCESSOR, DecodeOptions(MAX_PIXELS, image_timeout_s, **options))
        self._decoders.append(self.decoder)
        return self.decoder

    def decode(self, *images: bytes) -> list[tuple[Decoded | Failed, bytes]]:
        return decode(self.decoder, *images)

    @property
    def pids(self) -> list[int]:
        return [int(line) for line in self._log.read_text().splitlines()]

    @property
    def orphans(self) -> list[int]:
        path = self._log.with_name("orphans")
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def close(self) -> None:
        for decoder in self._decoders:
            decoder.close()


def decode(decoder: Decoder, *images: bytes) -> list[tuple[Decoded | Failed, bytes]]:
    """Each image's outcome and pixels; what leads and follows the images' bytes is none of theirs."""
    offsets = np.cumsum([7, *map(len, images)]).tolist()
    outcomes, pixels = decoder.decode(memoryview(b"before " + b"".join(images) + b"after"), offsets)
    size = decoder.image_bytes
    assert len(pixels) == size * len(images)
    return [(it, bytes(pixels[n * size :][:size])) for n, it in enumerate(outcomes)]


def pid_of(decoder: Decoder) -> int:
    child = decoder._child
    assert child is not None
    return child._process.pid


def assert_good(results: list[tuple[Decoded | Failed, bytes]], images: list[bytes] = GOOD) -> None:
    for (outcome, pixels), data in zip(results, images, strict=True):
        expected = decode_image(data, PROCESSOR, None)
        assert isinstance(outcome, Decoded), outcome
        assert (outcome.width, outcome.height, outcome.format) == expected[1:]
        assert pixels == expected.pixels.tobytes()


def is_gone(pid: int, timeout_s: float = 120) -> bool:
    """Neither running nor a zombie, soon."""
    deadline = time.monotonic() + timeout_s
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugged]:
    folder = tmp_path / "plug-in"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(PLUG_IN)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("POISON_LOG", str(folder / "log"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in Ray's workers: no thread that could take a signal
    plugged = Plugged(folder)
    yield plugged
    plugged.close()


CRASHES = {
    "segfault": "was ended by SIGSEGV, 3 times in a row",
    "null_pointer": "was ended by SIGSEGV, 3 times in a row",
    "abort": "was ended by SIGABRT, 3 times in a row",
    "killed": "was ended by SIGKILL, 3 times in a row",
    "exit_now": "ended with exit status 0, 3 times in a row",
    "leave": "ended with exit status 1, 3 times in a row",
    "scribble": "wrote over its own messages, 3 times in a row",
    "bear_and_die": "was ended by SIGSEGV, 3 times in a row",
}


@pytest.mark.parametrize("word", CRASHES)
def test_an_image_that_ends_its_decoder_is_told_after_three_tries_and_the_rest_is_kept(
    plugged: Plugged, word: str
) -> None:
    results = plugged.decode(GOOD[0], poison(word), GOOD[1], GOOD[2])
    outcome, _ = results.pop(1)
    assert_good(results)
    assert outcome.reason == "crashed"
    assert f"its decoder {CRASHES[word]}; take it out" in outcome.message
    assert len(plugged.pids) == len(set(plugged.pids)) == 3
    assert all(is_gone(pid) for pid in [*plugged.pids, *plugged.orphans])
    assert len(plugged.orphans) == (3 if word == "bear_and_die" else 0)
    assert_good(plugged.decode(*GOOD))


@pytest.mark.parametrize(
    ("word", "ended_by"),
    [
        ("sleep_in_c", "timer"),
        pytest.param("sleep_in_python", "timer", marks=pytest.mark.slow),
        pytest.param("sleep_with_a_handler", "parent", marks=pytest.mark.slow),
        ("sleep_deaf", "parent"),
    ],
)
def test_an_image_that_hangs_its_decoder_is_told_after_two_tries_and_the_rest_is_kept(
    plugged: Plugged, word: str, ended_by: str
) -> None:
    plugged.with_options(TIMEOUT_S)
    assert plugged.decoder._patience_s > TIMEOUT_S
    plugged.decoder._patience_s = TIMEOUT_S + 5 if ended_by == "parent" else 600
    started = time.monotonic()
    results = plugged.decode(GOOD[0], poison(word), GOOD[1], GOOD[2])
    seconds = time.monotonic() - started
    outcome, _ = results.pop(1)
    assert_good(results)
    assert outcome.reason == "timeout"
    assert "not decoded within 3 s, 2 times" in outcome.message
    assert "limits.image_timeout_s" in outcome.message
    assert len(plugged.pids) == len(set(plugged.pids)) == 2
    assert 2 * TIMEOUT_S <= seconds < 300  # of which a busy machine may take most to start three processes
    assert all(is_gone(pid) for pid in plugged.pids)
    assert_good(plugged.decode(*GOOD))


def test_a_timer_that_an_image_has_silenced_is_there_for_the_next(plugged: Plugged) -> None:
    plugged.with_options(TIMEOUT_S)
    plugged.decoder._patience_s = 600.0  # so that nothing but the timer can end it
    results = plugged.decode(poison("deaf_from_now_on"), poison("sleep_in_c"))
    assert isinstance(results[0][0], Decoded)
    assert results[1][0].reason == "timeout"


def test_an_image_that_takes_all_memory_is_told_and_the_machine_has_it_again(plugged: Plugged) -> None:
    results = plugged.decode(GOOD[0], poison("eat_memory"), GOOD[1], GOOD[2])
    outcome, _ = results.pop(1)
    assert_good(results)
    assert outcome.reason == "crashed"
    assert "its decoder took more than its 4.5 GB of memory, 2 times in a row" in outcome.message
    assert len(plugged.pids) == len(set(plugged.pids)) == 2


def test_whatever_a_decoder_prints_disturbs_nothing(
    plugged: Plugged, capfd: pytest.CaptureFixture[str]
) -> None:
    results = plugged.decode(GOOD[0], poison("prints"), GOOD[1], GOOD[2])
    outcome, pixels = results.pop(1)
    assert outcome[:3] == (40, 30, "POISON")
    assert pixels == bytes([10, 20, 30]) * 32 * 32
    assert_good(results)
    assert len(plugged.pids) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "garbage" in err


@pytest.mark.parametrize(("word", "tries"), [("dies_twice", 3), ("dies_once", 2), ("hangs_once", 2)])
def test_an_image_whose_decoder_was_unlucky_is_decoded_after_all(
    plugged: Plugged, word: str, tries: int
) -> None:
    plugged.with_options(TIMEOUT_S)
    results = plugged.decode(*GOOD, poison(word))
    assert_good(results[:3])
    assert results[3][0][:3] == (40, 30, "POISON")
    assert len(set(plugged.pids)) == tries


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each request to a child had."""
    counts: list[int] = []
    send = Child.send

    def spy(self: Child, message: dict[str, Any]) -> None:
        if "images" in message:
            counts.append(len(message["images"]))
        send(self, message)

    monkeypatch.setattr(Child, "send", spy)
    return counts


def test_after_a_crash_an_image_is_alone_until_it_is_done(plugged: Plugged, requests: list[int]) -> None:
    results = plugged.decode(GOOD[0], poison("dies_twice"), GOOD[1], GOOD[2])
    assert_good([results[0], *results[2:]])
    assert requests == [4, 1, 1, 2]


def test_poison_first_last_and_in_a_row_costs_itself_alone(plugged: Plugged) -> None:
    plugged.with_options(TIMEOUT_S)
    dead, bad = poison("segfault"), b"no image"
    results = plugged.decode(dead, poison("sleep_in_c"), GOOD[0], bad, GOOD[1], GOOD[2], dead)
    reasons = [outcome.reason if isinstance(outcome, Failed) else "" for outcome, _ in results]
    assert reasons == ["crashed", "timeout", "", "not_an_image", "", "", "crashed"]
    assert_good([results[n] for n in (2, 4, 5)])
    assert len(plugged.pids) == 3 + 2 + 3


def test_one_child_decodes_chunk_after_chunk(plugged: Plugged) -> None:
    assert_good(plugged.decode(*GOOD))
    pid = pid_of(plugged.decoder)
    assert_good(plugged.decode(*reversed(GOOD)), GOOD[::-1])
    assert pid_of(plugged.decoder) == pid


def test_a_child_killed_between_chunks_is_replaced_and_no_image_is_blamed(
    plugged: Plugged, requests: list[int]
) -> None:
    for _ in range(4):
        assert_good(plugged.decode(*GOOD))
        child = plugged.decoder._child
        assert child is not None
        child._process.kill()
        child._process.wait(60)
    killed = pid_of(plugged.decoder)
    assert_good(plugged.decode(*GOOD))
    assert requests == [3] * 5
    assert is_gone(killed)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_signals_of_a_terminal_are_the_parents_matter(plugged: Plugged, signum: signal.Signals) -> None:
    assert_good(plugged.decode(*GOOD))
    pid = pid_of(plugged.decoder)
    assert os.getpgid(pid) != os.getpgid(0)
    os.kill(pid, signum)
    time.sleep(0.1)
    assert_good(plugged.decode(*GOOD))
    assert pid_of(plugged.decoder) == pid


def test_a_child_outlives_the_thread_that_needed_it_first(plugged: Plugged) -> None:
    thread = threading.Thread(target=plugged.decode, args=GOOD)
    thread.start()
    thread.join()
    pid = pid_of(plugged.decoder)
    time.sleep(0.3)
    assert_good(plugged.decode(*GOOD))
    assert pid_of(plugged.decoder) == pid


PARENT = """
from cvt_model.image_processor import CvtImageProcessor
from pipeline.decoder import DecodeOptions, Decoder
decoder = Decoder(CvtImageProcessor(size=32), DecodeOptions(10**6, 600))
data = {data!r}
decoder.decode(memoryview(data), [0, len(data)])
print("idle", flush=True)
input()
"""


@pytest.mark.parametrize("word", ["", "sleep_in_c", "sleep_with_a_handler"])
def test_no_child_outlives_a_parent_that_is_killed(plugged: Plugged, word: str) -> None:
    words = [sys.executable, "-c", PARENT.format(data=poison(word) if word else GOOD[0])]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        if word:
            deadline = time.monotonic() + 60
            while not plugged.pids:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        else:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"idle\n"
        ((pid, started),) = descendants(parent.pid)
        assert not word or plugged.pids == [pid]
        parent.kill()
    deadline = time.monotonic() + 120
    while is_alive(pid, started):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_child_that_never_comes_up_is_an_error_with_its_last_words(
    plugged: Plugged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('this numpy is broken')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}:{tmp_path}")
    with pytest.raises(DecoderError, match=r"did not come up, 5 times.* status 1: .*this numpy is broken"):
        plugged.decode(*GOOD)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(DecoderError, match=r"did not come up.*No such file"):
        plugged.decode(*GOOD)


def test_what_lies_in_the_current_folder_is_not_imported(
    plugged: Plugged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy.py", "cvt_model.py", "pipeline.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    assert_good(plugged.decode(*GOOD))


def test_the_child_is_small_and_offers_itself_to_the_kernel_first(plugged: Plugged) -> None:
    plugged.decode(*GOOD)
    process = Path(f"/proc/{pid_of(plugged.decoder)}")
    assert (process / "oom_score_adj").read_text() == "1000\n"
    limits = (process / "limits").read_text().splitlines()
    (data,) = [line.split() for line in limits if line.startswith("Max data size")]
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert int(data[3]) == min(physical // 2, 4 * 2**30 + 16 * MAX_PIXELS)
    maps = (process / "maps").read_text()
    assert "numpy" in maps
    assert not any(name in maps for name in ("torch", "pyarrow", "ray/"))


def test_the_parent_hands_down_nothing_that_it_has_open(plugged: Plugged, tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        plugged.decode(*GOOD)
        links = Path(f"/proc/{pid_of(plugged.decoder)}/fd").iterdir()
        assert str(tmp_path / "open") not in [str(link.readlink()) for link in links]


def test_memory_follows_the_size_of_chunks_up_and_down(plugged: Plugged) -> None:
    large = encode(make_image(9, (2000, 1500)), "BMP")  # 9 MB
    sizes = []
    for images in (GOOD, [*GOOD, large], GOOD, [large, *GOOD, large]):
        assert_good(plugged.decode(*images), list(images))
        sizes.append(plugged.decoder._memory.size)
    assert sizes[1] > 9e6
    assert sizes[0] == sizes[2] < 2e6
    assert sizes[3] > 18e6
    pid = pid_of(plugged.decoder)
    assert Path(f"/proc/{pid}").exists()


def test_memory_without_memfd_is_a_file_without_a_name(
    plugged: Plugged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    plugged.with_options()
    assert_good(plugged.decode(*GOOD))
    assert_good(plugged.decode(*GOOD * 50), GOOD * 50)
    assert os.fstat(plugged.decoder._memory.fd).st_nlink == 0


def test_shared_memory_gives_back_what_is_much_too_much() -> None:
    memory = SharedMemory()
    for wanted, size in [(1, 1), (10**6, 1), (10**8, 96), (3 * 10**7, 96), (10**7, 10)]:
        memory.reserve(wanted)
        assert os.fstat(memory.fd).st_size == len(memory.map) == size * 2**20
    memory.close()


def test_an_interrupted_chunk_leaves_nothing_to_the_next(
    plugged: Plugged, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = Child.receive

    def interrupted(self: Child, patience_s: float) -> list[Any]:
        message = receive(self, patience_s)
        if message[:1] == [1]:
            raise KeyboardInterrupt
        return message

    with monkeypatch.context() as patch:
        patch.setattr(Child, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plugged.decode(*GOOD)
    assert_good(plugged.decode(*reversed(GOOD)), GOOD[::-1])


def test_threads_take_turns_with_the_processs_one_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "_decoder", None)
    seen: dict[int, list[tuple[Decoded | Failed, bytes]]] = {}

    def work(number: int) -> None:
        with borrowed_decoder(PROCESSOR, DecodeOptions(10**6)) as decoder:
            seen[number] = decode(decoder, GOOD[number % 3], GOOD[(number + 1) % 3])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(12):
        assert_good(seen[number], [GOOD[number % 3], GOOD[(number + 1) % 3]])
    with borrowed_decoder(PROCESSOR, DecodeOptions(10**6)) as decoder:
        first = pid_of(decoder)
    with borrowed_decoder(PROCESSOR, DecodeOptions(2399)) as decoder:
        assert is_gone(first)  # other options, another child
        ((outcome, _),) = decode(decoder, GOOD[0])
        assert outcome.reason == "too_many_pixels"
        decoder.close()


def test_fast_decoding_is_that_of_the_model_room(plugged: Plugged) -> None:
    photo = encode(make_image(5, (800, 600)), "JPEG")
    plugged.with_options(fast=True)
    ((_, pixels),) = plugged.decode(photo)
    assert pixels == decode_image(photo, PROCESSOR, None, fast=True).pixels.tobytes()
    assert pixels != decode_image(photo, PROCESSOR, None).pixels.tobytes()


@pytest.mark.slow  # tests/test_poison.py has a short one
def test_a_run_over_poison_ends_well_with_every_other_image(
    plugged: Plugged, tiny_model: Path, tmp_path: Path
) -> None:
    files = [(f"{seed:02d}.png", encode(make_image(seed))) for seed in range(40)]
    files[7:7] = [("07-dead.png", poison("segfault"))]
    files[30:30] = [("29-hung.png", poison("sleep_in_c"))]
    source = write_tar(tmp_path / "in" / "one.tar", files).parent
    config = make_config(source, tiny_model, tmp_path / "out", limits__image_timeout_s=3)
    ended = cli("extract", write_config(tmp_path / "config.yaml", config))
    assert ended.returncode == 0, ended.stderr
    rows, rejects = rows_of(tmp_path / "out"), rows_of(tmp_path / "out", "rejects")
    assert len({row["image_id"] for row in rows}) == len(rows) == 40
    found = {row["key"]: row["reason"] for row in rejects}
    assert found == {"07-dead": "crashed", "29-hung": "timeout"}
    assert len(plugged.pids) == 3 + 2
    assert all(is_gone(pid) for pid in plugged.pids)
