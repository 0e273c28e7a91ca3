"""`Llama`: build a model; generate, complete texts, answer dialogs, at once or as streams; score.

Text and dialogs become tokens here; `Engine.run` serves all of the calls, and yields each new token as it is generated.
"""

import numbers
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from . import sampling
from .backends.registry import choose_backend, slowdown_warning
from .chat import (
    B_INST,
    B_SYS,
    E_INST,
    E_SYS,
    SPECIAL_TAGS,
    UNSAFE_ERROR,
    Dialog,
    Message,
    Role,
)
from .checkpoint import loading, packed_file, params, shards, validate
from .distributed.agreement import gather_from_replicas, run_on_all_ranks, run_on_rank0
from .distributed.groups import global_rank, model_parallel, replica
from .distributed.setup import initialize
from .engine.backend import Backend
from .engine.checks import device_of
from .engine.collect import collect_results, results_of_replaced_generate
from .engine.engine import Engine
from .engine.incremental_text import IncrementalText
from .engine.request_builder import RequestBuilder, partition_by_length
from .engine.requests import GeneratedToken, GenerationCall
from .engine.results import ChatPrediction, CompletionPrediction, GenerationResult, InfillingPrediction, ResultDetails, Score
from .engine.stream import Stream, text_chunks
from .errors import CheckpointError, DeviceError, InputError, check_count, check_flag, describe
from .kernels.host_memory import set_environment
from .model import ModelArgs, Transformer
from .planning import estimate, free_memory
from .quantization.weight import check_quantize
from .sampling import SamplingParams, sample_top_p
from .tokenizer import Tokenizer

T = TypeVar("T")


class Llama:
    """A model and its tokenizer. It has one KV cache and serves one call at a time; calls of other threads wait.

    Options that the calls share, each off by default:

    top_k, min_p, repetition_penalty: see `SamplingParams`.
    seed: makes an answer depend on the prompt, the options and this number alone, whatever ran before or runs beside it. A list
    gives each prompt its own, for several answers to one prompt. None: all sample from torch's default generator.
    stop: one string or several; an answer's text ends just before the first of them. Tokens and log probabilities include the
    token that completed it. Calls for tokens have no stop strings.
    details: add to each result "finish_reason" ("stop": EOS or a stop string; "length": max_gen_len or the end of the context)
    and the number of tokens of the prompt and of the answer, without EOS.

    Calls take any number of prompts: max_batch_size of them run at a time, and a finished one is replaced at once.

    On several ranks, all make the same calls with the same input, or each raises InputError, and all get the same results.
    Replicas divide a call's prompts among themselves and, without `seed`, sample with seeds that rank 0 draws; each replica
    computes a stream as a whole. Logits that are not finite raise NonFiniteError.
    """

    @staticmethod
    def build(
        ckpt_dir: str | os.PathLike[str],
        tokenizer_path: str | os.PathLike[str],
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
    ) -> "Llama":
        """Load a checkpoint in Meta's layout, with any number of shards, on any number of ranks that divides its heads.

        max_seq_len: context length in tokens, prompt and answer together. max_batch_size: rows of the batch. Both size the
        KV cache.
        model_parallel_size: ranks that share one model; by default all, or 1 in plain python.
        seed: for torch's default generator.
        device: by default CUDA, else MPS, else the CPU. dtype: by default the stored one.
        compile: on CUDA, let torch.compile fuse the small kernels of a decode step and tune the products of a single row; the
        first step with each number of rows then takes seconds.
        quantize: "int8" or "int4" for the matrices, while they are read; `dtype` then applies to the rest.
        backend: "auto", or a name that `python -m llama info` lists. "eager" keeps plain tensors (quantized weights are
        dequantized) and always runs `Transformer.forward`, as the others do once a caller has changed the model.

        Raises CheckpointError, DeviceError or InputError, all of them LlamaError, before any weight is loaded; only weights
        that are not finite and files that change meanwhile are found while loading. On the CPU, weights may stay memory-mapped:
        replace a checkpoint's files, never overwrite them.
        """
        set_environment()
        where = initialize(device, model_parallel_size)

        def check() -> tuple[Tokenizer, shards.Shards, Transformer, torch.dtype]:
            _check_build_arguments(max_seq_len, max_batch_size, seed, compile, quantize, backend, where)
            chosen_dtype = params.parse_dtype(dtype)
            backend_class = choose_backend("torch_compile" if compile else backend, where)
            config = params.read_params(ckpt_dir)
            tokenizer = Tokenizer(tokenizer_path)
            fits = where.type == "cpu" and (quantize is not None or chosen_dtype in (None, torch.bfloat16))
            packed = packed_file.open_packed_file(ckpt_dir, quantize or "bfloat16", fits)
            files = packed or shards.open_shards(ckpt_dir)
            if packed and quantize == "int8" and where.type != "cpu" and global_rank() == 0:
                print(f"int8.safetensors is for CPUs, and slow on {where}: build from the .pth files instead", file=sys.stderr)
            model = validate.build_on_meta(config, files, int(max_seq_len), int(max_batch_size), tokenizer.n_words)
            if packed:
                packed_file.check_packed_file(model, files)
            else:
                validate.check_shards(model, files)
            weights_dtype = chosen_dtype or files.first["tok_embeddings.weight"].dtype
            held_as = quantize if backend_class.packs_weights else None
            sizes = model.params, model_parallel()[1], weights_dtype, where
            estimate.check_quantization(*sizes, held_as)
            estimate.check_memory(*sizes, free_memory.free_memory(where), held_as)
            return tokenizer, files, model, weights_dtype

        tokenizer, files, model, weights_dtype = run_on_all_ranks(
            check,
            must_match=lambda checked: (*validate.build_fingerprint(*checked), quantize, compile, backend, int(seed)),
        )
        backend_class = choose_backend("torch_compile" if compile else backend, where)
        if global_rank() == 0 and (warning := slowdown_warning(backend_class, where, model.params, weights_dtype)):
            print(warning, file=sys.stderr)
        packs = backend_class.packs_weights
        run_on_all_ranks(lambda: loading.load_weights(model, files, weights_dtype, where, quantize, packs))
        torch.manual_seed(int(seed))
        return run_on_all_ranks(lambda: Llama(model.eval(), tokenizer, backend_class()))

    def __init__(self, model: Transformer, tokenizer: Tokenizer, backend: Backend | None = None) -> None:
        if model.vocab_size != tokenizer.n_words:
            raise CheckpointError(
                f"the model has a vocabulary of {model.vocab_size}, but the tokenizer has {tokenizer.n_words} pieces: "
                "it is another model's tokenizer"
            )
        self.model = model
        self.tokenizer = tokenizer
        self._engine = Engine(model, backend or choose_backend("auto", device_of(model))())

    def __repr__(self) -> str:
        args, parameter = self.model.params, next(self.model.parameters())
        dtype = str(parameter.dtype).removeprefix("torch.")
        return (
            f"<Llama: {args.n_layers} layers of dim {args.dim}, {dtype} on {parameter.device}, backend {self.backend}, "
            f"max_seq_len={args.max_seq_len}, max_batch_size={args.max_batch_size}>"
        )

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if not name.startswith("_") or name.startswith("__")]

    @property
    def engine(self) -> Engine:
        """The engine of `model`; a new one if a caller has replaced the model."""
        if self._engine.model is not self.model:
            self._engine = Engine(self.model, self._engine.backend)
        return self._engine

    @property
    def backend(self) -> str:
        """The name of the backend. A changed model runs its own `forward` instead: see `build`."""
        return self._engine.backend.name

    def generate(
        self,
        prompt_tokens: Iterable[Iterable[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | Iterable[int] | None = None,
        stop_token: int | None = None,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Generate tokens after each prompt; return them, and their log probabilities or None.

        A prompt gets at most min(max_gen_len, max_seq_len - its length) tokens; EOS ends it and is not returned. temperature 0
        takes the likeliest token; otherwise see `SamplingParams`. logprobs: log_softmax of the raw logits at each token. echo:
        return the prompt's tokens first, the very first with 0.0. stop_token: ends an answer in place of EOS. Raises
        InputError, naming the prompt, before any computation.
        """
        params = partial(SamplingParams, temperature, top_p, top_k, min_p, repetition_penalty)
        results = self._results(
            lambda: self._requests.from_tokens(prompt_tokens, max_gen_len, seed, params(), logprobs, echo, stop_token),
            called_by_generate=True,
        )
        return [r.tokens for r in results], [r.logprobs for r in results] if logprobs else None

    def generate_stream(
        self,
        prompt_tokens: Iterable[Iterable[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | Iterable[int] | None = None,
    ) -> Iterator[GeneratedToken]:
        """Do what `generate` does, and yield each token as it is generated: (prompt_index, token, logprob).

        The tokens of one prompt come in order, those of different prompts mixed. EOS is not yielded.
        """
        params = partial(SamplingParams, temperature, top_p, top_k, min_p, repetition_penalty)
        call = self._validate_on_all_ranks(
            lambda: self._requests.from_tokens(prompt_tokens, max_gen_len, seed, params(), logprobs, echo)
        )
        return self._run(call, watched=True)

    def text_completion(
        self,
        prompts: Iterable[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | Iterable[int] | None = None,
        stop: str | Sequence[str] = (),
        details: bool = False,
    ) -> list[CompletionPrediction]:
        """Continue each text. max_gen_len defaults to the rest of the context. See `generate` and `Llama` for the options.

        Each result has "generation"; with logprobs=True also "tokens" (each decoded by itself) and "logprobs"; with
        details=True also "finish_reason", "prompt_tokens" and "new_tokens".
        """
        params = partial(SamplingParams, temperature, top_p, top_k, min_p, repetition_penalty)
        results = self._results(
            lambda: self._requests.from_texts(prompts, max_gen_len, seed, params(), stop, logprobs, echo, details=details)
        )
        return [{"generation": r.text, **self._details(r, logprobs, details)} for r in results]

    def iter_text_completion(
        self,
        prompts: Iterable[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | Iterable[int] | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[CompletionPrediction]:
        """Continue each text, and yield the results in order, each as soon as it and all before it are finished.

        Results have `text_completion`'s details. With replicas, all results come at once, when the last is finished.
        """
        params = partial(SamplingParams, temperature, top_p, top_k, min_p, repetition_penalty)
        call = self._validate_on_all_ranks(
            lambda: self._requests.from_texts(prompts, max_gen_len, seed, params(), stop, details=True)
        )
        if replica()[1] > 1 or self._generate_is_replaced():
            results = iter(self._results(lambda: call))
        else:
            results = collect_results(call, self._run(call, watched=True), self.tokenizer)
        return ({"generation": r.text, **self._details(r, False, True)} for r in results)

    def chat_completion(
        self,
        dialogs: Iterable[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | Iterable[int] | None = None,
        stop: str | Sequence[str] = (),
        details: bool = False,
    ) -> list[ChatPrediction]:
        """Answer each dialog as the assistant. max_gen_len defaults to the rest of the context. See `Llama` for the options.

        A dialog that contains a special tag of the format is answered with UNSAFE_ERROR, without computation.
        Each result has "generation", a message, and what `text_completion` adds.
        """
        params = partial(SamplingParams, temperature, top_p, top_k, min_p, repetition_penalty)
        results = self._results(
            lambda: self._requests.from_dialogs(dialogs, max_gen_len, seed, params(), stop, logprobs, details=details)
        )
        return [
            {
                "generation": {"role": "assistant", "content": r.text if r.request.prompt else UNSAFE_ERROR},
                **self._details(r, logprobs, details),
            }
            for r in results
        ]

    def text_infilling(
        self,
        prefixes: Iterable[str],
        suffixes: Iterable[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        suffix_first: bool = False,
    ) -> list[InfillingPrediction]:
        """Generate the text between each prefix and suffix, as Code Llama does. suffix_first: the suffix leads the prompt.

        Each result has "generation" and "full_text", which is prefix, generation and suffix; with logprobs=True also "tokens"
        and "logprobs". Raises InputError for a tokenizer without the four tokens that infilling needs.
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

    def text_completion_stream(
        self,
        prompt: str,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        reuse: bool = False,
    ) -> Stream:
        """Continue one text, and yield the continuation in chunks: see `Stream`.

        reuse: skip the tokens that this prompt shares with the beginning of the last stream with `reuse`, whose keys and values
        are still in the cache. Any other use of the cache discards them, and so does an edit of the weights; only an edit of
        plain weights through `.data` goes unnoticed: leave `reuse` out once after it. Raises InputError at the call, not at the
        first chunk.
        """
        params = partial(SamplingParams, temperature, top_p, top_k, min_p, repetition_penalty)
        return self._stream(
            lambda: self._requests.from_texts([prompt], max_gen_len, seed, params(), stop, reuse=reuse, label="the prompt")
        )

    def chat_completion_stream(
        self,
        dialog: Dialog,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        reuse: bool = False,
    ) -> Stream:
        """Answer one dialog, and yield the answer in chunks: see `text_completion_stream`.

        With `reuse`, the next turn of a dialog computes only what is new in it. UNSAFE_ERROR is a stream of one chunk.
        """
        params = partial(SamplingParams, temperature, top_p, top_k, min_p, repetition_penalty)
        return self._stream(
            lambda: self._requests.from_dialogs([dialog], max_gen_len, seed, params(), stop, reuse=reuse, label="the dialog")
        )

    def score(self, prompts: Iterable[str], continuations: Iterable[str]) -> list[Score]:
        """Return the log probability of each continuation after its prompt, computed in one pass; nothing is generated.

        A continuation's tokens are those of prompt + continuation, from the first one on that the prompt alone does not have:
        where the tokenizer joins letters across the border, the joined token counts.
        """

        def score_rows(rows: list[int]) -> list[list[float]]:
            some = [requests[row] for row in rows]
            return self.engine.score([r.tokens for r in some], [r.start for r in some], [r.label for r in some])

        with self.engine.lock:
            requests = run_on_all_ranks(
                lambda: self._requests.for_scoring(prompts, continuations),
                must_match=lambda checked: (checked, self.engine.why_reference_loop()),
            )
            logprobs = self._shard_across_replicas([len(r.tokens) for r in requests], score_rows)
        return [Score(self._decode_each(r.tokens[r.start :]), values) for r, values in zip(requests, logprobs, strict=True)]

    @property
    def _requests(self) -> RequestBuilder:
        return RequestBuilder(self.tokenizer, self.model.params.max_seq_len)

    def _validate_on_all_ranks(self, make_call: Callable[[], GenerationCall]) -> GenerationCall:
        """Return the call, the same on all ranks; give replicas the seeds that rank 0 draws where there is none."""
        call = run_on_all_ranks(make_call, must_match=lambda call: (call, self.engine.why_reference_loop()))
        if sample_top_p is not sampling.sample_top_p and any(request.seed is not None for request in call.requests):
            raise InputError("seed is for this library's sample_top_p, and another has been put in its place; leave seed out")
        if replica()[1] > 1 and not call.sampling.greedy and all(r.seed is None for r in call.requests):
            n = len(call.requests)
            seeds = run_on_rank0(lambda: torch.randint(-(2**63), 2**63 - 1, (n,)).tolist())
            for request, seed in zip(call.requests, seeds, strict=True):
                request.seed = seed
        return call

    def _shard_across_replicas(self, lengths: list[int], work: Callable[[list[int]], list[T]]) -> list[T]:
        """Return a result for each row, of which each replica computes some: `work` maps row indices to their results."""
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

    def _results(self, make_call: Callable[[], GenerationCall], called_by_generate: bool = False) -> list[GenerationResult]:
        """Run a call to its end: a result for each request. A caller's own `generate` is used by all calls but itself."""
        if not called_by_generate and self._generate_is_replaced():
            return results_of_replaced_generate(self.generate, self._validate_on_all_ranks(make_call), self.tokenizer)
        with self.engine.lock:
            call = self._validate_on_all_ranks(make_call)

            def run_rows(rows: list[int]) -> list[GenerationResult]:
                part = replace(call, requests=[call.requests[row] for row in rows])
                return list(collect_results(part, self._run(part), self.tokenizer))

            return self._shard_across_replicas([len(request.prompt) for request in call.requests], run_rows)

    def _run(self, call: GenerationCall, watched: bool = False) -> Iterator[GeneratedToken]:
        # Looked up at each call: a caller may have replaced the tokenizer, its eos_id, or sample_top_p.
        stop_token = self.tokenizer.eos_id if call.stop_token is None else call.stop_token
        return self.engine.run(replace(call, stop_token=stop_token, sampler=sample_top_p, watched=watched))

    def _stream(self, make_call: Callable[[], GenerationCall]) -> Stream:
        if self._generate_is_replaced():
            raise InputError(
                "generate has been replaced, and streams do not go through it; use text_completion or chat_completion, "
                "or override the stream's own method as well"
            )
        with self.engine.lock:
            call = self._validate_on_all_ranks(make_call)
        (request,) = call.requests
        if not request.prompt:
            return Stream(request, (chunk for chunk in [UNSAFE_ERROR]))
        text = IncrementalText(self.tokenizer, call.stop or ())
        return Stream(request, text_chunks(request, self._run(call, watched=True), text))

    def _details(self, result: GenerationResult, logprobs: bool, details: bool) -> ResultDetails:
        added: ResultDetails = {}
        if logprobs:
            added["tokens"], added["logprobs"] = self._decode_each(result.tokens), result.logprobs
        return {**added, **result.details()} if details else added

    def _decode_each(self, tokens: list[int]) -> list[str]:
        return [self.tokenizer.decode([token]) for token in tokens]


_GENERATE = Llama.generate


def _check_build_arguments(
    max_seq_len: int,
    max_batch_size: int,
    seed: int,
    compile: bool,
    quantize: str | None,
    backend: str,
    device: torch.device,
) -> None:
    """Raise InputError or DeviceError for arguments of `build` that need no file to be refused."""
    check_count(max_seq_len, "max_seq_len")
    check_count(max_batch_size, "max_batch_size")
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not -(2**63) <= seed < 2**64:
        raise InputError(f"seed is {describe(seed)}; it must be a whole number from -2**63 to 2**64 - 1")
    check_quantize(quantize)
    check_flag(compile, "compile")
    if compile and device.type != "cuda":
        raise DeviceError(f"compile=True is for CUDA, and this is {device}; leave it out: a step is not compiled here")
    if compile and backend not in ("auto", "torch_compile"):
        raise InputError(f"compile=True is backend='torch_compile', and backend is {describe(backend)}; leave one of them out")


__all__ = [
    "B_INST", "B_SYS", "E_INST", "E_SYS", "SPECIAL_TAGS", "UNSAFE_ERROR", "ChatPrediction", "CompletionPrediction", "Dialog",
    "GeneratedToken", "Llama", "Message", "ModelArgs", "Role", "SamplingParams", "Score", "Stream", "Tokenizer", "Transformer",
    "sample_top_p",
]  # fmt: skip
