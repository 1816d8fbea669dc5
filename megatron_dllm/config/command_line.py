"""`key=value` words of a command line, written so that Hydra's grammar reads each value as its key's type wants it.

Hydra would read a run called 8e12345 as infinity, 2024_01 as 202401, and stumble over a path with a comma, an equal
sign or a bracket. A key that holds text therefore gets its value quoted, as it was typed; one that holds a whole number
may be given as 1e9. A key that holds corpora (the schema types it Any) takes a text, or a list in brackets that begins
with a weight, whose texts are quoted.
"""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from decimal import Decimal
from typing import Any, Union, get_args, get_origin, get_type_hints

from megatron_dllm.config.rules import check

_EXPONENT = re.compile(r"[+-]?\d[\d_]*(\.\d+)?[eE]\+?\d{1,2}")
# A number that stands alone in {block_size: 8, num_tokens: 1e9} or [1e3, 4].
_NUMBER_INSIDE = re.compile(r"(?<=[\[,:\s])" + _EXPONENT.pattern + r"(?=\s*[\],}])")
_TRUTH_VALUES = ("true", "false", "yes", "no", "on", "off", "1", "0", "null", "???")
# A number as people write weights; a list that begins with one; what stands between commas outside quotes.
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,2})?")
_BLEND = re.compile(rf"\[\s*{_NUMBER.pattern}\s*,.*\]")
_PARTS = re.compile(r"""\s*(?:'[^']*'|"[^"]*")\s*(?=,|$)|[^,]+""")
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


def entry_of_dict(schema: type, key: str) -> tuple[str, str, list[str]] | None:
    """The dict of named groups that a dotted key lies in, the entry's name, and what follows; None for another key.

    `schedule.stages.extra.num_tokens` is (schedule.stages, extra, [num_tokens]).
    """
    parts = key.split(".")
    for end in range(1, len(parts)):
        hint = type_of_key(schema, ".".join(parts[:end]))
        if get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
            return ".".join(parts[:end]), parts[end], parts[end + 1 :]
    return None


def typed_word(schema: type, word: str, is_sweep: bool = False) -> str:
    """One word of the command line with its value as its key's type wants it; other words stay as they are.

    Hydra cannot add a group to those of a dict, such as a stage to the schedule; it can merge a dict that has one more.
    So +schedule.stages.extra={block_size: 8} becomes ++schedule.stages={extra: {block_size: 8}}. A dict of plain values
    with entries of any name is merged likewise with what the recipes give.

    Args:
        schema: dataclass of the configuration.
        word: `key=value`, perhaps with Hydra's + or ++ before it.
        is_sweep: whether a comma separates the values of several runs.

    Raises:
        ValueError: a key that is true or false is given something else, which Hydra would take for true.
    """
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    kind = type_of_key(schema, name) if equals else None
    if kind is bool and not (is_sweep and "," in value):
        check(value.lower() in _TRUTH_VALUES, f"{name} ({value}) is yes or no; give true or false.")
    value = _typed_value(kind, value, is_sweep) if equals else value
    if kind is not None and _is_plain_dict(kind) and value.startswith("{"):
        return f"++{name}={value}"
    entry = entry_of_dict(schema, name) if equals and key.startswith("+") else None
    if entry is None or not (entry[2] or value.startswith("{")):
        return f"{key}{equals}{value}"
    group, added, rest = entry
    return f"++{group}={{{': {'.join([added, *rest])}: {value}{'}' * (len(rest) + 1)}"


def _is_plain_dict(kind: Any) -> bool:
    return get_origin(kind) is dict and not is_dataclass(get_args(kind)[1])


def _typed_value(kind: Any, value: str, is_sweep: bool) -> str:
    """A value as Hydra's grammar has to see it, so that a key of this type gets what was typed."""
    if kind is int:
        return _whole_number(value)
    if is_dataclass(kind) or get_origin(kind) in (dict, list):
        return _NUMBER_INSIDE.sub(lambda match: _whole_number(match[0]), value)
    if kind is Any and _BLEND.fullmatch(value):
        return f"[{','.join(_item(part.strip()) for part in _PARTS.findall(value[1:-1]))}]"
    if kind not in (str, Any) or value in _LEFT_ALONE or _is_quoted(value) or (is_sweep and "," in value):
        return value
    return quoted(value)


def _whole_number(text: str) -> str:
    """1e9 as 1000000000; other texts as they are."""
    if not _EXPONENT.fullmatch(text):
        return text
    number = Decimal(text)
    return str(int(number)) if number == int(number) else text


def _is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]


def _item(text: str) -> str:
    """One value of a list: numbers and quoted texts as they are, other texts quoted."""
    return text if _NUMBER.fullmatch(text) or _is_quoted(text) else quoted(text)


def typed_words(schema: type, words: Sequence[str], is_sweep: bool = False) -> list[str]:
    """`typed_word` of every word."""
    return [typed_word(schema, word, is_sweep) for word in words]


def taken_as_typed(words: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Values of keys that hold texts and paths, which Hydra's grammar is not to read.

    Args:
        words: `key=value` words.
        keys: that are taken out.

    Returns:
        The values of each key that was given, in order, and the other words.
    """
    taken: dict[str, list[str]] = {}
    others: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in keys:
            taken.setdefault(key, []).append(value)
        else:
            others.append(word)
    return taken, others
