"""Chains of jobs: what they consist of (launch/jobs.py), and how a command line becomes one (launch/composition.py)."""

from __future__ import annotations

from launch.composition import compose_chain
from launch.jobs import Chain, Job, JobSpec, LaunchConfig, RequeueConfig

__all__ = ["Chain", "Job", "JobSpec", "LaunchConfig", "RequeueConfig", "compose_chain"]
