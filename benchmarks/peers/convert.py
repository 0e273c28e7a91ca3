"""Convert a checkpoint in Meta's layout to the file format of a peer, unless the converted files exist.

    python -m peers.convert '{"peer": "llama.cpp:Q8_0", ...}'    # a peers.Job; started by speed.py

Prints {"bytes": N} to stderr. N is the size of all weights that a decode step reads, which are all but the embedding.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import sentencepiece
import torch
from common import print_figures

from llama import ModelArgs
from llama.quantization.weight import FORMATS, OUTPUT_FORMAT, bytes_per_weight
from peers import GGUF_TYPES, Job

WEIGHT_NAMES = {  # name of a weight in Meta's checkpoints: (name in transformers, name in llama.cpp)
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


def convert_name(name: str, column: int) -> str:
    """Convert Meta's name of a weight to the name in transformers (column 0) or in llama.cpp (column 1)."""
    parts = name.removesuffix(".weight").split(".")
    layer = ""
    if parts[0] == "layers":
        layer, parts = ("model.layers.", "blk.")[column] + parts[1] + ".", parts[2:]
    return f"{layer}{WEIGHT_NAMES['.'.join(parts)][column]}.weight"


def pairs_to_halves(w: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Reorder the rows of wq or wk (heads * hd, dim) for the rotary embedding of transformers.

    The rotary embedding rotates pairs of values of a head. In Meta's code, a pair is two adjacent values. In transformers, a
    pair is one value of the first half of the head, and the value at the same place in the second half.
    """
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
    rotated = {"wq": args.n_heads, "wk": args.kv_heads}
    state = {}
    for name, w in weights.items():
        n_heads = rotated.get(name.split(".")[-2])
        state[convert_name(name, 0)] = (pairs_to_halves(w, n_heads) if n_heads else w).to(dtype)
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder, max_shard_size="2GB")


def write_gguf(weights: Weights, args: ModelArgs, dtype: torch.dtype, path: Path, tokenizer: str | None = None) -> None:
    """Write a GGUF file without a vocabulary, because the benchmarks give tokens to llama.cpp, not text.

    llama-server needs a vocabulary: that of the SentencePiece model `tokenizer`.
    The rows of wq and wk keep their order, because llama.cpp rotates adjacent pairs of values, as Meta's code does.
    """
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
    if tokenizer:
        pieces = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
        tokens = range(pieces.vocab_size())
        writer.add_tokenizer_model("llama")
        writer.add_token_list([pieces.id_to_piece(token) for token in tokens])
        writer.add_token_scores([pieces.get_score(token) for token in tokens])
        kinds = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE
        writer.add_token_types([kinds[pieces.is_control(token) + 2 * pieces.is_byte(token)] for token in tokens])
        writer.add_bos_token_id(pieces.bos_id())
        writer.add_eos_token_id(pieces.eos_id())
    else:
        writer.add_tokenizer_model("no_vocab")
    stored = {name: w.to(dtype if w.ndim == 2 else torch.float32).contiguous() for name, w in weights.items()}
    for name, w in stored.items():
        gguf_type = gguf.GGMLQuantizationType[GGUF_TYPES[str(w.dtype).removeprefix("torch.")]]
        raw = w.view(torch.uint8).numpy()
        writer.add_tensor_info(convert_name(name, 1), raw.shape, raw.dtype, raw.nbytes, gguf_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for w in stored.values():
        writer.write_tensor_data(w.view(torch.uint8).numpy())
    writer.close()


def quantize(source: str, path: Path, type_: str, threads: int) -> None:
    """Quantize a GGUF file with llama.cpp's own function, as users of llama.cpp do."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_}")
    if llama_cpp.llama_model_quantize(source.encode(), str(path).encode(), params):
        raise SystemExit(f"llama.cpp cannot quantize {source} to {type_}")


def write_ctranslate2(hf: str, folder: Path, vocab_size: int, quantization: str | None) -> None:
    """Convert a model folder in Hugging Face's format to a folder for CTranslate2, with CTranslate2's own converter.

    CTranslate2 takes tokens as strings. The vocabulary is replaced, so that the string of token 5 is "5".
    """
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_tokenizer(self, *_: object, **__: object) -> SimpleNamespace:
            vocab = {str(token): token for token in range(vocab_size)}
            return SimpleNamespace(get_vocab=lambda: vocab, unk_token="0", bos_token="1", eos_token="2")

    Converter(hf, low_cpu_mem_usage=True).convert(str(folder), quantization=quantization)


def write_once(path: str, write: Callable[[Path], None]) -> None:
    """Write a file or a folder, unless it exists.

    The file or folder has a temporary name until it is complete, so that an interrupted run leaves no incomplete one.
    """
    if not Path(path).exists():
        part = Path(f"{path}.part")
        shutil.rmtree(part, ignore_errors=True)
        write(part)
        os.replace(part, path)


def convert(job: Job, weights: Weights, args: ModelArgs) -> None:
    """Write the files that the peer of a job loads, and intermediate files of the conversion, unless they exist."""
    paths = {"transformers": job.hf, "llama.cpp": job.gguf, "openvino": job.openvino, "ctranslate2": job.ctranslate2}
    if job.library not in paths or Path(paths[job.library]).exists():
        return
    dtype = getattr(torch, job.dtype)
    if job.library == "llama.cpp":
        unquantized = Job(**vars(job) | {"peer": "llama.cpp"}).gguf
        write_once(unquantized, lambda part: write_gguf(weights, args, dtype, part))
        write_once(job.gguf, lambda part: quantize(unquantized, part, job.variant, job.threads))
        return
    write_once(job.hf, lambda part: write_hf(weights, args, dtype, part))
    if job.library == "openvino":
        from peers import convert_openvino

        write_once(job.openvino, lambda part: convert_openvino.write(job.hf, part, job.variant))
    if job.library == "ctranslate2":
        write_once(job.ctranslate2, lambda part: write_ctranslate2(job.hf, part, args.vocab_size, job.variant or None))


def gguf_matrix_bytes(path: str) -> int:
    """Return the total size, in bytes, of the matrices that a decode step reads from a GGUF file.

    The embedding counts only if it is also the output layer.
    """
    import gguf

    sizes = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(path).tensors if len(t.shape) == 2}
    return sum(size for name, size in sizes.items() if name != "token_embd.weight" or "output.weight" not in sizes)


def step_bytes(job: Job, weights: Weights) -> int:
    """Return the total size, in bytes, of the weights that a decode step reads in the format of the job's peer."""
    if job.library == "llama.cpp":
        import gguf

        return sum(int(t.n_bytes) for t in gguf.GGUFReader(job.gguf).tensors if t.name != "token_embd.weight")
    if job.library == "openvino":
        from peers import convert_openvino

        return convert_openvino.step_bytes(job.openvino)
    weights = {name: w for name, w in weights.items() if not name.startswith("tok_embeddings")}
    if job.library == "ctranslate2":  # CTranslate2 stores weights in float32, or in int8 with a float32 scale for each row
        is_int8 = job.variant == "int8"
        return sum(w.numel() + 4 * len(w) if is_int8 and w.ndim == 2 else 4 * w.numel() for w in weights.values())
    dtype, matrix_format = getattr(torch, job.dtype), job.quantize if job.quantize in FORMATS else None

    def size(name: str, weight: torch.Tensor) -> float:
        if name.startswith("output"):
            weight_format = matrix_format and OUTPUT_FORMAT
        else:
            weight_format = matrix_format if weight.ndim == 2 else None
        return weight.numel() * bytes_per_weight(weight_format, dtype)

    return round(sum(size(name, w) for name, w in weights.items()))


def read_checkpoint(ckpt: str | Path) -> tuple[Weights, ModelArgs]:
    """Return the weights of a checkpoint with one shard, memory-mapped, and the ModelArgs from its params.json."""
    shards = sorted(Path(ckpt).glob("*.pth"))
    if len(shards) != 1:
        raise SystemExit(f"{ckpt} has {len(shards)} shards; give a checkpoint with one shard")
    stored = torch.load(shards[0], map_location="cpu", weights_only=True, mmap=True)
    weights = {name: w for name, w in stored.items() if name != "rope.freqs"}
    params = json.loads(Path(ckpt, "params.json").read_text())
    return weights, ModelArgs(**params | {"vocab_size": len(weights["tok_embeddings.weight"]), "max_seq_len": 4096})


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    weights, args = read_checkpoint(job.ckpt)
    convert(job, weights, args)
    print_figures(bytes=step_bytes(job, weights))


if __name__ == "__main__":
    main()
