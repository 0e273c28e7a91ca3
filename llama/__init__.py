"""Llama 2 inference: Meta's checkpoints, on any machine."""

from .demo import given_or_demo
from .errors import CheckpointError, DeviceError, InputError, LlamaError, NumberError
from .generation import Dialog, Llama, Score
from .info import info
from .model import ModelArgs, Transformer
from .sampling import Sampling
from .text import Stream
from .tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "CheckpointError", "DeviceError", "Dialog", "InputError", "Llama", "LlamaError", "ModelArgs", "NumberError", "Sampling",
    "Score", "Stream", "Tokenizer", "Transformer", "given_or_demo", "info",
]  # fmt: skip
