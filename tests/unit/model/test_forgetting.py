"""What a dispatcher holds of tokens ends with the forward pass; what it was made with stays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.mark.parametrize("has_manager", [False, True], ids=["alltoall", "flex"])
def test_a_dispatcher_and_what_sends_for_it_forget_their_tokens(has_manager: bool) -> None:
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.model.forgetting import Forget

    manager = SimpleNamespace(token_probs=None, num_experts=4)
    dispatcher: Any = SimpleNamespace(input_chunk_idxs=torch.arange(4), probs=None, hidden_shape=None)
    if has_manager:
        dispatcher._comm_manager = manager
    forget = Forget(dispatcher)
    dispatcher.probs, dispatcher.hidden_shape = torch.ones(3), (3, 1, 8)
    manager.token_probs = torch.ones(3)
    forget(None, None, None)
    assert dispatcher.probs is None and dispatcher.hidden_shape == (3, 1, 8)
    assert torch.equal(dispatcher.input_chunk_idxs, torch.arange(4))
    assert (manager.token_probs is None) == has_manager and manager.num_experts == 4
