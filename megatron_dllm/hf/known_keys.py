"""Keys of config.json that we know; another one is refused.

A key that nobody here has heard of may be what makes a model another one (a clip of queries, a factor on residuals), in
files of transformers' own classes and in those of models that bring their code.
"""

from __future__ import annotations

from megatron_dllm.hf.config_meaning import BOOKKEEPING, common_name
from megatron_dllm.hf.config_sizes import MUST_BE
from megatron_dllm.hf.config_values import ConfigValues, brief
from megatron_dllm.hf.families import FAMILIES

# Read for every family.
_READ = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "rotary_dim",
    "tie_word_embeddings",
    "mask_token_id",
    "eos_token_id",
    "pad_token_id",
    "layer_types",
    "block_length",
    "training_context_length",
)
# Without effect on a logit: tokens, how text is generated, what other tasks and other versions of transformers kept.
_WITHOUT_EFFECT = (
    "bos_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "tokenizer_class",
    "max_sequence_length",
    "model_max_length",
    "is_llama_config",
    "transformers.js_config",
    "pretraining_tp",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "router_jitter_noise",
    "task_specific_params",
    "problem_type",
    "finetuning_task",
    "id2label",
    "label2id",
    "num_labels",
    "prefix",
    "is_decoder",
    "is_encoder_decoder",
    "add_cross_attention",
    "tie_encoder_decoder",
    "cross_attention_hidden_size",
    "chunk_size_feed_forward",
    "pruned_heads",
    "torchscript",
    "use_bfloat16",
    "tf_legacy_loss",
    "unsloth_version",
    "unsloth_fixed",
    "max_length",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "num_return_sequences",
    "output_scores",
    "return_dict_in_generate",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
)
_KNOWN = frozenset({*_READ, *_WITHOUT_EFFECT, *BOOKKEEPING, *MUST_BE})

# Ling and LLaDA2 have no table in families.py; these are read in config_sizes.py.
_BAILING = (
    "first_k_dense_replace",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "score_function",
    "moe_router_enable_expert_bias",
    "use_qk_norm",
    # Scales the loss of layers that predict further tokens, which a model that we read does not have.
    "mtp_loss_scaling_factor",
)
# Tokens with which LLaDA2.2 inserts and deletes while it decodes; a forward pass knows no difference.
_LLADA2 = ("delete_token_id", "split_token_id")
# How SDAR's files say that it is to be trained.
_SDAR = ("fuse_cross_entropy", "micro_forward", "skip_checkpoint", "debug")
# Keys of families that bring their code. Which code that is, auto_map says; we compute without it, and `architectures`
# has been compared with the class that we know.
_BESIDE_CODE = {
    "bailing_moe": ("auto_map", *_BAILING),
    "llada2_moe": ("auto_map", *_BAILING, *_LLADA2),
    "sdar": ("auto_map", *_SDAR),
    "sdar_moe": ("auto_map", *_SDAR),
    "megatron_dllm": ("auto_map",),
}


def refuse_unknown_keys(reader: ConfigValues, family: str) -> None:
    """Refuse a setting that may change what the model computes.

    Args:
        reader: of config.json.
        family: of the model.

    Raises:
        ValueError: naming the key and its value.
    """
    known = _KNOWN | _keys_of(family)
    for key, value in reader.values.items():
        if key not in known:
            what = (
                "names code of the folder's own" if key == "auto_map" else "is no key that a model of this family has"
            )
            raise ValueError(
                f"{reader.source}: {key} ({brief(value)}) {what}, so the model may be another than a {family}; "
                "remove the key if it changes nothing."
            )


def _keys_of(family: str) -> set[str]:
    """Our names of the keys that belong to a family alone."""
    keys = {*_BESIDE_CODE.get(family, ())}
    if (table := FAMILIES.get(family)) is not None:
        settings = table.settings + table.settings_of_experts
        keys |= {*table.stated, *table.written, *(setting.key for setting in settings)}
    return {common_name(key) for key in keys}
