"""Open a model in Hugging Face's layout as if it were a single shard in Meta's layout.

The weights are in `model.safetensors` or `pytorch_model.bin`, or in several files that an index lists:
`model.safetensors.index.json` or `pytorch_model.bin.index.json`. They are memory-mapped and renamed. The rows of q_proj and
k_proj are in another order than those of wq and wk; `Shards.in_metas_order` reorders them when loading.py reads them.
"""

import itertools
import json
import re
from pathlib import Path

import torch

from ..errors import CheckpointError, explain_system_error, identify_format, read_file, short_repr
from ..model import ModelArgs
from .hugging_face_config import INSTEAD, UNQUANTIZED, read_config
from .params import MAX_PARAMS_BYTES, describe_folder, list_folder, read_json
from .safetensors_file import map_safetensors, unique_keys
from .shards import IGNORED_TENSORS, Shards, file_identity, is_rotated, open_shard

MAX_INDEX_BYTES = 1 << 22  # limit of an index; that of 70B has 67 kB
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
# Files of weights, in the order in which transformers looks for them.
FILES = tuple(itertools.chain.from_iterable((name, f"{name}.index.json") for name in WHOLE_FILES))
_LAYER_NAMES = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def expected_tensors(args: ModelArgs) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return a dict from Hugging Face's name of each weight to Meta's name and to its shape."""
    dim, queries, keys, width = args.dim, args.n_heads * args.head_dim, args.kv_heads * args.head_dim, args.ffn_width
    shapes: dict[str, tuple[int, ...]] = {
        "attention.wq": (queries, dim), "attention.wk": (keys, dim), "attention.wv": (keys, dim),
        "attention.wo": (dim, queries),
        "feed_forward.w1": (width, dim), "feed_forward.w2": (dim, width), "feed_forward.w3": (width, dim),
        "attention_norm": (dim,), "ffn_norm": (dim,),
    }  # fmt: skip
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        _EMBEDDING: ("tok_embeddings.weight", (args.vocab_size, dim)),
        "model.norm.weight": ("norm.weight", (dim,)),
        _OUTPUT: ("output.weight", (args.vocab_size, dim)),
    }
    for layer, (theirs, metas) in itertools.product(range(args.n_layers), _LAYER_NAMES.items()):
        tensors[f"model.layers.{layer}.{theirs}.weight"] = f"layers.{layer}.{metas}.weight", shapes[metas]
    return tensors


def in_hugging_faces_order(name: str, rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return the rows of a whole weight in Hugging Face's order, from those in Meta's. `Shards.in_metas_order` is the inverse.

    name: Meta's name of the weight.
    """
    if not is_rotated(name):
        return rows
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def weight_paths(folder: Path) -> list[Path]:
    """Return the paths of a folder's files of weights, sorted by name; an empty list if there are none.

    Raises CheckpointError if an index lists a file that is missing or outside of the folder.
    """
    return sorted(folder / name for name in set(_read_index(folder).values()))


def _read_index(folder: Path) -> dict[str, str]:
    """Return a dict from tensors to the names of their files; from "" to the name of the file if there is only one."""
    names = list_folder(folder)
    found = next((name for name in FILES if name in names), None)
    if found is None:
        return {}
    if found in WHOLE_FILES:
        check_inside(folder, found, "the folder")
        return {"": found}
    path = folder / found
    try:
        index = json.loads(read_file(path, MAX_INDEX_BYTES), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not JSON, or longer than {MAX_INDEX_BYTES:,} bytes ({e}); fetch it again") from e
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path}: no weight_map from tensors to names of files; fetch it again")
    suffix = ".safetensors" if ".safetensors" in found else ".bin"
    for name in dict.fromkeys(weight_map.values()):
        if not re.fullmatch(r"[\w-][\w.-]*", name) or not name.endswith(suffix):
            raise CheckpointError(f"{path} names {short_repr(name)}, which is no name of a {suffix} file in the folder itself")
    files = set(weight_map.values())
    if missing := sorted(files - {*names}):
        raise CheckpointError(f"{folder}: {join_names(missing)} missing, and {found} lists {len(files)} files; fetch them, too")
    for name in files:
        check_inside(folder, name, found)
    return weight_map


def check_inside(folder: Path, name: str, listed_by: str) -> None:
    """Raise CheckpointError if a file is a link to outside of the folder, except into Hugging Face's own cache."""
    target = (folder / name).resolve()
    cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if not cached and not target.is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{folder / name}, listed by {listed_by}, is a link to {str(target)!r:.200}, outside of the folder: "
            "put the file itself there"
        )


def open_weights(folder: Path, values: bool = True) -> Shards:
    """Map the weights of a folder, under Meta's names, as a single shard.

    values: if False, nothing is mapped; the tensors have names, shapes and dtypes only. Raises CheckpointError if a file is
    missing, damaged or unreadable, if it contains other tensors than those of the model that config.json describes, and for
    what `read_config` refuses.
    """
    params, index = read_config(folder), _read_index(folder)
    paths = sorted({folder / name for name in index.values()})
    if not paths:
        raise CheckpointError(f"{folder}: no weights; {describe_folder(folder)}")
    identities = {path: file_identity(path) for path in paths}
    stored: dict[str, torch.Tensor] = {}
    file_of: dict[str, Path] = {}
    for path in paths:
        for name, tensor in open_file(path, values).items():
            if name in stored:
                raise CheckpointError(f"{short_repr(name)} is in {file_of[name].name} and in {path}: fetch both again")
            stored[name], file_of[name] = tensor, path
    misplaced = [name for name, file in index.items() if name and (name not in file_of or file_of[name].name != file)]
    if misplaced:
        raise CheckpointError(
            f"{folder}: the index places {short_repr(misplaced[0])} in {index[misplaced[0]]}, which lacks it: "
            "the files are not of one model; fetch all again"
        )
    args = ModelArgs(**params)
    _tie_output(folder, stored)
    _check_names(paths[0] if len(paths) == 1 else folder, stored, args)
    tensors = {metas: stored[name] for name, (metas, _) in expected_tensors(args).items()}
    label = paths[0].name if len(paths) == 1 else f"{paths[0].name} to {paths[-1].name}"
    return Shards({label: tensors}, identities, rotary_halves=args.head_dim)


def open_file(path: Path, values: bool) -> dict[str, torch.Tensor]:
    """Map one file of tensors, .safetensors or .bin, and return them by name. Raise CheckpointError if it is damaged."""
    if path.suffix == ".bin":
        return open_shard(path, values)
    head = read_file(path, 64)
    try:
        return map_safetensors(path, values)[1]
    except (OSError, MemoryError, RuntimeError, ValueError) as e:
        if reason := explain_system_error(e):
            raise CheckpointError(f"{path}: {reason}") from e
        kind = identify_format(head)
        reason = f"{e}" if "damaged" in kind else kind
        raise CheckpointError(f"{path}: no sound safetensors file; {reason:.300}; fetch it again") from e


def _tie_output(folder: Path, stored: dict[str, torch.Tensor]) -> None:
    """If the output layer is the embedding (`tie_word_embeddings`), add it to the stored tensors: the same view, not a copy."""
    embedding, output = stored.get(_EMBEDDING), stored.get(_OUTPUT)
    if embedding is None or not read_json(folder / "config.json", MAX_PARAMS_BYTES).get("tie_word_embeddings"):
        return
    if output is not None and not output.is_meta and not torch.equal(output, embedding):
        raise CheckpointError(
            f"{folder}: config.json says tie_word_embeddings, but {_OUTPUT} differs from {_EMBEDDING}: set it to false if "
            f"{_OUTPUT} is the model's output layer, otherwise delete {_OUTPUT}"
        )
    stored[_OUTPUT] = embedding


def _check_names(label: Path, stored: dict[str, torch.Tensor], args: ModelArgs) -> None:
    """Raise CheckpointError unless the stored tensors are those of the model, in the right shapes."""
    expected = expected_tensors(args)
    unknown = sorted(name for name in stored.keys() - expected.keys() if not IGNORED_TENSORS.fullmatch(name))
    if unknown:
        what = "the model that config.json describes has no such tensors"
        if quantized := next((n for n in unknown if re.search(r"qweight|qzeros|g_idx|scale|absmax|quant_", n)), None):
            unknown, what = [quantized], f"weights in a quantized format (GPTQ, AWQ, bitsandbytes) are not read; {UNQUANTIZED}"
        elif biased := next((n for n in unknown if n.endswith(".bias")), None):
            unknown, what = [biased], f"the layers of Llama have no biases: {INSTEAD}"
        raise CheckpointError(f"{label} contains unknown {join_names(unknown)}: {what}")
    if missing := [name for name in expected if name not in stored]:
        hint = "; if the model uses its embedding as output layer, set tie_word_embeddings to true in config.json"
        raise CheckpointError(
            f"{label} lacks {join_names(missing)}: not all of the model that config.json describes; fetch all files again"
            f"{hint if missing == [_OUTPUT] else ''}"
        )
    for name, (_, shape) in expected.items():
        if tuple(stored[name].shape) != shape:
            raise CheckpointError(
                f"{label}: {short_repr(name)} is {tuple(stored[name].shape)}, where config.json makes {shape}: "
                "they are not of one model; fetch both again"
            )


def join_names(names: list[str]) -> str:
    """Return the first three names as text, with the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(short_repr(name).strip("'") for name in names[:3]) + more
