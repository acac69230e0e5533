"""Makes the table of the model's speed, as the README has it: `python tests/bench/model.py`.

Takes about a quarter of an hour on two cores, and wants the machine for itself. A published network at a
few batch sizes; the weights are drawn, so that nothing is downloaded: speed does not depend on them. What
follows the script's name goes to `cvt-pipeline bench model` as it is (`--threads 8`, `--images FOLDER`).
"""

import subprocess
import sys
from pathlib import Path

NETWORK = "cvt-13"
BATCH_SIZES = (1, 16, 64)
RESULT = Path(__file__).with_suffix(".md")
COMMAND = Path(sys.executable).parent / "cvt-pipeline"


def main() -> None:
    sections = []
    for batch_size in BATCH_SIZES:
        words = ["--checkpoint", NETWORK, "--random-weights", "--batch-size", str(batch_size), "--memory"]
        done = subprocess.run(
            [COMMAND, "bench", "model", *words, *sys.argv[1:], "--markdown"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        sections.append(f"## Batches of {batch_size}\n\n{done.stdout}")
    RESULT.write_text(f"# {NETWORK}\n\n" + "\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
