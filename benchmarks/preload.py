"""Slow imports that every rank needs: the server from which a test's ranks are forked does them once."""

from __future__ import annotations

import torch

from megatron_dllm.host import prepare_host

torch.set_num_threads(1)
prepare_host()

import megatron_dllm.training.set_up  # noqa: E402, F401 - after the host is prepared
