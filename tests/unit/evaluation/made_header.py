"""The header of a file of scores, as the tests of several modules need it."""

from __future__ import annotations

from megatron_dllm.evaluation.scores_header import ScoresHeader

HEADER = ScoresHeader(
    checkpoint="c" * 64,
    corpus="f" * 64,
    chat_template="t" * 64,
    seed=7,
    block_size=4,
    context_length=32,
    fill="eos",
    turn_boundary="split_views",
    precision="fp32",
    noise={"num_views": 3, "t_min": 0.0, "is_count": True, "view_relation": "stratified"},
    num_documents=10,
    num_epochs=2,
)
