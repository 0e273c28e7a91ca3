"""Meta's checkpoints: find them, and check them before anything is allocated.

Shards are memory-mapped: names and shapes are read, and only of the small tensors the numbers (loading.py checks the
others as it reads them). Nothing in a file is ever executed.
"""

from typing import Any

import torch

from ..distributed.groups import model_parallel
from ..errors import CheckpointError, short_repr
from ..model import ModelArgs, Transformer
from ..tokenizer import Tokenizer
from .params import SUPPORTED_DTYPES
from .shards import IGNORED_TENSORS, Shards, split_dim

NON_FINITE = "holds NaN or infinity: the shards are damaged; compare with checklist.chk, fetch them again"
_OTHER_MODEL = "params.json and the shards are not of one model; fetch them again"
_PARAMS_BY_WEIGHT = {
    "wk": "n_heads, n_kv_heads",
    "w1": "multiple_of, ffn_dim_multiplier",
    "norm": "dim",
}  # key of a wrong shape


def build_on_meta(
    params: dict[str, Any],
    shards: Shards,
    max_seq_len: int,
    max_batch_size: int,
    vocab_size: int,
) -> Transformer:
    """The Transformer of params.json, without memory."""
    args = ModelArgs(**{**params, "vocab_size": vocab_size}, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    stored = {name for tensors in shards.values() for name in tensors}
    layers = len({n.split(".")[1] for n in stored if n.startswith("layers.")})
    if layers != args.n_layers:
        raise CheckpointError(f"params.json says n_layers={args.n_layers}, but the shards hold {layers} layers: {_OTHER_MODEL}")
    declared = params.get("vocab_size", -1)
    if declared not in (-1, vocab_size):
        raise CheckpointError(
            f"params.json says vocab_size={declared}, but the tokenizer has {vocab_size} pieces; use the model's own"
        )
    try:
        with torch.device("meta"):
            model = Transformer(args)
    except (RuntimeError, OverflowError) as e:
        sizes = f"max_seq_len={max_seq_len} and max_batch_size={max_batch_size}"
        raise CheckpointError(f"params.json with {sizes} describes tensors larger than any memory: {params}") from e
    return model


def expected_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """By Meta's names, of the weights whole."""
    ranks, expected = model_parallel()[1], {}
    # The last norm first, whose shape says whether `dim` is right, and so whether there are as many shards as there must be.
    for name, weight in sorted(model.state_dict().items(), key=lambda item: item[0] != "norm.weight"):
        shape, dim = list(weight.shape), split_dim(name)
        if dim is not None:
            shape[dim] *= ranks
        expected[name] = tuple(shape)
    return expected


def check_shards(model: Transformer, shards: Shards) -> None:
    """Raise CheckpointError unless the shards hold a model's tensors, and no others, and are of one model."""
    n, expected = len(shards), expected_shapes(model)
    for file, tensors in shards.items():
        for verb, names in (
            ("lacks", expected.keys() - tensors.keys()),
            ("holds unknown", {name for name in tensors.keys() - expected.keys() if not IGNORED_TENSORS.fullmatch(name)}),
        ):
            if names:
                some = ", ".join(sorted(short_repr(name).strip("'") for name in names)[:3])
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise CheckpointError(f"{file} {verb} {some}{more}: damaged, or not of the model that params.json describes")
        for name, whole in expected.items():
            tensor, dim = tensors[name], split_dim(name)
            part = whole if dim is None else tuple(w // n if d == dim else w for d, w in enumerate(whole))
            if tensor.dtype not in SUPPORTED_DTYPES:
                raise CheckpointError(
                    f"{file}: {name} is stored as {tensor.dtype}; supported are bfloat16, float16 and float32; convert it"
                )
            if tuple(tensor.shape) != part or (dim is not None and whole[dim] % n):
                raise CheckpointError(f"{file}: {name} is {tuple(tensor.shape)}, {_explain_shape(name, tensor, whole, n)}")

    (first, reference), *_ = shards.items()
    rows: dict[tuple[float, ...], str] = {}
    for file, tensors in shards.items():
        for name in expected:
            if split_dim(name) is None:
                if not tensors[name].isfinite().all():
                    raise CheckpointError(f"{file}: {name} {NON_FINITE}")
                # Meta's are equal; derived files may differ by rounding, those of another model by far more.
                if not torch.allclose(reference[name].float(), tensors[name].float(), rtol=0.05, atol=0.02):
                    raise CheckpointError(f"{name} differs between {first} and {file}: they are shards of different models")
        row = tuple(tensors["layers.0.attention.wq.weight"][0].tolist())
        if rows.setdefault(row, file) != file and len(set(row)) > 1:
            raise CheckpointError(f"{file} holds the same numbers as {rows[row]}: a copy under another name; fetch it again")


def _explain_shape(name: str, tensor: torch.Tensor, whole: tuple[int, ...], n: int) -> str:
    if name == "tok_embeddings.weight" and tensor.ndim == 2 and tensor.shape[1] and whole[1] % tensor.shape[1] == 0:
        if tensor.shape[0] != whole[0]:
            return f"but the tokenizer has {whole[0]} pieces; use the model's own tokenizer.model"
        return f"one of {whole[1] // tensor.shape[1]} parts of {whole}, but there are {n} shards: some are missing, or too many"
    hint = next((f" (see {keys})" for part, keys in _PARAMS_BY_WEIGHT.items() if part in name), "")
    return f"where params.json{hint} makes {whole} in {n} shard(s): {_OTHER_MODEL}"


def build_fingerprint(tokenizer: Tokenizer, shards: Shards, model: Transformer, dtype: torch.dtype) -> tuple[object, ...]:
    """What tells one build from another, wherever each machine keeps its copy of the files."""
    norms = [tensors["norm.weight"].tolist() for tensors in shards.values()]
    return tokenizer.n_words, {file: len(tensors) for file, tensors in shards.items()}, norms, model.params, dtype
