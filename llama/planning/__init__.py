"""What a model needs, and which machines can hold it."""

from .machines import GPUS, MODELS, plan

__all__ = ["GPUS", "MODELS", "plan"]
