"""`key=value` words of a command line, written so that Hydra's grammar reads each value as its key's type wants it.

Hydra would read a run called 8e12345 as infinity, 2024_01 as 202401, and stumble over a path with a comma, an equal
sign or a bracket. A key that holds text therefore gets its value quoted, as it was typed; one that holds a whole number
may be given as 1e9.
"""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from decimal import Decimal
from typing import Any, Union, get_args, get_origin, get_type_hints

_EXPONENT = re.compile(r"[+-]?\d[\d_]*(\.\d+)?[eE]\+?\d{1,2}")
_LEFT_ALONE = ("", "null", "???")


def type_of_key(schema: type, key: str) -> Any:
    """The type that a dotted key has in the schema, null apart; None for one that is no value of it.

    Args:
        schema: a dataclass.
        key: as on a command line, `schedule.stages.warmup.num_tokens`; entries of a dict may have any name.
    """
    hint: Any = schema
    for part in key.split("."):
        hint = _without_null(hint)
        if get_origin(hint) is dict:
            hint = get_args(hint)[1]
        elif is_dataclass(hint) and part in {field.name for field in fields(hint)}:
            hint = get_type_hints(hint)[part]
        else:
            return None
    return _without_null(hint)


def null_part(schema: type, key: str) -> str | None:
    """The first part of a dotted key that is a whole group of values and may be null, as a stage's layout; or None."""
    parts = key.split(".")
    hint: Any = schema
    for index, part in enumerate(parts):
        bare = _without_null(hint)
        if bare is not hint and is_dataclass(bare):
            return ".".join(parts[:index])
        hint = (
            get_args(bare)[1]
            if get_origin(bare) is dict
            else get_type_hints(bare).get(part)
            if is_dataclass(bare)
            else None
        )
    return key if _without_null(hint) is not hint and is_dataclass(_without_null(hint)) else None


def _without_null(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        present = [part for part in get_args(hint) if part is not type(None)]
        return present[0] if len(present) == 1 else hint
    return hint


def quoted(text: str) -> str:
    """A text as Hydra's command line reads it back, whatever its characters."""
    # Hydra reads backslashes as escapes only before a quote, and before the closing one.
    text = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    end = len(text) - len(text.rstrip("\\"))
    return f"'{text}{text[len(text) - end :] if end else ''}'"


def typed_word(schema: type, word: str, is_sweep: bool = False) -> str:
    """One word of the command line with its value as its key's type wants it; other words stay as they are.

    Args:
        schema: dataclass of the configuration.
        word: `key=value`, perhaps with Hydra's + or ++ before it.
        is_sweep: whether a comma separates the values of several runs.
    """
    key, equals, value = word.partition("=")
    kind = type_of_key(schema, key.lstrip("+")) if equals else None
    if kind is int and _EXPONENT.fullmatch(value):
        number = Decimal(value)
        return f"{key}={int(number)}" if number == int(number) else word
    is_quoted = len(value) > 1 and value[0] in "'\"" and value[-1] == value[0]
    if kind is not str or value in _LEFT_ALONE or is_quoted or (is_sweep and "," in value):
        return word
    return f"{key}={quoted(value)}"


def typed_words(schema: type, words: Sequence[str], is_sweep: bool = False) -> list[str]:
    """`typed_word` of every word."""
    return [typed_word(schema, word, is_sweep) for word in words]
