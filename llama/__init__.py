"""Llama 2 inference with Meta's checkpoints, on any machine."""

__version__ = "0.1.0"

from .backends.report import info
from .chat import Dialog
from .checkpoint.packed_file import save_packed_file
from .checkpoint.paths import resolve_model_paths
from .engine.request_builder import validate_options
from .engine.results import Score
from .engine.stream import Stream
from .errors import CheckpointError, DeviceError, InputError, LlamaError, NonFiniteError
from .generation import Llama
from .model import ModelArgs, Transformer
from .planning import plan
from .sampling import SamplingParams
from .tokenizer import Tokenizer

__all__ = [
    "CheckpointError", "DeviceError", "Dialog", "InputError", "Llama", "LlamaError", "ModelArgs", "NonFiniteError",
    "SamplingParams", "Score", "Stream", "Tokenizer", "Transformer", "info", "plan", "resolve_model_paths",
    "save_packed_file", "validate_options",
]  # fmt: skip


def __dir__() -> list[str]:
    """Return the public names: those of `__all__`, the version, and the modules that Meta's reference also has."""
    return sorted([*__all__, "__version__", "generation", "model", "tokenizer"])
