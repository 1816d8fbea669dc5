"""What a model's README says about its use."""

from __future__ import annotations

import pytest

from megatron_dllm.hf.usage import usage


@pytest.mark.parametrize("architecture", ["llada2_moe", "sdar_moe", "sdar"])
def test_a_diffusion_model_has_a_section_for_every_engine(architecture: str) -> None:
    text = usage(architecture, 8, 7, has_chat_template=False)
    for heading in ("### transformers", "### SGLang (", "### megatron_dllm", "## Scores"):
        assert heading in text
    assert "trust_remote_code=True" in text and 'tokenizer("Once upon a time"' in text
    assert "--dllm-algorithm-config dllm_algorithm.yaml" in text and "block_size: 8\nthreshold: 0.95\n```" in text
    assert "**mask_token_id (7) is not the" in text and "**block_size (8) is not the" in text
    assert "`lm_eval --model hf` scores another model" in text


def test_nothing_is_warned_of_where_sglang_agrees() -> None:
    text = usage("llada2_moe", 32, 156895, has_chat_template=True)
    assert "**" not in text.replace("**prompt", "") and "those that SGLang's class has" in text
    assert "apply_chat_template" in text and 'Once upon a time", return' not in text


def test_an_autoregressive_model_is_used_as_such() -> None:
    text = usage("qwen3_moe", 1, 7, has_chat_template=False)
    assert "from left to right" in text and "AutoModelForCausalLM" in text
    assert "trust_remote_code" not in text and "SGLang" not in text and "lm_eval" not in text
    assert "carries none" in usage("bailing_moe", 1, 7, has_chat_template=False)


def test_a_folder_without_tokenizer_says_so() -> None:
    assert "has no tokenizer" in usage("sdar", 4, 7, has_chat_template=False, has_tokenizer=False)


def test_a_class_of_our_own_is_served_by_no_engine() -> None:
    text = usage("megatron_dllm", 8, 7, has_chat_template=False)
    assert "trust_remote_code=True" in text and "### Serving engines\n\nNone has a class" in text
    assert "sglang.launch_server" not in text and "dllm_algorithm" not in text
