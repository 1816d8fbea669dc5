"""Slow imports that every rank needs: the server from which a test's ranks are forked does them once."""

from __future__ import annotations

import gc

import torch

# What torch.use_deterministic_algorithms imports: more than half a CPU second in each rank.
import torch._inductor.config

from megatron_dllm.host import prepare_host

torch.set_num_threads(1)
prepare_host()

import megatron_dllm.hydra_command  # noqa: E402
import megatron_dllm.training.set_up  # noqa: E402, F401 - after the host is prepared

# What has been imported is never garbage: a rank that looked through it would copy every page of it.
gc.collect()
gc.freeze()
