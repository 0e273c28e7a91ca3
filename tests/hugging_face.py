"""Write models in Hugging Face's layout, and build them on any number of ranks.

hugging_face.py OUT.pt TOKENIZER CKPT[::ADAPTER] [CKPT[::ADAPTER] ...]

Run as a program, build each checkpoint as stored, in int8 and in int4, with its adapter if one is given, and write the logits
of rank 0 to a file.
"""

import itertools
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llama import Llama
from llama.checkpoint.safetensors_file import DTYPE_CODES

FORMATS = (None, "int8", "int4")
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]
HEAD_DIM = 8  # of the small model in conftest.py
NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head", "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def hugging_face_name(name: str) -> str:
    """Return Hugging Face's name for Meta's name of a weight."""
    module = name.removesuffix(".weight")
    if not module.startswith("layers."):
        return f"{NAMES[module]}.weight"
    _, layer, module = module.split(".", 2)
    return f"model.layers.{layer}.{NAMES[module]}.weight"


def hugging_face_weights(weights: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    """Return weights by Hugging Face's names, with the rows of wq and wk in its order: of each head, first all even ones."""
    renamed = {}
    for name, weight in weights.items():
        if name.endswith(("wq.weight", "wk.weight")):
            heads = weight.split(head_dim)
            weight = torch.cat([rows for head in heads for rows in (head[0::2], head[1::2])])
        renamed[hugging_face_name(name)] = weight
    return renamed


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: Any = None, align: int = 8) -> Path:
    """Write tensors in the safetensors format. The values begin at a multiple of `align` bytes."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        values = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(values)]
        header[name] = {"dtype": DTYPE_CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += values
    return write_header(path, header, data, align)


def write_header(path: Path, header: Any, data: bytes = b"", align: int = 8) -> Path:
    """Write a safetensors file with this header: an object, or text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % align)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_hugging_face(
    folder: Path,
    params: dict[str, Any],
    weights: dict[str, torch.Tensor],
    n_files: int = 1,
    suffix: str = "safetensors",
    **config: Any,
) -> Path:
    """Write a folder in Hugging Face's layout with the weights of a model, and with changes to its config.json.

    params: the contents of Meta's params.json. n_files: with more than one, an index is written. suffix: safetensors or bin.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dim, n_heads = params["dim"], params["n_heads"]
    defaults = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": dim, "num_attention_heads": n_heads,
        "num_key_value_heads": params.get("n_kv_heads", n_heads), "num_hidden_layers": params["n_layers"],
        "intermediate_size": len(weights["layers.0.feed_forward.w1.weight"]), "rms_norm_eps": params["norm_eps"],
        "vocab_size": len(weights["tok_embeddings.weight"]), "hidden_act": "silu", "tie_word_embeddings": False,
        "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 2048,
    }  # fmt: skip
    values = {key: value for key, value in {**defaults, **config}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    tensors = list(hugging_face_weights(weights, config.get("head_dim") or dim // n_heads).items())
    if config.get("tie_word_embeddings"):
        tensors = [(name, tensor) for name, tensor in tensors if name != "lm_head.weight"]
    stem, weight_map = "model" if suffix == "safetensors" else "pytorch_model", {}
    per_file = math.ceil(len(tensors) / n_files)
    for i in range(n_files):
        part = tensors[i * per_file : (i + 1) * per_file]
        name = f"{stem}-{i + 1:05d}-of-{n_files:05d}.{suffix}" if n_files > 1 else f"{stem}.{suffix}"
        weight_map |= {tensor: name for tensor, _ in part}
        if suffix == "safetensors":
            write_safetensors(folder / name, dict(part), {"format": "pt"})
        else:
            torch.save({name: tensor.clone() for name, tensor in part}, folder / name)
    if n_files > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def random_pairs(modules: list[str], weights: Tensors, rank: int | dict[str, int] = 4) -> Tensors:
    """Return the tensors of an adapter for these modules, by PEFT's names. weights: the model's, by Hugging Face's names."""
    tensors, g = {}, torch.Generator().manual_seed(3)
    for module in modules:
        out, inputs = weights[f"{module}.weight"].shape
        r = rank if isinstance(rank, int) else rank[module]
        for name, shape in (("A", (r, inputs)), ("B", (out, r))):
            if module == "model.embed_tokens":
                tensors[f"base_model.model.{module}.lora_embedding_{name}"] = torch.randn(*shape[::-1], generator=g) * 0.1
            else:
                tensors[f"base_model.model.{module}.lora_{name}.weight"] = torch.randn(shape, generator=g) * 0.1
    if "base_model.model.model.embed_tokens.lora_embedding_A" in tensors:  # its matrices are those of the transposed weight
        halves = [tensors[f"base_model.model.model.embed_tokens.lora_embedding_{name}"] for name in "BA"]
        tensors |= {f"base_model.model.model.embed_tokens.lora_embedding_{n}": t for n, t in zip("AB", halves, strict=True)}
    return tensors


def write_adapter(folder: Path, tensors: Tensors, suffix: str = "safetensors", **config: Any) -> Path:
    """Write an adapter in PEFT's layout."""
    folder.mkdir(exist_ok=True)
    defaults = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": sorted({n.split(".")[-3] for n in tensors}),
        "bias": "none", "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True, "rank_pattern": {},
        "alpha_pattern": {}, "modules_to_save": None, "megatron_core": "megatron.core", "qalora_group_size": 16,
        "base_model_name_or_path": "someone/model", "task_type": "CAUSAL_LM", "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(defaults | config))
    if suffix == "safetensors":
        write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    else:
        torch.save(tensors, folder / "adapter_model.bin")
    return folder


def write_with_tokenizer(small: SimpleNamespace, root: Path) -> Path:
    """Write the fixture `small` into the folder root/hf, in one file, with its tokenizer in `root`; return the folder."""
    shutil.copy(small.tokenizer_path, root / "tokenizer.model")
    return write_hugging_face(root / "hf", small.params, small.weights)


def build(folder: Path, **options: Any) -> Llama:
    return Llama.build(folder, **{"max_seq_len": 32, "max_batch_size": 2, "device": "cpu"} | options)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logits(folder: str | Path, tokenizer_path: str | Path, **options: Any) -> torch.Tensor:
    """Build a model, and return its logits of some tokens after a prefill and a decode step of the engine, and of the model."""
    llama = Llama.build(folder, tokenizer_path, 32, 2, device="cpu", **options)
    tokens = torch.arange(3, 33).view(2, 15)
    answers = torch.tensor(llama.generate(tokens.tolist(), 4, temperature=0, logprobs=True)[1])
    return torch.cat([llama.model.forward(tokens, 0).flatten(), answers.flatten()])


if __name__ == "__main__":
    out, tokenizer, *folders = sys.argv[1:]
    results = {}
    for folder, format in itertools.product(folders, FORMATS):
        ckpt_dir, _, adapter = folder.partition("::")
        results[folder, format] = logits(ckpt_dir, tokenizer, quantize=format, adapter=adapter or None)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(results, out)
