"""Llama 2 inference with Meta's checkpoints, on any machine."""

import signal
import sys

__version__ = "0.1.0"

# While Python imports this package for `python -m llama`, argv[0] is "-m". Importing PyTorch takes seconds, in which Ctrl-C
# would print a traceback. cli/process.py restores Python's own handler.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from .backends.report import info
from .chat import Dialog
from .checkpoint.convert import convert_checkpoint
from .checkpoint.packed_file import save_packed_file
from .checkpoint.paths import resolve_model_paths
from .engine.async_calls import AsyncStream
from .engine.call_options import validate_options
from .engine.results import Score
from .engine.stream import Stream
from .errors import CheckpointError, DeviceError, InputError, LlamaError, NonFiniteError
from .generation import Llama
from .model import ModelArgs, Transformer
from .planning import plan
from .sampling import SamplingParams
from .tokenizer import Tokenizer

__all__ = [
    "AsyncStream", "CheckpointError", "DeviceError", "Dialog", "InputError", "Llama", "LlamaError", "ModelArgs",
    "NonFiniteError", "SamplingParams", "Score", "Stream", "Tokenizer", "Transformer", "convert_checkpoint", "info", "plan",
    "resolve_model_paths", "save_packed_file", "validate_options",
]  # fmt: skip


def __dir__() -> list[str]:
    """Return the public names: those of `__all__`, the version, and the modules that Meta's reference also has."""
    return sorted([*__all__, "__version__", "generation", "model", "tokenizer"])
