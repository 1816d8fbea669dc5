"""Steps of other programs that were published, as the planner sees them: model, layout, rows, and tokens a second.

What the planner does not know is put into the hardware of a row: products in FP8 count 1.45 times those in bf16, and a
dispatcher that sends a token once to each node takes nodes / K of the network's traffic. Latent attention
(DeepSeek-V3, Moonlight) is approximated by grouped queries with as many weights, and numbers of layers that a
pipeline does not divide are rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_dllm.compose import compose_train_config
from megatron_dllm.config import ModelConfig, OptimizerConfig, ParallelConfig, StageConfig, TrainingConfig
from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.config.cluster import ClusterConfig
from megatron_dllm.config.hardware import HardwareConfig
from megatron_dllm.planning.calibration import Observation, machine_of
from megatron_dllm.planning.layout_plan import Candidate, Setting
from megatron_dllm.planning.rows import RowContent
from megatron_dllm.planning.work import StageWork

FP8_PRODUCTS = 1.45
H100 = HardwareConfig(
    memory_gb=80, bf16_tflops=989, memory_gb_per_s=3350, node_gb_per_s=450, network_gb_per_s=50, price_per_hour=1
)
_TOKENS = dict(mask_token_id=0, eos_token_id=1, pad_token_id=1, max_position_embeddings=131072)


def _dense(layers: int, hidden: int, heads: int, inner: int) -> ModelConfig:
    """A Llama 3: eight query groups of 128 features."""
    return ModelConfig(
        **_TOKENS,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=inner,
        num_attention_heads=heads,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=128256,
        qk_layernorm=False,
    )


def _moe(**sizes: int) -> ModelConfig:
    return ModelConfig(**{**_TOKENS, "ffn_hidden_size": sizes["hidden_size"], **sizes})


def _recipe(name: str) -> ModelConfig:
    return compose_train_config([f"model={name}", "run.name=x", "data.train=x"]).model


def _models() -> dict[str, ModelConfig]:
    gpt_oss = dict(num_layers=36, hidden_size=2880, num_attention_heads=64, num_query_groups=8, kv_channels=64)
    qwen3 = dict(num_layers=96, hidden_size=4096, num_attention_heads=64, num_query_groups=4, kv_channels=128)
    deepseek = dict(num_layers=64, hidden_size=7168, num_attention_heads=128, num_query_groups=4, kv_channels=96)
    moonlight = dict(num_layers=27, hidden_size=2048, num_attention_heads=16, num_query_groups=8, kv_channels=128)
    return {
        "Qwen3-30B": _recipe("qwen3_30b_a3b"),
        "Ling-mini": _recipe("ling_mini"),
        "GPT-OSS-120B": _moe(
            **gpt_oss, vocab_size=201088, num_moe_experts=128, moe_router_topk=4, moe_ffn_hidden_size=2880
        ),
        "Qwen3-235B": _moe(
            **qwen3, vocab_size=151936, num_moe_experts=128, moe_router_topk=8, moe_ffn_hidden_size=1536
        ),
        "DeepSeek-V3": _moe(
            **deepseek,
            vocab_size=129280,
            num_dense_layers=3,
            ffn_hidden_size=18432,
            num_moe_experts=256,
            moe_router_topk=8,
            moe_ffn_hidden_size=2048,
            moe_shared_expert_intermediate_size=2048,
        ),
        "Moonlight-16B": _moe(
            **moonlight,
            vocab_size=163840,
            num_dense_layers=1,
            ffn_hidden_size=11264,
            num_moe_experts=64,
            moe_router_topk=6,
            moe_ffn_hidden_size=1408,
            moe_shared_expert_intermediate_size=2816,
        ),
        "Llama3-8B": _dense(32, 4096, 32, 14336),
        "Llama3-70B": _dense(80, 8192, 64, 28672),
        "Llama3-405B": _dense(128, 16384, 128, 53248),
    }


@dataclass(frozen=True)
class Published:
    """A published run.

    Attributes:
        model: a key of the models here.
        gpus: number of H100.
        layout: sizes that are not 1: tp, pp, vp, cp, ep.
        row: tokens of a row.
        batch: rows of a step.
        tokens_per_second: of one GPU.
        source: where it was published.
        micro_batch: rows.
        is_fp8: products in FP8.
        sends_once: a token is sent once to each node.
        is_fitted: the benchmark fits the constants to it.
    """

    model: str
    gpus: int
    layout: dict[str, int]
    row: int
    batch: int
    tokens_per_second: float
    source: str
    micro_batch: int = 1
    is_fp8: bool = False
    sends_once: bool = False
    is_fitted: bool = False

    @property
    def name(self) -> str:
        """Model, GPUs and layout in words."""
        sizes = " ".join(f"{key.upper()}{size}" for key, size in self.layout.items())
        kinds = f"{', FP8' if self.is_fp8 else ''}{', sends once' if self.sends_once else ''}"
        return f"{self.model}, {self.gpus} x H100, {sizes or 'DP'}, batch {self.batch}{kinds}"


_EP32, _EP64 = ({"tp": 2, "pp": 8, "vp": 4, "ep": ep} for ep in (32, 64))
_EXPERTS = "Megatron-Bridge, skills on expert parallelism and hardware"
_SUMMARY = "Megatron-Bridge, performance summaries 25.09 to 26.04"
ROWS = (
    Published("Qwen3-30B", 16, {"ep": 16}, 4096, 1024, 10607, _EXPERTS, sends_once=True, is_fitted=True),
    Published("Qwen3-30B", 16, {"ep": 16}, 4096, 1024, 12488, _EXPERTS, sends_once=True, is_fitted=True),
    Published("Qwen3-30B", 16, {"ep": 16}, 4096, 1024, 13011, _EXPERTS, sends_once=True),
    Published("Qwen3-30B", 16, {"ep": 16}, 4096, 1024, 6355, _EXPERTS, is_fitted=True),
    Published("Qwen3-30B", 16, {"ep": 16}, 4096, 1024, 8373, _EXPERTS),
    Published("GPT-OSS-120B", 64, {"pp": 4, "ep": 8}, 4096, 1280, 5993, _SUMMARY, is_fitted=True),
    Published("GPT-OSS-120B", 64, {"pp": 4, "ep": 8}, 4096, 512, 5630, _SUMMARY, micro_batch=4),
    Published("Qwen3-30B", 16, {"ep": 16}, 4096, 1024, 8960, _SUMMARY, is_fp8=True, sends_once=True, is_fitted=True),
    Published("Qwen3-30B", 16, {"pp": 2, "vp": 12, "ep": 8}, 4096, 1024, 9058, _SUMMARY, is_fp8=True),
    Published("Qwen3-235B", 256, _EP32, 4096, 8192, 1712, _SUMMARY, is_fp8=True, sends_once=True, is_fitted=True),
    Published("Qwen3-235B", 256, _EP32, 4096, 2048, 1575, _SUMMARY, is_fp8=True, sends_once=True),
    Published("DeepSeek-V3", 1024, _EP64, 4096, 8192, 1297, _SUMMARY, is_fp8=True, sends_once=True),
    Published("Ling-mini", 8, {"ep": 8}, 4096, 128, 16037, "Ling-V2, README", is_fp8=True),
    Published("Ling-mini", 16, {"ep": 8}, 4096, 256, 19204, "Ling-V2, README", is_fp8=True, is_fitted=True),
    Published("Ling-mini", 32, {"ep": 8}, 4096, 512, 19108, "Ling-V2, README", is_fp8=True),
    Published("Moonlight-16B", 8, {"tp": 2, "ep": 8}, 4096, 4, 4480, _EXPERTS),
    Published("Llama3-8B", 8, {}, 8192, 128, 14451, _SUMMARY, is_fp8=True, is_fitted=True),
    Published("Llama3-70B", 64, {"tp": 4, "pp": 8, "vp": 5}, 8192, 256, 1664, _SUMMARY, is_fp8=True, is_fitted=True),
    Published("Llama3-405B", 1024, {"tp": 8, "pp": 8, "vp": 8, "cp": 2}, 8192, 1536, 328, _SUMMARY, is_fp8=True),
)


def observations(assumptions: AssumptionsConfig) -> list[Observation]:
    """The published rows as measured steps."""
    models = _models()
    return [_observation(row, models[row.model], assumptions) for row in ROWS]


def _observation(row: Published, model: ModelConfig, assumptions: AssumptionsConfig) -> Observation:
    sizes = row.layout
    tp, ep = sizes.get("tp", 1), sizes.get("ep", 1)
    layout = ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        pipeline_model_parallel_size=sizes.get("pp", 1),
        virtual_pipeline_model_parallel_size=sizes.get("vp"),
        context_parallel_size=sizes.get("cp", 1),
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1 if model.is_moe else None,
        precision="bf16",
    )
    hardware = H100
    if row.is_fp8:
        hardware = replace(hardware, bf16_tflops=hardware.bf16_tflops * FP8_PRODUCTS)
    if row.sends_once:
        nodes = -(-ep // 8)
        hardware = replace(
            hardware, network_gb_per_s=hardware.network_gb_per_s * max(model.moe_router_topk / nodes, 1.0)
        )
    machine = machine_of(ClusterConfig(hardware=hardware), assumptions)
    optimizer = OptimizerConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    stage = StageConfig(
        objective="ar", num_tokens=1, global_batch_size=row.batch, micro_batch_size=row.micro_batch, learning_rate=1.0
    )
    content = RowContent(row.row, row.row, row.row, row.row * (row.row + 1) / 2, "published")
    seconds = row.batch * row.row / (row.tokens_per_second * row.gpus)
    return Observation(
        row.name,
        Setting(model, TrainingConfig(), optimizer, machine),
        StageWork("ar", stage, content, None),
        Candidate(layout, row.gpus),
        seconds,
    )
