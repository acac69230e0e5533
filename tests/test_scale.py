"""Scale: one large tar keeps every core decoding, and memory is that of the machine, not of the corpus.

CVT_TEST_SCALE sets how many images the larger corpus of the memory test has (200,000), CVT_TEST_SCALE_BASE
how many the smaller one has (a tenth). Debug with a few thousand.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import encode, make_image
from tests.disturbed import command, descendants, kill, start
from tests.running import ids_of, make_config, rows_of, write_config, write_tar

CORES = 4  # as Ray counts them; they need not be there
MEETING_S = 100

# Every image waits in its decoder until as many decoders as there are cores have an image to decode.
MEETING = f"""
import os, time
from pathlib import Path
from PIL import Image, ImageFile

FOLDER = Path(os.environ["MEETING"])
ALONE = FOLDER.with_name("alone")

class MeetingFile(ImageFile.ImageFile):
    format = "MEETING"
    def _open(self):
        self._size, self._mode = (40, 30), "RGB"
    def load(self):
        if self._im is None:
            (FOLDER / str(os.getpid())).touch()
            deadline = time.monotonic() + {MEETING_S}
            while len(list(FOLDER.iterdir())) < {CORES}:
                if time.monotonic() > deadline: ALONE.touch()
                if ALONE.exists(): raise OSError("alone")
                time.sleep(0.05)
            self._im = Image.core.fill("RGB", self._size, (10, 20, 30))
        return Image.Image.load(self)

Image.register_open("MEETING", MeetingFile, lambda prefix: prefix.startswith(b"MEETING"))
"""

RUN = f"""
import ray, sys, time
from pathlib import Path
from pipeline.load_config import load_config
from pipeline.extract import extract
from pipeline.stop import Stop

ray.init(num_cpus={CORES}, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
config = load_config(Path(sys.argv[1]))
tally = extract(config, stop=Stop(), on_progress=lambda tally: None, started=time.time())
print([tally.images, dict(tally.rejects), tally.stopped, tally.failed_shards])
"""


@pytest.mark.slow
def test_one_tar_is_decoded_by_all_cores_at_once(tiny_model, tmp_path):
    """Decoders one after another would never meet, and each would end its first image as a reject."""
    count = 2000
    for name in ("plug-in", "meeting"):
        (tmp_path / name).mkdir()
    (tmp_path / "plug-in/sitecustomize.py").write_text(MEETING)
    write_tar(tmp_path / "in/one.tar", [(f"{n:04d}.png", b"MEETING %d" % n) for n in range(count)])
    choices = {"compute__batch_size": 50, "limits__image_timeout_s": 2 * MEETING_S}
    out = tmp_path / "out"
    config = make_config(tmp_path / "in", tiny_model, out, **choices)
    path = write_config(tmp_path / "config.yaml", config)
    plug_in = {"PYTHONPATH": str(tmp_path / "plug-in"), "MEETING": str(tmp_path / "meeting")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path)],
        env={**os.environ, **plug_in},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.stdout.strip() == str([count, {}, "", {}]), done.stderr[-3000:]
    assert len(list((tmp_path / "meeting").iterdir())) >= CORES
    assert len(set(ids_of(out))) == count
    assert rows_of(out, "rejects") == []


SCALE = int(os.environ.get("CVT_TEST_SCALE", "200000"))
BASE = int(os.environ.get("CVT_TEST_SCALE_BASE", str(SCALE // 10)))
PER_TAR = 1000
KINDS = {
    "actor": r"ray::MapWorker",
    "worker": r"ray::",
    "decoder": r".* pipeline\.decoder_process",
}
SAMPLE_EVERY_S = 1.0
TOLERANCE = 1.1


def write_tiny(folder, count):
    """So many images in tars of a thousand, all with the same few JPEGs under other keys."""
    jpegs = [encode(make_image(seed, (32, 32)), "JPEG") for seed in range(8)]
    whole = write_tar(folder / "000.tar", [(f"{n:04d}.jpg", jpegs[n % len(jpegs)]) for n in range(PER_TAR)])
    for number in range(1, count // PER_TAR):
        shutil.copy(whole, folder / f"{number:03d}.tar")
    return folder


def anonymous_bytes(pid):
    """A process's own memory, without files and the object store; 0 once it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Anonymous:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def kind_of(pid, driver):
    """What a process of a run is; None of those that are Ray's own."""
    if pid == driver:
        return "driver"
    words = command(pid)
    return next((kind for kind, pattern in KINDS.items() if re.match(pattern, words)), None)


def sample(driver, peaks):
    """Raise `peaks`, the most bytes that one process of a kind has held, to what there is now."""
    for pid in (driver, *(pid for pid, _ in descendants(driver))):
        kind = kind_of(pid, driver)
        if kind is not None:
            peaks[kind] = max(peaks.get(kind, 0), anonymous_bytes(pid))


def peaks_of_a_run(folder, checkpoint, count):
    """Extract so many images in a process of its own; the peaks of its processes by kind, in bytes."""
    corpus = write_tiny(folder / "in", count)
    config = make_config(corpus, checkpoint, folder / "out", compute__batch_size=64)
    process = start(write_config(folder / "config.yaml", config))
    peaks = {}
    try:
        while process.poll() is None:
            sample(process.pid, peaks)
            time.sleep(SAMPLE_EVERY_S)
    finally:
        kill(process)
    told = (folder / "config.log").read_text()[-3000:]
    assert process.returncode == 0, told
    files = list((folder / "out/embeddings").glob("*.parquet"))
    assert sum(pq.read_metadata(file).num_rows for file in files) == count, told
    return peaks


def test_the_memory_that_is_sampled_is_that_of_the_process_alone(tmp_path):
    code = "import sys; held = b'x' * int(sys.argv[1]); print(flush=True); input()"
    sizes = []
    for size in (1, 2**26):
        words = [sys.executable, "-c", code, str(size)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            sizes.append(anonymous_bytes(process.pid))
            assert kind_of(process.pid, process.pid) == "driver"
            assert kind_of(process.pid, os.getpid()) is None
            process.stdin.close()
    assert sizes[0] < 2**25
    assert abs(sizes[1] - sizes[0] - 2**26) < 2**22
    assert anonymous_bytes(process.pid) == 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tiny_model, tmp_path):
    base, large = (peaks_of_a_run(tmp_path / str(n), tiny_model, n) for n in (BASE, SCALE))
    told = {kind: f"{base[kind] / 2**20:.0f} to {large.get(kind, 0) / 2**20:.0f} MiB" for kind in base}
    print(f"{BASE:,} to {SCALE:,} images: {told}")  # noqa: T201
    assert base.keys() == large.keys() == {"driver", *KINDS}
    assert {kind: told[kind] for kind in base if large[kind] > TOLERANCE * base[kind]} == {}
