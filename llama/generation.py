"""The class `Llama`: build a model, generate tokens, complete texts, answer dialogs and score continuations.

Answers are returned whole or as streams. `Llama` converts texts and dialogs to tokens. `Engine.run` generates the answers to
all calls, and yields each new token.
"""

import inspect
import itertools
import math
import os
import statistics
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar, cast

import torch
from typing_extensions import Unpack

from . import compat, sampling
from .backends.registry import choose_backend, slowdown_warning
from .chat import (
    B_INST,
    B_SYS,
    E_INST,
    E_SYS,
    LLAMA_2,
    SPECIAL_TAGS,
    UNSAFE_ERROR,
    ChatFormat,
    Dialog,
    Message,
    Role,
    find_tag,
)
from .checkpoint import layouts, loading, packed_file, params, shards, validate
from .checkpoint.adapter import open_adapter
from .distributed import groups
from .distributed.agreement import gather_from_replicas, run_on_all_ranks, run_on_rank0
from .distributed.groups import global_rank, model_parallel, replica, world_size
from .distributed.setup import initialize, set_environment
from .engine.async_calls import (
    AsyncStream,
    AsyncTokens,
    check_sharable,
    collect_results_async,
    run_async,
    text_chunks_async,
    tokens_until_stop_async,
)
from .engine.backend import Backend
from .engine.call_options import AnswerOptions, CallOptions, Integers, Numbers, StreamOptions, takes_options
from .engine.checks import device_of
from .engine.collect import collect_results, results_of_replaced_generate
from .engine.dialog_call import DialogCall
from .engine.draft import check_draft
from .engine.engine import NO_DRAFT, NO_EAGER, Engine
from .engine.hidden_states import check_layers, hidden_states, number_of_layers
from .engine.incremental_text import IncrementalText
from .engine.leading import check_led, lead
from .engine.request_builder import RequestBuilder, partition_by_length
from .engine.requests import GeneratedToken, GenerationCall, TokenScore, check_top_logprobs
from .engine.results import ChatPrediction, CompletionPrediction, GenerationResult, InfillingPrediction, ResultDetails, Score
from .engine.scoring import score
from .engine.stream import Stream, text_chunks, tokens_until_stop
from .errors import DeviceError, InputError, check_count, check_flag, describe, is_integer, short_traceback
from .hugging_face.load import TokenizerAndChatFormat, load_tokenizer_and_chat_format
from .kernels.packing import check_kernel
from .model import ModelArgs, Transformer
from .planning import estimate, free_memory
from .quantization.weight import check_quantize
from .sampling import SamplingParams, sample_top_p
from .tokenizer import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")


def _signature_of(method: Callable[P, Any]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Decorate an async method: give it the parameters of its sync twin, for `help` and for type checkers."""

    def give(twin: Callable[..., T]) -> Callable[P, T]:
        returned = inspect.signature(twin).return_annotation
        twin.__signature__ = inspect.signature(method).replace(return_annotation=returned)  # type: ignore[attr-defined]
        return twin

    return give


class Llama:
    """A model and its tokenizer. Calls and streams of all threads and event loops share one batch.

    Options that several calls share, each off by default. Passing None for an option means its default.

    top_k, min_p, typical_p, repetition_penalty, frequency_penalty, presence_penalty, logit_bias: see `SamplingParams`. They
    change no log probabilities.
    seed: makes each answer depend only on its prompt, the options and the seed, not on earlier calls or on the other prompts. A
    list contains one seed for each prompt, for example to get several answers to the same prompt. Without a seed, all prompts
    are sampled with torch's default generator.
    stop: one string or several. An answer's text ends just before the first stop string. Tokens and log probabilities include
    the token that completed the stop string.
    top_logprobs: with logprobs=True, also return the top_logprobs likeliest tokens at each token's position, up to 20, with
    their log probabilities, likeliest first. A token that was chosen need not be among them. The first token of an echoed
    prompt has none.
    keep_space: keep the space at the start of an answer's text, so that prompt + answer is the text of all tokens. Without it,
    the answer is decoded alone, which drops the space.
    n: the number of answers to each prompt. Those to prompt i are results i * n to i * n + n - 1. If the prompt has the seed s,
    their seeds are s, s + 1, ..., s + n - 1.
    stop_token_ids: tokens that end an answer as EOS does. ignore_eos: EOS does not end an answer.
    min_new_tokens: before this number of new tokens, neither EOS nor a token of stop_token_ids is chosen.
    logits_processor: a function (tokens of prompt and answer so far, logits (vocab,)) -> logits, called before each token of an
    answer is chosen, after penalties and before temperature. It may set logits to -inf. It must not call the model.
    `max_gen_len`, `min_new_tokens`, `seed`, `stop`, `logits_processor`, and sampling options that are numbers may be lists with
    one value for each prompt.
    speculate: guess the next tokens, and compute several in one step where that is faster. Guesses change no answer
    (docs/speculation.md). "prompt" guesses what followed the same tokens earlier in the prompt and answer. "draft" guesses with
    the model `draft`. False turns off what `build` was given.
    continue_answer: if a dialog ends with a message by the assistant, continue that message. The result is what follows it.
    details: add to each result "finish_reason" ("stop": EOS, a token of stop_token_ids, or a stop string; "length": max_gen_len
    or the end of the context) and the numbers of tokens in the prompt and in the answer, without the EOS or stop token. If the
    call speculates, also the numbers of guessed tokens and of those that were accepted.

    A call may have any number of prompts. Up to max_batch_size prompts of all calls run at a time, and when one is finished,
    the next one starts. Calls of a modified model, and calls on several ranks without `lead`, run one at a time.

    On several ranks, rank 0 alone makes calls, in `lead`; or all ranks make the same calls with the same input and get the same
    results. If calls differ, all ranks raise InputError. Replicas divide the prompts of a call among themselves, and rank 0
    chooses the seeds if the call has none. Each replica computes the whole of a stream.

    Logits that are not finite raise NonFiniteError.
    """

    @staticmethod
    @short_traceback
    def build(
        ckpt_dir: str | os.PathLike[str],
        tokenizer_path: str | os.PathLike[str] | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 8,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        compile: bool = False,
        quantize: str | None = None,
        backend: str = "auto",
        adapter: str | os.PathLike[str] | None = None,
        speculate: str | None = None,
        draft: "Llama | None" = None,
    ) -> "Llama":
        """Load a checkpoint, with any number of shards, on any number of ranks that divides its heads.

        ckpt_dir: a folder in Meta's layout, or in Hugging Face's (docs/hugging_face.md).

        tokenizer_path: by default tokenizer.model or tokenizer.json in ckpt_dir, or tokenizer.model in its parent folder.
        max_seq_len: context length in tokens, prompt and answer together. max_batch_size: rows of the batch. The two determine
        the size of the KV cache.
        model_parallel_size: number of ranks that share one model; by default all ranks of the job, or 1 without torchrun.
        seed: the seed of torch's default generator.
        device: by default CUDA if available, else the CPU; "mps" is untested. dtype: by default the dtype of the checkpoint.
        compile: on CUDA, let torch.compile fuse the small kernels of a decode step and tune the matrix products of a single
        row. The first step with each number of rows then takes seconds.
        quantize: "int8" or "int4" to quantize the matrices while they are read. `dtype` then applies to everything else.
        backend: "auto", or a name that `python -m llama info` lists. "eager" uses plain tensors only, so it dequantizes
        quantized weights, and it always runs `Transformer.forward`. The other backends run `Transformer.forward` only if a
        caller has modified the model.
        adapter: a folder with a LoRA adapter in PEFT's layout. It is merged into the weights while they are read, before
        they are quantized.
        speculate: what guesses tokens in all calls that are not given `speculate`; None for nothing. draft: a smaller model
        with the same tokenizer, for speculate="draft", which it makes the default.

        On the CPU, the first call lowers PyTorch's number of threads to this process's CPU quota, unless you have set a number.

        Raises CheckpointError, DeviceError or InputError, which are all LlamaError, before any weight is loaded. Only two
        errors can come later, while weights are read: for weights that are not finite, and for files that change. On the CPU,
        weights may stay memory-mapped after loading. So replace a checkpoint's files, but never overwrite them.
        """
        where = initialize(device, model_parallel_size)

        def check() -> tuple[TokenizerAndChatFormat, shards.Shards, Transformer, torch.dtype]:
            _check_build_arguments(max_seq_len, max_batch_size, seed, compile, quantize, backend, where)
            chosen_dtype = params.parse_dtype(dtype)
            backend_class = choose_backend("torch_compile" if compile else backend, where)
            config = layouts.read_params(ckpt_dir)
            loaded = load_tokenizer_and_chat_format(ckpt_dir, tokenizer_path, config.get("vocab_size", -1))
            _check_speculation(speculate, draft, backend_class.name, loaded.tokenizer, int(max_batch_size), int(max_seq_len))
            layouts.notes(ckpt_dir, int(max_seq_len))  # raises if the context is too long for the model
            fits = where.type == "cpu" and (quantize is not None or chosen_dtype in (None, torch.bfloat16))
            stored_format = quantize or "bfloat16"
            packed = packed_file.open_packed_file(ckpt_dir, stored_format, fits) if adapter is None else None
            if adapter is not None:
                packed_file.describe_unused(ckpt_dir, stored_format)  # raises if there are packed weights only
            files = packed or layouts.open_weights(ckpt_dir)
            if packed and quantize == "int8" and where.type != "cpu" and global_rank() == 0:
                print(
                    f"int8.safetensors is for CPUs, and slow on {where}: build from the weights themselves",
                    file=sys.stderr,
                )
            model = validate.build_on_meta(config, files, int(max_seq_len), int(max_batch_size), loaded.tokenizer.n_words)
            if packed:
                packed_file.check_packed_file(model, files)
            else:
                validate.check_shards(model, files)
            if adapter is not None:
                files.adapter = open_adapter(adapter, model.params, files)
            weights_dtype = chosen_dtype or files.first["tok_embeddings.weight"].dtype
            held_as = quantize if backend_class.packs_weights else None
            sizes = model.params, model_parallel()[1], weights_dtype, where
            if held_as:
                check_kernel(held_as, where, weights_dtype)
            mapped = loading.bytes_staying_mapped(model, files, weights_dtype, where, quantize, backend_class.packs_weights)
            estimate.check_memory(*sizes, free_memory.free_memory(where, mapped), held_as)
            return loaded, files, model, weights_dtype

        loaded, files, model, weights_dtype = run_on_all_ranks(
            check,
            must_match=lambda checked: (
                *validate.build_fingerprint(checked[0].tokenizer, *checked[1:]), quantize, compile, backend, int(seed),
                speculate, draft is None,
            ),
        )  # fmt: skip
        backend_class = choose_backend("torch_compile" if compile else backend, where)
        if global_rank() == 0:
            warning = slowdown_warning(backend_class, where, model.params, weights_dtype, quantize)
            notes = [*layouts.notes(ckpt_dir, int(max_seq_len)), *loaded.notes]
            if adapter is not None and (unused := packed_file.describe_unused(ckpt_dir, quantize or "bfloat16")):
                notes.append(unused)
            spare_rows = validate.describe_spare_rows(model.vocab_size, loaded.tokenizer.n_words)
            for line in filter(None, (*notes, spare_rows, warning)):
                print(line, file=sys.stderr)
        packs = backend_class.packs_weights
        run_on_all_ranks(lambda: loading.load_weights(model, files, weights_dtype, where, quantize, packs))
        for tensor in (*model.parameters(), model.freqs_cis) if backend_class.name != "eager" else ():
            compat.observe(tensor)  # now, since no caller has seen them yet
        torch.manual_seed(int(seed))

        def make() -> Llama:
            llama = Llama(model.eval(), loaded.tokenizer, backend_class())
            llama.chat_format, llama.draft = loaded.chat_format, draft
            llama.speculate = speculate or ("draft" if draft else None)
            return llama

        return run_on_all_ranks(make)

    def __init__(self, model: Transformer, tokenizer: Tokenizer, backend: Backend | None = None) -> None:
        validate.check_vocabulary(model.vocab_size, tokenizer.n_words, f"the model has a vocabulary of {model.vocab_size}")
        set_environment()
        self.model = model
        self.tokenizer = tokenizer
        self.chat_format: ChatFormat = LLAMA_2  # `build` replaces it by that of the model's folder
        self._engine = Engine(model, backend or choose_backend("auto", device_of(model))())

    def __repr__(self) -> str:
        if not isinstance(self.model, Transformer):
            return f"<Llama: a {type(self.model).__name__}, backend {self.backend}>"
        args, weight = self.model.params, next(self.model.parameters(), None)
        stored = "" if weight is None else f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}, "
        return (
            f"<Llama: {args.n_layers} layers of dim {args.dim}, {stored}backend {self.backend}, "
            f"max_seq_len={args.max_seq_len}, max_batch_size={args.max_batch_size}>"
        )

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if not name.startswith("_") or name.startswith("__")]

    @property
    def engine(self) -> Engine:
        """Return the engine of `model`. If a caller has replaced `model`, create a new engine for it."""
        if self._engine.model is not self.model:
            before, self._engine = self._engine, Engine(self.model, self._engine.backend)
            self._engine.speculate = before.speculate if before.speculate != "draft" else ""
        self._engine.n_words = self.tokenizer.n_words  # a caller may have replaced the tokenizer, too
        return self._engine

    def clear_prefix_cache(self) -> None:
        """Forget which prompts the rows of the KV cache hold, so that the next prompts are computed whole.

        Calls share the beginnings of prompts without being told, and notice most edits of the model. Call this to measure a
        prefill, or, on all ranks, after edits that nothing notices: those through the memory of a view, such as
        `weight[:4].data`, or through a tensor's storage.
        """
        with self.engine.lock:
            if (cache := self.engine.shared.cache) is not None:
                cache.weights_version = None  # when no call runs, the next one clears the prefixes of all ranks
                if world_size() == 1:
                    cache.prefixes.clear()

    @property
    def draft(self) -> "Llama | None":
        """Return the model that guesses tokens in calls with speculate="draft". Set it to a `Llama`, or to None for none.

        It must have the same tokenizer and be built with at least the same max_seq_len and max_batch_size. Raises InputError.
        """
        return self.engine.shared.draft

    @draft.setter
    def draft(self, draft: "Llama | None") -> None:
        if groups.rank0_leads:
            raise InputError("the draft cannot be set in `lead`, which the other ranks follow; set it on all ranks before")
        if draft is not None:
            if getattr(draft, "model", None) is self.model:
                raise InputError("a model cannot be its own draft; give a smaller one with the same tokenizer")
            sizes = self.model.params.max_batch_size, self.model.params.max_seq_len
            _check_speculation(None, draft, self.backend, self.tokenizer, *sizes)
            if self.engine.shared.targets:
                raise InputError("this model is the draft of another one; a draft has no draft itself")
        elif self.speculate == "draft":
            self.speculate = False
        shared = self.engine.shared
        if shared.draft is not None:
            shared.draft.engine.shared.targets.discard(self.model)
        shared.draft = draft
        if draft is not None:
            draft.engine.shared.targets.add(self.model)

    @property
    def speculate(self) -> str | None:
        """Return how calls speculate that are not given `speculate`: "prompt", "draft", or None for not at all. Can be set."""
        return self.engine.speculate or None

    @speculate.setter
    def speculate(self, value: str | bool | None) -> None:
        self.engine.speculate = self.engine.what_guesses(CallOptions(speculate=value).speculate() or "")

    @property
    def backend(self) -> str:
        """Return the name of the backend. A modified model runs `Transformer.forward` with any backend."""
        return self._engine.backend.name

    @short_traceback
    @takes_options(AnswerOptions)
    def generate(
        self,
        prompt_tokens: Iterable[Iterable[int]],
        max_gen_len: Integers,
        temperature: Numbers = 0.6,
        top_p: Numbers = 0.9,
        logprobs: bool | None = False,
        echo: bool | None = False,
        *,
        stop_token: int | None = None,
        stop: str | Sequence[str] | Sequence[Sequence[str]] | None = (),
        **options: Unpack[AnswerOptions],
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Generate tokens after each prompt; return them, and their log probabilities or None.

        A prompt gets at most min(max_gen_len, max_seq_len - length of the prompt) tokens. EOS ends an answer and is not
        returned.
        temperature: 0 chooses the likeliest token; see `SamplingParams` for other values.
        logprobs: also return the log probability of each token, from the logits before any sampling parameter is applied.
        echo: return the prompt's tokens before the answer. The first token of a prompt has the log probability 0.0.
        stop_token: the token that ends an answer, instead of EOS. stop: see `Llama`.
        Raises InputError, which names the prompt, before any computation.
        """
        given = CallOptions(temperature, top_p, max_gen_len, stop, **options)
        results = self._results(
            "generate",
            lambda: self._requests.from_tokens(prompt_tokens, given, logprobs, echo, stop_token),
            lambda r: r,
        )
        return [r.tokens for r in results], [r.logprobs for r in results] if logprobs else None

    @short_traceback
    @takes_options(AnswerOptions)
    def generate_stream(
        self,
        prompt_tokens: Iterable[Iterable[int]],
        max_gen_len: Integers,
        temperature: Numbers = 0.6,
        top_p: Numbers = 0.9,
        logprobs: bool | None = False,
        echo: bool | None = False,
        *,
        top_logprobs: int | None = 0,
        include_eos: bool | None = False,
        stop: str | Sequence[str] | Sequence[Sequence[str]] | None = (),
        **options: Unpack[AnswerOptions],
    ) -> Iterator[GeneratedToken]:
        """Generate tokens like `generate`, but yield (prompt_index, token, logprob) as soon as a token is generated.

        The tokens of one prompt come in order; the tokens of different prompts are mixed.
        top_logprobs: see `Llama`. Each yielded tuple has the attribute `top_logprobs`, a list of (token, logprob).
        include_eos: also yield the token that ends an answer: EOS, or one of stop_token_ids. stop: see `Llama`.
        """
        given = CallOptions(temperature, top_p, max_gen_len, stop, **options)
        call = self._validate_on_all_ranks(
            "generate_stream",
            lambda: self._requests.from_tokens(prompt_tokens, given, logprobs, echo, None, top_logprobs, include_eos),
        )
        return self._tokens(call)

    @short_traceback
    @takes_options(AnswerOptions)
    def text_completion(
        self,
        prompts: Iterable[str | Iterable[int]],
        temperature: Numbers = 0.6,
        top_p: Numbers = 0.9,
        max_gen_len: Integers = None,
        logprobs: bool | None = False,
        echo: bool | None = False,
        *,
        stop: str | Sequence[str] | Sequence[Sequence[str]] | None = (),
        details: bool | None = False,
        top_logprobs: int | None = 0,
        keep_space: bool | None = False,
        **options: Unpack[AnswerOptions],
    ) -> list[CompletionPrediction]:
        """Continue each text, given as a text or as tokens. max_gen_len defaults to the rest of the context.

        See `generate` and `Llama` for the options.

        Each result is a dict with "generation". logprobs=True adds "tokens", as the text of each token, and "logprobs".
        top_logprobs=n adds "top_logprobs": for each token a list of (text, logprob), the n likeliest at its position.
        details=True adds "finish_reason", "prompt_tokens" and "new_tokens".
        """
        given = CallOptions(temperature, top_p, max_gen_len, stop, **options)
        return self._results(
            "text_completion",
            lambda: self._requests.from_texts(prompts, given, logprobs, echo, details, top_logprobs, keep_space=keep_space),
            lambda r: {"generation": r.text, **self._details(r, logprobs, details, top_logprobs)},
        )

    @short_traceback
    @takes_options(AnswerOptions)
    def iter_text_completion(
        self,
        prompts: Iterable[str | Iterable[int]],
        temperature: Numbers = 0.6,
        top_p: Numbers = 0.9,
        max_gen_len: Integers = None,
        *,
        stop: str | Sequence[str] | Sequence[Sequence[str]] | None = (),
        keep_space: bool | None = False,
        **options: Unpack[AnswerOptions],
    ) -> Iterator[CompletionPrediction]:
        """Continue each text, and yield the results in the order of the prompts, each as early as possible.

        A result is yielded once it and all earlier results are finished. Each result has "generation", "finish_reason",
        "prompt_tokens" and "new_tokens". With replicas, all results come together at the end.
        """
        given = CallOptions(temperature, top_p, max_gen_len, stop, **options)
        results = self._iter_results(
            "iter_text_completion",
            lambda: self._requests.from_texts(prompts, given, details=True, keep_space=keep_space),
        )
        return ({"generation": r.text, **self._details(r, False, True)} for r in results)

    @short_traceback
    @takes_options(AnswerOptions)
    def chat_completion(
        self,
        dialogs: Iterable[Dialog],
        temperature: Numbers = 0.6,
        top_p: Numbers = 0.9,
        max_gen_len: Integers = None,
        logprobs: bool | None = False,
        *,
        stop: str | Sequence[str] | Sequence[Sequence[str]] | None = (),
        details: bool | None = False,
        top_logprobs: int | None = 0,
        continue_answer: bool | None = False,
        **options: Unpack[AnswerOptions],
    ) -> list[ChatPrediction]:
        """Answer each dialog as the assistant. max_gen_len defaults to the rest of the context. See `Llama` for the options.

        A model's own chat template is used, if it is not Llama 2's (docs/hugging_face.md). In Llama 2's format, the answer to a
        dialog that contains a special tag, such as "[INST]", is UNSAFE_ERROR, without computation.
        Each result is a dict with "generation", a message by the assistant. `logprobs`, `top_logprobs` and `details` add the
        same keys as in `text_completion`.
        """
        given = CallOptions(temperature, top_p, max_gen_len, stop, **options)
        wanted: dict[str, Any] = dict(logprobs=logprobs, details=details, top_logprobs=top_logprobs)
        return self._results(
            "chat_completion",
            DialogCall(self._requests, dialogs, given, continue_answer=continue_answer, **wanted),
            lambda r: {"generation": self._answer(r), **self._details(r, logprobs, details, top_logprobs)},
        )

    @short_traceback
    @takes_options(AnswerOptions)
    def iter_chat_completion(
        self,
        dialogs: Iterable[Dialog],
        temperature: Numbers = 0.6,
        top_p: Numbers = 0.9,
        max_gen_len: Integers = None,
        *,
        stop: str | Sequence[str] | Sequence[Sequence[str]] | None = (),
        continue_answer: bool | None = False,
        **options: Unpack[AnswerOptions],
    ) -> Iterator[ChatPrediction]:
        """Answer each dialog like `chat_completion`, and yield the results like `iter_text_completion`."""
        given = CallOptions(temperature, top_p, max_gen_len, stop, **options)
        results = self._iter_results(
            "iter_chat_completion",
            DialogCall(self._requests, dialogs, given, continue_answer=continue_answer, details=True),
        )
        return ({"generation": self._answer(r), **self._details(r, False, True)} for r in results)

    @short_traceback
    def text_infilling(
        self,
        prefixes: Iterable[str],
        suffixes: Iterable[str],
        temperature: float | None = 0.6,
        top_p: float | None = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool | None = False,
        suffix_first: bool | None = False,
    ) -> list[InfillingPrediction]:
        """Generate the text between each prefix and suffix, as Code Llama does.

        suffix_first: put the suffix before the prefix in the prompt.
        Each result has "generation", and "full_text", which is prefix + generation + suffix. logprobs=True adds "tokens" and
        "logprobs". Raises InputError if the tokenizer lacks the four special tokens of infilling.
        """
        before, after, prompts = run_on_all_ranks(
            lambda: self._requests.for_infilling(prefixes, suffixes, suffix_first), must_match=lambda checked: checked
        )
        generated, values = self.generate(
            prompt_tokens=prompts,
            max_gen_len=self.model.params.max_seq_len - 1 if max_gen_len is None else max_gen_len,
            temperature=temperature,
            top_p=top_p,
            logprobs=logprobs,
            stop_token=self.tokenizer.eot_id,
        )
        results: list[InfillingPrediction] = []
        for i, (prefix, suffix) in enumerate(zip(before, after, strict=True)):
            text = self.tokenizer.decode_infilling(generated[i])
            details: ResultDetails = {}
            if values is not None:
                details = {"tokens": self._decode_each(generated[i]), "logprobs": values[i]}
            results.append({"generation": text, "full_text": prefix + text + suffix, **details})
        return results

    @short_traceback
    @takes_options(StreamOptions)
    def text_completion_stream(
        self,
        prompt: str | Iterable[int],
        temperature: float | None = 0.6,
        top_p: float | None = 0.9,
        max_gen_len: int | None = None,
        *,
        stop: str | Sequence[str] | None = (),
        keep_space: bool | None = False,
        **options: Unpack[StreamOptions],
    ) -> Stream:
        """Continue one text, given as a text or as tokens. Return a `Stream`, which yields the continuation in chunks.

        Raises InputError at the call, not at the first chunk.
        """
        given = CallOptions(temperature, top_p, max_gen_len, stop, **options)
        return self._stream(
            "text_completion_stream",
            lambda: self._requests.from_texts([prompt], given, label="the prompt", keep_space=keep_space),
        )

    @short_traceback
    @takes_options(StreamOptions)
    def chat_completion_stream(
        self,
        dialog: Dialog,
        temperature: float | None = 0.6,
        top_p: float | None = 0.9,
        max_gen_len: int | None = None,
        *,
        stop: str | Sequence[str] | None = (),
        continue_answer: bool | None = False,
        **options: Unpack[StreamOptions],
    ) -> Stream:
        """Answer one dialog. Return a `Stream`, which yields the answer in chunks; see `text_completion_stream`.

        If the dialog contains a special tag of Llama 2's format, such as "[INST]", the stream yields UNSAFE_ERROR as its only
        chunk.
        """
        given = CallOptions(temperature, top_p, max_gen_len, stop, **options)
        return self._stream(
            "chat_completion_stream",
            DialogCall(self._requests, [dialog], given, label="the dialog", continue_answer=continue_answer),
        )

    @_signature_of(generate_stream)
    @short_traceback
    def agenerate_stream(self, *args: Any, **options: Any) -> AsyncTokens:
        """Generate tokens like `generate_stream`, with its arguments, for `async for`; see `AsyncTokens`, `AsyncStream`."""
        return _AsyncCaller(self).call(Llama.generate_stream, *args, **options)

    @_signature_of(text_completion)
    @short_traceback
    def atext_completion(self, *args: Any, **options: Any) -> Coroutine[Any, Any, list[CompletionPrediction]]:
        """Continue each text like `text_completion`, with its arguments and results, to be awaited.

        Wrong input raises at the call. Cancelling the task that awaits frees the rows of the batch at the next step. Any number
        of event loops and threads may make calls. They share the batch, which a background thread of ours runs meanwhile.
        Raises InputError on several ranks without `lead`, and for a model that the batch cannot run, because it is modified.
        """
        return _AsyncCaller(self).call(Llama.text_completion, *args, **options)

    @_signature_of(chat_completion)
    @short_traceback
    def achat_completion(self, *args: Any, **options: Any) -> Coroutine[Any, Any, list[ChatPrediction]]:
        """Answer each dialog like `chat_completion`, with its arguments and results, to be awaited; see `atext_completion`."""
        return _AsyncCaller(self).call(Llama.chat_completion, *args, **options)

    @_signature_of(text_completion_stream)
    @short_traceback
    def atext_completion_stream(self, *args: Any, **options: Any) -> AsyncStream:
        """Continue one text like `text_completion_stream`, with its arguments. Return an `AsyncStream`."""
        return _AsyncCaller(self).call(Llama.text_completion_stream, *args, **options)

    @_signature_of(chat_completion_stream)
    @short_traceback
    def achat_completion_stream(self, *args: Any, **options: Any) -> AsyncStream:
        """Answer one dialog like `chat_completion_stream`, with its arguments. Return an `AsyncStream`."""
        return _AsyncCaller(self).call(Llama.chat_completion_stream, *args, **options)

    @short_traceback
    def score(
        self, prompts: Iterable[Any], continuations: Iterable[Any], *, top_logprobs: int | None = 0
    ) -> list[Score] | list[list[Score]]:
        """Return a `Score` for each prompt's continuation: the log probabilities of its tokens; nothing is generated.

        Prompts are texts or lists of tokens, and so are continuations. A prompt may have a list of continuations; its result is
        then a list of scores. Two texts are encoded together: the continuation starts at the first token that differs from
        those of the prompt alone. This token may contain the last letters of the prompt and the first letters of the
        continuation. A prompt and a continuation have at most max_seq_len + 1 tokens together.
        top_logprobs: how many of the likeliest tokens to return at each position, 0 to 20.
        """
        n_top = check_top_logprobs(top_logprobs)

        def score_rows(rows: list[int]) -> list[list[TokenScore]]:
            return score(self.engine, [requests[row] for row in rows], n_top)

        with self.engine.exclusive():
            requests, counts = run_on_all_ranks(
                lambda: self._requests.for_scoring(prompts, continuations),
                must_match=lambda checked: (checked, n_top, self.engine.why_reference_loop()),
            )
            scores = self._shard_across_replicas([len(r.tokens) for r in requests], score_rows)
        results = iter([self._score_result(r.tokens[r.start :], each) for r, each in zip(requests, scores, strict=True)])
        return [next(results) if n is None else list(itertools.islice(results, n)) for n in counts]  # type: ignore[return-value]

    def _score_result(self, tokens: list[int], scores: list[TokenScore]) -> Score:
        top = [[(self._decode_each([t])[0], value) for t, value in each.top] for each in scores if each.top is not None]
        logprobs, greedy = [each.logprob or 0.0 for each in scores], [bool(each.is_greedy) for each in scores]
        return Score(self._decode_each(tokens), logprobs, greedy, top or None)

    @short_traceback
    def perplexity(self, text: str | Iterable[int], stride: int | None = None) -> float:
        """Return the perplexity of a text, or of a list of tokens: exp of the mean negative log probability of its tokens.

        Each token but the first (BOS, for a text) is scored once. A text that is longer than max_seq_len is scored in windows,
        each `stride` tokens further than the last, so that a token has the max_seq_len - stride tokens before it as context, or
        more. A smaller stride costs more. stride: 1 to max_seq_len; default: half of max_seq_len.
        """
        windows = run_on_all_ranks(lambda: self._requests.for_perplexity(text, stride))
        scores = self.score(*zip(*windows, strict=True))
        mean = statistics.fmean(value for each in scores for value in cast("Score", each).logprobs)
        return math.exp(-mean) if mean > -700 else math.inf

    @short_traceback
    def lead(self, work: Callable[[], T]) -> T | None:
        """Run `work` on rank 0, and let the other ranks follow its calls. Return its result; None on the other ranks.

        Call it on all ranks. Until `work` returns, calls and streams of any thread and event loop of rank 0 share one batch,
        as in one process, and the other ranks compute their part of each. They wait without using their CPU, and ignore SIGINT
        and SIGTERM, which rank 0 may handle. With a single process, `work` is simply run.

        Raises InputError for replicas and for a modified model, before `work` runs. If `work` raises, the other ranks raise
        LlamaError with the cause; after sys.exit or Ctrl-C on rank 0 they exit with 0. If one of the other ranks fails or is
        killed, calls on rank 0 raise LlamaError, and so does `lead`. Calls that still run in threads when `work` ends raise
        InputError.
        """
        return lead(self.engine, work)

    @short_traceback
    def hidden_states(
        self, texts: Iterable[str | Iterable[int]], layers: int | Iterable[int] | None = None
    ) -> list[torch.Tensor]:
        """Return the hidden states of each text, given as a text or as tokens: float32 on the CPU, (tokens, dim).

        A text is encoded with BOS and without EOS.
        layers: 0 for the token embeddings; i for the output of layer i, counted from 1; the number of layers, which is the
        default, for the output of the last layer after the final norm. Negative numbers count from the end. transformers
        numbers its `hidden_states` in the same way. With a list of numbers, the result for each text is
        (len(layers), tokens, dim).

        Texts are computed side by side, in the dtype of the model, without the KV cache. The results have no gradient. A model
        that a caller has modified runs its own `forward`. Raises InputError, which names the text, before any computation.
        """
        several = isinstance(layers, Iterable)
        return self._hidden_states("hidden_states", texts, layers, lambda states: states if several else states[0])

    @short_traceback
    def embed(self, texts: Iterable[str | Iterable[int]], pooling: str = "mean") -> torch.Tensor:
        """Return an embedding of each text: (texts, dim), float32 on the CPU, from the last of its `hidden_states`.

        pooling: "mean" for the mean of all tokens, BOS among them; "last" for the last token. Embeddings are not normalized.
        """
        if pooling not in ("mean", "last"):
            raise InputError(f"pooling is {describe(pooling)}; it must be 'mean' or 'last'")
        pooled = self._hidden_states(
            f"embed by {pooling}", texts, None, lambda states: states[0].mean(0) if pooling == "mean" else states[0, -1]
        )
        return torch.stack(pooled) if pooled else torch.empty(0, self.model.params.dim, device="cpu")

    def _hidden_states(
        self,
        name: str,
        texts: Iterable[str | Iterable[int]],
        layers: int | Iterable[int] | None,
        reduce: Callable[[torch.Tensor], torch.Tensor],
    ) -> list[torch.Tensor]:
        """Return `reduce` of the states (layers, tokens, dim) of each text. name: what all ranks must call in the same way."""
        with self.engine.exclusive():
            rows, labels, chosen = run_on_all_ranks(
                lambda: (*self._requests.for_hidden_states(texts), check_layers(layers, number_of_layers(self.model))),
                must_match=lambda checked: (name, checked, self.engine.why_reference_loop()),
            )
            return self._shard_across_replicas(
                [len(row) for row in rows],
                lambda some: hidden_states(self.engine, [rows[i] for i in some], [labels[i] for i in some], chosen, reduce),
            )

    @short_traceback
    def encode_dialog(self, dialog: Dialog, continue_answer: bool | None = False) -> list[int]:
        """Return the tokens of a dialog, with which `chat_completion` begins to answer it; see `Llama` for continue_answer.

        On several ranks, each encodes for itself; if the chat template uses the time or a random choice, the tokens may differ.
        Raises InputError for a dialog with a special tag, such as "[INST]", which `chat_completion` does not encode.
        """
        check_flag(continue_answer, "continue_answer")
        self.chat_format.check(dialog, "the dialog", continue_answer)
        if tag := find_tag(dialog, self.chat_format.tags):
            raise InputError(f"the dialog contains {tag}, a special tag of the chat format; remove it from the messages")
        return self.chat_format.encode(self.tokenizer, dialog)

    @property
    def _requests(self) -> RequestBuilder:
        return RequestBuilder(self.tokenizer, self.model.params.max_seq_len, self.chat_format, self.engine.what_guesses)

    def _validate_on_all_ranks(self, name: str, make_call: Callable[[], GenerationCall]) -> GenerationCall:
        """Build a call, and check that it is the same on all ranks. If it has no seeds, rank 0 chooses seeds for replicas."""
        check_led(self.engine)
        if isinstance(make_call, DialogCall):
            make_call.encode_on_rank0(name)
        call = run_on_all_ranks(
            lambda: replace(make_call(), name=name),
            must_match=lambda call: (
                *(call, self.engine.why_reference_loop()),
                [request.logits_processor is not None for request in call.requests],
            ),
        )
        if sample_top_p is not sampling.sample_top_p and any(request.seed is not None for request in call.requests):
            raise InputError("seed is for this library's sample_top_p, and another has been put in its place; leave seed out")
        is_greedy = all(request.sampling.greedy for request in call.requests)
        if replica()[1] > 1 and not is_greedy and all(r.seed is None for r in call.requests):
            n = len(call.requests)
            seeds = run_on_rank0(lambda: torch.randint(-(2**63), 2**63 - 1, (n,)).tolist())
            for request, seed in zip(call.requests, seeds, strict=True):
                request.seed = seed
        return call

    def _shard_across_replicas(self, lengths: list[int], work: Callable[[list[int]], list[T]]) -> list[T]:
        """Divide rows among the replicas, and return one result for each row, in order.

        lengths: the number of tokens in each row. work: a function from a list of row indices to their results.
        """
        index, count = replica()
        parts = partition_by_length(lengths, count)
        results = gather_from_replicas(lambda: work(parts[index]))
        by_row = {
            row: result
            for part, part_results in zip(parts, results, strict=True)
            for row, result in zip(part, part_results, strict=True)
        }
        return [by_row[row] for row in range(len(lengths))]

    def _generate_is_replaced(self) -> bool:
        return getattr(self.generate, "__func__", None) is not _GENERATE

    def _results(
        self, name: str, make_call: Callable[[], GenerationCall], make_result: Callable[[GenerationResult], T]
    ) -> list[T]:
        """Run a call to its end, and return one result for each request. name: the public method that calls this one.

        If a caller has replaced `generate`, the replacement runs all calls but those of `generate` itself.
        """
        if name != "generate" and self._generate_is_replaced():
            call = self._validate_on_all_ranks(name, make_call)
            return [*map(make_result, results_of_replaced_generate(self.generate, call, self.tokenizer, self.engine.speculate))]
        with self.engine.exclusive():
            return [*map(make_result, self._run_on_replicas(self._validate_on_all_ranks(name, make_call)))]

    def _iter_results(self, name: str, make_call: Callable[[], GenerationCall]) -> Iterator[GenerationResult]:
        """Run a call like `_results`, but yield each result as early as possible, in the order of the requests."""
        with self.engine.exclusive():
            call = self._validate_on_all_ranks(name, make_call)
            if self._generate_is_replaced():
                return iter(results_of_replaced_generate(self.generate, call, self.tokenizer, self.engine.speculate))
            if replica()[1] > 1:
                return iter(self._run_on_replicas(call))
            return collect_results(call, self._run(call, watched=True), self.tokenizer)

    def _run_on_replicas(self, call: GenerationCall) -> list[GenerationResult]:
        """Divide a validated call among the replicas, run it to its end, and return one result for each request."""

        def run_rows(rows: list[int]) -> list[GenerationResult]:
            part = replace(call, requests=[call.requests[row] for row in rows])
            return list(collect_results(part, self._run(part), self.tokenizer))

        return self._shard_across_replicas([len(request.prompt) for request in call.requests], run_rows)

    def _run(self, call: GenerationCall, watched: bool = False) -> Iterator[GeneratedToken]:
        return self.engine.run(self._resolve(call, watched))

    def _tokens(self, call: GenerationCall) -> Iterator[GeneratedToken]:
        tokens = self._run(call, watched=True)
        return tokens_until_stop(call, tokens, self.tokenizer) if call.has_stops else tokens

    def _resolve(self, call: GenerationCall, watched: bool) -> GenerationCall:
        # Read eos_id and sample_top_p anew for each call, because a caller may have replaced them or the tokenizer.
        if call.stop_token is None:
            more_eos_ids = getattr(self.tokenizer, "more_eos_ids", ())  # a caller's own tokenizer need not have it
            call = replace(call, stop_token=self.tokenizer.eos_id, more_eos_ids=more_eos_ids)
        return replace(call, sampler=sample_top_p, watched=watched)

    def _refuse_replaced_generate(self, what: str) -> None:
        if self._generate_is_replaced():
            raise InputError(
                f"generate has been replaced, and {what} do not go through it; use text_completion or chat_completion, "
                f"or override the method for {what} as well"
            )

    def _stream(self, name: str, make_call: Callable[[], GenerationCall]) -> Stream:
        self._refuse_replaced_generate("streams")
        with self.engine.exclusive():
            call = self._validate_on_all_ranks(name, make_call)
        (request,) = call.requests
        if not request.prompt:
            return Stream(request, (chunk for chunk in [UNSAFE_ERROR]))
        text = IncrementalText.of_answer(call, request, self.tokenizer)
        return Stream(request, text_chunks(request, self._run(call, watched=True), text))

    def _answer(self, result: GenerationResult) -> Message:
        return {"role": "assistant", "content": result.text if result.request.prompt else UNSAFE_ERROR}

    def _details(
        self, result: GenerationResult, logprobs: bool | None, details: bool | None, top_logprobs: int | None = 0
    ) -> ResultDetails:
        added: ResultDetails = {}
        if logprobs:
            added["tokens"], added["logprobs"] = self._decode_each(result.tokens), result.logprobs
        if top_logprobs:
            decode = self.tokenizer.decode
            added["top_logprobs"] = [[(decode([t]), value) for t, value in top] for top in result.top_logprobs]
        return {**added, **result.details()} if details else added

    def _decode_each(self, tokens: list[int]) -> list[str]:
        return [self.tokenizer.decode([token]) for token in tokens]


_GENERATE = Llama.generate


class _AsyncCaller:
    """What the sync methods get as `self` in place of a `Llama`, so that they return what their async twins return."""

    def __init__(self, llama: Llama) -> None:
        self.llama = llama

    def __getattr__(self, name: str) -> Any:
        return getattr(self.llama, name)

    def call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return method(self, *args, **options)

    def _validate_on_all_ranks(self, name: str, make_call: Callable[[], GenerationCall]) -> GenerationCall:
        check_sharable(self.engine, f"a{name}")
        return self.llama._validate_on_all_ranks(f"a{name}", make_call)

    def _run(self, call: GenerationCall, watched: bool = True) -> AsyncGenerator[GeneratedToken, None]:
        return run_async(self.engine, self._resolve(call, watched))

    def _tokens(self, call: GenerationCall) -> AsyncTokens:
        tokens = self._run(call)
        return AsyncTokens(call.requests, tokens_until_stop_async(call, tokens, self.tokenizer) if call.has_stops else tokens)

    def _results(
        self, name: str, make_call: Callable[[], GenerationCall], make_result: Callable[[GenerationResult], T]
    ) -> Coroutine[Any, Any, list[T]]:
        self._refuse_replaced_generate("async calls")
        call = self._validate_on_all_ranks(name, make_call)

        async def results() -> list[T]:
            return [*map(make_result, await collect_results_async(call, self._run(call), self.tokenizer))]

        return results()

    def _stream(self, name: str, make_call: Callable[[], GenerationCall]) -> AsyncStream:
        self._refuse_replaced_generate("streams")
        call = self._validate_on_all_ranks(name, make_call)
        (request,) = call.requests
        text = IncrementalText.of_answer(call, request, self.tokenizer)
        refusal = "" if request.prompt else UNSAFE_ERROR
        return AsyncStream(request, text_chunks_async(request, self._run(call), text, refusal))


def _check_speculation(
    speculate: str | None,
    draft: Llama | None,
    backend: str,
    tokenizer: Tokenizer,
    max_batch_size: int,
    max_seq_len: int,
) -> None:
    """Check how a model is to speculate. backend: its name. Raise InputError."""
    kind = CallOptions(speculate=speculate).speculate()
    if (kind or draft is not None) and backend == "eager":
        raise InputError(NO_EAGER)
    if kind == "draft" and draft is None:
        raise InputError(NO_DRAFT)
    if draft is not None:
        if not isinstance(draft, Llama):
            raise InputError(f"draft is {describe(draft)}; it must be a Llama")
        check_draft(draft.engine, draft.tokenizer, tokenizer, max_batch_size, max_seq_len)


def _check_build_arguments(
    max_seq_len: int,
    max_batch_size: int,
    seed: int,
    compile: bool,
    quantize: str | None,
    backend: str,
    device: torch.device,
) -> None:
    """Check the arguments of `build` that need no file to be read. Raise InputError or DeviceError."""
    check_count(max_seq_len, "max_seq_len")
    check_count(max_batch_size, "max_batch_size")
    if not is_integer(seed) or not -(2**63) <= seed < 2**64:
        raise InputError(f"seed is {describe(seed)}; it must be a whole number from -2**63 to 2**64 - 1")
    check_quantize(quantize)
    check_flag(compile, "compile")
    if compile and device.type != "cuda":
        raise DeviceError(f"compile=True is for CUDA, and this is {device}; leave it out: a step is not compiled here")
    if compile and backend not in ("auto", "torch_compile"):
        raise InputError(f"compile=True is backend='torch_compile', and backend is {describe(backend)}; leave one of them out")


__all__ = [
    "B_INST", "B_SYS", "E_INST", "E_SYS", "SPECIAL_TAGS", "UNSAFE_ERROR", "AsyncStream", "ChatPrediction",
    "CompletionPrediction", "Dialog", "GeneratedToken", "Llama", "Message", "ModelArgs", "Role", "SamplingParams", "Score",
    "Stream", "Tokenizer", "Transformer", "sample_top_p",
]  # fmt: skip
