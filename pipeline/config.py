"""The configuration: which keys there are, what they may be and what they mean, a section a stage.

Frozen, and validated once, at load (pipeline/load_config.py).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    model_validator,
)

from cvt_model.choices import BackendName, EmbeddingKind, Precision
from cvt_model.image_file import DEFAULT_MAX_PIXELS
from pipeline.errors import ConfigError
from pipeline.redact import HIDDEN, URI_CREDENTIALS, split_credentials


class Section(BaseModel):
    """A section of the configuration: frozen, and refusing keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def _hidden(options: dict[str, Any]) -> dict[str, str]:
    return dict.fromkeys(options, HIDDEN)


StorageOptions = Annotated[dict[str, Any], PlainSerializer(_hidden), Field(repr=False)]
"""What fsspec's file system takes (keys, an endpoint): shown nowhere, since any of it may be a secret."""


class Place(Section):
    """A section with a URI, whose password or signature moves to the options, so that it can be shown."""

    @model_validator(mode="before")
    @classmethod
    def _hide_credentials(cls, values: Any) -> Any:
        uri = values.get("uri") if isinstance(values, dict) else None
        shown, found = split_credentials(uri) if isinstance(uri, str) else ("", {})
        options = values.get("storage_options") or {} if found else None
        if not isinstance(options, dict):
            return values
        return {**values, "uri": shown, "storage_options": {**options, URI_CREDENTIALS: found}}


class Source(Place):
    """Where images are and how they are laid out."""

    uri: str = Field(min_length=1, description="folder, file or glob; local or any fsspec URL")
    format: Literal["auto", "images", "webdataset", "parquet", "manifest"] = Field(
        "auto", description="layout of the input; auto judges by the files' names"
    )
    image_column: str | None = Field(
        None,
        description="Parquet: column of image bytes; manifest: column of URIs (found if not given)",
    )
    id_column: str | None = Field(None, description="Parquet: column whose value is the image_id")
    ignore_shards: tuple[str, ...] = Field(
        (), description="shards to leave out, by the names that reports give; * and ? match"
    )
    storage_options: StorageOptions = Field(
        default_factory=dict, description="options of the input's file system, over storage_options"
    )


class InputConfig(Source):
    """The input of an extraction."""

    metadata_columns: Literal["all"] | tuple[str, ...] = Field(
        (), description="columns (WebDataset: extensions) to carry into the output, or all"
    )
    decode: Literal["exact", "fast"] = Field(
        "exact",
        description="exact: the reference's pixels; fast: large JPEGs decoded small, resized in one step",
    )
    on_deleted: Literal["keep", "remove"] = Field(
        "keep", description="what becomes of the rows of shards and images that are gone from the input"
    )
    min_age_s: float = Field(0, ge=0, description="younger files wait for the next run")


class ModelConfig(Section):
    """Which CvT, in which precision."""

    checkpoint: str = Field(
        min_length=1,
        description="a Hub id (with @revision), a published model's short name (cvt-13), a directory in "
        "the Hub's layout, a weight file (.safetensors, .bin, .pth, .h5), or a built-in model's name",
    )
    precision: Literal["auto"] | Precision = Field(
        "auto",
        description="auto: the output's own; for a new output bfloat16 on GPUs, float32 on CPUs",
    )
    backend: Literal["auto"] | BackendName = Field(
        "auto", description="auto: torch on GPUs; on CPUs openvino where it is installed, else torch"
    )
    embedding: EmbeddingKind = Field(
        "pooled",
        description="pooled: the vector that the classifier sees; cls_token: the raw CLS token",
    )


class Destination(Place):
    """Where results go."""

    uri: str = Field(min_length=1, description="folder for the results; local or any fsspec URL")
    storage_options: StorageOptions = Field(
        default_factory=dict, description="options of the output's file system, over storage_options"
    )


class OutputConfig(Destination):
    """Where an extraction's results go and which columns they have."""

    logits: Literal["full", "none"] | Annotated[int, Field(strict=True, ge=1)] = Field(
        "full", description="full, none, or the number K of largest logits to keep"
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="type of stored vectors")


class ActorRange(Section):
    """An autoscaling pool: Ray adds and removes replicas between these bounds."""

    min: int = Field(strict=True, ge=1, description="replicas that are always there")
    max: int = Field(strict=True, ge=1, description="replicas at most")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max {self.max} is less than min {self.min}")
        return self


class ComputeConfig(Section):
    """How the machine is used. Changes no result."""

    batch_size: Literal["auto"] | Annotated[int, Field(strict=True, ge=1, le=4096)] = Field(
        "auto",
        description="images the model takes at once, and a chunk; auto: measured, once a machine and model",
    )
    actors: Literal["auto"] | Annotated[int, Field(strict=True, ge=1)] | ActorRange = Field(
        "auto",
        description="model replicas, or {min, max} of a pool that grows and shrinks; "
        "auto: one a GPU, or one for every 8 CPU cores",
    )
    actor_gpus: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        "auto", description="GPUs of each replica, which may be a fraction; auto: one where there is one"
    )
    actor_labels: dict[str, str] = Field(
        default_factory=dict,
        description="labels of the nodes that replicas may run on, as Ray's label_selector takes them",
    )
    shard_images: int = Field(4096, ge=1, description="loose images grouped into one shard")


class ImageLimits(Section):
    """What an image may cost, and how many may fail."""

    max_pixels: int = Field(DEFAULT_MAX_PIXELS, ge=1, description="pixels of one image")
    max_image_bytes: int = Field(1_000_000_000, ge=1, description="encoded bytes of one image")
    max_reject_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of rejects over which the run stops, from 1,000 samples on",
    )
    image_timeout_s: float = Field(60, gt=0, description="seconds after which decoding an image is ended")


class LimitsConfig(ImageLimits):
    """When an extraction should rather stop."""

    max_deleted_fraction: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of what is committed that may be gone from the input before nothing is removed",
    )


class RunConfig(Section):
    """How a run behaves towards others."""

    lease_s: float = Field(120, ge=10, description="seconds after which a run that died may be taken over")
    log_format: Literal["text", "json"] = Field("text", description="log lines for people or for programs")


def _memory(value: Any) -> Any:
    """`1GB`, `400 MB` or `1.5GiB` as bytes; GB is 10**9, GiB 2**30."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE)
    if found is None or found[1].count(".") > 1 or found[1] == ".":
        raise ValueError(f"{value!r} is not an amount of memory, such as 400MB, 4GB or 1.5GiB")
    base = 1024 if found[3] else 1000
    return round(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))


Memory = Annotated[int, Field(strict=True, ge=1), BeforeValidator(_memory)]
"""Bytes, or text such as 4GB."""


class IndexConfig(Section):
    """The similarity index."""

    type: str = Field(
        "auto",
        min_length=1,
        description="auto: by rows, dimension, memory and target; exact, ivf_flat, ivf_sq8, ivf_rabitq, "
        "opq_ivf_pq, hnsw, or any FAISS factory string (IVF4096,PQ32)",
    )
    memory_budget: Memory = Field(
        4_000_000_000, description="what the process that builds or searches may take, such as 4GB"
    )
    target_recall: float = Field(
        0.95, gt=0, le=1, description="least recall@10 with which a version is published"
    )
    workers: Literal["auto"] | Annotated[int, Field(strict=True, ge=1)] = Field(
        "auto",
        description="Ray tasks that read and add at once; auto: one a node where RAY_ADDRESS names a "
        "cluster, else none: all in this process",
    )
    keep_versions: int = Field(3, ge=1, description="versions kept, the served one among them")
    lease_s: float = Field(120, ge=10, description="seconds after which a build that died is taken over")


Probability = Annotated[float, Field(ge=0, le=1)]


class DedupConfig(Section):
    """Groups of images that are the same, or nearly so."""

    threshold: float = Field(
        0.95, gt=0, le=1, description="least cosine of two embeddings of near-duplicates"
    )


class LabelConfig(Section):
    """Labels for every committed image, from what extract has stored."""

    method: Literal["head", "neighbours", "probe"] = Field(
        "head",
        description="head: the classifier's own classes; neighbours: votes of labelled images; "
        "probe: a linear classifier trained on labelled images",
    )
    labels: str | None = Field(
        None,
        description="labels that are known: a .csv, .jsonl or .parquet file with image_id and label, a "
        "metadata column of the output, or folder; head: calibrates by them",
    )
    reference: str | None = Field(
        None, description="neighbours: another output, of the same model, that the labels are of"
    )
    probe: str | None = Field(None, description="probe: a saved probe.safetensors, instead of labels")
    keep_known: bool = Field(
        False, description="images with a label in `labels` keep it, as method given, instead of being told"
    )
    threshold: Probability = Field(0.0, description="least score of a label; below it is unknown")
    thresholds: dict[str, Probability] = Field(
        default_factory=dict, description="least scores of single labels, over `threshold`"
    )
    coarser: dict[str, str] = Field(
        default_factory=dict, description="coarser labels by class; classes that are not in it stay"
    )
    k: int = Field(20, ge=1, le=1000, description="neighbours that vote")
    folds: int = Field(5, ge=2, le=20, description="probe: parts of the cross-validation")
    most_labelled: int = Field(
        20_000, ge=10, description="labelled images that a probe or a calibration looks at, drawn by seed"
    )
    seed: int = Field(0, ge=0, description="of all that is drawn at random")


class ServeConfig(Section):
    """The page on which people search, look and review."""

    host: str = Field(
        "127.0.0.1", min_length=1, description="address; any but this machine's own needs a token"
    )
    port: int = Field(8080, ge=0, le=65535, description="0: any that is free")
    token: SecretStr | None = Field(
        None, description="what visitors must know; on other addresses than this machine's one is drawn"
    )
    names: tuple[str, ...] = Field(
        (), description="host names, beside the address, by which the page may be asked for"
    )
    allow_urls: bool = Field(False, description="search by images behind URLs, of public addresses alone")
    max_upload_bytes: int = Field(20_000_000, ge=1, description="of an image to search by")
    max_upload_pixels: int = Field(50_000_000, ge=1, description="of an image to search by")
    upload_timeout_s: float = Field(30, gt=0, description="in which a request must have arrived")
    where_timeout_s: float = Field(10, gt=0, description="that a filter may take")
    thumbnail_bytes: Memory = Field(2_000_000_000, description="of thumbnails kept on this machine's disk")
    refresh_s: float = Field(
        30, gt=0, description="after which new rows, labels and an index are looked for"
    )


class Config(Section):
    """The whole of an extraction's configuration."""

    input: InputConfig
    model: ModelConfig
    output: OutputConfig
    compute: ComputeConfig = ComputeConfig()
    limits: LimitsConfig = LimitsConfig()
    run: RunConfig = RunConfig()
    index: IndexConfig | None = Field(None, description="`run` builds the index where this is given")
    dedup: DedupConfig | None = Field(None, description="`run` finds duplicates where this is given")
    label: LabelConfig | None = Field(None, description="`run` labels all images where this is given")
    storage_options: StorageOptions = Field(
        default_factory=dict, description="options of the file systems of input and output, as fsspec's are"
    )

    def into(self, place: str) -> Config:
        """The same configuration with another output: a URL or path, or a name beside the present one."""
        present = self.output.uri.rstrip("/")
        folder, slash, _ = present.rpartition("/")
        if "/" not in place:
            if folder.endswith(":/"):
                raise ConfigError(f"--into: {present} is a whole bucket; give the new output's full URL")
            place = f"{folder}{slash}{place}"
        if place.rstrip("/") == present:
            raise ConfigError(f"--into: {place} is output.uri itself; name another folder")
        return self.model_copy(update={"output": self.output.model_copy(update={"uri": place})})

    @property
    def input_options(self) -> dict[str, Any]:
        """Storage options of the input."""
        return {**self.storage_options, **self.input.storage_options}

    @property
    def output_options(self) -> dict[str, Any]:
        """Storage options of the output."""
        return {**self.storage_options, **self.output.storage_options}
