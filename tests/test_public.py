"""Test the public interface: names, signatures, constants, and the repr of objects."""

import dataclasses
import importlib
import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest

import llama
from llama import InputError, Llama, ModelArgs, Tokenizer, Transformer, validate_options

from .support import assert_raises

NAMES = {
    "llama": "Llama Dialog ModelArgs Transformer Tokenizer",
    "llama.generation": "Llama ModelArgs Transformer Tokenizer Role Message Dialog CompletionPrediction ChatPrediction "
    "InfillingPrediction B_INST E_INST B_SYS E_SYS SPECIAL_TAGS UNSAFE_ERROR sample_top_p",
    "llama.model": "ModelArgs RMSNorm precompute_freqs_cis reshape_for_broadcast apply_rotary_emb repeat_kv Attention "
    "FeedForward TransformerBlock Transformer",
    "llama.tokenizer": "Tokenizer",
}
SHARED = (
    "top_k=0, min_p=0.0, repetition_penalty=1.0, logit_bias=None, seed=None, typical_p=1.0, frequency_penalty=0.0, "
    "presence_penalty=0.0, stop_token_ids=None, ignore_eos=False, min_new_tokens=0, logits_processor=None, speculate=None"
)
SIGNATURES = {
    Llama.build: "ckpt_dir, tokenizer_path=None, max_seq_len=512, max_batch_size=8, model_parallel_size=None, seed=1, "
    "*, device=None, dtype=None, compile=False, quantize=None, backend='auto', adapter=None, speculate=None, draft=None",
    Llama.__init__: "self, model, tokenizer, backend=None",
    Llama.generate: "self, prompt_tokens, max_gen_len, temperature=0.6, top_p=0.9, logprobs=False, echo=False, "
    f"*, stop_token=None, stop=(), {SHARED}, n=1",
    Llama.generate_stream: "self, prompt_tokens, max_gen_len, temperature=0.6, top_p=0.9, logprobs=False, echo=False, "
    f"*, top_logprobs=0, include_eos=False, stop=(), {SHARED}, n=1",
    Llama.text_completion: "self, prompts, temperature=0.6, top_p=0.9, max_gen_len=None, logprobs=False, echo=False, "
    f"*, stop=(), details=False, top_logprobs=0, keep_space=False, {SHARED}, n=1",
    Llama.chat_completion: "self, dialogs, temperature=0.6, top_p=0.9, max_gen_len=None, logprobs=False, "
    f"*, stop=(), details=False, top_logprobs=0, continue_answer=False, {SHARED}, n=1",
    Llama.iter_text_completion: "self, prompts, temperature=0.6, top_p=0.9, max_gen_len=None, "
    f"*, stop=(), keep_space=False, {SHARED}, n=1",
    Llama.iter_chat_completion: "self, dialogs, temperature=0.6, top_p=0.9, max_gen_len=None, "
    f"*, stop=(), continue_answer=False, {SHARED}, n=1",
    Llama.text_completion_stream: "self, prompt, temperature=0.6, top_p=0.9, max_gen_len=None, "
    f"*, stop=(), keep_space=False, {SHARED}",
    Llama.chat_completion_stream: "self, dialog, temperature=0.6, top_p=0.9, max_gen_len=None, "
    f"*, stop=(), continue_answer=False, {SHARED}",
    Llama.text_infilling: "self, prefixes, suffixes, temperature=0.6, top_p=0.9, max_gen_len=None, logprobs=False, "
    "suffix_first=False",
    Llama.score: "self, prompts, continuations, *, top_logprobs=0",
    Llama.hidden_states: "self, texts, layers=None",
    Llama.embed: "self, texts, pooling='mean'",
    Llama.encode_dialog: "self, dialog, continue_answer=False",
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
def test_modules_have_the_references_names(module: str) -> None:
    imported = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(imported, name)] == []


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_public_signatures_are_stable(function: object) -> None:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    assert text == f"({SIGNATURES[function]})"


def test_model_args_have_the_references_fields_and_defaults() -> None:
    fields = {f.name: f.default for f in dataclasses.fields(ModelArgs)}
    assert list(fields.items()) == [
        ("dim", 4096), ("n_layers", 32), ("n_heads", 32), ("n_kv_heads", None), ("vocab_size", -1), ("multiple_of", 256),
        ("ffn_dim_multiplier", None), ("norm_eps", 1e-5), ("max_batch_size", 32), ("max_seq_len", 2048),
        ("rope_theta", 10000.0), ("rope_scale", 1.0), ("attention_head_dim", None),  # these are not the reference's
    ]  # fmt: skip


def test_special_tags_and_the_unsafe_error_are_the_references() -> None:
    from llama import generation

    tags = (generation.B_INST, generation.E_INST, generation.B_SYS, generation.E_SYS)
    assert tags == ("[INST]", "[/INST]", "<<SYS>>\n", "\n<</SYS>>\n\n")
    assert generation.SPECIAL_TAGS == ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
    assert generation.UNSAFE_ERROR == "Error: special tags are not allowed as part of the prompt."


@pytest.mark.parametrize("dtype, backend", [("float32", "auto"), ("bfloat16", "eager")])
def test_repr_of_a_llama_names_backend_dtype_and_sizes(small: SimpleNamespace, dtype: str, backend: str) -> None:
    built = Llama.build(small.folder, small.tokenizer_path, 48, 3, device="cpu", dtype=dtype, backend=backend)
    text = repr(built)
    parts = (f"backend {built.backend}", f"{dtype} on cpu", "max_seq_len=48", "max_batch_size=3")
    assert [part for part in parts if part not in text] == []
    assert backend in ("auto", built.backend)


def test_dir_of_a_llama_lists_public_names_and_dunders_only(shared_llama: Llama) -> None:
    names = dir(shared_llama)
    assert {"generate", "text_completion", "chat_completion", "score", "model", "tokenizer", "__init__"} <= set(names)
    private = [name for name in names if name.startswith("_") and not (name.startswith("__") and name.endswith("__"))]
    assert private == []


def test_repr_of_a_stream_shows_its_progress(shared_llama: Llama) -> None:
    stream = shared_llama.text_completion_stream("Once upon a time", temperature=0, max_gen_len=4)
    n = stream.prompt_tokens
    assert n > 0 and repr(stream) == f"<Stream running: {n} prompt tokens, 0 new tokens>"
    list(stream)
    assert repr(stream) == f"<Stream {stream.finish_reason}: {n} prompt tokens, {stream.new_tokens} new tokens>"
    assert stream.finish_reason in ("stop", "length") and stream.new_tokens > 0


@pytest.mark.parametrize(
    "options",
    [
        *({"max_gen_len": bad} for bad in (-1, 1.5, "4", True)),
        *({"stop": bad} for bad in ("", 5, ["a", ""], "\ud800")),
        *({"temperature": bad} for bad in (-1, "0", math.nan)),
        *({"top_p": bad} for bad in (-0.1, 1.01, "0.9")),
        *({"top_k": bad} for bad in (-1, 1.5, True)),
        *({"min_p": bad} for bad in (-0.1, 2, "0")),
        *({"repetition_penalty": bad} for bad in (0, -1, math.inf)),
        *({"logit_bias": bad} for bad in ([], {5: 101}, {-1: 0})),
    ],
    ids=str,
)
def test_validate_options_refuses_bad_values_with_input_error(options: dict[str, Any]) -> None:
    (name,) = options
    assert_raises(lambda: validate_options(**options), InputError, name)


def test_validate_options_accepts_what_calls_accept() -> None:
    validate_options()
    validate_options(None, None, temperature=None, top_p=None, top_k=None, min_p=None, repetition_penalty=None)
    validate_options(max_gen_len=0, stop=["a", "\n"], temperature=0, top_p=1, top_k=5, min_p=0.1, repetition_penalty=1.2)
    validate_options(logit_bias={5: -100})
