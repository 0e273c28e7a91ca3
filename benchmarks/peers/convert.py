"""A checkpoint in Meta's layout, written anew as each peer wants it: the same weights, once.

    python -m peers.convert '{"peer": "llama.cpp:Q8_0", ...}'    # a peers.Job; started by speed.py

Reports {"bytes": of all weights that a decode step reads}: all but the embedding.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from common import report

from llama import ModelArgs
from llama.quantization.weight import FORMATS, OUTPUT_FORMAT, bytes_per_weight
from peers import GGUF_TYPES, Job

NAMES = {  # Meta's: transformers', llama.cpp's
    "tok_embeddings": ("model.embed_tokens", "token_embd"),
    "attention.wq": ("self_attn.q_proj", "attn_q"),
    "attention.wk": ("self_attn.k_proj", "attn_k"),
    "attention.wv": ("self_attn.v_proj", "attn_v"),
    "attention.wo": ("self_attn.o_proj", "attn_output"),
    "feed_forward.w1": ("mlp.gate_proj", "ffn_gate"),
    "feed_forward.w2": ("mlp.down_proj", "ffn_down"),
    "feed_forward.w3": ("mlp.up_proj", "ffn_up"),
    "attention_norm": ("input_layernorm", "attn_norm"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
    "norm": ("model.norm", "output_norm"),
    "output": ("lm_head", "output"),
}
Weights = dict[str, torch.Tensor]


def renamed(name: str, column: int) -> str:
    """Meta's name of a weight as transformers (0) or llama.cpp (1) has it."""
    parts = name.removesuffix(".weight").split(".")
    layer = ""
    if parts[0] == "layers":
        layer, parts = ("model.layers.", "blk.")[column] + parts[1] + ".", parts[2:]
    return f"{layer}{NAMES['.'.join(parts)][column]}.weight"


def halves(w: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of wq or wk (heads * hd, dim) from adjacent pairs, as Meta turns them, to two halves, as transformers does."""
    return w.view(n_heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def write_hf(weights: Weights, args: ModelArgs, dtype: torch.dtype, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=len(weights["layers.0.feed_forward.w1.weight"]),
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.max_seq_len,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        dtype=dtype,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    turned = {"wq": args.n_heads, "wk": args.kv_heads}
    state = {}
    for name, w in weights.items():
        n_heads = turned.get(name.split(".")[-2])
        state[renamed(name, 0)] = (halves(w, n_heads) if n_heads else w).to(dtype)
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder, max_shard_size="2GB")


def write_gguf(weights: Weights, args: ModelArgs, dtype: torch.dtype, path: Path) -> None:
    """llama.cpp turns adjacent pairs, as Meta does: no row moves. It gets ids alone, and so no vocabulary but its size."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(args.max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(len(weights["layers.0.feed_forward.w1.weight"]))
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_vocab_size(args.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    stored = {name: w.to(dtype if w.ndim == 2 else torch.float32).contiguous() for name, w in weights.items()}
    for name, w in stored.items():
        kind = gguf.GGMLQuantizationType[GGUF_TYPES[str(w.dtype).removeprefix("torch.")]]
        raw = w.view(torch.uint8).numpy()
        writer.add_tensor_info(renamed(name, 1), raw.shape, raw.dtype, raw.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for w in stored.values():
        writer.write_tensor_data(w.view(torch.uint8).numpy())
    writer.close()


def quantize(source: str, path: Path, type_: str, threads: int) -> None:
    """By llama.cpp itself, as its users have it."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_}")
    if llama_cpp.llama_model_quantize(source.encode(), str(path).encode(), params):
        raise SystemExit(f"llama.cpp does not quantize {source} to {type_}")


def write_ctranslate2(hf: str, folder: Path, vocab_size: int, quantization: str | None) -> None:
    """By its own converter, but for the vocabulary: CTranslate2 takes tokens by their names, and ids are all that we have."""
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_tokenizer(self, *_: object, **__: object) -> SimpleNamespace:
            vocab = {str(id_): id_ for id_ in range(vocab_size)}
            return SimpleNamespace(get_vocab=lambda: vocab, unk_token="0", bos_token="1", eos_token="2")

    Converter(hf, low_cpu_mem_usage=True).convert(str(folder), quantization=quantization)


def once(path: str, write: Callable[[Path], None]) -> None:
    """Write a file or a folder, unless it is there. A part that an interrupted run left is not taken for the whole."""
    if not Path(path).exists():
        part = Path(f"{path}.part")
        shutil.rmtree(part, ignore_errors=True)
        write(part)
        os.replace(part, path)


def convert(job: Job, weights: Weights, args: ModelArgs) -> None:
    """Write what the job's peer reads, unless it is there, and what that is made from."""
    read = {"transformers": job.hf, "llama.cpp": job.gguf, "openvino": job.openvino, "ctranslate2": job.ctranslate2}
    if job.kind not in read or Path(read[job.kind]).exists():
        return
    dtype = getattr(torch, job.dtype)
    if job.kind == "llama.cpp":
        plain = Job(**vars(job) | {"peer": "llama.cpp"}).gguf
        once(plain, lambda part: write_gguf(weights, args, dtype, part))
        once(job.gguf, lambda part: quantize(plain, part, job.variant, job.threads))
        return
    once(job.hf, lambda part: write_hf(weights, args, dtype, part))
    if job.kind == "openvino":
        from peers import convert_openvino

        once(job.openvino, lambda part: convert_openvino.write(job.hf, part, job.variant))
    if job.kind == "ctranslate2":
        once(job.ctranslate2, lambda part: write_ctranslate2(job.hf, part, args.vocab_size, job.variant or None))


def matrix_bytes(path: str) -> int:
    """Return the bytes of all matrices in a GGUF file that a step reads: the embedding only if it is the output layer, too."""
    import gguf

    sizes = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(path).tensors if len(t.shape) == 2}
    return sum(size for name, size in sizes.items() if name != "token_embd.weight" or "output.weight" not in sizes)


def step_bytes(job: Job, weights: Weights) -> int:
    if job.kind == "llama.cpp":
        import gguf

        return sum(int(t.n_bytes) for t in gguf.GGUFReader(job.gguf).tensors if t.name != "token_embd.weight")
    if job.kind == "openvino":
        from peers import convert_openvino

        return convert_openvino.step_bytes(job.openvino)
    read = {name: w for name, w in weights.items() if not name.startswith("tok_embeddings")}
    if job.kind == "ctranslate2":  # float32 as it is loaded, or int8 with a scale for each row
        packed = job.variant == "int8"
        return sum(w.numel() + 4 * len(w) if packed and w.ndim == 2 else 4 * w.numel() for w in read.values())
    dtype, kind = getattr(torch, job.dtype), job.quantize if job.quantize in FORMATS else None

    def size(name: str, weight: torch.Tensor) -> float:
        of_its_own = kind and OUTPUT_FORMAT if name.startswith("output") else None if weight.ndim == 1 else kind
        return weight.numel() * bytes_per_weight(of_its_own, dtype)

    return round(sum(size(name, w) for name, w in read.items()))


def read(ckpt: str | Path) -> tuple[Weights, ModelArgs]:
    """Map the only shard of a checkpoint."""
    shards = sorted(Path(ckpt).glob("*.pth"))
    if len(shards) != 1:
        raise SystemExit(f"{ckpt} has {len(shards)} shards; the benchmark measures checkpoints of one")
    stored = torch.load(shards[0], map_location="cpu", weights_only=True, mmap=True)
    weights = {name: w for name, w in stored.items() if name != "rope.freqs"}
    params = json.loads(Path(ckpt, "params.json").read_text())
    return weights, ModelArgs(**params | {"vocab_size": len(weights["tok_embeddings.weight"]), "max_seq_len": 4096})


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    weights, args = read(job.ckpt)
    convert(job, weights, args)
    report(bytes=step_bytes(job, weights))


if __name__ == "__main__":
    main()
