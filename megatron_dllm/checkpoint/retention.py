"""Which checkpoints of a run stay.

Pure standard library.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

from megatron_dllm.checkpoint.folder import list_checkpoints
from megatron_dllm.checkpoint.meta import read_meta
from megatron_dllm.checkpoint.validation import Conditions, read_validation
from megatron_dllm.run.files import remove

log = logging.getLogger(__name__)


def retire(checkpoints: Path, keep_last: int, keep_best: int, keep_every: int) -> list[Path]:
    """Delete checkpoints that no rule keeps; returns the deleted folders.

    Kept: the last `keep_last`, the `keep_best` with the lowest validation ELBO among those trained as the newest
    one (only they can be merged with it), every `keep_every`-th of those saved at the interval, and every stage's
    end. An incomplete folder never counts as one that is kept, so the newest complete checkpoint always stays.
    """
    complete = list_checkpoints(checkpoints)
    kept = set(complete[-max(keep_last, 1) :])
    metas = {folder: read_meta(folder) for folder in complete}
    kept |= _best([f for f in complete if metas[f].semantics == metas[complete[-1]].semantics], keep_best)
    deleted = []
    for folder in complete:
        position = metas[folder].position
        number = position.save_number
        is_multiple = keep_every > 0 and number is not None and number % keep_every == 0
        if folder in kept or is_multiple or position.is_stage_end:
            continue
        remove(folder)
        deleted.append(folder)
    return deleted


def _best(folders: list[Path], keep_best: int) -> set[Path]:
    """The best of each kind of measurement, and those whose measurement cannot be read.

    A measurement on other text or at another target block size has nothing to say about the others: whoever changes
    it in the middle of a run keeps the best of both kinds.
    """
    kept: set[Path] = set()
    kinds: dict[tuple[Conditions | None, int | None], list[tuple[float, Path]]] = {}
    for folder in folders:
        try:
            validation = read_validation(folder)
        except ValueError as error:
            log.warning("%s stays: %s", folder.name, error)
            kept.add(folder)
            continue
        if validation is not None and validation.elbo is not None and math.isfinite(validation.elbo):
            kind = (validation.conditions, validation.target_block_size)
            kinds.setdefault(kind, []).append((validation.elbo, folder))
    for measured in kinds.values():
        kept |= {folder for _, folder in sorted(measured)[:keep_best]}
    return kept
