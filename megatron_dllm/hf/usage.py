"""How an exported folder is used, for its README: by transformers, SGLang and this project, and what not to trust.

The commands are meant to be typed inside the folder.
"""

from __future__ import annotations

from megatron_dllm.hf.architectures import ARCHITECTURE_CLASS, CODE_OF_ARCHITECTURE, DIFFUSION_ARCHITECTURES
from megatron_dllm.hf.serving import DLLM_CONFIG, SGLANG, dllm_config, sglang_differences

_TEXT = 'tokenizer("Once upon a time", return_tensors="pt")'
_CHAT = (
    'tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], add_generation_prompt=True,\n'
    '                                       return_tensors="pt", return_dict=True)'
)
_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto"{trust})
prompt = {prompt}
tokens = model.generate(**prompt, max_new_tokens=128)
print(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
```"""
_TRUST = ", trust_remote_code=True"
_DIFFUSION = """
## Use

{block_size} tokens are denoised together: position i predicts token i, where the input holds the mask token.
A model that is run with `attention_mask=None` lets every token see every other; `generate` decodes block by block.

### transformers (4.57 and 5)

{load}

`generate` also takes batches with their `attention_mask`, `do_sample`, `temperature`, `top_p`, `top_k`, `seed`,
`max_length`, `block_size`, `threshold`, `steps`, `eos_token_id` and a `generation_config`; it refuses other arguments
by name. A text-generation pipeline samples at temperature 0.7 unless it is told `do_sample=False`.

{engines}
### megatron_dllm

    python -m megatron_dllm.generate checkpoint=. prompt="Once upon a time"

## Scores

`lm_eval --model hf` scores another model. It shows this one the whole text, so that each token sees itself and what
follows, and takes the prediction of position i for token i + 1. Its numbers are no likelihoods and compare with
nothing. The bound on the likelihood (ELBO) is what this prints:

    python -m megatron_dllm.evaluate checkpoint.load=. data.validation=PREFIX
"""
_SGLANG = """### SGLang (as 0.5.23 reads a folder)

    python -m sglang.launch_server --model-path . --trust-remote-code \\
        --dllm-algorithm LowConfidence --dllm-algorithm-config {config_name}

`{config_name}`, in this folder:

```yaml
{config}```

{differences}
- LowConfidence ignores temperature, top_p and top_k, and may emit the mask token, which the other two never do.
"""
_NO_ENGINE = """### Serving engines

None has a class for these layers under block diffusion (SGLang 0.5.23, vLLM 0.33.0): `{name}` is code of this folder.
"""
_AUTOREGRESSIVE = """
## Use

The model predicts the next token, from left to right.

{how}
"""
_NO_CODE = """transformers has no class {name}, and this folder carries none: SGLang and vLLM serve it, or
add the modeling files that its authors publish."""


def usage(
    architecture: str, block_size: int, mask_token_id: int, has_chat_template: bool, has_tokenizer: bool = True
) -> str:
    """The sections "Use" and "Scores" of a model's README.

    Args:
        architecture: of the export.
        block_size: of the training.
        mask_token_id: of the model.
        has_chat_template: the tokenizer has one.
        has_tokenizer: there is a tokenizer in the folder.
    """
    trust = _TRUST if architecture in CODE_OF_ARCHITECTURE else ""
    load = _LOAD.format(trust=trust, prompt=_CHAT if has_chat_template else _TEXT)
    if not has_tokenizer:
        load = f"The folder has no tokenizer: put the model's beside it first.\n\n{load}"
    if architecture not in DIFFUSION_ARCHITECTURES:
        name = ARCHITECTURE_CLASS[architecture]
        return _AUTOREGRESSIVE.format(how=_NO_CODE.format(name=name) if architecture == "bailing_moe" else load)
    return _DIFFUSION.format(
        block_size=block_size, load=load, engines=_engines(architecture, block_size, mask_token_id)
    )


def _engines(architecture: str, block_size: int, mask_token_id: int) -> str:
    """How the model is served, and what an engine does otherwise than the training did."""
    if architecture not in SGLANG:
        return _NO_ENGINE.format(name=ARCHITECTURE_CLASS[architecture])
    differences = sglang_differences(architecture, block_size, mask_token_id)
    return _SGLANG.format(
        config_name=DLLM_CONFIG,
        config=dllm_config(block_size),
        differences="\n".join(f"- **{text}**" for text in differences)
        or "- Block size and mask token are those that SGLang's class has.",
    )
