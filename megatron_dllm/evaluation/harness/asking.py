"""Tasks of lm-evaluation-harness put to a model, in the way that a configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from megatron_dllm.config.asking import AskingConfig
from megatron_dllm.run.place import is_rank_zero


def ask(
    model: LM,
    tasks: Sequence[Any],
    config: AskingConfig,
    *,
    limit: float | None,
    bootstrap_iters: int = 0,
    log_samples: bool = True,
) -> dict[str, Any] | None:
    """What `simple_evaluate` returns for loaded tasks, on the rank 0 of each node; elsewhere none (a collective).

    Args:
        model: asked on every rank alike.
        tasks: from `load_tasks`; they may be asked again.
        config: examples, templates.
        limit: questions of each task; below 1 a share of them; None: all.
        bootstrap_iters: resamplings for the errors of metrics that have no formula.
        log_samples: keep every question with what came of it.
    """
    found: dict[str, Any] | None = simple_evaluate(
        model=model,
        tasks=list(tasks),
        # Without one, the harness would look through all of its own tasks on every rank.
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=config.num_fewshot,
        limit=limit,
        bootstrap_iters=bootstrap_iters if is_rank_zero() else 0,
        log_samples=log_samples,
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        fewshot_random_seed=config.fewshot_seed,
        confirm_run_unsafe_code=config.confirm_unsafe_code,
    )
    return found
