"""Tell what a folder contains, how much memory a model needs, and on which machines it fits, without loading it."""

from .folder import describe_folder
from .machines import GPUS, MODELS, model_size, plan

__all__ = ["GPUS", "MODELS", "describe_folder", "model_size", "plan"]
