"""What SGLang does otherwise than the training did."""

from __future__ import annotations

import pytest
from yaml import safe_load

from megatron_dllm.hf.architectures import DIFFUSION_ARCHITECTURES
from megatron_dllm.hf.serving import DLLM_CONFIG, SGLANG, dllm_config, sglang_differences, usual_block_size

# As SGLang 0.5.23 has them in dllm/config.py.
EXPECTED = {"llada2_moe": (32, 156895), "sdar_moe": (4, 151669), "sdar": (4, 151669)}


@pytest.mark.parametrize("architecture", SGLANG)
def test_nothing_is_said_where_all_agrees(architecture: str) -> None:
    block_size, mask_token_id = EXPECTED[architecture]
    assert (SGLANG[architecture].block_size, SGLANG[architecture].mask_token_id) == (block_size, mask_token_id)
    assert sglang_differences(architecture, block_size, mask_token_id) == []


def test_each_difference_is_a_sentence_with_its_remedy() -> None:
    block, mask = sglang_differences("llada2_moe", 16, 7)
    assert "block_size (16) is not the 32" in block and f"--dllm-algorithm-config {DLLM_CONFIG}" in block
    assert "mask_token_id (7) is not the 156895" in mask and "cannot serve" in mask
    assert len(sglang_differences("sdar", 4, 7)) == len(sglang_differences("sdar", 8, 151669)) == 1


def test_the_file_for_sglang_sets_the_block_size() -> None:
    assert safe_load(dllm_config(16)) == {"block_size": 16, "threshold": 0.95}


def test_every_diffusion_class_has_a_usual_block_size() -> None:
    sizes = {architecture: usual_block_size(architecture) for architecture in DIFFUSION_ARCHITECTURES}
    assert sizes == {"llada2_moe": 32, "sdar_moe": 4, "sdar": 4, "megatron_dllm": 32}
