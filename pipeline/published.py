"""What a verb makes of an output, version by version.

`<folder>/<version>/` holds a version, `<folder>/CURRENT` names the served one. A version is whole when its
`summary.json` is there, which is written before it is served. Knows nothing of what else is in it.
"""

from __future__ import annotations

import json
from typing import Any

from pipeline.storage import Storage

SUMMARY, CURRENT = "summary.json", "CURRENT"
KEEP_VERSIONS = 3


def publish(
    output: Storage, folder: str, version: str, summary: dict[str, Any], keep: int = KEEP_VERSIONS
) -> None:
    """Serve a version whose other files are in place; the newest `keep` whole ones stay."""
    output.write_bytes(f"{folder}/{version}/{SUMMARY}", json.dumps(summary, indent=1).encode())
    output.write_bytes(f"{folder}/{CURRENT}", version.encode())
    _drop_old(output, folder, version, keep)


def _drop_old(output: Storage, folder: str, served: str, keep: int) -> None:
    """Delete what is older than the newest whole versions.

    A younger one that is not whole may be in the making.
    """
    paths = [info.path.split("/") for info in output.find(folder)]
    whole = sorted(path[1] for path in paths if path[2:] == [SUMMARY])
    for name in {path[1] for path in paths if len(path) == 3 and path[1][:1].isdigit()}:  # no other folder
        if name < whole[-keep:][0] and name != served:
            output.delete_folder(f"{folder}/{name}")


def served_version(output: Storage, folder: str) -> str | None:
    """The version that is served; None where there is none yet."""
    path = f"{folder}/{CURRENT}"
    return output.read_bytes(path).decode().strip() if output.exists(path) else None
