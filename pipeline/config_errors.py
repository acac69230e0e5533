"""What is wrong with a configuration, in a line: the key's path, what was found, what is allowed."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel

from pipeline.redact import HIDDEN, scrub

OPTIONS = "storage_options"


def explain(model: type[BaseModel], detail: Any, prefix: tuple[str, ...]) -> str:
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
    found = HIDDEN if OPTIONS in detail["loc"] else found_value(detail["input"])
    return f"  {path}: found {found}; {_allowed(section, location[-1], detail)}"


def found_value(value: object) -> str:
    """A wrong value as it was found, without what may be secret: only its kind, where it holds others."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return scrub(repr(value))


def _constants(option: dict[str, Any]) -> list[Any]:
    return [option["const"]] if "const" in option else option.get("enum", [])


def _range(option: dict[str, Any]) -> str:
    upper = f" to {option['maximum']}" if "maximum" in option else ""
    return f"from {option.get('minimum', 0)}{upper}"


def _allowed(section: type[BaseModel], name: str, detail: Any) -> str:
    schema = section.model_json_schema()["properties"].get(name, {})
    alternatives = schema.get("anyOf", [schema])
    choices = [repr(value) for option in alternatives for value in _constants(option)]
    integers = [option for option in alternatives if option.get("type") == "integer"]
    choices += [f"a whole number {_range(option)}" for option in integers]
    choices += ["a list of names" for option in alternatives if option.get("type") == "array"]
    description = schema.get("description", "")
    allowed = f"allowed: {', '.join(choices)}" if choices else str(detail["msg"]).lower()
    return f"{allowed} ({description})" if description else allowed
