"""Where a configuration comes from: YAML, environment and command line in, a validated model out.

Precedence: command line over environment (`CVT_PIPELINE__MODEL__PRECISION=bfloat16`) over the YAML
file. Every error names the key's path, what was found and what is allowed, before Ray starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import Config
from pipeline.config_errors import OPTIONS, explain, found_value
from pipeline.errors import ConfigError
from pipeline.redact import HIDDEN
from pipeline.storage import Storage

ENV_PREFIX = "CVT_PIPELINE__"
# Their values stay text, though YAML would take some for numbers.
_CREDENTIALS = {"key", "secret", "token", "username", "password", "account_key", "sas_token"}
_CREDENTIALS |= {"client_id", "client_secret", "tenant_id", "account_name", "connection_string"}
_CREDENTIALS |= {"aws_access_key_id", "aws_secret_access_key", "aws_session_token"}
M = TypeVar("M", bound=BaseModel)


def load_config(
    path: Path,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] = os.environ,
    into: str | None = None,
) -> Config:
    """The validated configuration of an extraction; `into` names another output (see `Config.into`)."""
    config = read_config(Config, path, overrides, environ)
    return config if into is None else config.into(into)


def read_config(
    model: type[M], path: Path, overrides: Iterable[str] = (), environ: Mapping[str, str] = os.environ
) -> M:
    """The validated configuration of a YAML file, the environment and `key.path=value` overrides.

    Raises ConfigError, with one line for each bad key.
    """
    values = _read_yaml(path, "the config file")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections (input, model, output), found {found_value(values)}")
    values = {str(name): {} if section is None else section for name, section in values.items()}
    _merge_environment(values, environ)
    for override in overrides:
        _merge_override(values, override)
    return validate(model, values, origin=str(path))


def read_mapping(path: Path, named: str) -> dict[Any, Any]:
    """A mapping from a YAML file; `named` is the option that it was given to. Raises ConfigError."""
    values = _read_yaml(path, named)
    if not isinstance(values, dict):
        raise ConfigError(f"{named}: {path} has {found_value(values)}; expected a mapping, name: label")
    return values


def _read_yaml(path: Path, what: str) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read {what}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_problem(error)}") from error


def load_section(
    section: type[M], overrides: Iterable[str], name: str, given: Mapping[str, Any] | None = None
) -> M:
    """One section alone, from `name.key=value` overrides (`index OUTPUT index.type=exact`) over `given`."""
    values: dict[str, Any] = {name: dict(given or {})}
    for override in overrides:
        _merge_override(values, override)
    for unknown in sorted(set(values) - {name}):
        raise ConfigError(f"{unknown}: not a key of this command; its keys begin with {name}.")
    return validate(section, values[name], origin="command line", prefix=(name,))


def validate(model: type[M], values: object, *, origin: str, prefix: tuple[str, ...] = ()) -> M:
    """`values` as a validated model; ConfigError lists every key that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [explain(model, detail, prefix) for detail in error.errors()]
        unique = list(dict.fromkeys(lines))
        raise ConfigError("\n".join([f"{origin}: the configuration is not valid", *unique])) from error


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


def _problem(error: Exception) -> str:
    """What is wrong with a YAML text and where, without the text: it may be a secret's line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + re.sub(r"'[^'<>]{2,}'", f"'{HIDDEN}'", problem or type(error).__name__)
