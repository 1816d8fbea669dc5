"""Reading a pickle that a stranger may have written: names outside a table of the format are refused.

torch's checkpoint formats contain pickles by definition. Here they are read for what they say: the names that the
format knows become inert records of our own, any other name is an error, and no class or function of another library
is ever called.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import IO, Any


class TableUnpickler(pickle.Unpickler):
    """Knows the names of one format and no others."""

    def __init__(
        self, stream: IO[bytes], what: str, find: Callable[[str, str], Any], has_storages: bool = False
    ) -> None:
        """Prepare to read one pickle.

        Args:
            stream: the pickle.
            what: it describes, for the error.
            find: returns what (module, name) stands for in the format, or None. It must return classes and functions
                of ours, made for this call: a pickle can write attributes of whatever it gets.
            has_storages: whether the format refers to storages outside the pickle; they are kept as they are written.
        """
        super().__init__(stream)
        self._what, self._find, self._has_storages = what, find, has_storages

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for.

        Raises:
            UnpicklingError: the format does not have it.
        """
        found = self._find(module, name)
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in {self._what}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        """A reference to a storage, as it is written."""
        if not self._has_storages:
            raise pickle.UnpicklingError(f"{pid!r} has no place in {self._what}")
        return pid
