"""The configuration: YAML, environment and command line in; frozen, validated models out.

Precedence: command line over environment (`CVT_PIPELINE__MODEL__PRECISION=bfloat16`) over the YAML
file. Every error names the key's path, what was found and what is allowed, before Ray starts.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from cvt_model.choices import BackendName, EmbeddingKind, Precision
from cvt_model.image_file import DEFAULT_MAX_PIXELS
from pipeline.errors import ConfigError
from pipeline.redact import HIDDEN, URI_CREDENTIALS, scrub, split_credentials
from pipeline.storage import Storage

ENV_PREFIX = "CVT_PIPELINE__"
OPTIONS = "storage_options"
# Their values stay text, though YAML would take some for numbers.
_CREDENTIALS = {"key", "secret", "token", "username", "password", "account_key", "sas_token"}
_CREDENTIALS |= {"client_id", "client_secret", "tenant_id", "account_name", "connection_string"}
_CREDENTIALS |= {"aws_access_key_id", "aws_secret_access_key", "aws_session_token"}
M = TypeVar("M", bound=BaseModel)


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


class InputConfig(Place):
    """Where the images are and how they are laid out."""

    uri: str = Field(min_length=1, description="folder, file or glob; local or any fsspec URL")
    format: Literal["auto", "images", "webdataset", "parquet", "manifest"] = Field(
        "auto", description="layout of the input; auto judges by the files' names"
    )
    image_column: str | None = Field(
        None,
        description="Parquet: column of image bytes; manifest: column of URIs (found if not given)",
    )
    id_column: str | None = Field(None, description="Parquet: column whose value is the image_id")
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
    ignore_shards: tuple[str, ...] = Field(
        (), description="shards to leave out, by the names that reports give; * and ? match"
    )
    storage_options: StorageOptions = Field(
        default_factory=dict, description="options of the input's file system, over storage_options"
    )


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


class OutputConfig(Place):
    """Where results go and which columns they have."""

    uri: str = Field(min_length=1, description="folder for the results; local or any fsspec URL")
    logits: Literal["full", "none"] | Annotated[int, Field(strict=True, ge=1)] = Field(
        "full", description="full, none, or the number K of largest logits to keep"
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="type of stored vectors")
    storage_options: StorageOptions = Field(
        default_factory=dict, description="options of the output's file system, over storage_options"
    )


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


class LimitsConfig(Section):
    """What an image may cost, and when a run should rather stop."""

    max_pixels: int = Field(DEFAULT_MAX_PIXELS, ge=1, description="pixels of one image")
    max_image_bytes: int = Field(1_000_000_000, ge=1, description="encoded bytes of one image")
    max_reject_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of rejects over which the run stops, from 1,000 samples on",
    )
    max_deleted_fraction: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of what is committed that may be gone from the input before nothing is removed",
    )
    image_timeout_s: float = Field(60, gt=0, description="seconds after which decoding an image is ended")


class RunConfig(Section):
    """How a run behaves towards others."""

    lease_s: float = Field(120, ge=10, description="seconds after which a run that died may be taken over")
    log_format: Literal["text", "json"] = Field("text", description="log lines for people or for programs")


class IndexConfig(Section):
    """The similarity index."""

    type: Literal["auto", "exact"] = Field("auto", description="exact: exhaustive search; auto: exact")


class Config(Section):
    """The whole of an extraction's configuration."""

    input: InputConfig
    model: ModelConfig
    output: OutputConfig
    compute: ComputeConfig = ComputeConfig()
    limits: LimitsConfig = LimitsConfig()
    run: RunConfig = RunConfig()
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


def load_config(
    path: Path,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] = os.environ,
    into: str | None = None,
) -> Config:
    """The validated configuration of a YAML file, the environment and `key.path=value` overrides.

    `into` names another output (see `Config.into`). Raises ConfigError, with one line for each bad key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_problem(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections (input, model, output), found {_found(values)}")
    values = {str(name): {} if section is None else section for name, section in values.items()}
    _merge_environment(values, environ)
    for override in overrides:
        _merge_override(values, override)
    config = validate(Config, values, origin=str(path))
    return config if into is None else config.into(into)


def load_section(section: type[M], overrides: Iterable[str], name: str) -> M:
    """One section alone, from `name.key=value` overrides (`index OUTPUT index.type=exact`)."""
    values: dict[str, Any] = {name: {}}
    for override in overrides:
        _merge_override(values, override)
    for unknown in sorted(set(values) - {name}):
        raise ConfigError(f"{unknown}: not a key of this command; its keys begin with {name}.")
    return validate(section, values[name], origin="command line", prefix=(name,))


def storage_options_of(
    section: str, environ: Mapping[str, str] = os.environ, *, shared: bool = True
) -> dict[str, Any]:
    """The storage options that the environment gives to `input` or `output`, the section's own first.

    They are called as in a config: `CVT_PIPELINE__STORAGE_OPTIONS` (those that both share) and
    `CVT_PIPELINE__OUTPUT__STORAGE_OPTIONS`, each a mapping in YAML or JSON. Raises ConfigError.
    """
    values: dict[str, Any] = {}
    names = [name for name in environ if OPTIONS in name.lower().split("__")]
    _merge_environment(values, {name: environ[name] for name in names})
    own = values.get(section) or {}
    given = {f"{section}.{OPTIONS}": own.get(OPTIONS)}
    if shared:
        given = {OPTIONS: values.get(OPTIONS), **given}
    options: dict[str, Any] = {}
    for name, found in given.items():
        if not isinstance(found, dict | None):
            raise ConfigError(f"{name}: found {HIDDEN}; expected a mapping, such as {{key: …, secret: …}}")
        options |= found or {}
    return options


def open_output(uri: str, environ: Mapping[str, str] = os.environ) -> Storage:
    """The output of an earlier run, with the environment's storage options, found to answer."""
    output = Storage(uri, storage_options_of("output", environ))
    output.check_reachable()
    return output


def open_input(uri: str, output: Storage, environ: Mapping[str, str] = os.environ) -> Storage:
    """A place of an output's input: with its own options, and the output's where one service has both."""
    return Storage(uri, {**output.options_for(uri), **storage_options_of("input", environ, shared=False)})


def validate(model: type[M], values: object, *, origin: str, prefix: tuple[str, ...] = ()) -> M:
    """`values` as a validated model; ConfigError lists every key that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, detail, prefix) for detail in error.errors()]
        unique = list(dict.fromkeys(lines))
        raise ConfigError("\n".join([f"{origin}: the configuration is not valid", *unique])) from error


def _merge_environment(values: dict[str, Any], environ: Mapping[str, str]) -> None:
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX):
            path = name.removeprefix(ENV_PREFIX).lower().split("__")
            _put(values, path, environ[name], source=name)


def _merge_override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"{path!r}: expected key.path=value, such as model.precision=bfloat16")
    _put(values, path.split("."), text, source=path)


def _put(values: dict[str, Any], path: list[str], text: str, *, source: str) -> None:
    *sections, key = path
    for name in sections:
        if values.get(name) is None:
            values[name] = {}
        inner = values[name]
        if not isinstance(inner, dict):
            raise ConfigError(f"{source}: {name} is a value, not a section")
        values = inner
    if OPTIONS in sections and key in _CREDENTIALS:
        values[key] = text
        return
    try:
        values[key] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: the value is not valid YAML") from error


def _explain(model: type[BaseModel], detail: Any, prefix: tuple[str, ...]) -> str:
    """One line: the key's path, what was found, what is allowed."""
    location, section = [str(name) for name in prefix], model
    field_description = ""
    for name in detail["loc"]:
        field = section.model_fields.get(str(name))
        if field is None and detail["type"] != "extra_forbidden":
            break  # inside a union: pydantic goes on with the alternative's name
        location.append(str(name))
        if field is not None:
            field_description = field.description or ""
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                section = field.annotation
    path = ".".join(location) or "the file"
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], section.model_fields, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"  {path}: unknown key; {hint}allowed: {', '.join(section.model_fields)}"
    if detail["type"] == "missing":
        return f"  {path}: missing; {field_description or 'this section is required'}"
    found = HIDDEN if OPTIONS in detail["loc"] else _found(detail["input"])
    return f"  {path}: found {found}; {_allowed(section, location[-1], detail)}"


def _found(value: object) -> str:
    """A wrong value as it was found, without what may be secret: only its kind, where it holds others."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return scrub(repr(value))


def _problem(error: Exception) -> str:
    """What is wrong with a YAML text and where, without the text: it may be a secret's line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + re.sub(r"'[^'<>]{2,}'", f"'{HIDDEN}'", problem or type(error).__name__)


def _constants(option: dict[str, Any]) -> list[Any]:
    return [option["const"]] if "const" in option else option.get("enum", [])


def _allowed(section: type[BaseModel], name: str, detail: Any) -> str:
    schema = section.model_json_schema()["properties"].get(name, {})
    alternatives = schema.get("anyOf", [schema])
    choices = [repr(value) for option in alternatives for value in _constants(option)]
    integers = [option for option in alternatives if option.get("type") == "integer"]
    choices += [f"a whole number from {option.get('minimum', 0)}" for option in integers]
    choices += ["a list of names" for option in alternatives if option.get("type") == "array"]
    description = schema.get("description", "")
    allowed = f"allowed: {', '.join(choices)}" if choices else str(detail["msg"]).lower()
    return f"{allowed} ({description})" if description else allowed
