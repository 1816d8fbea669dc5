"""The values of a config.json, taken by name and type; what is missing or of another type is refused."""

from __future__ import annotations

import sys
from typing import Any


class ConfigValues:
    """Settings by name, and the file they come from."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        """Keep the settings.

        Args:
            values: of `config_meaning.canonical`.
            source: the file's name, for errors.
        """
        self.values = values
        self.source = source

    def need(self, key: str, kind: type = int) -> Any:
        """A value that must be there, of the given type; an int also counts as a float.

        Raises:
            ValueError: it is missing, or of another type.
        """
        value = self.values.get(key)
        if value is None:
            raise ValueError(
                f"{self.source} lacks {key}; it is read, never guessed: add it as the model's authors gave it."
            )
        return self.checked(key, value, kind)

    def get(self, key: str, default: Any, kind: type = int) -> Any:
        """A value of the given type, or the default where it is missing or null.

        Raises:
            ValueError: it is of another type.
        """
        value = self.values.get(key)
        return default if value is None else self.checked(key, value, kind)

    def checked(self, key: str, value: Any, kind: type) -> Any:
        """The value as the given type.

        Raises:
            ValueError: it is of another type, or no finite number.
        """
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(
                f"{self.source}: {key} ({brief(value)}) must be of type {kind.__name__}; correct it as the "
                "model's authors gave it."
            )
        if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
            raise ValueError(
                f"{self.source}: {key} ({brief(value)}) must be a finite number; correct it as the model's authors "
                "gave it."
            )
        return kind(value)

    def token_id(self, key: str) -> int:
        """A token's id, of a list the first; -1 where the file names none.

        Raises:
            ValueError: it is no whole number, or a negative one.
        """
        value = self.values.get(key)
        if isinstance(value, list):
            value = value[0] if value else None
        token_id = -1 if value is None else int(self.checked(key, value, int))
        if token_id < -1:
            raise ValueError(f"{self.source}: {key} ({token_id}) must not be negative; name a token, or null for none.")
        return token_id


def brief(value: Any) -> str:
    """A value for a message: a long one is cut."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
