"""The parallel layout."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dllm.config.model import ModelConfig
from megatron_dllm.config.rules import check, check_choice, check_positive

CONTEXT_PARALLEL_METHODS = ("gather", "ulysses")
TOKEN_DISPATCHERS = ("auto", "allgather", "alltoall", "flex")
FLEX_BACKENDS = ("deepep", "hybridep")
PRECISIONS = ("fp32", "bf16")
TRAINING_PRECISIONS = (*PRECISIONS, "fp8")
# Rows and columns of a block of numbers with one scale; products in FP8 want multiples of it.
FP8_BLOCK = 128


@dataclass
class ParallelConfig:
    """Sizes of the parallel layout, in megatron-core's names. Data parallel size is what is left."""

    # Ranks that share the matrices of each layer (TP).
    tensor_model_parallel_size: int = 1
    # Ranks that share the layers (PP).
    pipeline_model_parallel_size: int = 1
    # Pieces into which each pipeline rank cuts its layers; null: one.
    virtual_pipeline_model_parallel_size: int | None = None
    # Layers of the first pipeline rank; null: as many as the others.
    num_layers_in_first_pipeline_stage: int | None = None
    # Layers of the last pipeline rank; null: as many as the others.
    num_layers_in_last_pipeline_stage: int | None = None
    # Ranks that share the tokens of each row (CP).
    context_parallel_size: int = 1
    # Ranks that share the experts of each layer (EP).
    expert_model_parallel_size: int = 1
    # Ranks that share the matrices of each expert; null: tensor_model_parallel_size.
    expert_tensor_parallel_size: int | None = None
    # Share the tokens between tensor-parallel ranks where layers work on single tokens.
    sequence_parallel: bool = False
    # How attention sees the tokens of the other context-parallel ranks. gather: every rank gets all keys and values
    # and keeps its queries; ulysses: every rank gets all tokens of some heads.
    context_parallel_method: str = "gather"
    # How tokens reach their experts; auto: alltoall with CUDA (sends only what is needed), allgather without. flex: by
    # the kernels of DeepEP, which reorder and send at once, on GPUs with TransformerEngine.
    moe_token_dispatcher: str = "auto"
    # Whose kernels the flex dispatcher calls: deepep, or hybridep, those of DeepEP's branch of that name.
    moe_flex_dispatcher_backend: str = "deepep"
    # Of weights and activations in forward and backward passes: fp32, bf16, or fp8: bf16 with the products of the
    # layers in FP8 (E4M3, a scale for each block, as Ling was trained), on a GPU with TransformerEngine. The optimizer
    # keeps fp32.
    precision: str = "fp32"
    # none | selective (attention is recomputed) | full (only each layer's input is kept).
    recompute: str = "none"

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the dense weights and one row: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas that read different rows."""
        return world_size // self.model_parallel_size

    def validate_choices(self) -> None:
        """Refuse settings that are wrong for any number of ranks."""
        check_choice("parallel.precision", self.precision, TRAINING_PRECISIONS)
        check_choice("parallel.recompute", self.recompute, ("none", "selective", "full"))
        check_choice("parallel.context_parallel_method", self.context_parallel_method, CONTEXT_PARALLEL_METHODS)
        check_choice("parallel.moe_token_dispatcher", self.moe_token_dispatcher, TOKEN_DISPATCHERS)
        check_choice("parallel.moe_flex_dispatcher_backend", self.moe_flex_dispatcher_backend, FLEX_BACKENDS)
        if self.moe_token_dispatcher == "flex":
            self._validate_flex()

    def _validate_flex(self) -> None:
        check(
            self.precision != "fp32",
            "parallel.moe_token_dispatcher (flex) sends tokens in bf16, and parallel.precision (fp32) is more; use "
            "precision bf16, or the dispatcher auto.",
        )
        ep, etp = self.expert_model_parallel_size, self.expert_tensor_parallel_size or self.tensor_model_parallel_size
        check(
            ep * etp > 1,
            f"parallel.moe_token_dispatcher (flex) needs experts that several ranks share, and expert x expert-tensor "
            f"({ep} x {etp}) is one; use auto.",
        )

    def validate(self, world_size: int, model: ModelConfig) -> None:
        """Refuse layouts that megatron-core would refuse late, or would train wrongly."""
        self.validate_choices()
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
        ):
            check_positive(f"parallel.{name}", getattr(self, name))
        check(
            world_size % self.model_parallel_size == 0,
            f"parallel: tensor x pipeline x context ({self.tensor_model_parallel_size} x "
            f"{self.pipeline_model_parallel_size} x {self.context_parallel_size} = {self.model_parallel_size}) must "
            f"divide the number of ranks ({world_size}); start a multiple of {self.model_parallel_size} ranks.",
        )
        self._validate_tensor(model)
        self._validate_context(model)
        self._validate_pipeline(model)
        self._validate_experts(world_size, model)
        if self.precision == "fp8":
            self._validate_fp8(model)

    def _validate_fp8(self, model: ModelConfig) -> None:
        tp = self.tensor_model_parallel_size
        sizes = {
            "hidden_size": (model.hidden_size, 1),
            "ffn_hidden_size": (model.ffn_hidden_size, tp),
            "num_attention_heads x kv_channels": (model.num_attention_heads * model.kv_channels, tp),
            "moe_ffn_hidden_size": (model.moe_ffn_hidden_size, self.expert_tensor_parallel_size or tp),
            "moe_shared_expert_intermediate_size": (model.moe_shared_expert_intermediate_size, tp),
        }
        for name, (size, parts) in sizes.items():
            check(
                not size or (size // parts) % FP8_BLOCK == 0 or (not model.is_moe and name.startswith("moe")),
                f"parallel.precision (fp8) needs multiples of {FP8_BLOCK}, and model.{name} ({size}) on {parts} tensor "
                f"ranks is {size // parts} each; use bf16, or fewer tensor ranks.",
            )

    def _validate_tensor(self, model: ModelConfig) -> None:
        tp = self.tensor_model_parallel_size
        for name in ("num_attention_heads", "ffn_hidden_size", "vocab_size", "moe_shared_expert_intermediate_size"):
            value = getattr(model, name)
            remedy = f"; extend_vocab makes {-(-value // tp) * tp} rows of them" if name == "vocab_size" else ""
            check(
                value % tp == 0,
                f"parallel.tensor_model_parallel_size ({tp}) must divide model.{name} ({value}){remedy}.",
            )
        groups = model.num_query_groups
        check(
            groups % tp == 0 or tp % groups == 0,
            f"parallel.tensor_model_parallel_size ({tp}) must divide model.num_query_groups ({groups}) "
            "or be a multiple of it.",
        )
        check(
            groups % tp == 0 or not model.qk_layernorm_spans_heads,
            f"parallel.tensor_model_parallel_size ({tp}) must divide model.num_query_groups ({groups}) where one norm "
            "spans all heads (model.qk_layernorm_spans_heads); use a divisor.",
        )
        check(
            not self.sequence_parallel or tp > 1,
            f"parallel.sequence_parallel (true) needs tensor_model_parallel_size above 1 (it is {tp}); "
            "set it to false.",
        )
        check(
            not (model.is_moe and tp > 1) or self.sequence_parallel,
            f"parallel.sequence_parallel (false) must be true for a mixture of experts with "
            f"tensor_model_parallel_size {tp}: megatron-core does not train it otherwise; set it to true.",
        )

    def _validate_context(self, model: ModelConfig) -> None:
        cp, tp = self.context_parallel_size, self.tensor_model_parallel_size
        if self.context_parallel_method != "ulysses" or cp == 1:
            return
        heads, groups = model.num_attention_heads // tp, max(1, model.num_query_groups // tp)
        check(
            heads % cp == 0 and (groups % cp == 0 or cp % groups == 0),
            f"parallel.context_parallel_size ({cp}) must divide the {heads} attention heads of a tensor rank, and "
            f"divide its {groups} query groups or be a multiple of them, with context_parallel_method ulysses; "
            "use another size, or gather.",
        )

    def _validate_pipeline(self, model: ModelConfig) -> None:
        pp = self.pipeline_model_parallel_size
        vpp = self.virtual_pipeline_model_parallel_size
        first, last = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        check(
            vpp is None or (pp > 1 and vpp > 1),
            f"parallel.virtual_pipeline_model_parallel_size ({vpp}) must be above 1 and needs "
            f"pipeline_model_parallel_size above 1 (it is {pp}); set it to null for one stage a rank.",
        )
        for name, number in (("first", first), ("last", last)):
            check(
                number is None or (number > 0 and number % (vpp or 1) == 0),
                f"parallel.num_layers_in_{name}_pipeline_stage ({number}) must be positive and a multiple of the "
                f"virtual stages ({vpp or 1}); set it to null to share the layers out evenly.",
            )
            check(
                number is None or pp > 1,
                f"parallel.num_layers_in_{name}_pipeline_stage ({number}) needs pipeline_model_parallel_size above "
                f"1 (it is {pp}); set it to null.",
            )
        middle = pp - (first is not None) - (last is not None)
        layers = model.num_layers - (first or 0) - (last or 0)
        if middle == 0:
            check(
                layers == 0,
                f"parallel.num_layers_in_first/last_pipeline_stage ({first}, {last}) must add up to "
                f"model.num_layers ({model.num_layers}).",
            )
            check(
                vpp is None,
                f"parallel.num_layers_in_last_pipeline_stage ({last}) must be null with virtual stages ({vpp}) "
                f"where no stage lies between the first ({first} layers) and the last: megatron-core divides by the "
                "number of those; set it to null, and the last stage takes the rest.",
            )
            return
        check(
            layers > 0 and layers % (middle * (vpp or 1)) == 0,
            f"parallel.pipeline_model_parallel_size ({pp}, virtual {vpp or 1}, first {first}, last {last}) must "
            f"divide the layers left for the middle stages ({layers} of {model.num_layers}).",
        )

    def _validate_experts(self, world_size: int, model: ModelConfig) -> None:
        ep = self.expert_model_parallel_size
        tp = self.tensor_model_parallel_size
        if not model.is_moe:
            check(ep == 1, f"parallel.expert_model_parallel_size ({ep}) needs a model with experts; set it to 1.")
            return
        if self.expert_tensor_parallel_size is not None:
            check_positive("parallel.expert_tensor_parallel_size", self.expert_tensor_parallel_size)
        etp = self.expert_tensor_parallel_size or tp
        check(
            model.num_moe_experts % ep == 0,
            f"parallel.expert_model_parallel_size ({ep}) must divide model.num_moe_experts ({model.num_moe_experts}).",
        )
        check(
            ep > 1 or etp == tp,
            f"parallel.expert_tensor_parallel_size ({etp}) must equal tensor_model_parallel_size ({tp}) when "
            "expert_model_parallel_size is 1: megatron-core 0.16 would reduce the experts' gradients over the ranks "
            f"of the dense weights and train wrongly without an error; set it to {tp} or use expert parallelism.",
        )
        check(
            model.moe_ffn_hidden_size % etp == 0,
            f"parallel.expert_tensor_parallel_size ({etp}) must divide model.moe_ffn_hidden_size "
            f"({model.moe_ffn_hidden_size}).",
        )
        expert_ranks = ep * etp * self.pipeline_model_parallel_size
        check(
            world_size % expert_ranks == 0,
            f"parallel: expert x expert-tensor x pipeline ({ep} x {etp} x {self.pipeline_model_parallel_size} = "
            f"{expert_ranks}) must divide the number of ranks ({world_size}); "
            f"start a multiple of {expert_ranks} ranks or use less expert parallelism.",
        )
