"""What came of a run of lm-evaluation-harness, and everything that decides it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_dllm.config.harness import HarnessConfig
from megatron_dllm.data.tokenizer import tokenizer_fingerprint
from megatron_dllm.diffusion.generation import Generation
from megatron_dllm.evaluation.harness.model import Scored
from megatron_dllm.evaluation.likelihood import decide
from megatron_dllm.evaluation.request import Request
from megatron_dllm.evaluation.task_results import FORMAT
from megatron_dllm.hf.tokenizer_folder import chat_template_fingerprint
from megatron_dllm.run.code_version import commit

# Of what the harness returns, what says how a task was asked and what came of it.
_KEPT = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


def decisions(scored: Iterable[Scored]) -> dict[str, dict[str, Any]]:
    """Of each task with choices: its questions, and those whose two best choices are closer than two standard errors.

    The comparison is that of the metric acc, by sums; acc_norm divides them first.
    """
    questions: dict[tuple[str, int], list[Scored]] = defaultdict(list)
    for choice in scored:
        if choice.has_context:
            questions[choice.task, choice.question].append(choice)
    found: dict[str, dict[str, Any]] = {}
    for (task, question), choices in questions.items():
        if len(choices) < 2:
            continue
        of_task = found.setdefault(task, {"num_questions": 0, "num_unsure": 0, "unsure": []})
        of_task["num_questions"] += 1
        decision = decide([choice.likelihood for choice in choices])
        if not decision.is_sure:
            of_task["num_unsure"] += 1
            of_task["unsure"].append({"question": question, "gap": decision.gap, "error": decision.standard_error})
    return found


def settings_of(request: Request, config: HarnessConfig) -> dict[str, Any]:
    """Everything that decides the numbers, beside the tasks themselves.

    Args:
        request: what was loaded.
        config: of the run.
    """
    assert config.data.tokenizer is not None, "the tasks are text"
    is_ar = not request.weights.is_diffusion
    return {
        "weights": str(request.weights.folder),
        "code": commit(),
        "lm_eval": version("lm_eval"),
        "precision": config.parallel.precision,
        "block_size": None if is_ar else int(request.names[0]),
        "context_length": config.schedule.context_length,
        "likelihood": "exact, autoregressive" if is_ar else asdict(config.likelihood),
        "rolling": "document behind the end-of-text token" if is_ar else "document and end-of-text token, as evaluate",
        "decoding": None if is_ar else asdict(config.decoding),
        "tokenizer": tokenizer_fingerprint(config.data.tokenizer),
        "chat_template": chat_template_fingerprint(Path(config.data.tokenizer)) if config.apply_chat_template else None,
        "fewshot_as_multiturn": config.fewshot_as_multiturn,
        "system_instruction": config.system_instruction,
        "num_fewshot": config.num_fewshot,
        "fewshot_seed": config.fewshot_seed,
        "limit": config.limit,
    }


def texts_of(written: Iterable[tuple[str, Generation]]) -> dict[str, dict[str, float]]:
    """Of each task with texts: how many, their tokens and passes, and the tokens of a pass."""
    by_task: dict[str, list[Generation]] = defaultdict(list)
    for task, generation in written:
        by_task[task].append(generation)
    return {task: _counts(texts) for task, texts in by_task.items()}


def _counts(texts: Sequence[Generation]) -> dict[str, float]:
    num_tokens = sum(len(text.generated_ids) for text in texts)
    num_denoising = sum(text.num_denoising_forwards for text in texts)
    num_commits = sum(text.num_commit_forwards for text in texts)
    return {
        "num_texts": len(texts),
        "num_tokens": num_tokens,
        "num_denoising_forwards": num_denoising,
        "num_commit_forwards": num_commits,
        "tokens_per_forward": num_tokens / num_denoising,
        "tokens_per_forward_with_commits": num_tokens / (num_denoising + num_commits),
    }


def results_of(
    found: dict[str, Any], scored: Iterable[Scored], written: Iterable[tuple[str, Generation]], settings: dict[str, Any]
) -> dict[str, Any]:
    """The file of results.

    Args:
        found: what `lm_eval.simple_evaluate` returned.
        scored: every choice.
        written: every text, with its task.
        settings: from `settings_of`.
    """
    kept = {name: found[name] for name in _KEPT if name in found}
    content = {"format": FORMAT, "settings": settings, **kept, "decisions": decisions(scored)}
    content["texts"] = texts_of(written)
    if "samples" in found:
        content["samples"] = found["samples"]
    return content
