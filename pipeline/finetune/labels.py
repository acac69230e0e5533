"""Where the label of an image is: a column, a member of its archive, or its folder.

Enters: the listing of a labelled source. Leaves: a rule that the readers carry out. Knows no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline import schema
from pipeline.errors import ConfigError, InputError
from pipeline.label_source import class_names
from pipeline.manifest import Manifest
from pipeline.read_parquet import first_schema
from pipeline.shards import Listing

DEFAULT_COLUMN, DEFAULT_EXTENSION = "label", "cls"
EXTENSIONS = ("cls", "txt")


@dataclass(frozen=True)
class LabelRule:
    """How a sample's label is found. `names` are those of class numbers, where the input tells them."""

    column: pa.Field | None  # None: the folder that the image lies in
    names: tuple[str, ...] = ()

    @property
    def metadata(self) -> tuple[pa.Field, ...]:
        """What the readers have to carry."""
        return () if self.column is None else (self.column,)

    def label_of(self, sample: Mapping[str, Any]) -> str | None:
        """The label of a sample, given as a row of its columns; None where it has none."""
        if self.column is None:
            return _folder_of(str(sample[schema.IMAGE_ID]))
        value = sample[self.column.name]
        if self.names and isinstance(value, int) and value < 0:
            return None  # -1 is how `datasets` writes that there is no label
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(self.names):
            return self.names[value]
        text = "" if value is None else str(value).strip()
        return text or None


def _folder_of(path: str) -> str | None:
    """The first folder of an image's path; None below a hidden one, which a program made for itself."""
    *folders, _ = path.split("/")
    hidden = any(folder.startswith(".") for folder in folders)
    return folders[0] if folders and not hidden else None


def find_rule(listing: Listing, column: str | None, manifest: Manifest | None, section: str) -> LabelRule:
    """The rule for a source; ConfigError where the column is not there or cannot hold labels."""
    if listing.format == "images":
        if column is not None:
            raise ConfigError(
                f"{section}.label_column: loose images are labelled by the folder that they lie in; leave "
                "it out, or give a manifest with a column of labels"
            )
        return LabelRule(None)
    if listing.format == "webdataset":
        extension = column or DEFAULT_EXTENSION
        if extension not in EXTENSIONS:
            raise ConfigError(
                f"{section}.label_column: of a WebDataset it is one of {', '.join(EXTENSIONS)}"
            )
        return LabelRule(pa.field(extension, pa.string()))
    if manifest is not None:
        columns = manifest.metadata_schema
    elif (first := first_schema(listing)) is not None:
        _, columns = first
    else:
        raise InputError(f"{listing.root.uri}: none of its Parquet files can be read")
    name = column or DEFAULT_COLUMN
    if name not in columns.names:
        raise ConfigError(
            f"{section}.label_column: {listing.root.uri} has no column {name}; it has "
            f"{', '.join(columns.names)}"
        )
    if name in schema.PIXELS.names:
        raise ConfigError(f"{section}.label_column: {name} is a name of our own; rename the column")
    kind = columns.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ConfigError(
            f"{section}.label_column: {name} holds {kind}; a label is a whole number or a text"
        )
    names = class_names(columns, name) if pa.types.is_integer(kind) else ()
    return LabelRule(pa.field(name, kind), names)
