"""Every key of the configuration with its default and meaning, read from the dataclasses and the comments in them.

    python -m megatron_dllm.config.reference                    all keys of a training run, as Markdown
    python -m megatron_dllm.config.reference schedule.stages    those that begin so

The comment above a field is its meaning; the units of its class stand in the class's docstring.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from megatron_dllm.config.band import BandConfig
from megatron_dllm.config.cluster import ClusterConfig
from megatron_dllm.config.generate import GenerateConfig
from megatron_dllm.config.harness import HarnessConfig
from megatron_dllm.config.needle import NeedleConfig
from megatron_dllm.config.plan import PlanKeys
from megatron_dllm.config.rules import check
from megatron_dllm.config.study import StudyConfig
from megatron_dllm.config.train import TrainConfig

_FIELD = re.compile(r"^    (?P<name>\w+): ")
_COMMENT = re.compile(r"^    # ?(?P<text>.*)$")


@dataclass(frozen=True)
class Key:
    """One value that can be set.

    Attributes:
        name: dotted; NAME stands for what the user calls an entry.
        kind: of its value.
        default: as on a command line; ??? where there is none.
        meaning: with its unit; "" where the source has no comment.
    """

    name: str
    kind: str
    default: str
    meaning: str


def comments_of(schema: type) -> dict[str, str]:
    """The comment above each field of a dataclass, those of its base classes included."""
    found: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        if not is_dataclass(owner):
            continue
        lines: list[str] = []
        for line in inspect.getsource(owner).splitlines():
            comment, field = _COMMENT.match(line), _FIELD.match(line)
            if comment:
                lines.append(comment["text"])
            else:
                if field:
                    found[field["name"]] = " ".join(lines)
                lines = []
    return found


def keys_of(schema: type, prefix: str = "") -> Iterator[Key]:
    """Every key below a dataclass, in the order of its fields."""
    hints, comments = get_type_hints(schema), comments_of(schema)
    for field in fields(schema):
        name, kind = prefix + field.name, hints[field.name]
        group = _group_of(kind)
        if group is None or type(None) in get_args(kind) or get_origin(kind) is dict:
            yield Key(name, _kind_name(kind), _default(field), comments.get(field.name, ""))
        if group is not None:
            yield from keys_of(group, f"{name}.NAME." if get_origin(kind) is dict else f"{name}.")


def _group_of(kind: Any) -> type | None:
    """The dataclass that a key holds, itself or as the entries of a dict."""
    return next((part for part in (kind, *get_args(kind)) if is_dataclass(part) and isinstance(part, type)), None)


def _kind_name(kind: Any) -> str:
    if isinstance(kind, type) and not get_args(kind):
        return "group" if is_dataclass(kind) else kind.__name__
    return re.sub(r"[\w.]+\.(\w+)", r"\1", str(kind)).replace("None", "null")


def _default(field: Field[Any]) -> str:
    value = field.default
    if field.default_factory is not NO_DEFAULT:
        value = field.default_factory()
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def markdown(title: str, schema: type) -> str:
    """The keys below a dataclass, as a table with a heading."""
    rows = [
        f"| `{key.name}` | {_cell(key.kind)} | `{key.default}` | {_cell(key.meaning)} |" for key in own_keys(schema)
    ]
    return "\n".join([f"## {title}\n", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def own_keys(schema: type) -> list[Key]:
    """The keys below a dataclass, without those of training where it adds to them."""
    keys = [*keys_of(schema)]
    if not issubclass(schema, TrainConfig) or schema is TrainConfig:
        return keys
    known = {key.name for key in keys_of(TrainConfig)}
    return [key for key in keys if key.name not in known]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


SECTIONS = {
    "Training: train, evaluate, and the training jobs of a chain": TrainConfig,
    "Tasks of lm-evaluation-harness: harness, which has the keys of training too": HarnessConfig,
    "Long contexts: needle, which has the keys of training too": NeedleConfig,
    "Bands of noise levels: band, which has the keys of training too": BandConfig,
    "Decoding: generate": GenerateConfig,
    "Decoding in many ways: study": StudyConfig,
    "Planning: plan, beside the keys of training": PlanKeys,
    "A cluster: cluster.KEY of the launcher, recipes/cluster/NAME.yaml": ClusterConfig,
}


_PREFACE = """# Every key

Made from the dataclasses in `megatron_dllm/config/`. `???`: it has no default and must be given. A recipe may give
another default than the one here; `config.yaml` of a run says what was used. Document tokens are tokens of the corpus,
counted once; rows are what `micro_batch_size` and `global_batch_size` count.
"""


def page() -> str:
    """All keys as a page."""
    return "\n".join([_PREFACE, *(markdown(title, schema) for title, schema in SECTIONS.items())])


def main(words: Sequence[str] | None = None) -> int:
    """Print the reference, or the keys that begin as asked.

    Raises:
        ValueError: no key begins so.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beginning", nargs="?", help="of the keys to be shown; all where it is left out")
    beginning = parser.parse_args(words).beginning
    if beginning is None:
        print(page())
        return 0
    keys = [key for schema in SECTIONS.values() for key in own_keys(schema)]
    found = [key for key in keys if key.name.startswith(beginning)]
    nearest = difflib.get_close_matches(beginning, [key.name for key in keys], n=3, cutoff=0.0)
    check(bool(found), f"{beginning!r} must be the beginning of a key; the nearest keys are {', '.join(nearest)}.")
    for key in found:
        print(f"{key.name} ({key.kind}, default {key.default})\n    {key.meaning}")
    return 0


if __name__ == "__main__":
    run_command(main)
