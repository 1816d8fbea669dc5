"""Whether lm-evaluation-harness is there; asked before anything of it is imported."""

from __future__ import annotations

from importlib.util import find_spec

from megatron_dllm.config.rules import check


def check_installed() -> None:
    """Refuse to go on without the package.

    Raises:
        ValueError: naming the extra that brings it.
    """
    check(
        find_spec("lm_eval") is not None,
        "lm_eval (not installed) is what asks the tasks; pip install 'megatron_dllm[eval]' brings it.",
    )
