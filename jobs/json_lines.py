"""Log lines for programs: every line on stderr is one JSON object."""

from __future__ import annotations

import io
import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

_WIDTH = 10_000  # a table's row is one line, however long


class JsonFormatter(logging.Formatter):
    """time (ISO 8601, UTC), level, logger, message; exception and values where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        if hasattr(record, "values"):
            values["values"] = record.values
        return json.dumps(values, default=str)


class JsonLines(io.StringIO):
    """A stream that turns each line of text into a record at INFO; blank lines are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                logging.getLogger("jobs").info("%s", line.rstrip())
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


def speak_json(console: Console) -> None:
    """Make what a console prints log records, without colours and without a bar.

    The console is one that others hold already, so it is set up again in its place.
    """
    if not isinstance(console.file, JsonLines):
        Console.__init__(
            console, file=JsonLines(), force_terminal=False, color_system=None, width=_WIDTH, soft_wrap=True
        )
