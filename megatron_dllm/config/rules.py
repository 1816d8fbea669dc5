"""How a wrong value is refused: a ValueError that says name (value), the rule, and the remedy."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any

# No count, size or length of a run comes near it, and arithmetic in 64 bits stays far from its end.
LARGEST_NUMBER = 10**15
# The longest context or row: positions and sizes of tensors are 32-bit numbers in places.
LARGEST_LENGTH = 2**31 - 1


def check(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the choices."""
    check(value in choices, f"{name} ({value}) is not known; use one of {', '.join(choices)}.")


def check_positive(name: str, value: float) -> None:
    """Refuse a value of 0 or less."""
    check(value > 0, f"{name} ({value}) must be positive; give a value above 0.")


def check_at_most(name: str, value: int, largest: int) -> None:
    """Refuse a number beyond what anything here could be."""
    check(value <= largest, f"{name} ({value}) must be at most {largest}; give a smaller number.")


def check_values(config: Any, prefix: str = "", unbounded: tuple[str, ...] = ()) -> None:
    """Refuse what no key may hold, whatever it means: a number that is not finite or absurdly large, an empty text.

    Args:
        config: a dataclass, whose groups, dicts and lists are looked through.
        prefix: name of it in messages.
        unbounded: keys whose numbers are not counts, as seeds.
    """
    for name, value in _entries(config):
        key = f"{prefix}.{name}" if prefix else name
        if is_dataclass(value) or isinstance(value, (dict, list)):
            check_values(value, key, unbounded)
        elif isinstance(value, float):
            check(math.isfinite(value), f"{key} ({value}) must be a finite number; give one.")
            check(abs(value) <= LARGEST_NUMBER, f"{key} ({value:g}) must be at most {LARGEST_NUMBER:g}; give less.")
        elif isinstance(value, int) and not isinstance(value, bool) and key not in unbounded:
            check(abs(value) <= LARGEST_NUMBER, f"{key} ({value:g}) must be at most {LARGEST_NUMBER:g}; give less.")
        elif isinstance(value, str):
            check(value.strip() != "", f"{key} ({value!r}) is empty; give a value, or leave the key out.")
            check("\0" not in value, f"{key} ({value!r}) holds a zero byte; take it out.")


def _entries(config: Any) -> list[tuple[str, Any]]:
    if isinstance(config, dict):
        return [(str(name), value) for name, value in config.items()]
    if isinstance(config, list):
        return [(str(index), value) for index, value in enumerate(config)]
    return [(field.name, getattr(config, field.name)) for field in fields(config)]


def check_name(key: str, name: str) -> None:
    """Refuse a name that is not a plain folder name, or that a shell or scheduler could misread."""
    plain = bool(name) and name.isascii() and all(c.isalnum() or c in "._-" for c in name) and name[0] not in ".-"
    check(
        plain,
        f"{key} ({name!r}) must be letters, digits, '.', '_' or '-', not starting with '.' or '-'; "
        "it names a folder and a job.",
    )


def nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of `number` next to `wanted`, for a message."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0] or [1]
    divisors = sorted({*small, *(number // d for d in small)})
    below = max(d for d in divisors if d <= max(wanted, 1))
    above = min((d for d in divisors if d >= wanted), default=number)
    return f"{below} or {above}"


def nearest_multiples(number: int, unit: int) -> str:
    """The multiples of `unit` next to `number`, for a message."""
    below = number // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
