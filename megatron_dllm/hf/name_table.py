"""Which rows of which Hugging Face tensor are which part of which megatron-core tensor.

One table per family of names, read in both directions. Every relation between the two sides is a copy
of whole rows, the interleaved query-key-value matrix included, so the map of a model is a list of
`Piece`s: equal, contiguous runs of elements on both sides. Converting is copying pieces; no piece is
ever computed with, and a round trip is exact because there is nothing in it that could round.

Sizes are written as letters: V vocabulary, H hidden, D head dim, NH heads, NG query groups, I dense
MLP, M expert MLP, 2M its gate and up, S shared expert MLP, E experts. `{l}` is the layer, `{e}` the expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

from megatron_dllm.config import ModelConfig

# How the rows of the HF tensor lie in the megatron tensor.
WHOLE, GATE, UP, QUERY, KEY, VALUE = "whole", "gate", "up", "query", "key", "value"
# How the HF side keeps a layer's experts: each in tensors of its own, all of them stacked in one tensor per projection,
# or stacked with the rows of gate and up in one tensor.
EACH, STACKED, FUSED = "each", "stacked", "fused"

# Families whose tensors carry the same names and shapes.
NAMES_OF_FAMILY = {
    "bailing_moe": "bailing",
    "llada2_moe": "bailing",
    "qwen3_moe": "llama",
    "sdar_moe": "llama",
    "qwen3": "llama",
    "sdar": "llama",
    "qwen2": "llama",
    "llama": "llama",
    "mistral": "llama",
    "olmoe": "llama",
    "megatron_dllm": "llama",
    "mixtral": "mixtral",
}


@dataclass(frozen=True)
class Rule:
    """One line of a table: an HF tensor, the megatron tensor that holds it, and where.

    Attributes:
        hf: name of the HF tensor, with `{l}` and `{e}` to fill in.
        mcore: key of the megatron tensor in a torch_dist checkpoint; experts are stacked along dim 0.
        shape: the HF tensor's shape in letters, e.g. "M H".
        place: where its rows go (WHOLE, GATE, ...).
        when: part of the model it belongs to: model, untied, layer, norms, qkv_bias, dense, moe, bias, shared, expert.
    """

    hf: str
    mcore: str
    shape: str
    place: str = WHOLE
    when: str = "layer"


_LAYER = "decoder.layers.{l}."
_QKV = _LAYER + "self_attention.linear_qkv.weight"
_QKV_BIAS = _LAYER + "self_attention.linear_qkv.bias"
_FC1, _FC2 = _LAYER + "mlp.linear_fc1.weight", _LAYER + "mlp.linear_fc2.weight"
_SHARED_FC1 = _LAYER + "mlp.shared_experts.linear_fc1.weight"
_SHARED_FC2 = _LAYER + "mlp.shared_experts.linear_fc2.weight"
_EXPERTS_FC1 = _LAYER + "mlp.experts.experts.linear_fc1.weight"
_EXPERTS_FC2 = _LAYER + "mlp.experts.experts.linear_fc2.weight"

_GATE_NAME = "model.layers.{l}.mlp.gate.weight"
_COMMON = (
    Rule("model.norm.weight", "decoder.final_layernorm.weight", "H", when="model"),
    Rule("lm_head.weight", "output_layer.weight", "V H", when="untied"),
    Rule("model.layers.{l}.input_layernorm.weight", _LAYER + "self_attention.linear_qkv.layer_norm_weight", "H"),
    Rule("model.layers.{l}.post_attention_layernorm.weight", _LAYER + "mlp.linear_fc1.layer_norm_weight", "H"),
    Rule("model.layers.{l}.mlp.gate_proj.weight", _FC1, "I H", GATE, "dense"),
    Rule("model.layers.{l}.mlp.up_proj.weight", _FC1, "I H", UP, "dense"),
    Rule("model.layers.{l}.mlp.down_proj.weight", _FC2, "H I", when="dense"),
    Rule(_GATE_NAME, _LAYER + "mlp.router.weight", "E H", when="moe"),
)
_EXPERTS = (
    Rule("model.layers.{l}.mlp.experts.{e}.gate_proj.weight", _EXPERTS_FC1, "M H", GATE, "expert"),
    Rule("model.layers.{l}.mlp.experts.{e}.up_proj.weight", _EXPERTS_FC1, "M H", UP, "expert"),
    Rule("model.layers.{l}.mlp.experts.{e}.down_proj.weight", _EXPERTS_FC2, "H M", when="expert"),
)
# dFactory's training form: one tensor per layer and projection, experts along dim 0, no ".weight".
_STACKED_EXPERTS = (
    Rule("model.layers.{l}.mlp.experts.gate_proj", _EXPERTS_FC1, "E M H", GATE, "moe"),
    Rule("model.layers.{l}.mlp.experts.up_proj", _EXPERTS_FC1, "E M H", UP, "moe"),
    Rule("model.layers.{l}.mlp.experts.down_proj", _EXPERTS_FC2, "E H M", when="moe"),
)
# transformers 5 in memory, and on disk with save_original_format=False: an expert's gate rows, then its up rows.
_FUSED_EXPERTS = (
    Rule("model.layers.{l}.mlp.experts.gate_up_proj", _EXPERTS_FC1, "E 2M H", when="moe"),
    Rule("model.layers.{l}.mlp.experts.down_proj", _EXPERTS_FC2, "E H M", when="moe"),
)
_EXPERTS_IN = {EACH: _EXPERTS, STACKED: _STACKED_EXPERTS, FUSED: _FUSED_EXPERTS}
_MIXTRAL_EXPERTS = (
    Rule("model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight", _EXPERTS_FC1, "M H", GATE, "expert"),
    Rule("model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight", _EXPERTS_FC1, "M H", UP, "expert"),
    Rule("model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight", _EXPERTS_FC2, "H M", when="expert"),
)
_BAILING = (
    Rule("model.word_embeddings.weight", "embedding.word_embeddings.weight", "V H", when="model"),
    *_COMMON,
    # One HF tensor: all query heads, then all key heads, then all value heads.
    Rule("model.layers.{l}.attention.query_key_value.weight", _QKV, "QKV H", QUERY),
    Rule("model.layers.{l}.attention.query_key_value.weight", _QKV, "QKV H", KEY),
    Rule("model.layers.{l}.attention.query_key_value.weight", _QKV, "QKV H", VALUE),
    Rule(
        "model.layers.{l}.attention.query_layernorm.weight",
        _LAYER + "self_attention.q_layernorm.weight",
        "D",
        when="norms",
    ),
    Rule(
        "model.layers.{l}.attention.key_layernorm.weight",
        _LAYER + "self_attention.k_layernorm.weight",
        "D",
        when="norms",
    ),
    Rule("model.layers.{l}.attention.dense.weight", _LAYER + "self_attention.linear_proj.weight", "H Q"),
    Rule("model.layers.{l}.mlp.gate.expert_bias", _LAYER + "mlp.router.expert_bias", "E", when="bias"),
    Rule("model.layers.{l}.mlp.shared_experts.gate_proj.weight", _SHARED_FC1, "S H", GATE, "shared"),
    Rule("model.layers.{l}.mlp.shared_experts.up_proj.weight", _SHARED_FC1, "S H", UP, "shared"),
    Rule("model.layers.{l}.mlp.shared_experts.down_proj.weight", _SHARED_FC2, "H S", when="shared"),
)
# Llama's names, which Qwen, Mistral and many others took over and added to.
_LLAMA = (
    Rule("model.embed_tokens.weight", "embedding.word_embeddings.weight", "V H", when="model"),
    *_COMMON,
    Rule("model.layers.{l}.self_attn.q_proj.weight", _QKV, "Q H", QUERY),
    Rule("model.layers.{l}.self_attn.k_proj.weight", _QKV, "K H", KEY),
    Rule("model.layers.{l}.self_attn.v_proj.weight", _QKV, "K H", VALUE),
    Rule("model.layers.{l}.self_attn.q_proj.bias", _QKV_BIAS, "Q", QUERY, "qkv_bias"),
    Rule("model.layers.{l}.self_attn.k_proj.bias", _QKV_BIAS, "K", KEY, "qkv_bias"),
    Rule("model.layers.{l}.self_attn.v_proj.bias", _QKV_BIAS, "K", VALUE, "qkv_bias"),
    Rule("model.layers.{l}.self_attn.q_norm.weight", _LAYER + "self_attention.q_layernorm.weight", "QN", when="norms"),
    Rule("model.layers.{l}.self_attn.k_norm.weight", _LAYER + "self_attention.k_layernorm.weight", "KN", when="norms"),
    Rule("model.layers.{l}.self_attn.o_proj.weight", _LAYER + "self_attention.linear_proj.weight", "H Q"),
)
_MIXTRAL = tuple(
    replace(rule, hf="model.layers.{l}.block_sparse_moe.gate.weight") if rule.hf == _GATE_NAME else rule
    for rule in _LLAMA
)
# The rules of every way to keep experts. Mixtral has names of its own for them, until transformers 5 fuses them.
TABLES = {
    "bailing": {form: _BAILING + experts for form, experts in _EXPERTS_IN.items()},
    "llama": {form: _LLAMA + experts for form, experts in _EXPERTS_IN.items()},
    "mixtral": {form: _LLAMA + experts for form, experts in _EXPERTS_IN.items()} | {EACH: _MIXTRAL + _MIXTRAL_EXPERTS},
}


@dataclass(frozen=True)
class Piece:
    """A run of elements that lies contiguously in both formats.

    Attributes:
        hf_name: HF tensor, flat from `hf_start` (in elements).
        mcore_key: megatron tensor, the box at `offsets` of size `sizes`.
    """

    hf_name: str
    hf_start: int
    mcore_key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Elements of the run."""
        return prod(self.sizes)


@dataclass(frozen=True)
class WeightMap:
    """All tensors of a model on both sides, in the order of the layers.

    Attributes:
        hf_shapes: HF tensor names and shapes.
        mcore_shapes: torch_dist keys and shapes.
        pieces: what lies where; together they cover every element of both sides exactly once.
    """

    hf_shapes: dict[str, tuple[int, ...]]
    mcore_shapes: dict[str, tuple[int, ...]]
    pieces: tuple[Piece, ...]


def experts_form(hf_names: Iterable[str]) -> str:
    """How a folder with these tensors keeps its experts: EACH, STACKED or FUSED; EACH where it has none."""
    forms = {"gate_proj": STACKED, "gate_up_proj": FUSED}
    for name in hf_names:
        prefix, _, last = name.rpartition(".")
        if last in forms and prefix.endswith(".mlp.experts"):
            return forms[last]
    return EACH


def weight_map(model: ModelConfig, architecture: str | None = None, experts: str = EACH) -> WeightMap:
    """Build the map of one model.

    Args:
        model: the sizes.
        architecture: family whose HF names are used; None: the model's own.
        experts: how the HF side keeps them: EACH, STACKED or FUSED.
    """
    letters = _letters(model)
    hf_shapes: dict[str, tuple[int, ...]] = {}
    mcore_shapes: dict[str, tuple[int, ...]] = {}
    pieces: list[Piece] = []
    table = TABLES[NAMES_OF_FAMILY[architecture or model.family]][experts]
    for rule, layer, expert in _instances(model, table):
        hf_name = rule.hf.format(l=layer, e=expert)
        hf_shapes[hf_name] = tuple(letters[letter] for letter in rule.shape.split())
        key = rule.mcore.format(l=layer)
        mcore_shapes[key] = _mcore_shape(rule, letters)
        pieces += _place(rule, hf_name, key, expert, letters)
    return WeightMap(hf_shapes, mcore_shapes, tuple(pieces))


def key_aliases(model: ModelConfig) -> dict[str, str]:
    """Keys under which the TransformerEngine spec stores what the local spec stores elsewhere.

    megatron-core's local spec writes the norm before a mixture of experts under the name of the norm
    that TransformerEngine fuses into a dense MLP; the TransformerEngine spec does not fuse it there.

    Returns:
        {local key: TransformerEngine key}.
    """
    if not model.is_moe:
        return {}
    prefixes = [f"decoder.layers.{layer}." for layer in range(model.num_dense_layers, model.num_layers)]
    return {prefix + "mlp.linear_fc1.layer_norm_weight": prefix + "pre_mlp_layernorm.weight" for prefix in prefixes}


def extra_state_keys(model: ModelConfig) -> Iterator[str]:
    """Keys of the (always empty) `_extra_state` objects that megatron-core's linear layers ask for."""
    for layer in range(model.num_layers):
        prefix = f"decoder.layers.{layer}."
        names = ["self_attention.linear_proj", "self_attention.linear_qkv"]
        if not _is_moe_layer(model, layer):
            names += ["mlp.linear_fc1", "mlp.linear_fc2"]
        elif model.moe_shared_expert_intermediate_size:
            names += ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
        yield from (f"{prefix}{name}._extra_state/shard_0_1" for name in names)
        if _is_moe_layer(model, layer):
            for expert in range(model.num_moe_experts):
                for name in ("linear_fc1", "linear_fc2"):
                    yield f"{prefix}mlp.experts.experts.{name}._extra_state/shard_{expert}_{model.num_moe_experts}"


def is_fp32(hf_or_mcore_name: str) -> bool:
    """Whether a tensor stays fp32 whatever the model's dtype is: with a rounded bias, tokens go to other experts."""
    return hf_or_mcore_name.endswith("expert_bias")


def _is_moe_layer(model: ModelConfig, layer: int) -> bool:
    return model.is_moe and layer >= model.num_dense_layers


def _letters(model: ModelConfig) -> dict[str, int]:
    head_dim, heads, groups = model.kv_channels, model.num_attention_heads, model.num_query_groups
    return {
        "V": model.vocab_size,
        "H": model.hidden_size,
        "D": head_dim,
        "NH": heads,
        "NG": groups,
        "Q": heads * head_dim,
        "K": groups * head_dim,
        "QKV": (heads + 2 * groups) * head_dim,
        "QN": heads * head_dim if model.qk_layernorm_spans_heads else head_dim,
        "KN": groups * head_dim if model.qk_layernorm_spans_heads else head_dim,
        "I": model.ffn_hidden_size,
        "M": model.moe_ffn_hidden_size,
        "2M": 2 * model.moe_ffn_hidden_size,
        "S": model.moe_shared_expert_intermediate_size,
        "E": model.num_moe_experts,
    }


def _applies(rule: Rule, model: ModelConfig, layer: int) -> bool:
    is_moe = _is_moe_layer(model, layer)
    return {
        "layer": True,
        "norms": model.qk_layernorm,
        "qkv_bias": model.add_qkv_bias,
        "dense": not is_moe,
        "moe": is_moe,
        "expert": is_moe,
        "bias": is_moe and model.moe_router_enable_expert_bias,
        "shared": is_moe and model.moe_shared_expert_intermediate_size > 0,
    }[rule.when]


def _instances(model: ModelConfig, table: tuple[Rule, ...]) -> Iterator[tuple[Rule, int, int]]:
    """Rules with their layer and expert, in the order of the forward pass: embedding, layers, head."""
    whole_model = [
        rule for rule in table if rule.when == "model" or (rule.when == "untied" and not model.tie_word_embeddings)
    ]
    yield from ((rule, 0, 0) for rule in whole_model if rule.mcore.startswith("embedding."))
    layer_rules = [rule for rule in table if rule.when not in ("model", "untied")]
    for layer in range(model.num_layers):
        rules = [rule for rule in layer_rules if _applies(rule, model, layer)]
        yield from ((rule, layer, 0) for rule in rules if rule.when != "expert")
        expert_rules = [rule for rule in rules if rule.when == "expert"]
        yield from ((rule, layer, expert) for expert in range(model.num_moe_experts) for rule in expert_rules)
    yield from ((rule, 0, 0) for rule in whole_model if not rule.mcore.startswith("embedding."))


def _mcore_shape(rule: Rule, letters: dict[str, int]) -> tuple[int, ...]:
    shape = [letters[letter] for letter in rule.shape.split()]
    if rule.place in (GATE, UP):
        shape[-2] *= 2
    if rule.place in (QUERY, KEY, VALUE):
        shape[0] = letters["QKV"]
    return (letters["E"], *shape) if rule.when == "expert" else tuple(shape)


def _place(rule: Rule, hf_name: str, key: str, expert: int, letters: dict[str, int]) -> Iterator[Piece]:
    """Pieces of one HF tensor."""
    shape = tuple(letters[letter] for letter in rule.shape.split())
    if rule.place in (QUERY, KEY, VALUE):
        yield from _place_attention(rule, hf_name, key, letters)
        return
    experts = range(shape[0]) if len(shape) == 3 else (expert,)
    matrix = shape[1:] if len(shape) == 3 else shape
    row = matrix[0] if rule.place == UP else 0
    for number, index in enumerate(experts):
        start = number * prod(matrix)
        is_stacked = rule.when == "expert" or len(shape) == 3
        offsets = (row,) + (0,) * (len(matrix) - 1)
        yield Piece(
            hf_name, start, key, (index, *offsets) if is_stacked else offsets, (1, *matrix) if is_stacked else matrix
        )


def _place_attention(rule: Rule, hf_name: str, key: str, letters: dict[str, int]) -> Iterator[Piece]:
    """Megatron keeps, for every query group, its query heads, its key head and its value head together."""
    head_dim, groups = letters["D"], letters["NG"]
    row = tuple(letters[letter] for letter in rule.shape.split()[1:])  # of a bias: one number
    heads_per_group = letters["NH"] // groups
    heads = heads_per_group if rule.place == QUERY else 1
    first_head = {QUERY: 0, KEY: heads_per_group, VALUE: heads_per_group + 1}[rule.place]
    # Where this part begins when the HF side keeps query, key and value in one tensor.
    base = {QUERY: 0, KEY: letters["NH"], VALUE: letters["NH"] + groups}[rule.place] if rule.shape == "QKV H" else 0
    for group in range(groups):
        hf_row = (base + group * heads) * head_dim
        mcore_row = (group * (heads_per_group + 2) + first_head) * head_dim
        offsets = (mcore_row,) + (0,) * len(row)
        yield Piece(hf_name, hf_row * prod(row), key, offsets, (heads * head_dim, *row))
