"""Check a checkpoint's shards against `params.json` and against each other, before anything is allocated.

Names, shapes and dtypes of all tensors are checked, and the values of the norms. The values of the matrices are checked when
loading.py reads them.
"""

from typing import Any

import torch

from ..distributed.groups import model_parallel
from ..errors import CheckpointError, short_repr
from ..model import ModelArgs, Transformer
from ..tokenizer import Tokenizer
from .params import SUPPORTED_DTYPES
from .shards import IGNORED_TENSORS, Shards, split_dim

NON_FINITE = "contains NaN or infinity: the shards are damaged; compare with checklist.chk, fetch them again"
_OTHER_MODEL = "params.json and the shards are not of one model; fetch them again"
# For a part of a weight's name: the keys of params.json that are probably wrong if such a weight has the wrong shape.
_PARAMS_BY_WEIGHT = {"wk": "n_heads, n_kv_heads", "w1": "multiple_of, ffn_dim_multiplier", "norm": "dim"}


def build_on_meta(
    params: dict[str, Any],
    shards: Shards,
    max_seq_len: int,
    max_batch_size: int,
    vocab_size: int,
) -> Transformer:
    """Return the model that params.json describes, on the meta device.

    Raises CheckpointError if params.json contradicts the shards or the tokenizer.
    """
    args = ModelArgs(**{**params, "vocab_size": vocab_size}, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    names = {name for tensors in shards.values() for name in tensors}
    layers = len({name.split(".")[1] for name in names if name.startswith("layers.")})
    if layers != args.n_layers:
        raise CheckpointError(
            f"params.json says n_layers={args.n_layers}, but the shards contain {layers} layers: {_OTHER_MODEL}"
        )
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
    """Return the shape of each whole weight, not of one rank's part, by Meta's names."""
    ranks, expected = model_parallel()[1], {}
    # norm.weight comes first. It is not split, so its shape shows whether `dim` is right. If tok_embeddings.weight came
    # first, a wrong `dim` would look like missing shards.
    for name, weight in sorted(model.state_dict().items(), key=lambda item: item[0] != "norm.weight"):
        shape, dim = list(weight.shape), split_dim(name)
        if dim is not None:
            shape[dim] *= ranks
        expected[name] = tuple(shape)
    return expected


def check_shards(model: Transformer, shards: Shards) -> None:
    """Raise CheckpointError unless the shards contain exactly the model's tensors, and all shards belong to one model."""
    expected = expected_shapes(model)
    _check_tensors(expected, shards)
    _check_same_model(expected, shards)


def _check_tensors(expected: dict[str, tuple[int, ...]], shards: Shards) -> None:
    """Raise CheckpointError unless each shard contains the expected tensors, with supported dtypes and the right shapes."""
    n = len(shards)
    for file, tensors in shards.items():
        for verb, names in (
            ("lacks", expected.keys() - tensors.keys()),
            ("contains unknown", {name for name in tensors.keys() - expected.keys() if not IGNORED_TENSORS.fullmatch(name)}),
        ):
            if names:
                listed = ", ".join(sorted(short_repr(name).strip("'") for name in names)[:3])
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise CheckpointError(f"{file} {verb} {listed}{more}: damaged, or not of the model that params.json describes")
        for name, whole in expected.items():
            tensor, dim = tensors[name], split_dim(name)
            part = whole if dim is None else tuple(size // n if d == dim else size for d, size in enumerate(whole))
            if tensor.dtype not in SUPPORTED_DTYPES:
                raise CheckpointError(
                    f"{file}: {name} is stored as {tensor.dtype}; supported are bfloat16, float16 and float32; convert it"
                )
            if tuple(tensor.shape) != part or (dim is not None and whole[dim] % n):
                raise CheckpointError(f"{file}: {name} is {tuple(tensor.shape)}, {_explain_shape(name, tensor, whole, n)}")


def _check_same_model(expected: dict[str, tuple[int, ...]], shards: Shards) -> None:
    """Raise CheckpointError if norms are not finite or differ between shards, or if one shard is a copy of another."""
    (first_file, reference), *_ = shards.items()
    file_by_row: dict[tuple[float, ...], str] = {}  # first row of a file's first wq weight -> name of the file
    for file, tensors in shards.items():
        for name in expected:
            if split_dim(name) is None:
                if not tensors[name].isfinite().all():
                    raise CheckpointError(f"{file}: {name} {NON_FINITE}")
                # Every shard contains all norms. Converted shards may differ by rounding; shards of different models differ far
                # more.
                if not torch.allclose(reference[name].float(), tensors[name].float(), rtol=0.05, atol=0.02):
                    raise CheckpointError(
                        f"{name} differs between {first_file} and {file}: they are shards of different models"
                    )
        row = tuple(tensors["layers.0.attention.wq.weight"][0].tolist())
        if file_by_row.setdefault(row, file) != file and len(set(row)) > 1:
            raise CheckpointError(
                f"{file} contains the same values as {file_by_row[row]}: a copy under another name; fetch it again"
            )


def _explain_shape(name: str, tensor: torch.Tensor, whole: tuple[int, ...], n: int) -> str:
    """Return the second half of an error about a weight's wrong shape: the expected shape, and the likely cause."""
    if name == "tok_embeddings.weight" and tensor.ndim == 2 and tensor.shape[1] and whole[1] % tensor.shape[1] == 0:
        if tensor.shape[0] != whole[0]:
            return f"but the tokenizer has {whole[0]} pieces; use the model's own tokenizer.model"
        return f"one of {whole[1] // tensor.shape[1]} parts of {whole}, but there are {n} shards: some are missing, or too many"
    hint = next((f" (see {keys})" for part, keys in _PARAMS_BY_WEIGHT.items() if part in name), "")
    return f"where params.json{hint} makes {whole} in {n} shard(s): {_OTHER_MODEL}"


def build_fingerprint(tokenizer: Tokenizer, shards: Shards, model: Transformer, dtype: torch.dtype) -> tuple[object, ...]:
    """Return values that are equal on all ranks if all ranks build the same model.

    Paths are not among the values, because machines may store the same files in different folders.
    """
    norms = [tensors["norm.weight"].tolist() for tensors in shards.values()]
    return tokenizer.n_words, {file: len(tensors) for file, tensors in shards.items()}, norms, model.params, dtype
