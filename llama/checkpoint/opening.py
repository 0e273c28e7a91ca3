"""Open a model's files and check them, before any weight is loaded: a packed file or other weights, and an adapter."""

import os
import sys
from dataclasses import dataclass
from typing import Any

import torch

from ..distributed.groups import global_rank
from ..kernels.packing import check_kernel
from ..model import Transformer
from ..tokenizer import Tokenizer
from . import layouts, loading, packed_file, validate
from .adapter import open_adapter
from .shards import Shards


@dataclass(frozen=True)
class OpenedModel:
    """A model whose files are mapped and checked, and how its weights are to be loaded.

    packs: True if the backend packs weights. notes: lines for stderr.
    """

    model: Transformer  # on the meta device until `load`
    files: Shards
    dtype: torch.dtype
    device: torch.device
    quantize: str | None
    packs: bool
    notes: list[str]

    @property
    def held_as(self) -> str | None:
        """Return the format in which memory holds the matrices: "int8" or "int4", or None for `dtype`."""
        return self.quantize if self.packs else None

    def fingerprint(self, tokenizer: Tokenizer) -> tuple[object, ...]:
        """Return values that must be the same on all ranks."""
        return validate.build_fingerprint(tokenizer, self.files, self.model, self.dtype)

    def bytes_staying_mapped(self) -> int:
        """Return how many bytes of weights stay memory-mapped after `load`."""
        return loading.bytes_staying_mapped(self.model, self.files, self.dtype, self.device, self.quantize, self.packs)

    def load(self) -> None:
        """Load this rank's weights. Raise CheckpointError for weights that are not finite and for files that have changed."""
        loading.load_weights(self.model, self.files, self.dtype, self.device, self.quantize, self.packs)


def open_model(
    ckpt_dir: str | os.PathLike[str],
    config: dict[str, Any],
    n_words: int,
    max_seq_len: int,
    max_batch_size: int,
    dtype: torch.dtype | None,
    device: torch.device,
    quantize: str | None,
    packs: bool,
    adapter: str | os.PathLike[str] | None,
) -> OpenedModel:
    """Open the files of a folder and check them. The arguments are those of `Llama.build`, and these:

    config: what `layouts.read_params` has returned. n_words: number of the tokenizer's tokens. packs: True if the backend packs
    weights.
    Raises CheckpointError, DeviceError or InputError.
    """
    fits = device.type == "cpu" and (quantize is not None or dtype in (None, torch.bfloat16))
    stored_format, unused = quantize or "bfloat16", None
    if adapter is None:
        packed = packed_file.open_packed_file(ckpt_dir, stored_format, fits)
    else:
        packed, unused = None, packed_file.describe_unused(ckpt_dir, stored_format)  # raises if all weights are packed
    files = packed or layouts.open_weights(ckpt_dir)
    if packed and quantize == "int8" and device.type != "cpu" and global_rank() == 0:
        print(f"int8.safetensors is for CPUs, and slow on {device}: build from the weights themselves", file=sys.stderr)
    model = validate.build_on_meta(config, files, max_seq_len, max_batch_size, n_words)
    if packed:
        packed_file.check_packed_file(model, files)
    else:
        validate.check_shards(model, files)
    if adapter is not None:
        files.adapter = open_adapter(adapter, model.params, files)
    spare_rows = validate.describe_spare_rows(model.vocab_size, n_words)
    notes = [note for note in (unused, spare_rows) if note]
    weights_dtype = dtype or files.first["tok_embeddings.weight"].dtype
    opened = OpenedModel(model, files, weights_dtype, device, quantize, packs, notes)
    if opened.held_as:
        check_kernel(opened.held_as, device, weights_dtype)
    return opened
