"""Merge a LoRA adapter in PEFT's layout into a model's weights while they are read, one tensor at a time.

An adapter's folder contains `adapter_config.json`, and `adapter_model.safetensors` or `adapter_model.bin`. For each matrix W
(out, in) that it adapts, the file has a pair of matrices, A (r, in) and B (out, r):

    merged weight = W + scale * B @ A    scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

It is computed in float32 and rounded once, to the dtype of the model. The file may also contain whole weights
(`modules_to_save`), which replace the model's.
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..distributed.groups import model_parallel
from ..errors import CheckpointError, short_repr
from ..kernels.host_memory import DONTNEED, madvise
from ..model import ModelArgs
from .adapter_config import (
    CONFIG,
    check_adapter_folder,
    check_patterns,
    ends_with_name,
    rank_and_scale,
    read_adapter_config,
    targets,
)
from .hugging_face import check_inside, expected_tensors, join_names, open_file
from .params import MERGE_WITH_PEFT, SUPPORTED_DTYPES, list_folder
from .shards import Shards, file_identity, is_rotated, metas_order, split_dim
from .validate import NON_FINITE, is_finite

FILES = ("adapter_model.safetensors", "adapter_model.bin")  # in the order in which PEFT looks for them
_PREFIX = "base_model.model."  # of each tensor's name, before Hugging Face's name of a module
# The ends of the names of tensors, after the name of a module. Those of an embedding are transposed.
_PAIRS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}
_WHOLE = ("base_layer.weight", "weight")
_SAVED_BY_PEFT = {"model.embed_tokens", "lm_head"}  # whole weights that PEFT may save without naming them in modules_to_save
_VALUES_AT_ONCE = 1 << 17  # values of a merged weight computed at a time, in float32, so that they fit the CPU's cache


class Pair(NamedTuple):
    """Two matrices, (out, r) and (r, in), whose product times `scale` is added to a weight."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float


class Adapter:
    """The parts of an adapter by Meta's names of the weights that they change. Rows are in the order of the stored weights.

    pairs: the pairs of matrices. replaced: weights that replace the model's. shapes: the shape of each whole weight.
    """

    def __init__(
        self, path: Path, pairs: dict[str, Pair], replaced: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        self.path, self.pairs, self.replaced, self.shapes = path, pairs, replaced, shapes

    def __contains__(self, name: object) -> bool:
        return name in self.pairs or name in self.replaced

    def merge(self, name: str, views: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """Return the merged values of views of a stored weight, in `dtype`; the views themselves if the weight is not adapted.

        views: parts of the weight that, joined along its `split_dim`, are this rank's part or the whole weight.
        Raises CheckpointError for values that are not finite.
        """
        if name not in self:
            return views
        shape, dim, (rank, ranks) = self.shapes[name], split_dim(name), model_parallel()
        merged, begin = [], 0
        if dim is not None and sum(view.shape[dim] for view in views) != shape[dim]:
            begin = shape[dim] * rank // ranks
        for view in views:
            end = begin + view.shape[dim or 0]
            rows, columns = (slice(None), slice(begin, end)) if dim == 1 else (slice(begin, end), slice(None))
            merged.append(self._merge_part(name, view, rows, columns, dtype))
            madvise(view, DONTNEED)
            begin = end
        return merged

    def _merge_part(self, name: str, view: torch.Tensor, rows: slice, columns: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return the merged values of one view, which holds these rows and columns of a stored weight."""
        base, pair = view, self.pairs.get(name)
        if name in self.replaced:
            base = self.replaced[name][rows] if view.ndim == 1 else self.replaced[name][rows, columns]
        if pair is None:
            merged = base.to(dtype)
        else:
            left, right = pair.left[rows].float(), pair.right[:, columns].float()
            merged = torch.empty(view.shape, dtype=dtype, device="cpu")
            step = max(1, _VALUES_AT_ONCE // view.shape[1])
            products = torch.empty(min(step, len(view)), view.shape[1], device="cpu")  # once, as the system clears new memory
            for i in range(0, len(view), step):
                rows_at_once = left[i : i + step]
                product = torch.mm(rows_at_once, right, out=products[: len(rows_at_once)])
                merged[i : i + step] = product.mul_(pair.scale).add_(base[i : i + step])
        if not is_finite(merged):
            if not is_finite(view):
                raise CheckpointError(f"{name} {NON_FINITE}")
            if not all(map(is_finite, [base, *pair[:2]] if pair else [base])):
                raise CheckpointError(f"{self.path}: the part for {name} contains NaN or infinity: damaged; fetch it again")
            raise CheckpointError(
                f"{name} with the adapter {self.path} contains values too large for {dtype}; use dtype='bfloat16' or 'float32'"
            )
        return merged

    def fingerprint(self) -> list[Any]:
        """Return values that are equal on all ranks if all ranks have the same adapter."""
        pairs = [(name, pair.scale, pair.left[0].tolist(), pair.right[0].tolist()) for name, pair in self.pairs.items()]
        return [*pairs, *((name, whole[0].tolist()) for name, whole in self.replaced.items())]


def open_adapter(adapter: str | os.PathLike[str], args: ModelArgs, weights: Shards) -> Adapter:
    """Map an adapter for a model. weights: the model's stored weights, into which it will be merged.

    The adapter's files are added to those whose changes `weights.check_unchanged` notices. Raises CheckpointError if a file is
    missing or damaged, if the adapter belongs to another model, and for what `read_adapter_config` refuses.
    """
    folder = check_adapter_folder(adapter)
    config = read_adapter_config(folder)
    names = list_folder(folder)
    path = next((folder / name for name in FILES if name in names), None)
    if path is None:
        raise CheckpointError(f"{folder}: it contains {CONFIG}, but neither {' nor '.join(FILES)}; fetch one of them, too")
    check_inside(folder, path.name, "the folder")
    weights.identities |= {file: file_identity(file) for file in (path, folder / CONFIG)}
    modules = {name.removesuffix(".weight"): metas for name, metas in expected_tensors(args).items()}
    halves, whole = _sort_tensors(path, open_file(path, values=True), modules)
    if not halves and not whole:
        raise CheckpointError(f"{path} contains no tensors; fetch it again")
    check_patterns(config, modules, folder / CONFIG)
    _check_targets(folder / CONFIG, path, config, [m for m, (_, shape) in modules.items() if len(shape) == 2], halves, whole)
    pairs = {modules[m][0]: _make_pair(path, config, m, modules[m][1], tensors) for m, tensors in halves.items()}
    replaced = {modules[m][0]: tensor for m, tensor in whole.items()}
    if weights.rotary_halves is None:  # the rows of the model's wq and wk are in Meta's order
        for name in filter(is_rotated, pairs):
            pairs[name] = pairs[name]._replace(left=_in_metas_order(pairs[name].left, args.head_dim))
        for name in filter(is_rotated, replaced):
            replaced[name] = _in_metas_order(replaced[name], args.head_dim)
    tied = weights.first["output.weight"].data_ptr() == weights.first["tok_embeddings.weight"].data_ptr()
    if tied and (both := {"lm_head", "model.embed_tokens"} & {*halves, *whole}):
        raise CheckpointError(
            f"{path} changes {join_names(sorted(both))}, but the model's output layer is its embedding (tie_word_embeddings): "
            f"{MERGE_WITH_PEFT}"
        )
    return Adapter(path, pairs, replaced, dict(modules.values()))


def _in_metas_order(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    return rows[metas_order(len(rows), head_dim)]


def _sort_tensors(
    path: Path, tensors: dict[str, torch.Tensor], modules: dict[str, tuple[str, tuple[int, ...]]]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Return an adapter's matrices A and B, and its whole weights, each by Hugging Face's names of the modules.

    modules: for each module of the model, Meta's name and the shape of its weight. Raises CheckpointError for other tensors.
    """
    halves: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        (module, end), shown = _split_name(name), short_repr(name.removeprefix(_PREFIX))
        if module not in modules or (end.startswith("lora_embedding") and module != "model.embed_tokens"):
            known = end in (*_PAIRS, *_WHOLE) and module
            what = f"the model lacks {short_repr(module)}" if known else "no part of a LoRA adapter for Llama"
            raise CheckpointError(f"{path} contains {shown}: {what}; give the model that was adapted, or {MERGE_WITH_PEFT}")
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise CheckpointError(f"{path}: {shown} is {tensor.dtype}; supported are bfloat16, float16 and float32: convert it")
        if module in whole if end in _WHOLE else _PAIRS[end] in halves.get(module, {}):
            raise CheckpointError(f"{path} contains {shown} and the same under another name: damaged; fetch it again")
        if end in _PAIRS:
            halves.setdefault(module, {})[_PAIRS[end]] = tensor
            continue
        shape = modules[module][1]
        if tuple(tensor.shape) != shape:
            hint = "; the vocabulary was resized, which is not merged here" if len(shape) == 2 and tensor.ndim == 2 else ""
            raise CheckpointError(
                f"{path}: {shown} is {tuple(tensor.shape)}, where the model has {shape}{hint}: {MERGE_WITH_PEFT}"
            )
        whole[module] = tensor
    return halves, whole


def _split_name(name: str) -> tuple[str, str]:
    """Return the module in the name of an adapter's tensor, and what follows it; ("", name) for a name of another form."""
    ends = "|".join(map(re.escape, (*_PAIRS, *_WHOLE)))
    match = re.fullmatch(rf"{re.escape(_PREFIX)}([\w.]+?)\.({ends})", name)
    return (match[1], match[2]) if match else ("", name)


def _check_targets(
    config_path: Path, path: Path, config: dict[str, Any], modules: list[str], halves: Any, whole: dict[str, Any]
) -> None:
    """Raise CheckpointError unless an adapter's file has parts for those modules that its config names.

    modules: the model's modules with matrices.
    """
    expected = targets(config, modules, config_path)
    for name in config.get("modules_to_save", []):
        if not any(ends_with_name(module, name) for module in whole):
            raise CheckpointError(f"{path} lacks {short_repr(name)}, which modules_to_save names; fetch it again")
    # PEFT compares the ends of names: "norm" in modules_to_save stands for each input_layernorm, too.
    saved = {module for module in whole if module.endswith(tuple(config.get("modules_to_save", [])))}
    if unnamed := sorted({*whole} - saved - _SAVED_BY_PEFT):
        raise CheckpointError(
            f"{path} contains whole weights of {join_names(unnamed)}, which modules_to_save of {config_path.name} does not "
            "name: not of one adapter; fetch both"
        )
    if expected is None:
        return
    if missing := sorted(expected - {*halves} - saved):
        raise CheckpointError(f"{path} lacks {join_names(missing)}, which target_modules names; fetch it again")
    if others := sorted({*halves} - expected):
        raise CheckpointError(
            f"{path} contains {join_names(others)}, which {config_path.name} does not name: not of one adapter; fetch both"
        )


def _make_pair(
    path: Path, config: dict[str, Any], module: str, shape: tuple[int, ...], tensors: dict[str, torch.Tensor]
) -> Pair:
    """Return the pair of matrices for a weight of this shape. Raise CheckpointError if one is missing or has a wrong shape."""
    if lacking := {"A", "B"} - tensors.keys():
        raise CheckpointError(f"{path}: {module} has no lora_{lacking.pop()}, only the other half of the pair; fetch it again")
    rank, scale = rank_and_scale(config, module)
    is_embedding = module == "model.embed_tokens"
    found = tuple(tensors["A"].shape), tuple(tensors["B"].shape)
    inputs, outputs = shape if is_embedding else shape[::-1]
    expected = (rank, inputs), (outputs, rank)
    if found != expected:
        raise CheckpointError(
            f"{path}: lora_A and lora_B of {module} are {found[0]} and {found[1]}, where the model and {CONFIG} make "
            f"{expected[0]} and {expected[1]}: not of this model, or damaged; give the model that was adapted"
        )
    return Pair(tensors["A"].mT, tensors["B"].mT, scale) if is_embedding else Pair(tensors["B"], tensors["A"], scale)
