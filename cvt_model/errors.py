"""The errors that `cvt_model` raises for what users hand it: bad checkpoints and bad images.

Everything else that escapes from this room is our own bug.
"""

from typing import Literal

ImageReason = Literal[
    "empty", "not_an_image", "too_many_pixels", "truncated", "corrupt", "unsupported", "unreadable"
]


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file or id and the remedy."""


class ImageError(ValueError):
    """An image cannot be read or decoded; `reason` is one of a closed list, `message` is for people."""

    def __init__(self, reason: ImageReason, message: str) -> None:
        super().__init__(reason, message)
        self.reason: ImageReason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message
