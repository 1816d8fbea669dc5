"""Imported once by the server that the ranks of a test are forked from: what every rank needs and is slow to import."""

from __future__ import annotations

import torch

from megatron_dllm.host import prepare_host

torch.set_num_threads(1)
prepare_host()

import megatron_dllm.training.set_up  # noqa: E402, F401 - after the host is prepared
