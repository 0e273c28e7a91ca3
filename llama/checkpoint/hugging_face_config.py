"""Read `config.json` of a model in Hugging Face's layout as arguments of ModelArgs; refuse what is not Llama's architecture."""

from pathlib import Path
from typing import Any

from ..errors import CheckpointError, describe, short_repr
from ..model import ffn_width
from .params import LLAMA_3, LLAMA_3_VOCAB_SIZE, MAX_PARAMS_BYTES, check_heads, check_value, read_json

INSTEAD = "run such a model with transformers or vLLM"
UNQUANTIZED = "take the model's folder in bfloat16 or float16, and give quantize='int8' or 'int4'"
# For each key of config.json: the key of params.json that has the same meaning, and the value of transformers if it is missing.
_REQUIRED = object()
_KEYS: dict[str, tuple[str, Any]] = {
    "hidden_size": ("dim", _REQUIRED), "num_hidden_layers": ("n_layers", _REQUIRED),
    "num_attention_heads": ("n_heads", _REQUIRED), "intermediate_size": ("multiple_of", _REQUIRED),
    "vocab_size": ("vocab_size", _REQUIRED), "num_key_value_heads": ("n_kv_heads", None),
    "head_dim": ("attention_head_dim", None), "rms_norm_eps": ("norm_eps", 1e-6),
}  # fmt: skip
# What other architectures and formats set, the values that are Llama's, and what the key means.
_LLAMA_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "the feed-forward's activation"),
    "attention_bias": ((False,), "the attention's matrices have biases"),
    "mlp_bias": ((False,), "the feed-forward's matrices have biases"),
    "bias": ((False,), "the matrices have biases"),
    "sliding_window": ((0,), "attention is limited to a window"),
    "partial_rotary_factor": ((1,), "only a part of each head is rotated"),
    "auto_map": (({},), "the model has code of its own, which is never run"),
}
_ROPE_TYPES = ("default", "linear", "dynamic")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the contents of a folder's `config.json` as arguments of ModelArgs.

    Raises CheckpointError for any bad value, and for a model that is not of Llama's architecture.
    """
    path = folder / "config.json"
    config = read_json(path, MAX_PARAMS_BYTES)
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder}: it contains a model (config.json) and an adapter (adapter_config.json): move the adapter into a folder "
            "of its own and give that as adapter; if it is merged already, delete adapter_config.json"
        )
    _check_architecture(path, config)
    params: dict[str, Any] = {}
    for key, (name, default) in _KEYS.items():
        value = config.get(key)
        value = default if value is None else value
        if value is _REQUIRED:
            raise CheckpointError(f"{path}: no {key}; fetch it again")
        if value is not None:
            check_value(path, key, name, value)
            params[name] = value
    rope = _rope(path, config)
    params["rope_theta"] = rope.get("rope_theta", config.get("rope_theta") or 10000.0)
    check_value(path, "rope_theta", "rope_theta", params["rope_theta"])
    if _rope_type(rope) == "linear":
        params["rope_scale"] = rope.get("factor")
        check_value(path, "the factor of linear rope_scaling", "rope_scale", params["rope_scale"])
    if params["vocab_size"] == LLAMA_3_VOCAB_SIZE:
        raise CheckpointError(f"{path} {LLAMA_3}")
    _set_width(params)
    check_heads(path, params)
    return params


def _check_architecture(path: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError if a model is not of Llama's architecture, or if its weights are quantized."""
    model_type = config.get("model_type")
    if model_type != "llama":
        raise CheckpointError(f"{path}: model_type is {short_repr(model_type)}; supported is 'llama': {INSTEAD}")
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if architectures not in (["LlamaForCausalLM"], ["LLaMAForCausalLM"]):
        raise CheckpointError(f"{path}: architectures is {short_repr(architectures)}; supported is LlamaForCausalLM: {INSTEAD}")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{path}: quantization_config, the weights are stored in a quantized format ({short_repr(method)}), which is not "
            f"read; {UNQUANTIZED}"
        )
    for key, (allowed, meaning) in _LLAMA_ONLY.items():
        value = config.get(key)
        if value is not None and value not in allowed:
            raise CheckpointError(f"{path}: {key} is {short_repr(value)}: {meaning}, and Llama has no such thing: {INSTEAD}")
    if (tied := config.get("tie_word_embeddings")) not in (None, True, False):
        raise CheckpointError(f"{path}: tie_word_embeddings is {describe(tied)}; it must be true or false")


def _rope(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary embedding's parameters. Raise CheckpointError if they are of a type that is not supported."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"  # the names before and since transformers 5
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: {key} is {describe(rope)}; it must be an object, or null")
    if _rope_type(rope) not in _ROPE_TYPES:
        raise CheckpointError(
            f"{path}: {key} is of the type {short_repr(_rope_type(rope))}; supported are 'linear' and, up to "
            f"max_position_embeddings, 'dynamic': {INSTEAD}"
        )
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise CheckpointError(f"{path}: {key} rotates only a part of each head, which Llama does not: {INSTEAD}")
    return rope


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type") or rope.get("type") or "default"


def _set_width(params: dict[str, Any]) -> None:
    """Turn `multiple_of`, which holds the feed-forward's width, into keys of params.json from which this width is computed."""
    width, computed = params["multiple_of"], int(2 * 4 * params["dim"] / 3)
    if ffn_width(4 * params["dim"], 256, None) == width:
        params["multiple_of"] = 256  # as in Meta's own files
    elif width < computed:
        params["ffn_dim_multiplier"] = width / computed  # the product, rounded up to a multiple of the width, is the width


def notes(folder: Path, max_seq_len: int) -> list[str]:
    """Return a line about each setting in a folder that this library does not follow.

    Raises CheckpointError if the model's rotary embedding depends on the length of contexts as long as max_seq_len ("dynamic").
    """
    lines = [_context_note(folder, max_seq_len)]
    return [f"llama: {line}" for line in lines if line]


def _context_note(folder: Path, max_seq_len: int) -> str | None:
    """Return a note that a context is longer than those of the model's training; None if it is not."""
    path, trained = folder / "config.json", trained_context(folder)
    if max_seq_len <= trained:
        return None
    config = read_json(path, MAX_PARAMS_BYTES)
    if _rope_type(_rope(path, config)) == "dynamic":
        raise CheckpointError(
            f"{path}: the rotary embedding is 'dynamic', which rotates all positions anew when the context grows beyond "
            f"{trained:,} tokens, and max_seq_len is {max_seq_len:,}: give max_seq_len={trained}, up to which it is exact; "
            "for longer contexts, use transformers"
        )
    return f"max_seq_len is {max_seq_len:,}, but max_position_embeddings {trained:,}: answers may become poor beyond it"


def trained_context(folder: Path) -> int:
    """Return the number of tokens in the contexts of a model's training."""
    path = folder / "config.json"
    trained = read_json(path, MAX_PARAMS_BYTES).get("max_position_embeddings", 2048)
    check_value(path, "max_position_embeddings", "dim", trained)
    return int(trained)


def describe_rope(folder: Path) -> str:
    """Return text about a model's rotary embedding, as in "theta 10000, linear scaling by 2"."""
    path = folder / "config.json"
    config = read_json(path, MAX_PARAMS_BYTES)
    rope, theta = _rope(path, config), read_config(folder)["rope_theta"]
    if (kind := _rope_type(rope)) == "default":
        return f"theta {theta:g}"
    return f"theta {theta:g}, {kind} scaling by {short_repr(rope.get('factor'))}"
