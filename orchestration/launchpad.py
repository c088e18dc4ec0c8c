"""params.yaml as Dagster's launchpad takes it: every setting optional, typed and described as its `config.py` says."""

import copy
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import dagster as dg
from pydantic import BaseModel

NONE = type(None)


def config_of(annotation: Any, name: str) -> Any:
    """Dagster's config type of a pydantic annotation. Bounds are no part of it: they are checked with params.yaml as a whole.

    Args:
        name: dotted, of the setting; types that offer a choice are named by it.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return config_of(inner[0], name)
    if origin in (Union, types.UnionType):
        present = [one for one in inner if one is not NONE]
        of_value = config_of(present[0], name) if len(present) == 1 else dg.Any
        return dg.Noneable(of_value) if NONE in inner else of_value
    if origin is Literal:
        if all(isinstance(value, str) for value in inner):
            return dg.Enum(name.replace(".", "_"), [dg.EnumValue(value) for value in inner])
        return dg.Any
    if origin is dict:
        return dg.Map(str, config_of(inner[1], name))
    if origin in (list, tuple):
        return dg.Array(config_of(inner[0], name))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return dg.Shape(
            {
                key: dg.Field(config_of(field.annotation, f"{name}.{key}"), is_required=False, description=field.description)
                for key, field in annotation.model_fields.items()
            }
        )
    return annotation if annotation in (bool, int, float, str) else dg.Any


def merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`values` with what `overrides` gives in its place, section by section; a list is replaced as a whole."""
    result = copy.deepcopy(values)
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def flat(overrides: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in overrides.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
