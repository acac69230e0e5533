"""What the readers of every layout yield, and what they have to know of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.schema import RejectReason

CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class ReadOptions:
    """What the read stage has to know of the configuration."""

    chunk_images: int
    max_image_bytes: int
    first_images: int | None = None  # of the first chunk, where it is to be there sooner
    metadata: tuple[pa.Field, ...] = ()
    image_column: str | None = None
    id_column: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)

    @property
    def metadata_names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.metadata)


@dataclass(frozen=True)
class Sample:
    """One sample as it was read: encoded bytes, or the reason why there are none."""

    image_id: str
    key: str
    data: bytes | None
    metadata: dict[str, Any] = field(default_factory=dict)
    reason: RejectReason | None = None
    message: str = ""
    size_bytes: int | None = None


@dataclass(frozen=True)
class Amendment:
    """What the end of an archive told of a sample read earlier: another id and key, or metadata."""

    amended_key: str
    columns: dict[str, Any]
