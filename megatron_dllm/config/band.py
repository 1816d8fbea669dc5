"""What a search for a band of noise levels loads, measures and writes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dllm.config.evaluate import EvaluateConfig


@dataclass
class BandConfig(EvaluateConfig):
    """The configuration of an evaluation, and how often its documents are read; output=FILE keeps the table as JSON."""

    # Passes over the held-out documents, each with noise of its own; one draw of a block serves all bands.
    draws: int = 4
