"""Fixtures of all unit tests."""

from tests.tiny_models import checkpoint, hf, make_checkpoint

__all__ = ["checkpoint", "hf", "make_checkpoint"]
