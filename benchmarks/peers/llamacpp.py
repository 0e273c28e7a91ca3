"""The peer llama.cpp: call the C functions of llama.cpp directly, because the classes of llama-cpp-python add overhead."""

import time
from collections.abc import Callable
from typing import TypeVar

import llama_cpp
import numpy as np

from peers import Answer, Job

CHUNK = 512  # maximum number of tokens per call: n_batch and n_ubatch of llama.cpp
Entry = tuple[int, int, int, bool]  # row, position, token, and True if the logits at this position are needed
T = TypeVar("T")


@llama_cpp.llama_log_callback
def ignore_message(level: int, text: bytes, data: object) -> None:
    """Ignore a log message of llama.cpp."""


def silence_log() -> None:
    """Stop llama.cpp from writing log messages to stderr."""
    llama_cpp.llama_log_set(ignore_message, None)


def argmax(logits: np.ndarray) -> int:
    return int(logits.argmax())


class LlamaCpp:
    def __init__(self, job: Job) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        if job.device == "cpu":
            params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(job.gguf.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {job.gguf}; delete the file, and it is written again")
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.threads = job.threads
        self.contexts: dict[tuple[int, int], llama_cpp.llama_context_p] = {}
        self.batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)

    def generate(self, prompts: list[list[int]], new: int) -> Answer:
        context = self._context(len(prompts), max(len(p) for p in prompts) + new)
        start = time.perf_counter()
        entries = [(row, i, token, i == len(p) - 1) for row, p in enumerate(prompts) for i, token in enumerate(p)]
        tokens = [[token] for token in self._decode(context, entries, argmax)]
        first = time.perf_counter()
        for step in range(new - 1):
            entries = [(row, len(p) + step, tokens[row][-1], True) for row, p in enumerate(prompts)]
            for row, token in enumerate(self._decode(context, entries, argmax)):
                tokens[row].append(token)
        return Answer(first - start, time.perf_counter() - first, tokens)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Return the logits (S, vocab) at all positions of one sequence of S tokens."""
        context = self._context(1, len(tokens))
        return np.stack(self._decode(context, [(0, i, token, True) for i, token in enumerate(tokens)], np.copy))

    def _context(self, rows: int, length: int) -> llama_cpp.llama_context_p:
        """Return an empty llama.cpp context, which contains a KV cache. length: maximum number of tokens in each row.

        Later calls reuse the context, so that only the first measurement of a workload touches new memory.
        """
        length = -(-length // 256) * 256  # round up to a multiple of 256, as llama.cpp itself does
        if (rows, length) not in self.contexts:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = rows * length, rows
            params.n_batch = params.n_ubatch = CHUNK
            params.n_threads = params.n_threads_batch = self.threads
            self.contexts[rows, length] = llama_cpp.llama_init_from_model(self.model, params)
        context = self.contexts[rows, length]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        return context

    def _decode(self, context: llama_cpp.llama_context_p, entries: list[Entry], convert: Callable[[np.ndarray], T]) -> list[T]:
        """Run the model on the tokens of `entries`; return `convert(logits)` for each entry that needs logits, in order."""
        batch, results = self.batch, []
        for begin in range(0, len(entries), CHUNK):
            chunk = entries[begin : begin + CHUNK]
            for i, (row, position, token, needs_logits) in enumerate(chunk):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, needs_logits
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.n_tokens = len(chunk)
            if status := llama_cpp.llama_decode(context, batch):
                raise SystemExit(f"llama_decode failed with status {status}")
            for i, (*_, needs_logits) in enumerate(chunk):
                if needs_logits:
                    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (self.n_vocab,))
                    results.append(convert(logits))
        return results
