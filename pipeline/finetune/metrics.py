"""`metrics.json`, the last thing that a training writes: how good it is, and that it is finished."""

from __future__ import annotations

import json
from typing import Any

from pipeline.errors import OutputError
from pipeline.storage import Storage

METRICS = "metrics.json"


def read_metrics(output: Storage) -> dict[str, Any] | None:
    """The metrics of a finished training; None where there is none. OutputError for another file."""
    try:
        values: dict[str, Any] = json.loads(output.read_bytes(METRICS))
        values["asked"], values["failed_shards"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{output.url(METRICS)}: not of a training of this program ({error!r}); choose another output"
        ) from error
    return values
