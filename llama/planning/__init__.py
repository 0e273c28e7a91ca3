"""Compute how much memory a model needs, and on which machines it fits, without loading it."""

from .machines import GPUS, MODELS, model_size, plan

__all__ = ["GPUS", "MODELS", "model_size", "plan"]
