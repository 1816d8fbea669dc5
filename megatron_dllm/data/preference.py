"""Preference pairs: two answers to one prompt, the chosen and the rejected one.

A corpus of pairs is an ordinary corpus of chats: documents 2i and 2i + 1 are prompt and answer of pair i, first the
chosen side, then the rejected one. PREFIX.json says `kind: pairs`. The sample id of a document is its number, so

    pair = sample_id // 2        side = sample_id % 2, 0 chosen, 1 rejected

also in a blend, whose corpora add even numbers. Pairs are shuffled as one, and lie in the rows of one global batch
(`data.pair_packing`). `Batch.target_segments` says which of its `sample_ids` a target belongs to.
"""

from __future__ import annotations

PAIRS = "pairs"  # the kind in PREFIX.json
CHOSEN, REJECTED = 0, 1
SIDES = ("chosen", "rejected")
