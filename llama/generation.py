"""`Llama`: build, generate, complete texts, answer dialogs, at once or as streams; score.

One loop serves all of them: `Engine.run`, which yields each new id as it is made. Text and dialogs are ids before they
reach it.
"""

import numbers
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from . import backends, calls, checkpoint, loading, memory, ranks, runtime, sampling, saved
from .backends import Backend
from .calls import Answer, Call, ChatPrediction, CompletionPrediction, Details, InfillingPrediction, Planner, Score
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
from .engine import Engine, Token
from .errors import CheckpointError, DeviceError, InputError, check_flag, kind
from .model import ModelArgs, Transformer
from .quantize import KINDS
from .sampling import Sampling, sample_top_p
from .text import Stream, Text, pieces
from .tokenizer import Tokenizer

T = TypeVar("T")


class Llama:
    """A model and its tokenizer. It has one cache, and so serves one call at a time; calls of other threads wait.

    What the calls for ids, texts, dialogs and streams have in common, each off by default:

    top_k, min_p, repetition_penalty: see `Sampling`.
    seed: the answer then depends on prompt, options and this number alone, whatever ran before or runs beside it. A list
    gives each prompt its own, as for several answers to one. None: all draw from torch's default generator.
    stop: one string or several, before which an answer's text ends. Lists of ids and log probabilities go on to the id
    that made a stop string complete. Calls for ids have none: it is text that they end.
    details: whether a result says why it ended, "finish_reason" ("stop": EOS or a stop string; "length": max_gen_len or
    the window), and how many ids the prompt and the answer (without EOS) have.

    Prompts may be any number: max_batch_size of them run at a time, and where one ends the next takes its place.

    On several ranks all make the same calls with the same input, else each raises InputError, and all get the same results.
    Replicas divide the prompts of a call among themselves, and draw without `seed` by seeds that rank 0 draws; a stream
    each makes as a whole. Logits that are not finite raise NumberError.
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
        """Load a checkpoint of Meta's, in any number of shards, on any number of ranks that divides its key/value heads.

        max_seq_len: positions per row, prompt and answer together; max_batch_size: rows at a time. Both size the cache.
        model_parallel_size: ranks that share one model; default WORLD_SIZE, or 1 in plain python.
        seed: of torch's default generator. device: default CUDA, else MPS, else CPU. dtype: default the stored one.
        compile: on CUDA, have torch.compile fuse a decode step's small kernels and tune the products of a single row; the
        first step of each number of rows takes seconds.
        quantize: "int8" or "int4", of the matrices, while they are read; `dtype` is then that of all else.
        backend: how to compute: "auto", or one of those that `python -m llama info` lists. "eager" keeps plain tensors
        (quantized weights dequantized) and runs `Transformer.forward`, as all do once a caller has changed the model.
        Raises LlamaError (CheckpointError, DeviceError, InputError) before any weight is loaded; only numbers that are not
        finite, and files that change meanwhile, are found while loading. On the CPU the weights may be the mapped file:
        replace it, never overwrite it.
        """
        where = runtime.start(device, model_parallel_size)

        def plan() -> tuple[Tokenizer, checkpoint.Shards, Transformer, torch.dtype]:
            for name, value in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
                if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 1 <= value < 2**31:
                    raise InputError(f"{name} is {kind(value)}; it must be a whole number from 1 to {2**31 - 1:,}")
            if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not -(2**63) <= seed < 2**64:
                raise InputError(f"seed is {kind(seed)}; it must be a whole number from -2**63 to 2**64 - 1")
            if quantize is not None and (not isinstance(quantize, str) or quantize not in KINDS):
                raise InputError(f"quantize is {kind(quantize)}; use {' or '.join(map(repr, KINDS))}, or leave it out")
            wanted = checkpoint.dtype_of(dtype)
            check_flag(compile, "compile")
            if compile and where.type != "cuda":
                raise DeviceError(f"compile=True is for CUDA, and this is {where}; leave it out: a step is not compiled here")
            if compile and backend not in ("auto", "torch_compile"):
                raise InputError(
                    f"compile=True is backend='torch_compile', and backend is {kind(backend)}; leave one of them out"
                )
            served_by = backends.choose("torch_compile" if compile else backend, where)
            held = quantize if served_by.packs else None
            params = checkpoint.read_params(ckpt_dir)
            tokenizer = Tokenizer(tokenizer_path)
            fits = where.type == "cpu" and (quantize is not None or wanted in (None, torch.bfloat16))
            opened = saved.open_saved(ckpt_dir, quantize or "bfloat16", fits)
            shards = opened or checkpoint.open_shards(ckpt_dir)
            if opened and quantize == "int8" and where.type != "cpu" and ranks.global_rank() == 0:
                print(f"int8.safetensors is for CPUs, and slow on {where}: build from the .pth files instead", file=sys.stderr)
            model = checkpoint.build_on_meta(params, shards, int(max_seq_len), int(max_batch_size), tokenizer.n_words)
            (saved if opened else checkpoint).check(model, shards)
            stored = shards.first["tok_embeddings.weight"].dtype
            n_ranks = ranks.model_parallel()[1]
            memory.check_quantized(model.params, n_ranks, wanted or stored, where, held)
            memory.preflight(model.params, n_ranks, wanted or stored, where, runtime.free_memory(where), held)
            return tokenizer, shards, model, wanted or stored

        tokenizer, shards, model, chosen = ranks.together(
            plan, alike=lambda made: (*checkpoint.marks(*made), quantize, compile, backend, int(seed))
        )
        served_by = backends.choose("torch_compile" if compile else backend, where)
        if ranks.global_rank() == 0 and (slow := backends.slower(served_by, where, model.params, chosen)):
            print(slow, file=sys.stderr)
        ranks.together(lambda: loading.load_weights(model, shards, chosen, where, quantize, served_by.packs))
        torch.manual_seed(int(seed))
        return ranks.together(lambda: Llama(model.eval(), tokenizer, served_by()))

    def __init__(self, model: Transformer, tokenizer: Tokenizer, backend: Backend | None = None) -> None:
        if model.vocab_size != tokenizer.n_words:
            raise CheckpointError(
                f"the model has a vocabulary of {model.vocab_size}, but the tokenizer has {tokenizer.n_words} pieces: "
                "it is another model's tokenizer"
            )
        self.model = model
        self.tokenizer = tokenizer
        self._engine = Engine(model, backend)

    @property
    def engine(self) -> Engine:
        """The engine of `model`, made anew if a caller has replaced that."""
        if self._engine.model is not self.model:
            self._engine = Engine(self.model, self._engine.backend)
        return self._engine

    @property
    def backend(self) -> str:
        """The backend's name. A changed model runs its own `forward` instead: see `build`."""
        return self._engine.backend.name

    @property
    def planner(self) -> Planner:
        return Planner(self.tokenizer, self.model.params.max_seq_len)

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
        """New ids for each prompt, and their log probabilities or None.

        Row i gets at most min(max_gen_len, max_seq_len - its length) ids, and ends before EOS. temperature 0 takes the
        likeliest id, else ids are drawn: see `Sampling`. logprobs: log_softmax of the raw logits at each id. echo: the
        prompt's ids come first, the very first with 0.0. stop_token: what ends a row in place of EOS. Raises InputError, naming
        the row, before any work.
        """
        drawing = partial(Sampling, temperature, top_p, top_k, min_p, repetition_penalty)
        answers = self._answers(
            lambda: self.planner.ids(prompt_tokens, max_gen_len, seed, drawing(), logprobs, echo, stop_token), own=True
        )
        return [a.ids for a in answers], [a.logprobs for a in answers] if logprobs else None

    def tokens(
        self,
        prompts: Iterable[Iterable[int]],
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
    ) -> Iterator[Token]:
        """`generate`, id by id as they are made: rows take turns, each in its own order. EOS is not yielded."""
        drawing = partial(Sampling, temperature, top_p, top_k, min_p, repetition_penalty)
        call = self._agreed(lambda: self.planner.ids(prompts, max_gen_len, seed, drawing(), logprobs, echo))
        return self._tokens(call, watched=True)

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
        """Continue each text. max_gen_len defaults to what the window holds. See `generate` and `Llama` for the rest.

        Each result has "generation"; with logprobs=True also "tokens" (each id decoded by itself) and "logprobs"; with
        details=True also "finish_reason", "prompt_tokens" and "new_tokens".
        """
        drawing = partial(Sampling, temperature, top_p, top_k, min_p, repetition_penalty)
        answers = self._answers(
            lambda: self.planner.texts(prompts, max_gen_len, seed, drawing(), stop, logprobs, echo, details=details)
        )
        return [{"generation": a.text, **self._details(a, logprobs, details)} for a in answers]

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
        """Answer each dialog, as the assistant. max_gen_len defaults to what the window holds. See `Llama` for the rest.

        A dialog that holds a special tag of the format is answered with UNSAFE_ERROR, and computed no further.
        Each result has "generation", a message, and what `text_completion` adds.
        """
        drawing = partial(Sampling, temperature, top_p, top_k, min_p, repetition_penalty)
        answers = self._answers(
            lambda: self.planner.dialogs(dialogs, max_gen_len, seed, drawing(), stop, logprobs, details=details)
        )
        said = [a.text if a.request.prompt else UNSAFE_ERROR for a in answers]
        return [
            {"generation": {"role": "assistant", "content": text}, **self._details(answer, logprobs, details)}
            for text, answer in zip(said, answers, strict=True)
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
        """Generate the text between each prefix and suffix, as Code Llama does. suffix_first: it precedes in the prompt.

        Each result has "generation" and "full_text", which is prefix, generation and suffix; with logprobs=True also "tokens"
        and "logprobs". Raises InputError for a tokenizer without the four tokens that infilling needs.
        """
        before, after, prompts = ranks.together(
            lambda: self.planner.infilling(prefixes, suffixes, suffix_first), alike=lambda planned: planned
        )
        tokens, values = self.generate(
            prompt_tokens=prompts,
            max_gen_len=self.model.params.max_seq_len - 1 if max_gen_len is None else max_gen_len,
            temperature=temperature,
            top_p=top_p,
            logprobs=logprobs,
            stop_token=self.tokenizer.eot_id,
        )
        results: list[InfillingPrediction] = []
        for i, (prefix, suffix) in enumerate(zip(before, after, strict=True)):
            text = self.tokenizer.decode_infilling(tokens[i])
            more: Details = {} if values is None else {"tokens": self._pieces(tokens[i]), "logprobs": values[i]}
            results.append({"generation": text, "full_text": prefix + text + suffix, **more})
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
        """Continue one text, and yield the continuation piece by piece: see `Stream`.

        reuse: keys and values that the last stream with `reuse` left in the cache serve for the ids that both prompts
        begin with; any other use of the cache forgets them, and so do edits of weights (through `.data` too if they are packed;
        plain ones count no such edit: then leave `reuse` out once). Raises InputError at the call, not at the first piece.
        """
        drawing = partial(Sampling, temperature, top_p, top_k, min_p, repetition_penalty)
        return self._stream(
            lambda: self.planner.texts([prompt], max_gen_len, seed, drawing(), stop, reuse=reuse, each="the prompt")
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
        """Answer one dialog, and yield the answer piece by piece: see `text_completion_stream`.

        With `reuse` a dialog's next turn computes only what is new in it. UNSAFE_ERROR is a stream of one piece.
        """
        drawing = partial(Sampling, temperature, top_p, top_k, min_p, repetition_penalty)
        return self._stream(
            lambda: self.planner.dialogs([dialog], max_gen_len, seed, drawing(), stop, reuse=reuse, each="the dialog")
        )

    def score(self, prompts: Iterable[str], continuations: Iterable[str]) -> list[Score]:
        """The log probability of each continuation after its prompt, in one pass; nothing is generated.

        Any number of pairs. A continuation's ids are those of prompt + continuation, from the first on that the prompt
        alone has not: where the tokenizer joins letters over the border, the joined piece counts.
        """

        def work(rows: list[int]) -> list[list[float]]:
            some = [scored[row] for row in rows]
            return self.engine.score([s.ids for s in some], [s.start for s in some], [s.name for s in some])

        with self.engine.lock:
            scored = ranks.together(
                lambda: self.planner.scored(prompts, continuations), alike=lambda scored: (scored, self.engine.why_eager())
            )
            values = self._divided([len(s.ids) for s in scored], work)
        return [Score(self._pieces(s.ids[s.start :]), found) for s, found in zip(scored, values, strict=True)]

    def _agreed(self, plan: Callable[[], Call]) -> Call:
        """What is to be done, the same on all ranks."""
        call = ranks.together(plan, alike=lambda call: (call, self.engine.why_eager()))  # a hook on one rank alone is an error
        if sample_top_p is not sampling.sample_top_p and any(request.seed is not None for request in call.requests):
            raise InputError("seed is for this library's sample_top_p, and another has been put in its place; leave seed out")
        if ranks.replica()[1] > 1 and not call.sampling.greedy and all(r.seed is None for r in call.requests):
            seeds = ranks.on_rank0(lambda: torch.randint(-(2**63), 2**63 - 1, (len(call.requests),)).tolist())
            for request, seed in zip(call.requests, seeds, strict=True):
                request.seed = seed
        return call

    def _divided(self, lengths: list[int], work: Callable[[list[int]], list[T]]) -> list[T]:
        """A result for each row, from the replicas that do the work for some rows each."""
        index, count = ranks.replica()
        hands = calls.dealt(lengths, count)
        results = ranks.on_every_replica(lambda: work(hands[index]))
        by_row = {
            row: result for hand, part in zip(hands, results, strict=True) for row, result in zip(hand, part, strict=True)
        }
        return [by_row[row] for row in range(len(lengths))]

    def _generate_is_replaced(self) -> bool:
        return getattr(self.generate, "__func__", None) is not _GENERATE

    def _answers_of_generate(self, call: Call) -> list[Answer]:
        """Return the answers of a caller's own `generate`, called as the reference calls it."""
        asked = [request for request in call.requests if request.prompt]
        defaults = Sampling()
        options = {
            n: v for n, v in vars(call.sampling).items() if n not in ("temperature", "top_p") and v != getattr(defaults, n)
        }
        if any(request.seed is not None for request in asked):
            options["seed"] = [request.seed for request in asked]
        tokens, logprobs = self.generate(
            prompt_tokens=[request.prompt for request in asked],
            max_gen_len=max((request.most for request in asked), default=0),
            temperature=call.sampling.temperature, top_p=call.sampling.top_p,
            logprobs=call.logprobs, **({"echo": True} if call.echo else {}), **options,
        )  # fmt: skip
        found = dict(zip(map(id, asked), zip(tokens, logprobs or [[] for _ in tokens], strict=True), strict=True))
        answers = []
        for request in call.requests:
            answer, text = Answer(request), Text(self.tokenizer, call.stops or ())
            ids, values = found.get(id(request), ([], []))
            answer.ids, answer.logprobs = list(ids), list(values)
            for n, token in enumerate(answer.ids, 1):
                answer.text += text.push(token)
                if text.stopped:
                    answer.ids, answer.logprobs, request.finish_reason = answer.ids[:n], answer.logprobs[:n], "stop"
                    break
            answer.text += text.end()
            request.made = len(answer.ids) - (len(request.prompt) if call.echo else 0)
            request.finish_reason = request.finish_reason or ("stop" if request.made < request.most else "length")
            answers.append(answer)
        return answers

    def _answers(self, plan: Callable[[], Call], own: bool = False) -> list[Answer]:
        """Collect each row's answer. own: called by `Llama.generate` itself."""
        if not own and self._generate_is_replaced():
            return self._answers_of_generate(self._agreed(plan))
        with self.engine.lock:
            call = self._agreed(plan)

            def work(rows: list[int]) -> list[Answer]:
                return list(self._gathered(replace(call, requests=[call.requests[row] for row in rows])))

            return self._divided([len(request.prompt) for request in call.requests], work)

    def finished(self, plan: Callable[[], Call]) -> Iterator[Answer]:
        """The answers in order, each as soon as it and all before it are done; those of replicas, when all are."""
        if ranks.replica()[1] > 1:
            yield from self._answers(plan)
            return
        with self.engine.lock:
            call = self._agreed(plan)
        yield from self._gathered(call)

    def _gathered(self, call: Call) -> Iterator[Answer]:
        """What this replica makes of a call, in order; text only where there are stops, be it none."""
        answers = [Answer(request) for request in call.requests]
        texts = [Text(self.tokenizer, call.stops) for _ in answers] if call.stops is not None else []
        if call.echo:
            for answer, text in zip(answers, texts, strict=False):
                answer.text = text.begin(answer.request.prompt)
        done = 0
        for row, id_, logprob in self._tokens(call):
            while not call.echo and answers[done].request.finish_reason:  # the one at hand has none yet
                yield self._whole(answers[done], texts[done : done + 1])
                done += 1
            answer = answers[row]
            answer.ids.append(id_)
            if logprob is not None:
                answer.logprobs.append(logprob)
            if texts and answer.request.made:  # else it is the prompt's own
                answer.text += texts[row].push(id_)
                if texts[row].stopped:
                    answer.request.finish_reason = "stop"
        for i in range(done, len(answers)):
            yield self._whole(answers[i], texts[i : i + 1])

    @staticmethod
    def _whole(answer: Answer, text: list[Text]) -> Answer:
        """With what its text held back."""
        answer.text += "".join(t.end() for t in text)
        return answer

    def _tokens(self, call: Call, watched: bool = False) -> Iterator[Token]:
        # As they are now: a caller may have put others there.
        eos_id, sampler = self.tokenizer.eos_id if call.stop_token is None else call.stop_token, sample_top_p
        return self.engine.run(call.requests, call.sampling, eos_id, call.logprobs, call.echo, call.reuse, sampler, watched)

    def _stream(self, plan: Callable[[], Call]) -> Stream:
        if self._generate_is_replaced():
            raise InputError(
                "generate has been replaced, and streams do not go through it; use text_completion or chat_completion, "
                "or override the stream's own method as well"
            )
        with self.engine.lock:
            call = self._agreed(plan)
        (request,), stops = call.requests, call.stops or ()
        if not request.prompt:
            return Stream(request, (piece for piece in [UNSAFE_ERROR]))
        return Stream(request, pieces(request, self._tokens(call, watched=True), Text(self.tokenizer, stops)))

    def _details(self, answer: Answer, logprobs: bool, details: bool) -> Details:
        found: Details = {}
        if logprobs:
            found["tokens"], found["logprobs"] = self._pieces(answer.ids), answer.logprobs
        return {**found, **answer.details()} if details else found

    def _pieces(self, ids: list[int]) -> list[str]:
        return [self.tokenizer.decode([id_]) for id_ in ids]


_GENERATE = Llama.generate

__all__ = [
    "B_INST", "B_SYS", "E_INST", "E_SYS", "SPECIAL_TAGS", "UNSAFE_ERROR", "ChatPrediction", "CompletionPrediction", "Dialog",
    "Llama", "Message", "ModelArgs", "Role", "Sampling", "Score", "Stream", "Token", "Tokenizer", "Transformer", "sample_top_p",
]  # fmt: skip
