"""The class `Llama`: build a model, generate tokens, complete texts, answer dialogs and score continuations.

`RequestBuilder` converts texts and dialogs to tokens. `Calls` and `AsyncCalls` return answers whole or as streams. `Engine.run`
generates the answers to all calls, and yields each new token.
"""

import math
import os
import statistics
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from typing_extensions import Unpack

from .backends.registry import check_compile, choose_backend, slowdown_warning
from .chat import B_INST, B_SYS, E_INST, E_SYS, LLAMA_2, SPECIAL_TAGS, UNSAFE_ERROR, ChatFormat, Dialog, Message, Role, find_tag
from .checkpoint import layouts, params, validate
from .checkpoint.opening import OpenedModel, open_model
from .distributed import threads
from .distributed.agreement import run_on_all_ranks
from .distributed.groups import global_rank, model_parallel
from .distributed.setup import initialize, set_environment
from .engine.async_calls import AsyncCalls, AsyncStream, AsyncTokens
from .engine.backend import Backend
from .engine.call_options import AnswerOptions, CallOptions, Integers, Numbers, StreamOptions, takes_options, twin_of
from .engine.calls import Calls
from .engine.checks import device_of
from .engine.dialog_call import DialogCall
from .engine.draft import check_speculation, set_draft
from .engine.engine import Engine
from .engine.leading import lead
from .engine.request_builder import RequestBuilder
from .engine.requests import GeneratedToken
from .engine.results import ChatPrediction, CompletionPrediction, InfillingPrediction, Score, infilling_results
from .engine.stream import Stream
from .engine.unmodified import observe_edits
from .errors import InputError, check_count, check_flag, describe, is_integer, short_traceback
from .hugging_face.load import TokenizerAndChatFormat, load_tokenizer_and_chat_format
from .model import ModelArgs, Transformer
from .planning import estimate, free_memory
from .quantization.weight import check_quantize
from .sampling import SamplingParams, sample_top_p
from .tokenizer import Tokenizer

T = TypeVar("T")


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

        def check() -> tuple[TokenizerAndChatFormat, OpenedModel, type[Backend]]:
            check_count(max_seq_len, "max_seq_len")
            check_count(max_batch_size, "max_batch_size")
            if not is_integer(seed) or not -(2**63) <= seed < 2**64:
                raise InputError(f"seed is {describe(seed)}; it must be a whole number from -2**63 to 2**64 - 1")
            check_quantize(quantize)
            check_compile(compile, backend, where)
            chosen_dtype, length, rows = params.parse_dtype(dtype), int(max_seq_len), int(max_batch_size)
            backend_class = choose_backend("torch_compile" if compile else backend, where)
            config = layouts.read_params(ckpt_dir)
            text = load_tokenizer_and_chat_format(ckpt_dir, tokenizer_path, config.get("vocab_size", -1))
            check_speculation(speculate, draft, Llama, backend_class.name, text.tokenizer, rows, length)
            layouts.notes(ckpt_dir, length)  # raises if the context is too long for the model
            opened = open_model(
                ckpt_dir, config, text.tokenizer.n_words, length, rows, chosen_dtype, where, quantize,
                backend_class.packs_weights, adapter,
            )  # fmt: skip
            free = free_memory.free_memory(where, opened.bytes_staying_mapped())
            estimate.check_memory(opened.model.params, model_parallel()[1], opened.dtype, where, free, opened.held_as)
            return text, opened, backend_class

        text, opened, backend_class = run_on_all_ranks(
            check,
            must_match=lambda checked: (
                *checked[1].fingerprint(checked[0].tokenizer), quantize, compile, backend, int(seed), speculate, draft is None
            ),
        )  # fmt: skip
        model = opened.model
        if global_rank() == 0:
            warning = slowdown_warning(backend_class, where, model.params, opened.dtype, quantize)
            for line in filter(None, (*layouts.notes(ckpt_dir, int(max_seq_len)), *text.notes, *opened.notes, warning)):
                print(line, file=sys.stderr)
        run_on_all_ranks(opened.load)
        observe_edits(model, backend_class.name)
        torch.manual_seed(int(seed))

        def make() -> Llama:
            llama = Llama(model.eval(), text.tokenizer, backend_class())
            llama.chat_format, llama.draft = text.chat_format, draft
            llama.speculate = speculate or ("draft" if draft else None)
            return llama

        llama = run_on_all_ranks(make)
        threads.release_pool()  # the calls may come from other threads than this one
        return llama

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
        self.engine.clear_prefix_cache()

    @property
    def draft(self) -> "Llama | None":
        """Return the model that guesses tokens in calls with speculate="draft". Set it to a `Llama`, or to None for none.

        It must have the same tokenizer and be built with at least the same max_seq_len and max_batch_size. Raises InputError.
        """
        return self.engine.shared.draft

    @draft.setter
    def draft(self, draft: "Llama | None") -> None:
        set_draft(self.engine, draft, Llama, self.tokenizer)

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
        results = self._calls.results(
            "generate",
            lambda: self._requests.from_tokens(prompt_tokens, given, logprobs, echo, stop_token),
            lambda r: r,
        )
        return [r.tokens for r in results], [r.logprobs for r in results] if logprobs else None

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
        return self._calls.tokens(
            "generate_stream",
            lambda: self._requests.from_tokens(prompt_tokens, given, logprobs, echo, None, top_logprobs, include_eos),
        )

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
        return self._calls.results(
            "text_completion",
            lambda: self._requests.from_texts(prompts, given, logprobs, echo, details, top_logprobs, keep_space=keep_space),
            lambda r: {"generation": r.text, **r.entries(self.tokenizer, logprobs, details, top_logprobs)},
        )

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
        results = self._calls.iter_results(
            "iter_text_completion",
            lambda: self._requests.from_texts(prompts, given, details=True, keep_space=keep_space),
        )
        return ({"generation": r.text, **r.details()} for r in results)

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
        return self._calls.results(
            "chat_completion",
            DialogCall(self._requests, dialogs, given, continue_answer=continue_answer, **wanted),
            lambda r: {"generation": r.message, **r.entries(self.tokenizer, logprobs, details, top_logprobs)},
        )

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
        results = self._calls.iter_results(
            "iter_chat_completion",
            DialogCall(self._requests, dialogs, given, continue_answer=continue_answer, details=True),
        )
        return ({"generation": r.message, **r.details()} for r in results)

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
        return infilling_results(before, after, generated, values, self.tokenizer)

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
        return self._calls.stream(
            "text_completion_stream",
            lambda: self._requests.from_texts([prompt], given, label="the prompt", keep_space=keep_space),
        )

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
        return self._calls.stream(
            "chat_completion_stream",
            DialogCall(self._requests, [dialog], given, label="the dialog", continue_answer=continue_answer),
        )

    @twin_of(generate_stream)
    def agenerate_stream(self, *args: Any, **options: Any) -> AsyncTokens:
        """Generate tokens like `generate_stream`, with its arguments, for `async for`; see `AsyncTokens`, `AsyncStream`."""
        return _AsyncSelf(self).call(Llama.generate_stream, *args, **options)

    @twin_of(text_completion)
    def atext_completion(self, *args: Any, **options: Any) -> Coroutine[Any, Any, list[CompletionPrediction]]:
        """Continue each text like `text_completion`, with its arguments and results, to be awaited.

        Wrong input raises at the call. Cancelling the task that awaits frees the rows of the batch at the next step. Any number
        of event loops and threads may make calls. They share the batch, which a background thread of ours runs meanwhile.
        Raises InputError on several ranks without `lead`, and for a model that the batch cannot run, because it is modified.
        """
        return _AsyncSelf(self).call(Llama.text_completion, *args, **options)

    @twin_of(chat_completion)
    def achat_completion(self, *args: Any, **options: Any) -> Coroutine[Any, Any, list[ChatPrediction]]:
        """Answer each dialog like `chat_completion`, with its arguments and results, to be awaited; see `atext_completion`."""
        return _AsyncSelf(self).call(Llama.chat_completion, *args, **options)

    @twin_of(text_completion_stream)
    def atext_completion_stream(self, *args: Any, **options: Any) -> AsyncStream:
        """Continue one text like `text_completion_stream`, with its arguments. Return an `AsyncStream`."""
        return _AsyncSelf(self).call(Llama.text_completion_stream, *args, **options)

    @twin_of(chat_completion_stream)
    def achat_completion_stream(self, *args: Any, **options: Any) -> AsyncStream:
        """Answer one dialog like `chat_completion_stream`, with its arguments. Return an `AsyncStream`."""
        return _AsyncSelf(self).call(Llama.chat_completion_stream, *args, **options)

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
        return self._calls.score(lambda: self._requests.for_scoring(prompts, continuations), top_logprobs)

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
        as in one process, and the other ranks compute their part of each. Replicas share the queue of requests. The other ranks
        wait without using their CPU, and ignore SIGINT and SIGTERM, which rank 0 may handle. With a single process, `work` is
        simply run.

        Raises InputError for a modified model, before `work` runs. If `work` raises, the other ranks raise
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
        return self._calls.hidden_states(
            "hidden_states",
            lambda: self._requests.for_hidden_states(texts),
            lambda states: states if several else states[0],
            layers,
        )

    @short_traceback
    def embed(self, texts: Iterable[str | Iterable[int]], pooling: str = "mean") -> torch.Tensor:
        """Return an embedding of each text: (texts, dim), float32 on the CPU, from the last of its `hidden_states`.

        pooling: "mean" for the mean of all tokens, BOS among them; "last" for the last token. Embeddings are not normalized.
        """
        if pooling not in ("mean", "last"):
            raise InputError(f"pooling is {describe(pooling)}; it must be 'mean' or 'last'")
        pooled = self._calls.hidden_states(
            f"embed by {pooling}",
            lambda: self._requests.for_hidden_states(texts),
            lambda states: states[0].mean(0) if pooling == "mean" else states[0, -1],
        )
        return torch.stack(pooled) if pooled else torch.empty(0, self.model.params.dim, device="cpu")

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

    @property
    def _calls(self) -> Calls:
        return Calls(self, _GENERATE, lambda: sample_top_p)


_GENERATE = Llama.generate


class _AsyncSelf:
    """What a sync method gets as `self` from its async twin: a `Llama` whose calls are async."""

    def __init__(self, llama: Llama) -> None:
        self._llama, self._calls = llama, AsyncCalls(llama._calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llama, name)

    def call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return method(self, *args, **options)


__all__ = [
    "B_INST", "B_SYS", "E_INST", "E_SYS", "SPECIAL_TAGS", "UNSAFE_ERROR", "AsyncStream", "ChatPrediction",
    "CompletionPrediction", "Dialog", "GeneratedToken", "Llama", "Message", "ModelArgs", "Role", "SamplingParams", "Score",
    "Stream", "Tokenizer", "Transformer", "sample_top_p",
]  # fmt: skip
