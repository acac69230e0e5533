"""The index against brute force, plain FAISS and autofaiss: on the same vectors, in one run.

    python tests/bench/bench_index.py --rows 1000000 --dim 384 --memory-budget 1GB --json

Each contender builds in one process and searches in another, one after the other, on two cores at most; the
vectors are those of tests/bench/index_corpus.py. The figures of each, on a machine with nothing else to do:

- `build_s`: seconds of wall time of the whole building process, its start, its reading and its tuning
  included; ours is `cvt-pipeline index`, and `build_s_inside` what index.json says.
- `peak_memory_bytes`, `search_peak_memory_bytes`: the most anonymous memory (RssAnon of /proc/PID/status,
  the process and all below it) of 20 ms samples. Pages of files, mmap's, are not in it.
- `latency_ms`, `latency_p95_ms`: median and 95th percentile of 1,000 queries, one at a time on one thread,
  k = 10, after 100 that are not counted. Ours gives image ids and cosines, the rivals row numbers.
- `queries_per_s`: all queries in one call on two threads, the median of three, in a process of its own (one
  that starts with OMP_NUM_THREADS=1 stays slow with more threads).
- `recall_at_10`: against brute force in NumPy. `index_bytes`: the files that the build left.

`brute_force` is IndexFlatIP; `faiss_ivf_sq8` is IVF<nlist>,SQ8 with all vectors in memory, trained on 40 a
list, its nprobe the least power of two that reaches the target on 256 of the rows. Both read the Parquet
files. autofaiss reads normalised .npy copies and tunes itself, to 10 ms a query and not to a recall. It
wants numpy < 2, so it has an environment of its own (`python3.11 -m venv V; V/bin/pip install autofaiss
'numpy<2' 'pyarrow<23'`), which `--autofaiss-python V/bin/python` or CVT_BENCH_AUTOFAISS_PYTHON names.
A rival that is absent is null; of one that failed the figures are null and `error` says why.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from tests.bench.index_corpus import Corpus, corpus_in
    from tests.bench.index_steps import NUM_CORES, FailedError, Figures, versions_of
else:  # a script; autofaiss's environment has another package of the name `tests`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from index_corpus import Corpus, corpus_in
    from index_steps import NUM_CORES, FailedError, Figures, versions_of

INTERVAL_S = 0.02
RIVALS = {"brute": "brute_force", "faiss_sq8": "faiss_ivf_sq8", "autofaiss": "autofaiss"}
FIGURES = (
    *("type", "recall_at_10", "latency_ms", "latency_p95_ms", "queries_per_s", "build_s"),
    *("peak_memory_bytes", "search_peak_memory_bytes", "index_bytes"),
)
HEADINGS = ("recall@10", "ms", "p95", "queries/s", "build_s", "build_MB", "search_MB", "index_MB")
PACKAGES = ("cvt-pipeline", "faiss-cpu", "numpy", "pyarrow")
CLI = Path(sys.executable).parent / "cvt-pipeline"


def measured(command: list[str], num_threads: int, timeout_s: float = math.inf) -> tuple[Figures, Figures]:
    """A command to its end: the JSON of its stdout; its wall seconds and peak of anonymous bytes."""
    env = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        began, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=env, start_new_session=True)
        try:
            while process.poll() is None and time.perf_counter() - began < timeout_s:
                peak = max(peak, anonymous_bytes(process.pid))
                time.sleep(INTERVAL_S)
            wall_s, code = time.perf_counter() - began, process.poll()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        errors.seek(0)
        if code is None:
            raise FailedError(f"not done after {timeout_s:.0f} s")
        if code:
            raise FailedError(f"exit {code}: {errors.read()[-2000:].strip()}")
        return json.loads(out.read()), {"wall_s": round(wall_s, 2), "peak_bytes": peak}


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process and of all below it. Pages that forked processes share count in each."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            parent = stat.read_text(errors="replace").rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    total, pending = 0, [pid]
    while pending:
        member = pending.pop()
        pending += children.get(member, [])
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{member}/status").read_text(errors="replace").splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    return total


def step_command(python: str, do: str, corpus: Corpus, folder: Path, **values: Any) -> list[str]:
    place = {"corpus": [str(corpus.folder), corpus.num_rows, corpus.dim], "folder": str(folder)}
    return [
        python,
        str(Path(__file__).resolve().with_name("index_steps.py")),
        json.dumps({"do": do, **place, **values}),
    ]


def ours(corpus: Corpus, run: Path, options: argparse.Namespace) -> Figures:
    """`cvt-pipeline index` on a copy of the output (hard links), then the Python API on that."""
    output = run / "output"
    shutil.copytree(corpus.output, output, copy_function=os.link)
    keys = {"memory_budget": options.memory_budget, "type": "auto", "target_recall": options.target_recall}
    words = [f"index.{key}={value}" for key, value in keys.items()]
    told, cost = measured([str(CLI), "index", str(output), *words, "--json"], NUM_CORES)
    found = searched(sys.executable, "search_ours", corpus, output)
    inside = {"type": told["type"], "build_s_inside": told["build_s"]}
    return figures(inside, cost, found, output / "index")


def rival(name: str, corpus: Corpus, run: Path, options: argparse.Namespace) -> Figures | None:
    """A rival's figures; None where it is not asked for, or not installed."""
    python = options.autofaiss_python if name == "autofaiss" else sys.executable
    if name not in [RIVALS[word] for word in options.rivals] or not python:
        return None
    folder = run / name
    folder.mkdir()
    if name == "autofaiss":
        corpus.npy_folder()
    wanted = {"memory_budget": options.budget_bytes, "target_recall": options.target_recall}
    build = step_command(python, f"build_{name}", corpus, folder, **wanted)
    try:
        told, cost = measured(build, NUM_CORES, options.rival_timeout_s)
        found = searched(python, "search_faiss", corpus, folder, options.rival_timeout_s, **told)
    except FailedError as error:
        return {**dict.fromkeys(FIGURES), "error": str(error)}
    return figures(told, cost, found, folder)


def searched(
    python: str, do: str, corpus: Corpus, folder: Path, timeout_s: float = math.inf, **values: Any
) -> Figures:
    """Queries one by one on one thread, then, in a fresh process, all at once on every core."""
    known: Figures = {"search_peak_memory_bytes": 0}
    for num_threads in (1, NUM_CORES):
        command = step_command(python, do, corpus, folder, num_threads=num_threads, **values)
        found, cost = measured(command, num_threads, timeout_s)
        known |= found
        known["search_peak_memory_bytes"] = max(known["search_peak_memory_bytes"], cost["peak_bytes"])
    return known


def figures(told: Figures, cost: Figures, found: Figures, folder: Path) -> Figures:
    """Under their names, those that all have first."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    built = {"build_s": cost["wall_s"], "peak_memory_bytes": cost["peak_bytes"], "index_bytes": size}
    known = {**told, **found, **built}
    return {name: known.pop(name) for name in FIGURES} | known


def surroundings(options: argparse.Namespace) -> Figures:
    """What was asked for, and of which machine and packages."""
    from cvt_model.calibration import cpu_name

    return {
        **{name: getattr(options, name) for name in ("rows", "dim", "memory_budget", "target_recall")},
        "memory_counts": "RssAnon of the process and all below it, every 20 ms; no pages of files",
        "hardware": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_before": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version(), **versions_of(PACKAGES)},
    }


def bench(options: argparse.Namespace, work: Path) -> Figures:
    """Ours, then each rival, one process at a time."""
    facts = surroundings(options)
    corpus = corpus_in(work, options.rows, options.dim)
    with tempfile.TemporaryDirectory(prefix="run-", dir=work) as run:
        own = ours(corpus, Path(run), options)
        rivals = {name: rival(name, corpus, Path(run), options) for name in RIVALS.values()}
    return {**facts, **own, "rivals": rivals}


def show(result: Figures) -> None:
    """A table of all contenders on stderr, memory and sizes in MB."""
    lines = [f"{result['rows']} x {result['dim']}, {result['memory_budget']}"]
    lines.append(" " * 43 + "".join(f"{heading:>10}" for heading in HEADINGS))
    for name, row in {"ours": result, **result["rivals"]}.items():
        if row is None or "error" in row:
            lines.append(f"{name:<14} {row['error'].splitlines()[-1] if row else 'absent'}")
        else:
            values = (row[key] / (1e6 if key.endswith("_bytes") else 1) for key in FIGURES[1:])
            lines.append(f"{name:<14} {row['type']:<28}" + "".join(f"{value:>10.5g}" for value in values))
    sys.stderr.write("\n".join(lines) + "\n")


def arguments(words: list[str]) -> argparse.Namespace:
    from pydantic import ValidationError

    from pipeline.config import IndexConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, required=True, help="vectors; at least 1,000")
    parser.add_argument("--dim", type=int, required=True, help="numbers of a vector")
    parser.add_argument("--memory-budget", default="4GB", help="such as 1GB, which is 10⁹ bytes")
    parser.add_argument("--target-recall", type=float, default=0.95, help="recall@10 to tune for")
    parser.add_argument("--rivals", default=",".join(RIVALS), help="of %(default)s; none for none")
    parser.add_argument("--autofaiss-python", default=os.environ.get("CVT_BENCH_AUTOFAISS_PYTHON"))
    parser.add_argument("--rival-timeout-s", type=float, default=3600, help="for each step of a rival")
    parser.add_argument("--work", type=Path, help="folder of corpora, kept; else a temporary one")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(words)
    options.rivals = [] if options.rivals == "none" else options.rivals.split(",")
    if unknown := set(options.rivals) - set(RIVALS):
        parser.error(f"--rivals: {', '.join(sorted(unknown))} is not one of {', '.join(RIVALS)}")
    if options.rows < 1000:
        parser.error("--rows: at least 1,000")
    if options.autofaiss_python and not shutil.which(options.autofaiss_python):
        parser.error(f"--autofaiss-python: there is no {options.autofaiss_python}")
    try:
        config = IndexConfig(memory_budget=options.memory_budget, target_recall=options.target_recall)
    except ValidationError as error:
        parser.error(f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}")
    options.budget_bytes = config.memory_budget
    return options


def main() -> None:
    options = arguments(sys.argv[1:])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        try:
            result = bench(options, work)
        except FailedError as error:
            sys.exit(f"the index could not be measured: {error}")
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        show(result)


if __name__ == "__main__":
    main()
