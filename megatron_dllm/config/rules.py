"""How a wrong value is refused: a ValueError that says name (value), the rule, and the remedy."""

from __future__ import annotations


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
    divisors = [d for d in range(1, number + 1) if number % d == 0] or [1]
    below = max(d for d in divisors if d <= max(wanted, 1))
    above = min((d for d in divisors if d >= wanted), default=number)
    return f"{below} or {above}"


def nearest_multiples(number: int, unit: int) -> str:
    """The multiples of `unit` next to `number`, for a message."""
    below = number // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
