"""Keys of config.json that we know; in a family whose class is transformers' own, another one is refused.

A key that nobody here has heard of may be what makes a model another one (a clip of queries, a factor on residuals).
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


def refuse_unknown_keys(reader: ConfigValues, family: str) -> None:
    """Refuse a setting that may change what the model computes.

    Args:
        reader: of config.json.
        family: of the model; one whose code comes with the folder may have keys of its own.

    Raises:
        ValueError: naming the key and its value.
    """
    table = FAMILIES.get(family)
    if table is None or not table.is_strict:
        return
    settings = table.settings + table.settings_of_experts
    own = {common_name(key) for key in (*table.stated, *table.written, *(setting.key for setting in settings))}
    for key, value in reader.values.items():
        if key not in _KNOWN | own:
            what = (
                "names code of the folder's own" if key == "auto_map" else "is no key that a model of this family has"
            )
            raise ValueError(
                f"{reader.source}: {key} ({brief(value)}) {what}, so the model may be another than a {family}; "
                "remove the key if it changes nothing."
            )
