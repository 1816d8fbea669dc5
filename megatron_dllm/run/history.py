"""What a run was at its earlier starts, kept in the run folder beside what it is now (standard library only).

RUN/config.yaml, git.txt             of the newest start that trained
RUN/config_0001.yaml, git_0001.txt   as they were before the first start that changed one of them; then _0002, ...
RUN/starts.jsonl                     a line for every start: when, where, from which step, and what had changed
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_dllm.run.files import append_line, write_text
from megatron_dllm.run.names import CODE_STATE, CONFIG, STARTS

_ABSENT = "(none)"


@dataclass(frozen=True)
class Change:
    """A value of the configuration that differs from the start before; `(none)` where one of them has no such key."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """As people read it."""
        return f"{self.name}: {_text(self.old)} -> {_text(self.new)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def changes_between(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Change, ...]:
    """What differs between two configurations, by dotted names: first what is there now, then what is gone.

    Args:
        old: nested tables of plain values.
        new: the same, of this start.
    """
    before, after = _flat(old), _flat(new)
    names = [*after, *(name for name in before if name not in after)]
    pairs = ((name, before.get(name, _ABSENT), after.get(name, _ABSENT)) for name in names)
    return tuple(Change(name, was, now) for name, was, now in pairs if was != now)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in content.items():
        values |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {prefix + name: value}
    return values


def record_start(run_folder: Path, changes: tuple[Change, ...], **details: Any) -> None:
    """Add a line about this start to starts.jsonl.

    Args:
        run_folder: of the run.
        changes: since the start before.
        details: what else is known of it, as plain values.
    """
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        **details,
        "changes": {change.name: [change.old, change.new] for change in changes},
    }
    append_line(run_folder / STARTS, json.dumps(line))


def replace_records(run_folder: Path, config: str, code_state: str) -> None:
    """Write config.yaml and git.txt of this start; where one of them differs, both stay under the next number.

    Args:
        run_folder: of the run.
        config: text of config.yaml.
        code_state: text of git.txt.
    """
    paths = {run_folder / CONFIG: config, run_folder / CODE_STATE: code_state}
    earlier = {path: path.read_text(encoding="utf-8") for path in paths if path.is_file()}
    if any(text != paths[path] for path, text in earlier.items()):
        number = 1 + len(list(run_folder.glob(f"{Path(CONFIG).stem}_[0-9]*.yaml")))
        for path, text in earlier.items():
            write_text(path.with_stem(f"{path.stem}_{number:04d}"), text)
    for path, text in paths.items():
        write_text(path, text)
