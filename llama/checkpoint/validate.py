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

MAX_SPARE_ROWS = 1024  # a model with more rows beyond the tokenizer's tokens has probably been given another model's tokenizer
NON_FINITE = "contains NaN or infinity: the shards are damaged; compare with checklist.chk, fetch them again"
_OTHER_MODEL = "params.json and the shards are not of one model; fetch them again"
# For a part of a weight's name: the keys of params.json that are probably wrong if such a weight has the wrong shape.
_PARAMS_BY_WEIGHT = {"wk": "n_heads, n_kv_heads", "w1": "multiple_of, ffn_dim_multiplier", "norm": "dim"}


def is_finite(weight: torch.Tensor) -> bool:
    """Return True if all values of a weight are finite."""
    # A finite sum proves in one pass that all values are finite. The sum of finite values may overflow, so test each value if
    # the sum is not finite.
    return bool(weight.sum().isfinite() or weight.isfinite().all())


def build_on_meta(
    params: dict[str, Any],
    shards: Shards,
    max_seq_len: int,
    max_batch_size: int,
    n_words: int | None,
) -> Transformer:
    """Return the model that params.json describes, on the meta device. Its vocabulary has the size of the stored embedding.

    n_words: number of the tokenizer's tokens; None without a tokenizer. Raises CheckpointError if params.json contradicts the
    shards or the tokenizer.
    """
    embedding, vocab_size = shards.first.get("tok_embeddings.weight"), n_words or 1
    has_rows = embedding is not None and embedding.ndim == 2 and len(embedding) > 0
    if embedding is not None and has_rows:
        vocab_size = len(embedding)
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
            f"params.json says vocab_size={declared}, but tok_embeddings.weight has {vocab_size} rows: if they are of one "
            f"model, set vocab_size to {vocab_size}"
        )
    if embedding is not None and has_rows and n_words is not None:
        check_vocabulary(vocab_size, n_words, f"tok_embeddings.weight is {tuple(embedding.shape)}")
    try:
        with torch.device("meta"):
            model = Transformer(args)
    except (RuntimeError, OverflowError) as e:
        sizes = f"max_seq_len={max_seq_len} and max_batch_size={max_batch_size}"
        raise CheckpointError(f"params.json with {sizes} describes tensors larger than any memory: {params}") from e
    return model


def check_vocabulary(vocab_size: int, n_words: int, finding: str) -> None:
    """Raise CheckpointError if a model's vocabulary does not suit a tokenizer.

    A model may have more rows than the tokenizer has tokens, for example for a padding token or to round the size up.
    n_words: number of the tokenizer's tokens. finding: text about the model, with which the error begins.
    """
    if not n_words <= vocab_size <= n_words + MAX_SPARE_ROWS:
        limit = f" (the model may have at most {MAX_SPARE_ROWS:,} more)" if vocab_size > n_words else ""
        raise CheckpointError(
            f"{finding}, but the tokenizer has {n_words} tokens{limit}: another model's tokenizer; "
            "use the model's own tokenizer.model"
        )


def describe_spare_rows(vocab_size: int, n_words: int) -> str | None:
    """Return a note that a model has more rows than the tokenizer has tokens; None if it has not."""
    if vocab_size == n_words:
        return None
    return (
        f"llama: the vocabulary has {vocab_size:,} tokens, the tokenizer only {n_words:,}: "
        f"tokens from {n_words:,} on are never generated"
    )


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
        unknown = {name for name in tensors.keys() - expected.keys() if not IGNORED_TENSORS.fullmatch(name)}
        for verb, names, way_out in (
            (
                "lacks",
                expected.keys() - tensors.keys(),
                "damaged, or not of the model that params.json describes; every .pth file in the folder is read as a shard",
            ),
            (
                "contains unknown",
                unknown,
                "the model that params.json describes has no such tensors; if it can do without them, load the file, delete "
                "them and torch.save() it again",
            ),
        ):
            if names:
                listed = ", ".join(sorted(short_repr(name).strip("'") for name in names)[:3])
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise CheckpointError(f"{file} {verb} {listed}{more}: {way_out}")
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
    is_table = name in ("tok_embeddings.weight", "output.weight") and tensor.ndim == 2
    if is_table and tensor.shape[0] * (n if split_dim(name) == 0 else 1) != whole[0]:
        return (
            f"but tok_embeddings.weight of the first shard makes it {whole} in {n} shard(s): both need a row for each token; "
            "save both with the same rows, or fetch them again"
        )
    if name == "tok_embeddings.weight" and is_table and tensor.shape[1] and whole[1] % tensor.shape[1] == 0:
        return f"one of {whole[1] // tensor.shape[1]} parts of {whole}, but there are {n} shards: some are missing, or too many"
    hint = next((f" (see {keys})" for part, keys in _PARAMS_BY_WEIGHT.items() if part in name), "")
    return f"where params.json{hint} makes {whole} in {n} shard(s): {_OTHER_MODEL}"


def build_fingerprint(tokenizer: Tokenizer, shards: Shards, model: Transformer, dtype: torch.dtype) -> tuple[object, ...]:
    """Return values that are equal on all ranks if all ranks build the same model.

    Paths are not among the values, because machines may store the same files in different folders.
    """
    norms = [tensors["norm.weight"].tolist() for tensors in shards.values()]
    adapter = shards.adapter.fingerprint() if shards.adapter else None
    return tokenizer.n_words, {file: len(tensors) for file, tensors in shards.items()}, norms, model.params, dtype, adapter
