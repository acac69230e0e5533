"""A step of the nightly job: how it ended, as a report's values and as words for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Step:
    """A step that has ended. `message` says why it failed or was skipped, `facts` what it made.

    A step that ended by itself and still left something out has failed, without an `error`.
    """

    name: str
    status: Literal["done", "failed", "skipped"]
    seconds: float = 0.0
    message: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: PipelineError | None = None

    def to_json(self) -> dict[str, Any]:
        """The step as `steps` of a report has it; the names are a contract."""
        own = {"step": self.name, "status": self.status}
        return {**own, **self.facts, "seconds": round(self.seconds, 3), "message": self.message}


def outcome(values: Mapping[str, Any]) -> str:
    """What came of a step in a few words, from its values in a report."""
    if values["message"] is not None:
        return str(values["message"])
    match values["step"]:
        case "index":
            return (
                f"{values['version']}: {values['type']}, {values['num_vectors']:,} vectors, "
                f"recall@10 {values['recall_at_10']:.3f}, {values['latency_ms']:.2f} ms a query"
            )
        case "label":
            unknown = f", {values['unknown']:,} of them unknown" if values["unknown"] else ""
            return f"{values['version']}: {values['images']:,} images by {values['method']}{unknown}"
        case "dedup":
            return (
                f"{values['groups']:,} groups of {values['images_in_groups']:,} images, "
                f"{values['removable']:,} removable ({values['share_removable']:.1%}) "
                f"at a threshold of {values['threshold']}"
            )
        case _:
            return ""
