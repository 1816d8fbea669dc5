"""Tables of JSON into dataclasses: every field is there, of its type, and nothing else is.

Pure standard library.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
    "Mapping[str, Any]": (dict,),
}
T = TypeVar("T")


def read_fields(kind: type[T], table: Mapping[str, Any], place: str, ignored: Collection[str] = ()) -> T:
    """Make a dataclass of a JSON object.

    Args:
        kind: a dataclass whose fields are annotated with names of `_TYPES` or a dataclass of the same sort, or several
            of them joined by " | ".
        table: the object.
        place: file and object, for errors: "contract.json: model." and the field follows.
        ignored: names that may stand there and are passed over.

    Raises:
        ValueError: a field is missing, of another type, or not known.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    unknown = sorted(set(table) - set(known) - set(ignored))
    if unknown:
        raise ValueError(f"{place}{unknown[0]} is not known to this version; use the version that wrote it.")
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name not in table and field.default is not MISSING:
            values[name] = field.default
            continue
        values[name] = table.get(name)
    for name, value in values.items():
        wanted, part_kind = str(known[name].type), _dataclass_in(hints[name])
        if part_kind is not None and isinstance(value, dict):
            values[name] = read_fields(part_kind, value, f"{place}{name}.")
        elif type(value) not in [item for part in wanted.split(" | ") for item in _TYPES.get(part, ())]:
            raise ValueError(
                f"{place}{name} ({value!r}) must be of type {wanted}: the file is damaged; choose another."
            )
    return kind(**values)


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a field may hold."""
    return next((part for part in (hint, *get_args(hint)) if isinstance(part, type) and is_dataclass(part)), None)
