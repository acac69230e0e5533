"""What the API takes and answers, as its OpenAPI documents it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints


def _whole(text: str) -> str:
    text.encode()  # half a character cannot be written anywhere; its error is a ValueError
    return text


Whole = AfterValidator(_whole)
ImageId = Annotated[str, StringConstraints(min_length=1, max_length=4096), Whole]
LabelName = Annotated[str, StringConstraints(min_length=1, max_length=4096), Whole]


class Problem(BaseModel):
    """Why there is no answer."""

    error: str


class Said(BaseModel):
    """What people decided of an image's label."""

    action: Literal["accept", "reject", "relabel"]
    label: str | None
    reviewer: str
    id: str = Field(description="of the decision, for who undoes it")


class ImageFacts(BaseModel):
    """A committed image."""

    image_id: str
    shard: str | None
    key: str | None
    label: str | None
    label_score: float | None = Field(description="probability of the label")
    width: int | None
    height: int | None
    format: str | None
    sha256: str | None
    metadata: dict[str, Any]
    decision: Said | None


class Hit(ImageFacts):
    """A neighbour."""

    score: float = Field(description="cosine of the embeddings")


class Found(BaseModel):
    """The nearest images, best first."""

    query: ImageFacts | None = Field(description="the image searched by, where it is a committed one")
    hits: list[Hit]


class Page(BaseModel):
    """Some images of many."""

    images: list[ImageFacts]
    next: int | None = Field(description="`after` of the next page; null on the last")
    total: int


class FacetValue(BaseModel):
    """A value and how many images have it."""

    value: str
    count: int


class FacetCounts(BaseModel):
    """A column of few values."""

    name: str
    values: list[FacetValue]
    num_values: int


class Facets(BaseModel):
    """How many images pass the filter, and what they are like."""

    total: int
    facets: list[FacetCounts]


class Uploaded(BaseModel):
    """An image to search by."""

    upload: str = Field(description="its name: the SHA-256 of its bytes")


class FromUrl(BaseModel):
    """Where an image to search by is to be fetched from."""

    model_config = ConfigDict(extra="forbid")

    url: Annotated[str, StringConstraints(min_length=8, max_length=4096)]


class Deciding(BaseModel):
    """A decision on an image's label."""

    model_config = ConfigDict(extra="forbid")

    image_id: ImageId
    action: Literal["accept", "reject", "relabel", "undo"]
    label: LabelName | None = Field(
        None, description="relabel: the right one; accept, reject: the one that was seen, 409 if it changed"
    )
    undoes: Annotated[str, StringConstraints(pattern="^[0-9a-f]{12}$")] | None = Field(
        None,
        description="undo: the id of what it takes back; by default the image's last decision",
    )


class Decisions(BaseModel):
    """Decisions that are taken together."""

    model_config = ConfigDict(extra="forbid")

    decisions: Annotated[list[Deciding], Field(min_length=1, max_length=1000)]
    reviewer: Annotated[str, StringConstraints(max_length=100), Whole] = ""


class Taken(BaseModel):
    """The images after the decisions, in their order."""

    images: list[ImageFacts]


class LabelCount(BaseModel):
    """A label, how many images have it, and how many of those were decided."""

    label: str
    count: int
    decided: int


class LabelCounts(BaseModel):
    """All labels, the most frequent first."""

    version: str | None = Field(description="of the labels that are served; null: those of extract")
    labels: list[LabelCount]
    decisions: dict[str, int]


class Twin(ImageFacts):
    """A member of a group."""

    similarity: float = Field(description="cosine to the representative")
    representative: bool


class Group(BaseModel):
    """Images that are the same, or nearly so."""

    group: int
    size: int
    images: list[Twin] = Field(description="the first of them")


class Groups(BaseModel):
    """Groups of duplicates, the largest first."""

    version: str | None
    threshold: float | None
    total: int
    images_in_groups: int
    groups: list[Group]
    next: int | None


class Run(BaseModel):
    """A run of extract."""

    run: str
    started_at: Any = None
    images: Any = None
    rejects: Any = None
    seconds: Any = None
    images_per_s: Any = None
    limiting_stage: Any = None
    stopped: Any = None
    page: bool = Field(description="whether /reports/RUN.html is there")


class Overview(BaseModel):
    """What the output holds."""

    output: str
    status: dict[str, Any] = Field(description="as `cvt-pipeline status --json` tells it")
    rows: int = Field(description="that are served now")
    index: dict[str, Any] | None
    no_index: str
    labels: LabelCounts | None
    runs: list[Run]
    allow_urls: bool
    max_upload_bytes: int
