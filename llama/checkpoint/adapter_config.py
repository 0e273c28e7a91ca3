"""Read `adapter_config.json` of a LoRA adapter in PEFT's layout; refuse other adapters than plain LoRA."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, check_path, short_repr
from .params import MAX_PARAMS_BYTES, MERGE_WITH_PEFT, list_folder, read_json

CONFIG = "adapter_config.json"
# For each setting of another kind of adapter: the values that change nothing here, and what it means.
_LORA_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_dora": ((), "DoRA scales the columns of the merged weights"),
    "bias": (("none",), "the adapter trains biases, and the layers of Llama have none"),
    "lora_bias": ((), "the adapter adds biases, and the layers of Llama have none"),
    "fan_in_fan_out": ((), "the weights are transposed, and those of Llama are not"),
    "init_lora_weights": (
        (True, "gaussian", "orthogonal", "eva"),
        "the training began from changed weights of the base model, which the adapter does not contain",
    ),
    "layer_replication": ((), "layers are used several times"),
    "alora_invocation_tokens": ((), "the adapter is active only after some tokens"),
    "trainable_token_indices": ((), "single rows of the embedding are replaced"),
    "target_parameters": ((), "parameters of experts are adapted, and Llama has no experts"),
}  # fmt: skip
# Settings that are obeyed, and those of the training, which change nothing in the merged weights.
_KNOWN = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "modules_to_save",
    "layers_to_transform", "layers_pattern", "lora_dropout", "task_type", "base_model_name_or_path", "revision",
    "inference_mode", "auto_mapping", "peft_version", "megatron_core", "runtime_config", "eva_config", "ensure_weight_tying",
    "qalora_group_size",  # without use_qalora, which is refused, it changes nothing
}  # fmt: skip
MAX_RANK = 1 << 16


def check_adapter_folder(adapter: Any) -> Path:
    """Return the folder of an adapter as a path. Raise CheckpointError unless it is a folder with adapter_config.json."""
    folder = check_path(adapter, "adapter", f"an adapter's folder, with {CONFIG} and adapter_model.safetensors", folder=True)
    names = list_folder(folder)
    if CONFIG not in names:
        inside = [name for name in names if (folder / name / CONFIG).is_file()]
        hint = f"; give one of the folders in it: {', '.join(inside[:8])}" if inside else ""
        raise CheckpointError(f"{folder}: no {CONFIG}, so it contains no adapter in PEFT's layout{hint}")
    return folder


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the contents of a folder's adapter_config.json, without keys whose value is null.

    Raises CheckpointError for any bad value, and for an adapter that is not merged here.
    """
    path = folder / CONFIG
    config = {key: value for key, value in read_json(path, MAX_PARAMS_BYTES).items() if value is not None}
    _check_kind(path, config)
    requirements = (
        ("r", _is_rank, f"a whole number from 1 to {MAX_RANK:,}"),
        ("lora_alpha", _is_number, "a number"),
        ("use_rslora", lambda v: isinstance(v, bool), "true or false"),
        ("target_modules", _is_names_or_text, "a list of modules, or a regular expression"),
        ("exclude_modules", _is_names_or_text, "a list of modules, or a regular expression"),
        ("modules_to_save", _is_names, "a list of modules"),
        ("layers_to_transform", lambda v: all(map(_is_layer, v if isinstance(v, list) else [v])), "a list of layers"),
        ("layers_pattern", lambda v: v in ("layers", ["layers"], "", []), '"layers"'),
        ("rank_pattern", lambda v: _is_pattern(v, _is_rank), "an object from modules to ranks"),
        ("alpha_pattern", lambda v: _is_pattern(v, _is_number), "an object from modules to numbers"),
    )
    for key, is_valid, requirement in requirements:
        if key in config and not is_valid(config[key]):
            raise CheckpointError(f"{path}: {key} is {short_repr(config[key])}; it must be {requirement}: {MERGE_WITH_PEFT}")
    return {"r": 8, "lora_alpha": 8} | config


def _check_kind(path: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError unless an adapter is of the kind that is merged here."""
    if config.get("peft_type") != "LORA":
        kind = short_repr(config.get("peft_type"))
        raise CheckpointError(f"{path}: peft_type is {kind}; only 'LORA' is merged here: {MERGE_WITH_PEFT}")
    for key, value in config.items():
        allowed, meaning = _LORA_ONLY.get(key, ((), "this setting is not known here"))
        is_unset = value is False or value in ("", [], {}) or (key in _LORA_ONLY and value == 0)
        if not is_unset and key not in _KNOWN and value not in allowed:
            raise CheckpointError(f"{path}: {key} is {short_repr(value)}: {meaning}; {MERGE_WITH_PEFT}")


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_layer(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # also False for NaN


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_names_or_text(value: Any) -> bool:
    return _is_names(value) or isinstance(value, str)


def _is_pattern(value: Any, is_valid: Any) -> bool:
    """Return True for an object whose keys are names of modules, not other regular expressions."""
    # PEFT takes the keys as regular expressions. Matching those of a hostile file could take for ever.
    names = isinstance(value, dict) and all(re.fullmatch(r"\^?(\w|\\?\.)+", key) for key in value)
    return names and all(map(is_valid, value.values()))


def ends_with_name(module: str, name: str) -> bool:
    """Return True if a module has a name, or if its name ends with it after a dot."""
    return module == name or module.endswith(f".{name}")


def _matches(module: str, pattern: str) -> bool:
    """Return True if a key of rank_pattern or alpha_pattern names a module."""
    name = pattern.replace("\\.", ".")
    return module == name[1:] if name.startswith("^") else ends_with_name(module, name)


def check_patterns(config: dict[str, Any], modules: Iterable[str], path: Path) -> None:
    """Raise CheckpointError if a key of rank_pattern or alpha_pattern names none of a model's modules."""
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(setting, {}):
            if not any(_matches(module, pattern) for module in modules):
                raise CheckpointError(
                    f"{path}: {setting} names {short_repr(pattern)}, which the model lacks: "
                    "the adapter belongs to another model; give that model's folder"
                )


def rank_and_scale(config: dict[str, Any], module: str) -> tuple[int, float]:
    """Return the rank of a module's pair of matrices, and the factor of their product. module: Hugging Face's name."""

    def of_pattern(key: str, default: Any) -> Any:
        return next((value for pattern, value in config.get(key, {}).items() if _matches(module, pattern)), default)

    rank, alpha = of_pattern("rank_pattern", config["r"]), of_pattern("alpha_pattern", config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def targets(config: dict[str, Any], modules: list[str], path: Path) -> set[str] | None:
    """Return those of a model's modules with matrices that an adapter must adapt; None if a regular expression names them.

    A regular expression of a file is never matched, since that could take for ever. Raises CheckpointError for a target that
    the model lacks.
    """
    names, excluded = config.get("target_modules", []), config.get("exclude_modules", [])
    layers = config.get("layers_to_transform", [])
    layers = layers if isinstance(layers, list) else [layers]
    if names == "all-linear":
        names = sorted({module.rpartition(".")[2] for module in modules if ".layers." in module})
    if isinstance(names, str) or (isinstance(excluded, str) and excluded):
        return None
    for name in names:
        if not any(ends_with_name(module, name) for module in modules):
            raise CheckpointError(
                f"{path}: target_modules names {short_repr(name)}, which the model lacks: "
                "the adapter belongs to another model; give that model's folder"
            )
    numbers = [module.split(".")[2] for module in modules if ".layers." in module]
    if lacking := [layer for layer in layers if str(layer) not in numbers]:
        raise CheckpointError(
            f"{path}: layers_to_transform names {lacking[0]}, and the model has {len(set(numbers))} layers: "
            "the adapter belongs to another model; give that model's folder"
        )
    return {
        module
        for module in modules
        if any(ends_with_name(module, name) for name in names)
        and not any(ends_with_name(module, name) for name in excluded)
        and (not layers or (".layers." in module and int(module.split(".")[2]) in layers))
    }
