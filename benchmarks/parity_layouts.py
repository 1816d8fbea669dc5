"""What the parity table compares: layouts, stages, and the tiny run that both sides train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_dllm.config import (
    AttentionAnnealConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
    TrainingConfig,
)
from megatron_dllm.config.annealing import RANDOM

CONTEXT_LENGTH, BLOCK_SIZE, ROW_LENGTH = 32, 4, 96
# Beside the corpus of the other stages, for the one that blends two.
SECOND_CORPUS = "second_corpus"
GLOBAL_BATCH_SIZE = 4
VOCAB_SIZE, EOS, PAD, MASK = 128, 0, 1, 2
LEARNING_RATE = 1e-2
# Of the order of the gradient's elements. Adam divides by |g| + eps: with the usual 1e-8 the first updates are the
# sign of g, and an element whose gradient is nothing but rounding moves by a full learning rate either way.
ADAM_EPS = 1e-3

_DENSE = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=512,
    init_method_std=0.1,
    mask_token_id=MASK,
    eos_token_id=EOS,
    pad_token_id=PAD,
)
# Four layers, the first of them dense. The router's bias moves, so that it is compared too.
_EXPERTS = replace(
    _DENSE,
    num_dense_layers=1,
    num_moe_experts=8,
    moe_ffn_hidden_size=32,
    moe_shared_expert_intermediate_size=32,
    moe_router_topk=4,
    moe_router_num_groups=4,
    moe_router_group_topk=2,
    moe_router_topk_scaling_factor=2.5,
)
# The last layer may leave out tokens that nobody reads only where the router's bias stands still (model/last_layer.py).
SKIPPING = "skipping"
MODELS: dict[str, ModelConfig] = {
    "experts": _EXPERTS,
    SKIPPING: _EXPERTS,
    "six layers": replace(_EXPERTS, num_layers=6),
    "dense": replace(_DENSE, tie_word_embeddings=True),
}


@dataclass(frozen=True)
class Layout:
    """One way to train the same global batches.

    `has_overlap` overlaps gradient and parameter traffic with compute. `model` is one of MODELS. `defect` makes the
    program wrong in that way; such a layout is not validated.
    """

    world_size: int
    parallel: ParallelConfig
    micro_batch_size: int = 1
    has_overlap: bool = False
    model: str = "experts"
    defect: str | None = None

    @property
    def variant(self) -> str:
        """What the expected result depends on, besides the stage."""
        return f"{self.parallel.precision}_{self.model}"


def _layout(
    world_size: int,
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    ep: int = 1,
    micro_batch_size: int = 1,
    has_overlap: bool = False,
    model: str = "experts",
    defect: str | None = None,
    **others: object,
) -> Layout:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        sequence_parallel=tp > 1,
    )
    return Layout(world_size, replace(parallel, **others), micro_batch_size, has_overlap, model, defect)


# One rank, by what the result depends on.
EXPECTED: dict[str, Layout] = {
    layout.variant: layout
    for layout in (
        *(_layout(1, micro_batch_size=GLOBAL_BATCH_SIZE, model=model) for model in MODELS),
        _layout(1, micro_batch_size=GLOBAL_BATCH_SIZE, precision="bf16"),
    )
}

LAYOUTS: dict[str, Layout] = {
    "accumulation 4": _layout(1),
    "recompute full": _layout(1, micro_batch_size=2, recompute="full"),
    "recompute selective": _layout(1, micro_batch_size=2, recompute="selective"),
    "DP2": _layout(2, micro_batch_size=2),
    "DP2 overlap": _layout(2, has_overlap=True),
    "TP2": _layout(2, tp=2, expert_tensor_parallel_size=2),
    "TP2 recompute": _layout(2, tp=2, expert_tensor_parallel_size=2, recompute="full"),
    "TP2 x EP2": _layout(2, tp=2, ep=2, expert_tensor_parallel_size=1),
    "PP2": _layout(2, pp=2),
    "PP2 uneven 1+3": _layout(2, pp=2, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=3),
    "PP2 virtual 2": _layout(2, pp=2, virtual_pipeline_model_parallel_size=2),
    "PP2 recompute selective": _layout(2, pp=2, recompute="selective"),
    "CP2": _layout(2, cp=2),
    "CP2 ulysses": _layout(2, cp=2, context_parallel_method="ulysses"),
    "EP2": _layout(2, ep=2),
    "EP2 alltoall": _layout(2, ep=2, moe_token_dispatcher="alltoall"),
    "TP2 dense": _layout(2, tp=2, model="dense", sequence_parallel=False),
    "PP2 virtual 2 dense": _layout(2, pp=2, model="dense", virtual_pipeline_model_parallel_size=2),
    "PP3 uneven 1+2+1": _layout(3, pp=3, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=1),
    "TP2 x PP2": _layout(4, tp=2, pp=2),
    "EP2 x ETP2": _layout(4, ep=2, expert_tensor_parallel_size=2),
    "TP2 x EP2 x DP2": _layout(4, tp=2, ep=2, expert_tensor_parallel_size=1),
    "TP2 x EP2 x ETP2": _layout(4, tp=2, ep=2, expert_tensor_parallel_size=2),
    "TP2 x CP2": _layout(4, tp=2, cp=2),
    "TP2 x CP2 ulysses": _layout(4, tp=2, cp=2, context_parallel_method="ulysses"),
    "TP4, 2 query groups": _layout(4, tp=4),
    "PP4": _layout(4, pp=4),
    "PP2 virtual 2 x DP2 overlap": _layout(4, pp=2, virtual_pipeline_model_parallel_size=2, has_overlap=True),
    "PP2 x EP2": _layout(4, pp=2, ep=2),
    "CP4": _layout(4, cp=4),
    "CP4 ulysses": _layout(4, cp=4, context_parallel_method="ulysses"),
    "CP2 x EP2": _layout(4, cp=2, ep=2),
    "CP2 x EP4": _layout(4, cp=2, ep=4),
    "EP4": _layout(4, ep=4),
    "TP2 x PP2 x CP2": _layout(8, tp=2, pp=2, cp=2),
    "DP2 x EP2 x PP2": _layout(8, pp=2, ep=2),
    "CP2 x EP2 recompute": _layout(4, cp=2, ep=2, recompute="full"),
    "PP2 virtual 2 x CP2": _layout(4, pp=2, cp=2, virtual_pipeline_model_parallel_size=2),
    "PP2 virtual 2 uneven 2+4": _layout(
        2, pp=2, model="six layers", virtual_pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=2
    ),
    # As the large recipes train: the router's bias stands still and the last layer leaves out what nobody reads.
    "recompute full, skipping": _layout(1, model=SKIPPING, recompute="full"),
    "CP2, skipping": _layout(2, cp=2, model=SKIPPING),
    "EP2 alltoall, skipping": _layout(2, ep=2, model=SKIPPING, moe_token_dispatcher="alltoall"),
    "TP2 x EP2, skipping": _layout(
        2, tp=2, ep=2, model=SKIPPING, expert_tensor_parallel_size=1, moe_token_dispatcher="alltoall"
    ),
    "TP2 x PP2, skipping": _layout(4, tp=2, pp=2, model=SKIPPING),
    "PP2 x EP2 overlap, skipping": _layout(
        4, pp=2, ep=2, model=SKIPPING, moe_token_dispatcher="alltoall", recompute="full", has_overlap=True
    ),
    "TP2 x PP2 x EP2 overlap, skipping": _layout(
        8,
        tp=2,
        pp=2,
        ep=2,
        model=SKIPPING,
        expert_tensor_parallel_size=1,
        moe_token_dispatcher="alltoall",
        recompute="full",
        has_overlap=True,
    ),
}

# Wrong on purpose: the comparison must see each of them.
BROKEN: dict[str, Layout] = {
    "TP2, expert TP 1, EP 1": _layout(2, tp=2, expert_tensor_parallel_size=1, defect="not_validated"),
    "TP1, expert TP 2, EP 1": _layout(2, expert_tensor_parallel_size=2, defect="not_validated"),
    "DP2, gradient not divided by the tokens": _layout(2, defect="unscaled_gradient"),
    "TP2, norm gradients not summed": _layout(2, tp=2, defect="unsummed_norms"),
    "CP2, key gradients of other ranks dropped": _layout(2, cp=2, defect="dropped_key_gradients"),
}

# Their rounding differs where sums are taken in another order; see docs/parallelism.md.
BF16: dict[str, Layout] = {
    f"{name} bf16": replace(LAYOUTS[name], parallel=replace(LAYOUTS[name].parallel, precision="bf16"))
    for name in ("accumulation 4", "DP2", "TP2", "PP2", "CP2", "EP2")
}

_BLOCKS = StageConfig(
    block_size=BLOCK_SIZE, num_tokens=1, global_batch_size=GLOBAL_BATCH_SIZE, learning_rate=LEARNING_RATE
)
_OPENING = replace(
    _BLOCKS,
    block_size=CONTEXT_LENGTH,
    shift=True,
    attention_anneal=AttentionAnnealConfig(steps=3),
    ar_weight=0.5,
    ar_row_share=0.25,
)
# Of all stages the one whose mask a single backend on a CPU can compute.
RANDOM_PAIRS = "random_pairs"
STAGES: dict[str, StageConfig] = {
    "ar": replace(_BLOCKS, objective="ar", block_size=1),
    "complementary": replace(_BLOCKS, num_views=2, view_relation="complementary", t_max=0.999),
    "single_view": _BLOCKS,
    "shift": replace(_BLOCKS, num_views=2, shift=True, loss_weight="cart"),
    "mdlm": replace(_BLOCKS, block_size=CONTEXT_LENGTH),
    "guided": replace(_BLOCKS, clean_block_size=1, ar_weight=0.5, ar_share=0.5, ar_row_share=0.25),
    "annealed": _OPENING,
    RANDOM_PAIRS: replace(_OPENING, attention_anneal=AttentionAnnealConfig(steps=3, kind=RANDOM)),
    "blend": replace(_BLOCKS, train=[0.6, "corpus", 0.4, SECOND_CORPUS]),
}
# Noise on the embeddings of masked tokens, where a stage has it.
EMBEDDING_NOISE = {"complementary": 0.3}


def train_config(layout: Layout, stage: StageConfig, corpus: Path) -> TrainConfig:
    """The whole configuration of one comparison. What one rank is expected to make of it leaves no output out.

    Args:
        layout: of the ranks.
        stage: what they train. The corpora of a blend of its own lie beside `corpus`.
        corpus: prefix of what the other stages train on.
    """
    backend = "dense" if stage == STAGES[RANDOM_PAIRS] else "auto"
    stage = replace(stage, micro_batch_size=layout.micro_batch_size)
    if isinstance(stage.train, list):
        stage = replace(stage, train=[str(corpus.parent / v) if isinstance(v, str) else v for v in stage.train])
    training = TrainingConfig(
        skip_unused_outputs=layout not in EXPECTED.values(),
        moe_router_bias_update_rate=0.0 if layout.model == SKIPPING else 1e-3,
        attention_backend=backend,
    )
    return TrainConfig(
        run=RunConfig(name="parity"),
        model=MODELS[layout.model],
        training=training,
        data=DataConfig(train=str(corpus), packing_chunk=64),
        noise=NoiseConfig(),
        parallel=layout.parallel,
        logging=LoggingConfig(),
        schedule=ScheduleConfig(context_length=CONTEXT_LENGTH, row_length=ROW_LENGTH, stages={"only": stage}),
        optimizer=OptimizerConfig(
            adam_eps=ADAM_EPS, overlap_grad_reduce=layout.has_overlap, overlap_param_gather=layout.has_overlap
        ),
    )
