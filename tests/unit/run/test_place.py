"""What the launcher's environment says about this process."""

from __future__ import annotations

import pytest

from megatron_dllm.run.place import is_rank_zero, world_size


def test_place_in_the_run_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert world_size() == 1 and is_rank_zero()
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("RANK", "3")
    assert world_size() == 16 and not is_rank_zero()
