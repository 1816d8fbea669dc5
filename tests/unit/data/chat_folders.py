"""Tokenizer folders with chat templates, small enough to be made in a test."""

from __future__ import annotations

from pathlib import Path

from megatron_dllm.data.stdlib_corpus import save_tokenizer, train_tokenizer

# ChatML with tools, as Qwen2.5 writes them: tool results are turns of the user, those in a row share one.
CHATML = """{%- if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}
{{- '<|im_end|>\n' }}{%- endif %}{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{- '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Reasoning is shown in the answer to the last question alone, as Qwen3's and Ling's templates do.
REASONING = """{%- set ns = namespace(last=0) %}{%- for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n' }}{% endif %}
{{- m.content + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# The template says what the assistant says: not the name before it, and without the end of the turn.
GENERATION = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}
{{- 'Bot: ' }}{%- generation %}{{- m.content }}{%- endgeneration %}{%- else %}{{- m.content }}{% endif %}
{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Nothing lies between the beginning of an answer and its text.
MERGING = """{%- for m in messages %}{{- '<|im_start|>' + ('ans' if m.role == 'assistant' else 'q') + m.content }}
{{- '<|im_end|>' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>ans' }}{% endif %}"""


def write_chat_tokenizer(folder: Path, template: str | None = CHATML) -> str:
    """A byte-level tokenizer with ChatML's two tokens, in which "answer" is one token; returns the folder."""
    tokenizer = train_tokenizer(["answer the answer\n" * 20], 300)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    save_tokenizer(tokenizer, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return str(folder)
