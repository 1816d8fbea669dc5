"""Which checkpoints of a run stay.

Pure standard library.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

from megatron_dllm.checkpoint.folder import list_checkpoints
from megatron_dllm.checkpoint.meta import read_meta
from megatron_dllm.checkpoint.validation import validation_elbo
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
    ranked = []
    for folder in (f for f in complete if metas[f].semantics == metas[complete[-1]].semantics):
        try:
            elbo = validation_elbo(folder)
        except ValueError as error:
            log.warning("%s stays: %s", folder.name, error)
            kept.add(folder)
            continue
        if elbo is not None and math.isfinite(elbo):
            ranked.append((elbo, folder))
    kept |= {f for _, f in sorted(ranked)[:keep_best]}
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
