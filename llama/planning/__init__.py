"""Tell what a folder contains, how much memory a model needs, and on which machines it fits, without loading it."""

from .folder import describe_folder, is_adapter
from .machines import GPUS, MODELS, model_size, plan

__all__ = ["GPUS", "MODELS", "describe_folder", "is_adapter", "model_size", "plan"]
