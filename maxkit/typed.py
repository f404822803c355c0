# SPDX-License-Identifier: Apache-2.0
"""Read a value as a type: papermill, YAML, shells and the environment often hand over a string. No JAX."""

import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter

from maxkit.errors import nearest

TRUE = frozenset({"true", "yes", "on", "1"})
FALSE = frozenset({"false", "no", "off", "0"})
NONE = frozenset({"none", "null", ""})


def convert(value: Any, annotation: Any) -> Any:
    """`value` as `annotation`, without losing anything: 20.0 is an int, 20.5 and True are not.

    Raises:
        ValueError: says what is allowed.
    """
    annotation = _bare(annotation)
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(value, annotation)
    if origin is Literal:
        return _convert_literal(value, annotation)
    if origin in (list, tuple):
        return _convert_sequence(value, annotation)
    if annotation in _SCALARS:
        return _SCALARS[annotation](value)
    if origin is dict or isinstance(value, str):
        value = _parse_json(value)
    try:
        return TypeAdapter(annotation).validate_python(value)
    except ValueError as error:
        raise ValueError(f"must be {type_name(annotation)}") from error


def type_name(annotation: Any) -> str:
    """A type in words: "whole number", "'a' | 'b'", "true | false | none"."""
    annotation = _bare(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(a) for a in sorted(arguments, key=lambda a: a is type(None)))
    if origin is Literal:
        return " | ".join(repr(a) for a in arguments)
    if origin in (list, tuple):
        return f"list of {type_name(arguments[0])}" if arguments else "list"
    words = {bool: "true | false", int: "whole number", float: "number", str: "text", type(None): "none"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _convert_union(value: Any, annotation: Any) -> Any:
    members = get_args(annotation)
    if type(None) in members and (value is None or (isinstance(value, str) and value.strip().lower() in NONE)):
        return None
    for member in members:
        if type(value) is _bare(member):
            return value
    for member in (m for m in members if m is not type(None)):
        try:
            return convert(value, member)
        except ValueError:
            continue
    raise ValueError(f"must be {type_name(annotation)}")


def _convert_literal(value: Any, annotation: Any) -> Any:
    allowed = get_args(annotation)
    # papermill turns the word None into None, but it may be the name of a choice.
    text = "none" if value is None else value
    for choice in allowed:
        if type(choice) is type(text) and choice == text:
            return choice
        if isinstance(text, str) and not isinstance(choice, str) and str(choice).lower() == text.strip().lower():
            return choice
    hint = nearest(str(text), map(str, allowed))
    raise ValueError(f"must be {type_name(annotation)}" + (f"; {hint}" if hint.startswith("did") else ""))


def _convert_sequence(value: Any, annotation: Any) -> Any:
    if isinstance(value, str):
        text = value.strip()
        value = (
            _parse_json(text) if text.startswith("[") else [part for part in map(str.strip, text.split(",")) if part]
        )
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"must be a {type_name(annotation)}")
    arguments = get_args(annotation)
    items = [convert(item, arguments[0]) if arguments else item for item in value]
    return tuple(items) if get_origin(annotation) is tuple else items


def _parse_json(value: Any) -> Any:
    if isinstance(value, (Mapping, list)):
        return value
    try:
        return json.loads(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{value!r} is not JSON") from error


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower() if isinstance(value, (str, int)) else ""
    if text in TRUE or text in FALSE:
        return text in TRUE
    raise ValueError("must be true or false")


def _int(value: Any) -> int:
    if isinstance(value, str):
        value = _number(value, "a whole number")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        raise ValueError("must be a whole number")
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, str):
        value = _number(value, "a number")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("must be a number")
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return float(value)


def _str(value: Any) -> str:
    if isinstance(value, (bool, type(None))) or not isinstance(value, (str, int, float)):
        raise ValueError("must be text")
    return str(value)


def _number(text: str, wanted: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ValueError(f"must be {wanted}")


_SCALARS: dict[Any, typing.Callable[[Any], Any]] = {bool: _bool, int: _int, float: _float, str: _str}
