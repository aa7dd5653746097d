"""Values that were read from a file, against the types that they must have."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from typing import Any

from ..errors import RunError

WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", dict: "an object"}


def require_fields(values: Mapping[str, Any], kinds: type | Mapping[str, Any], prefix: str = "") -> None:
    """Checks values from JSON; names that `kinds` does not have are not looked at.

    Args:
        values: what was read
        kinds: name → type, Literal, tuple type, or a plain tuple of the values allowed; or a dataclass
        prefix: of the names in a message

    Raises:
        RunError: a value is of another type; the message names it, what was expected and what came.

    Example:
        >>> require_fields({"steps": 3, "rate": 1}, {"steps": int, "rate": float})
        >>> require_fields({"steps": 2.5}, {"steps": int})
        Traceback (most recent call last):
        jlebm_fast.errors.RunError: steps must be an integer, got 2.5
    """
    kinds = kinds if isinstance(kinds, Mapping) else typing.get_type_hints(kinds)
    for name, value in values.items():
        expected = _expected(value, kinds[name]) if name in kinds else None
        if expected is not None:
            came = json.dumps(value)
            came = came if len(came) <= 60 else came[:60] + "…"
            raise RunError(f"{prefix}{name} must be {expected}, got {came}")


def _expected(value: Any, kind: Any) -> str | None:
    """What `value` should have been, in words; None where it is."""
    if isinstance(kind, tuple) or typing.get_origin(kind) is typing.Literal:
        allowed = kind if isinstance(kind, tuple) else typing.get_args(kind)
        fits = any(type(value) is type(one) and value == one for one in allowed)
        return None if fits else f"one of {', '.join(map(str, allowed))}"
    if typing.get_origin(kind) is tuple:  # tuple[int, ...]
        fits = isinstance(value, list) and all(type(one) is int for one in value)
        return None if fits else "a list of integers"
    fits = type(value) is kind or (kind is float and type(value) is int)
    return None if fits else WORDS[kind]
