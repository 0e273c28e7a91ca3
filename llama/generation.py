"""`Llama`: build, generate, complete texts, answer dialogs.

One loop serves all of them: `Llama.tokens`, a generator that prefills once, then steps, and yields each new id as it is
made. Text and dialogs are ids before they reach it.
"""

import itertools
import numbers
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict

import torch

from . import checkpoint, kernels, loading, memory, runtime, saved
from .cache import Batch, chunked
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
    check_dialog,
    encode_dialog,
    is_unsafe,
)
from .decode import Decoder
from .errors import CheckpointError, DeviceError, InputError, kind
from .memory import LOGPROB_CHUNK, PREFILL_CHUNK
from .model import ModelArgs, Transformer
from .quantize import KINDS
from .sampling import logprobs_of, next_ids, sample_top_p
from .tokenizer import Tokenizer, check_text


class CompletionPrediction(TypedDict, total=False):
    generation: str
    tokens: list[str]  # with logprobs=True
    logprobs: list[float]  # with logprobs=True


class ChatPrediction(TypedDict, total=False):
    generation: Message
    tokens: list[str]  # with logprobs=True
    logprobs: list[float]  # with logprobs=True


class Token(NamedTuple):
    """One id of one row, and its log probability where asked for."""

    row: int
    id: int
    logprob: float | None


class Llama:
    """A model and its tokenizer. It has one cache, and so serves one call at a time, from one thread."""

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
    ) -> "Llama":
        """Load a checkpoint of Meta's, in any number of shards, on any number of ranks that divides its key/value heads.

        max_seq_len: positions per row, prompt and answer together; max_batch_size: rows at a time. Both size the cache.
        model_parallel_size: ranks that share one model; default WORLD_SIZE, or 1 in plain python.
        seed: of torch's default generator. device: default CUDA, else MPS, else CPU. dtype: default the stored one.
        compile: on CUDA, have torch.compile fuse a decode step's small kernels; the first steps of each size take seconds.
        quantize: "int8" or "int4", of the matrices, while they are read; `dtype` is then that of all else.
        Raises LlamaError (CheckpointError, DeviceError, InputError) before any weight is loaded; only numbers that are
        not finite are found while loading. On the CPU the weights may be the mapped file: replace it, never overwrite it.
        """
        for name, value in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise InputError(f"{name} is {kind(value)}; it must be a whole number from 1 to {2**31 - 1:,}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
            raise InputError(f"seed is {kind(seed)}; it must be a whole number from -2**63 to 2**64 - 1")
        if quantize is not None and (not isinstance(quantize, str) or quantize not in KINDS):
            raise InputError(f"quantize is {kind(quantize)}; use {' or '.join(map(repr, KINDS))}, or leave it out")
        wanted = _dtype(dtype)
        where = runtime.start(device, model_parallel_size)
        if compile and where.type != "cuda":
            raise DeviceError(f"compile=True is for CUDA, and this is {where}; leave it out: a step is not compiled here")

        def plan() -> tuple[Tokenizer, checkpoint.Shards, Transformer, torch.dtype]:
            params = checkpoint.read_params(ckpt_dir)
            tokenizer = Tokenizer(tokenizer_path)
            quantized = saved.open_saved(ckpt_dir, quantize) if quantize else None
            shards = quantized or checkpoint.open_shards(ckpt_dir)
            check = saved.check if quantized else checkpoint.check
            model = checkpoint.build_on_meta(params, shards, max_seq_len, max_batch_size, tokenizer.n_words, check)
            stored = next(iter(shards.values()))["tok_embeddings.weight"].dtype
            ranks = runtime.model_parallel()[1]
            if quantize is not None:
                kernels.check(quantize, where, wanted or stored)
                loading.check_widths(model, quantize)
            memory.preflight(model.params, ranks, wanted or stored, where, runtime.free_memory(where), quantize)
            return tokenizer, shards, model, wanted or stored

        tokenizer, shards, model, dtype = runtime.together(plan)
        runtime.together(lambda: loading.load_weights(model, shards, dtype, where, quantize))
        runtime.together(model.allocate)
        if compile:
            model.compile()
        torch.manual_seed(seed)
        return Llama(model.eval(), tokenizer)

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        if model.vocab_size != tokenizer.n_words:
            raise CheckpointError(
                f"the model has a vocabulary of {model.vocab_size}, but the tokenizer has {tokenizer.n_words} pieces: "
                "it is another model's tokenizer"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.decoder = Decoder(model)

    def generate(
        self,
        prompt_tokens: list[list[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """New ids for each prompt, and their log probabilities or None.

        Row i gets at most min(max_gen_len, max_seq_len - its length) ids, and ends before EOS. temperature 0 takes the
        likeliest id, else ids are drawn by top-p. logprobs: log_softmax of the raw logits at each id. echo: the prompt's
        ids come first, the very first with 0.0. Raises InputError, naming the row, before any work.
        """
        stream = self.tokens(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo)
        ids: list[list[int]] = [[] for _ in prompt_tokens]
        values: list[list[float]] = [[] for _ in prompt_tokens]
        for token in stream:
            ids[token.row].append(token.id)
            if token.logprob is not None:
                values[token.row].append(token.logprob)
        return ids, values if logprobs else None

    def tokens(
        self,
        prompts: list[list[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> Iterator[Token]:
        """`generate`, id by id as they are made: rows take turns, each in its own order. EOS is not yielded."""
        self._check_prompts(prompts)
        _check_sampling(max_gen_len, temperature, top_p)
        ids = [[int(id_) for id_ in prompt] for prompt in prompts]  # NumPy's are welcome
        return self._loop(ids, int(max_gen_len), float(temperature), float(top_p), logprobs, echo)

    @torch.inference_mode()
    def _loop(
        self, prompts: list[list[int]], max_gen_len: int, temperature: float, top_p: float, logprobs: bool, echo: bool
    ) -> Iterator[Token]:
        window, device, B = self.model.params.max_seq_len, self.model.device, len(prompts)
        left = [min(max_gen_len, window - len(p)) for p in prompts]  # ids each row may still get
        scored = echo and logprobs and bool(prompts)  # the prompts' own ids have log probabilities to be computed
        if echo and not scored:
            yield from (Token(row, id_, None) for row, prompt in enumerate(prompts) for id_ in prompt)
        if not any(left) and not scored:
            return

        cache = self.model.ready_cache()
        cache.turn = turn = object()
        hidden, scores = self._prefill(prompts, scored)
        if scored:
            for row, prompt in enumerate(prompts):
                yield from (Token(row, id_, score) for id_, score in zip(prompt, scores[row], strict=True))

        lengths = torch.tensor([len(p) for p in prompts], device=device)
        # A row that is done steps on with the rest, as the rows of a batch share their draws, but stays where it ended.
        last = lengths + torch.tensor(left, device=device) - 1
        positions = torch.minimum(lengths, last)  # of the ids to come
        longest, steps, ragged = max(len(p) for p in prompts), max(left), len({len(p) for p in prompts}) > 1
        live = {row for row in range(B) if left[row]}
        logits = self.model.logits(hidden)
        for step in range(steps):
            ids = runtime.from_rank0(next_ids(logits, temperature, top_p))
            fetched = runtime.fetch(ids, logprobs_of(logits, ids)) if logprobs else runtime.fetch(ids)

            end = min(longest + step + 1, window)
            ahead = step + 1 < steps and runtime.runs_ahead(device)
            if ahead:  # the device goes on while the host reads: whether all rows are done is known a step late
                logits = self.decoder(ids, positions, end, ragged)
            new, *values = fetched()
            for row, id_ in enumerate(new):
                if row not in live:
                    continue
                if id_ == self.tokenizer.eos_id:
                    live.remove(row)
                    continue
                yield Token(row, id_, values[0][row] if values else None)
                left[row] -= 1
                if left[row] == 0:
                    live.remove(row)
            if not live:
                return
            if self.model.cache is not cache or cache.turn is not turn:
                raise InputError("another call has used this model's cache since: end a stream before the next call")
            if not ahead:
                logits = self.decoder(ids, positions, end, ragged)
            positions = torch.minimum(positions + 1, last)

    def _prefill(self, prompts: list[list[int]], scored: bool) -> tuple[torch.Tensor, list[list[float]]]:
        """Each prompt through the model once: the hidden state of each one's last id, (B, dim), and, if asked for, the log
        probabilities of each one's ids, each read off the position before it; 0.0 for the first."""
        lengths, device = [len(p) for p in prompts], self.model.device
        packed = torch.tensor([id_ for p in prompts for id_ in p] + [0], device=device)
        last_hidden, scores, first = [], [0.0], 0
        chunks = list(chunked(lengths, PREFILL_CHUNK))
        for pieces in runtime.progress(chunks, lambda chunk: sum(n for _, _, n in chunk), "reading prompts", "ids"):
            ends = list(itertools.accumulate(n for _, _, n in pieces))
            hidden = self.model.hidden(packed[first : first + ends[-1]], Batch.of(pieces, device))
            final = [end - 1 for end, (row, start, n) in zip(ends, pieces, strict=True) if start + n == lengths[row]]
            last_hidden.append(hidden[torch.tensor(final, dtype=torch.int64, device=device)])
            if scored:
                scores += self._score(hidden, packed[first + 1 :])
            first += ends[-1]
        starts = itertools.accumulate(lengths, initial=0)
        return torch.cat(last_hidden), [[0.0, *scores[i + 1 : i + n]] for i, n in zip(starts, lengths, strict=False)]

    def _score(self, hidden: torch.Tensor, following: torch.Tensor) -> list[float]:
        """Log probabilities, at positions whose hidden states (N, dim) are given, of the ids that follow."""
        values: list[float] = []
        for i in range(0, len(hidden), LOGPROB_CHUNK):
            logits = self.model.logits(hidden[i : i + LOGPROB_CHUNK])
            values += logprobs_of(logits, following[i : i + len(logits)]).tolist()
        return values

    def text_completion(
        self,
        prompts: list[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """Continue each text. max_gen_len defaults to what the window holds. See `generate` for the rest.

        Each result has "generation"; with logprobs=True also "tokens" (each id decoded by itself) and "logprobs".
        """
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
            raise InputError(f"prompts is {kind(prompts)}; it must be a list of texts, as in [text]")
        for row, prompt in enumerate(prompts):
            check_text(prompt, f"prompt {row}")
        encoded = [self.tokenizer.encode(p, bos=True, eos=False) for p in prompts]
        ids, values = self.generate(encoded, self._gen_len(max_gen_len), temperature, top_p, logprobs, echo)
        predictions: list[CompletionPrediction] = [{"generation": self.tokenizer.decode(row)} for row in ids]
        if values is not None:
            for i, prediction in enumerate(predictions):
                prediction["tokens"], prediction["logprobs"] = self._pieces(ids[i]), values[i]
        return predictions

    def chat_completion(
        self,
        dialogs: list[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """Answer each dialog, as the assistant. max_gen_len defaults to what the window holds.

        A dialog that holds a special tag of the format is answered with UNSAFE_ERROR, and computed no further.
        Each result has "generation", a message; with logprobs=True also "tokens" and "logprobs".
        """
        if isinstance(dialogs, (str, bytes, dict)) or not isinstance(dialogs, Sequence):
            raise InputError(f"dialogs is {kind(dialogs)}; it must be a list of dialogs, as in [dialog]")
        for row, dialog in enumerate(dialogs):
            check_dialog(dialog, f"dialog {row}")
        safe = [row for row, dialog in enumerate(dialogs) if not is_unsafe(dialog)]
        encoded = [encode_dialog(self.tokenizer, dialogs[row]) for row in safe]
        self._check_prompts(encoded, [f"dialog {row}" for row in safe])
        ids, values = self.generate(encoded, self._gen_len(max_gen_len), temperature, top_p, logprobs)

        unsafe: Message = {"role": "assistant", "content": UNSAFE_ERROR}
        predictions: list[ChatPrediction] = [{"generation": unsafe} for _ in dialogs]
        if logprobs:
            for prediction in predictions:
                prediction["tokens"], prediction["logprobs"] = [], []
        for i, row in enumerate(safe):
            predictions[row]["generation"] = {"role": "assistant", "content": self.tokenizer.decode(ids[i])}
            if values is not None:
                predictions[row]["tokens"], predictions[row]["logprobs"] = self._pieces(ids[i]), values[i]
        return predictions

    def _pieces(self, ids: list[int]) -> list[str]:
        return [self.tokenizer.decode([id_]) for id_ in ids]

    def _gen_len(self, max_gen_len: int | None) -> int:
        return self.model.params.max_seq_len - 1 if max_gen_len is None else max_gen_len

    def _check_prompts(self, prompts: list[list[int]], names: list[str] | None = None) -> None:
        args, n_words = self.model.params, self.tokenizer.n_words
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
            raise InputError(f"prompt_tokens is {kind(prompts)}; it must be a list of lists of token ids")
        if len(prompts) > args.max_batch_size:
            raise InputError(
                f"{len(prompts)} prompts, but the model was built for max_batch_size={args.max_batch_size}; "
                "give fewer at a time, or build with a larger max_batch_size"
            )
        for name, prompt in zip(names or [f"prompt {row}" for row in range(len(prompts))], prompts, strict=True):
            if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
                raise InputError(f"{name} is {kind(prompt)}; it must be a list of token ids")
            if not prompt:
                raise InputError(f"{name} holds no ids; begin it with BOS ({self.tokenizer.bos_id})")
            for id_ in prompt:
                if isinstance(id_, bool) or not isinstance(id_, numbers.Integral) or not 0 <= int(id_) < n_words:
                    raise InputError(f"{name}: {kind(id_)} is no token id; ids are whole numbers from 0 to {n_words - 1}")
            if len(prompt) > args.max_seq_len:
                raise InputError(
                    f"{name} has {len(prompt)} ids, but the window holds max_seq_len={args.max_seq_len}; "
                    "shorten it, or build with a larger max_seq_len"
                )


def _check_sampling(max_gen_len: int, temperature: float, top_p: float) -> None:
    if isinstance(max_gen_len, bool) or not isinstance(max_gen_len, numbers.Integral) or int(max_gen_len) < 0:
        raise InputError(f"max_gen_len is {kind(max_gen_len)}; it must be a whole number, 0 or more")
    for name, value, most in (("temperature", temperature, 1e30), ("top_p", top_p, 1.0)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= most:
            limit = "from 0 (the likeliest id) to 1e30" if name == "temperature" else "from 0 to 1"
            raise InputError(f"{name} is {kind(value)}; it must be a number, {limit}")


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(wanted, torch.dtype) or wanted not in checkpoint.DTYPES:
        raise InputError(f"dtype is {kind(dtype)}; use 'bfloat16', 'float16' or 'float32', or leave it out for the stored one")
    return wanted


__all__ = [
    "B_INST", "B_SYS", "E_INST", "E_SYS", "SPECIAL_TAGS", "UNSAFE_ERROR", "ChatPrediction", "CompletionPrediction", "Dialog",
    "Llama", "Message", "ModelArgs", "Role", "Token", "Tokenizer", "Transformer", "sample_top_p",
]  # fmt: skip
