"""On what a run was validated, as its records say, and which validations cannot be compared with the newest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from megatron_dllm.checkpoint.validation import Conditions, Validation
from megatron_dllm.reporting.records import Record


def conditions_in(record: Record) -> Conditions | None:
    """The conditions of a validation; None where the record does not say them all."""
    stated = record.get("conditions")
    names = {item.name for item in fields(Conditions)}
    return Conditions(**stated) if isinstance(stated, dict) and set(stated) == names else None


def difference(record: Record, newest: Record) -> str:
    """What makes a validation incomparable with the newest one, in words; empty where nothing does."""
    mine, reference = (Validation({}, conditions=conditions_in(item)) for item in (record, newest))
    return mine.difference(reference)


def is_same_text(record: Record, other: Record | Validation) -> bool:
    """Whether two validations measured one corpus, as far as they say."""
    mine, theirs = conditions_in(record), other.conditions if isinstance(other, Validation) else conditions_in(other)
    return mine is None or theirs is None or mine.corpus == theirs.corpus


def alike(records: Sequence[Record]) -> list[list[Record]]:
    """Validations in order, a new list wherever the conditions change."""
    parts: list[list[Record]] = []
    for record in records:
        if not parts or difference(record, parts[-1][-1]):
            parts.append([])
        parts[-1].append(record)
    return parts


def measured_on(records: Sequence[Record], corpus: object) -> str:
    """What the newest validation measured.

    Args:
        records: validations.
        corpus: that the configuration names.
    """
    if not records:
        return "nothing was validated"
    conditions = conditions_in(records[-1])
    if conditions is None:
        return f"{corpus}"
    try:
        tokens = f"{conditions.num_tokens:,}"
    except (TypeError, ValueError):  # a stranger's record
        tokens = str(conditions.num_tokens)
    return (
        f"{tokens} document tokens of {corpus} (fingerprint {str(conditions.corpus)[:12]}); context length "
        f"{conditions.context_length}; blocks by {conditions.blocks}; {conditions.precision}"
    )
