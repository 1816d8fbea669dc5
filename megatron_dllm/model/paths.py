"""Which implementation runs: one function of the model, its layout and the device, and the reasons beside the names.

Everything that depends on CUDA, Triton or TransformerEngine is decided here, before anything starts; the rest of the
program reads the answer. Asked with `DeviceFacts.as_cuda()`, it says on any machine what a GPU would run.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_dllm.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_dllm.model.attention.backends import BACKENDS
from megatron_dllm.parallel.device import DeviceFacts

# How to have the packages that are faster.
GET_ENGINE = 'pip install "megatron_dllm[gpu]"'
GET_DEEPSPEED = 'pip install "megatron_dllm[offload]"'
# Of the first card whose products in FP8 take a scale for each block: Hopper.
FP8_CAPABILITY = (9, 0)
# torch's grouped product refuses matrices whose rows are not a multiple of so many bytes.
GROUPED_ROW_BYTES = 16


@dataclass(frozen=True)
class Choice:
    """A name and why it was chosen, for people, and what would be faster there and how to have it."""

    name: str
    reason: str
    faster: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@dataclass(frozen=True)
class Paths:
    """What runs.

    Attributes:
        attention: a key of `BACKENDS`.
        linear: linear layers, te or torch.
        norms: te or torch.
        experts: te_grouped, grouped (one product for all experts), sections (one after the other), sequential
            (megatron-core's own, never chosen), or none in a dense model.
        dispatcher: how tokens reach their experts, alltoall, allgather or flex; none in a dense model.
        fusions: of small operations, compiled or plain. Where they are compiled, torch's Adam is one kernel too.
        optimizer: whose Adam: te, apex or torch; or offloaded, on the host.
        precision: fp32, bf16 or fp8, of the products of the layers.
        collectives: nccl or gloo. An overlapped send of gloo reads its tensor while it is on its way.
    """

    attention: Choice
    linear: Choice
    norms: Choice
    experts: Choice
    dispatcher: Choice
    fusions: Choice
    optimizer: Choice
    precision: Choice
    collectives: Choice

    @property
    def uses_transformer_engine(self) -> bool:
        """Whether layers, norms and experts are TransformerEngine's."""
        return self.linear.name == "te"

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self))


def choose_paths(
    model: ModelConfig,
    parallel: ParallelConfig,
    facts: DeviceFacts,
    attention_backend: str = "auto",
    is_training: bool = False,
    optimizer: OptimizerConfig | None = None,
) -> Paths:
    """What runs on such a device; a pure function.

    Args:
        model: sizes.
        parallel: layout and precision.
        facts: of the device.
        attention_backend: see `config.training.ATTENTION_BACKENDS`.
        is_training: gradients are needed.
        optimizer: of the run; None: the defaults.

    Raises:
        ValueError: what is asked for by name cannot run there, or a package that is installed is the wrong one.
    """
    facts.packages.check(facts.is_cuda)
    has_te = facts.is_cuda and facts.has_transformer_engine
    from_te = Choice("te", "TransformerEngine is installed")
    torchs = Choice("torch", "no CUDA")
    if facts.is_cuda:
        torchs = Choice("torch", "TransformerEngine is not installed, slower", f"TransformerEngine's: {GET_ENGINE}")
    device = "CUDA" if facts.is_cuda else "no CUDA"
    layers = from_te if has_te else torchs
    return Paths(
        attention=_attention(attention_backend, facts, is_training),
        linear=layers,
        norms=layers,
        experts=_experts(model, parallel, facts.is_cuda, has_te),
        dispatcher=_dispatcher(model, parallel, facts, has_te),
        fusions=Choice("compiled" if facts.is_cuda else "plain", device),
        optimizer=_optimizer(optimizer or OptimizerConfig(), facts, layers),
        precision=_precision(parallel, facts, has_te),
        collectives=Choice("nccl" if facts.is_cuda else "gloo", device),
    )


def _attention(name: str, facts: DeviceFacts, is_training: bool) -> Choice:
    if name == "auto":
        if not facts.is_cuda:
            return Choice("shared_prefix", "fastest on CPU")
        if facts.has_triton:
            return Choice("flex", "fastest on CUDA")
        return Choice("chunked", "no Triton here, which flex needs", "flex: a torch whose wheel brings Triton")
    if name not in BACKENDS:
        raise ValueError(f"attention_backend ({name}) is not known; use auto or one of {', '.join(BACKENDS)}.")
    if name == "shared_prefix" and facts.is_cuda:
        raise ValueError(
            "attention_backend (shared_prefix) calls a kernel of the CPU and the tensors are on cuda; "
            "use auto, flex or chunked."
        )
    if name == "flex" and facts.is_cuda and not facts.has_triton:
        raise ValueError("attention_backend (flex) needs Triton and a GPU that it supports; use chunked.")
    if name == "flex" and not facts.is_cuda and is_training:
        raise ValueError("attention_backend (flex) has no backward on the CPU; use shared_prefix or auto.")
    return Choice(name, "asked for by name")


def _optimizer(config: OptimizerConfig, facts: DeviceFacts, layers: Choice) -> Choice:
    """Whose Adam: megatron-core takes TransformerEngine's, else Apex's, else torch's."""
    if config.offload == "cpu":
        if config.offload_adam == "deepspeed" and not facts.packages.has_deepspeed:
            raise ValueError(
                f"optimizer.offload_adam (deepspeed) needs the package deepspeed, which is not installed; "
                f"{GET_DEEPSPEED}, or use torch."
            )
        return Choice("offloaded", f"{config.offload_fraction:.0%} on the host, by {config.offload_adam}'s Adam")
    if config.moments != "fp32":
        if layers.name != "te":
            raise ValueError(
                f"optimizer.moments ({config.moments}) needs the Adam of TransformerEngine on a GPU, which is not "
                f"here; {GET_ENGINE} on a GPU, or use fp32."
            )
        return Choice("te", f"TransformerEngine is installed; moments in {config.moments}")
    if layers.name == "torch" and facts.is_cuda and facts.packages.apex == "nvidia":
        return Choice("apex", "TransformerEngine is not installed, Apex is")
    return layers


def _precision(parallel: ParallelConfig, facts: DeviceFacts, has_te: bool) -> Choice:
    if parallel.precision != "fp8":
        faster = "fp8, on Hopper: parallel.precision=fp8" if has_te and facts.capability >= FP8_CAPABILITY else ""
        return Choice(parallel.precision, "asked for", faster)
    if not has_te:
        raise ValueError(
            "parallel.precision (fp8) needs TransformerEngine and a GPU, which are not both here; "
            f"{GET_ENGINE} on a GPU, or use bf16."
        )
    if facts.capability < FP8_CAPABILITY:
        needed, found = (".".join(map(str, version)) for version in (FP8_CAPABILITY, facts.capability))
        raise ValueError(
            f"parallel.precision (fp8) needs a GPU of compute capability {needed} (Hopper) or later, and this one has "
            f"{found}; use bf16."
        )
    return Choice("fp8", "E4M3 in blocks, through TransformerEngine")


def _experts(model: ModelConfig, parallel: ParallelConfig, is_cuda: bool, has_te: bool) -> Choice:
    if not model.is_moe:
        return Choice("none", "a dense model")
    if has_te:
        return Choice("te_grouped", "TransformerEngine is installed")
    expert_tp = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    inner = model.moe_ffn_hidden_size // expert_tp
    unit = GROUPED_ROW_BYTES // (4 if parallel.precision == "fp32" else 2)
    if inner % unit or model.hidden_size % unit:
        return Choice("sections", f"the grouped product is for sizes that are multiples of {unit}")
    if is_cuda and parallel.precision == "fp32":
        faster = "one grouped product: parallel.precision=bf16"
        return Choice("sections", "the grouped product of CUDA is for bf16", faster)
    return Choice("grouped", "bf16 on CUDA" if is_cuda else "one product for all, whose weights lie together")


def _dispatcher(model: ModelConfig, parallel: ParallelConfig, facts: DeviceFacts, has_te: bool) -> Choice:
    """All-to-all sends a token only where it is needed; all-gather needs no host arrays and suits gloo."""
    if not model.is_moe:
        return Choice("none", "a dense model")
    is_cuda = facts.is_cuda
    if parallel.moe_token_dispatcher == "flex":
        return _flex(parallel.moe_flex_dispatcher_backend, facts, has_te)
    if parallel.moe_token_dispatcher == "auto":
        return Choice("alltoall", "sends only what is needed") if is_cuda else Choice("allgather", "suits gloo")
    expert_tp = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    if parallel.moe_token_dispatcher == "alltoall" and expert_tp > 1 and not is_cuda:
        raise ValueError(
            f"parallel.moe_token_dispatcher (alltoall) needs NCCL with expert_tensor_parallel_size "
            f"{expert_tp}: the tensor ranks gather different numbers of tokens, which gloo cannot; use "
            "allgather or auto."
        )
    return Choice(parallel.moe_token_dispatcher, "asked for by name")


def _flex(backend: str, facts: DeviceFacts, has_te: bool) -> Choice:
    """DeepEP's kernels, in front of TransformerEngine's experts: the pair that megatron-core is made for."""
    if not has_te:
        raise ValueError(
            "parallel.moe_token_dispatcher (flex) needs a GPU and TransformerEngine, which are not both here; "
            f"{GET_ENGINE} on a GPU, or use auto."
        )
    if backend not in facts.packages.deepep:
        branch = "its branch hybrid-ep of " if backend == "hybridep" else ""
        raise ValueError(
            f"parallel.moe_flex_dispatcher_backend ({backend}) needs the package deep_ep, which has no such kernels "
            f"here; build {branch}github.com/deepseek-ai/DeepEP, or use parallel.moe_token_dispatcher=auto."
        )
    return Choice("flex", f"asked for by name, by {backend}'s kernels")
