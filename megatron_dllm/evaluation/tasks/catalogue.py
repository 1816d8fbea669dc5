"""All tasks, by name."""

from __future__ import annotations

from megatron_dllm.evaluation.tasks.dates import DATES
from megatron_dllm.evaluation.tasks.json_form import JSON_FORM
from megatron_dllm.evaluation.tasks.reversal import REVERSAL
from megatron_dllm.evaluation.tasks.sorting import SORTING
from megatron_dllm.evaluation.tasks.sums import SUMS

TASKS = {task.name: task for task in (SORTING, REVERSAL, DATES, JSON_FORM, SUMS)}
