"""What callers may rely on: names, signatures, and the order in which the files build on each other."""

import dataclasses
import importlib
import inspect

import pytest

import llama
from llama import Llama, ModelArgs, Tokenizer, Transformer

NAMES = {
    "llama": "Llama Dialog ModelArgs Transformer Tokenizer",
    "llama.generation": "Llama ModelArgs Transformer Tokenizer Role Message Dialog CompletionPrediction ChatPrediction "
    "InfillingPrediction B_INST E_INST B_SYS E_SYS SPECIAL_TAGS UNSAFE_ERROR sample_top_p",
    "llama.model": "ModelArgs RMSNorm precompute_freqs_cis reshape_for_broadcast apply_rotary_emb repeat_kv Attention "
    "FeedForward TransformerBlock Transformer",
    "llama.tokenizer": "Tokenizer",
}
OPTIONS = "*, top_k=0, min_p=0.0, repetition_penalty=1.0, seed=None"
SIGNATURES = {
    Llama.build: "ckpt_dir, tokenizer_path, max_seq_len=512, max_batch_size=8, model_parallel_size=None, seed=1, "
    "*, device=None, dtype=None, compile=False, quantize=None, backend='auto'",
    Llama.__init__: "self, model, tokenizer, backend=None",
    Llama.generate: "self, prompt_tokens, max_gen_len, temperature=0.6, top_p=0.9, logprobs=False, echo=False, "
    + OPTIONS
    + ", stop_token=None",
    Llama.generate_stream: "self, prompt_tokens, max_gen_len, temperature=0.6, top_p=0.9, logprobs=False, echo=False, "
    + OPTIONS,
    Llama.text_completion: "self, prompts, temperature=0.6, top_p=0.9, max_gen_len=None, logprobs=False, echo=False, "
    + OPTIONS
    + ", stop=(), details=False",
    Llama.chat_completion: "self, dialogs, temperature=0.6, top_p=0.9, max_gen_len=None, logprobs=False, "
    + OPTIONS
    + ", stop=(), details=False",
    Llama.text_completion_stream: "self, prompt, temperature=0.6, top_p=0.9, max_gen_len=None, "
    + OPTIONS
    + ", stop=(), reuse=False",
    Llama.chat_completion_stream: "self, dialog, temperature=0.6, top_p=0.9, max_gen_len=None, "
    + OPTIONS
    + ", stop=(), reuse=False",
    Llama.text_infilling: "self, prefixes, suffixes, temperature=0.6, top_p=0.9, max_gen_len=None, logprobs=False, "
    "suffix_first=False",
    Llama.score: "self, prompts, continuations",
    Transformer.__init__: "self, params",
    Transformer.forward: "self, tokens, start_pos",
    llama.model.TransformerBlock.__init__: "self, layer_id, args",
    llama.model.TransformerBlock.forward: "self, x, start_pos, freqs_cis, mask",
    llama.model.Attention.__init__: "self, args",
    llama.model.Attention.forward: "self, x, start_pos, freqs_cis, mask",
    llama.model.FeedForward.__init__: "self, dim, hidden_dim, multiple_of, ffn_dim_multiplier",
    llama.model.FeedForward.forward: "self, x",
    Tokenizer.__init__: "self, model_path",
    Tokenizer.encode: "self, s, bos, eos",
    Tokenizer.decode: "self, ids",
    llama.model.RMSNorm.__init__: "self, dim, eps=1e-06",
    llama.model.precompute_freqs_cis: "dim, end, theta=10000.0",
    llama.model.reshape_for_broadcast: "freqs_cis, x",
    llama.model.apply_rotary_emb: "xq, xk, freqs_cis",
    llama.model.repeat_kv: "x, n_rep",
    llama.sampling.sample_top_p: "probs, p",
}


@pytest.mark.parametrize("module", NAMES)
def test_names(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signatures(function: object) -> None:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    got = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    assert got == f"({SIGNATURES[function]})"


def test_model_args() -> None:
    fields = {f.name: f.default for f in dataclasses.fields(ModelArgs)}
    assert list(fields.items()) == [
        ("dim", 4096), ("n_layers", 32), ("n_heads", 32), ("n_kv_heads", None), ("vocab_size", -1), ("multiple_of", 256),
        ("ffn_dim_multiplier", None), ("norm_eps", 1e-5), ("max_batch_size", 32), ("max_seq_len", 2048),
        ("rope_theta", 10000.0),
    ]  # fmt: skip


def test_tags_and_the_error() -> None:
    from llama import generation as g

    assert (g.B_INST, g.E_INST, g.B_SYS, g.E_SYS) == ("[INST]", "[/INST]", "<<SYS>>\n", "\n<</SYS>>\n\n")
    assert g.SPECIAL_TAGS == ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
    assert g.UNSAFE_ERROR == "Error: special tags are not allowed as part of the prompt."
