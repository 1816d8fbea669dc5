"""How SGLang decodes our architectures, where that differs from how a model was trained, and what can be done.

Block size and mask token are constants of SGLang's classes (read in 0.5.23); config.json's values are not read.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dllm.hf.architectures import ARCHITECTURE_CLASS

# Written into exports; SGLang takes it by --dllm-algorithm-config.
DLLM_CONFIG = "dllm_algorithm.yaml"


@dataclass(frozen=True)
class ServedClass:
    """What SGLang's class takes for granted.

    Attributes:
        block_size: tokens denoised together, unless DLLM_CONFIG says otherwise.
        mask_token_id: stands for an unknown token; nothing changes it.
    """

    block_size: int
    mask_token_id: int


SGLANG = {
    "llada2_moe": ServedClass(block_size=32, mask_token_id=156895),
    "sdar_moe": ServedClass(block_size=4, mask_token_id=151669),
    "sdar": ServedClass(block_size=4, mask_token_id=151669),
}

# Of our own class, as long as a file does not say another.
_OWN_BLOCK_SIZE = 32


def usual_block_size(architecture: str) -> int:
    """Tokens that a diffusion class denoises together where config.json does not say."""
    return SGLANG[architecture].block_size if architecture in SGLANG else _OWN_BLOCK_SIZE


def sglang_differences(architecture: str, block_size: int, mask_token_id: int) -> list[str]:
    """Sentences about what SGLang does otherwise than the training did, each with its remedy; none where all agrees.

    Args:
        architecture: of the export, one of SGLANG.
        block_size: of the training.
        mask_token_id: of the model.
    """
    served, name, found = SGLANG[architecture], ARCHITECTURE_CLASS[architecture], []
    if block_size != served.block_size:
        found.append(
            f"block_size ({block_size}) is not the {served.block_size} of SGLang's {name}: start SGLang with "
            f"--dllm-algorithm-config {DLLM_CONFIG} of the export, which sets it."
        )
    if mask_token_id != served.mask_token_id:
        found.append(
            f"mask_token_id ({mask_token_id}) is not the {served.mask_token_id} of SGLang's {name}, which no option of "
            "SGLang overrides: SGLang cannot serve these weights; use transformers or megatron_dllm.generate, or train "
            f"with mask token {served.mask_token_id}."
        )
    return found


def dllm_config(block_size: int) -> str:
    """The file that SGLang takes by --dllm-algorithm-config: the training's block size, decoding's usual threshold."""
    return f"# sglang.launch_server --dllm-algorithm LowConfidence --dllm-algorithm-config {DLLM_CONFIG}\n" + (
        f"block_size: {block_size}\nthreshold: 0.95\n"
    )
