"""llama.cpp, by the calls of its C interface (llama-cpp-python wraps them one by one), so that no Python slows it."""

import time
from collections.abc import Callable
from typing import TypeVar

import llama_cpp
import numpy as np

from peers import Answer, Job

CHUNK = 512  # ids in one call: its n_batch and n_ubatch
Entries = list[tuple[int, int, int, bool]]
T = TypeVar("T")


@llama_cpp.llama_log_callback
def quiet(level: int, text: bytes, data: object) -> None:
    """Print nothing."""


def be_quiet() -> None:
    """Keep llama.cpp from saying on stderr what it loads and quantizes."""
    llama_cpp.llama_log_set(quiet, None)


def likeliest(logits: np.ndarray) -> int:
    return int(logits.argmax())


class LlamaCpp:
    def __init__(self, job: Job) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        if job.device == "cpu":
            params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(job.gguf.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {job.gguf}")
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.threads = job.threads
        self.contexts: dict[tuple[int, int], llama_cpp.llama_context_p] = {}
        self.batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)

    def generate(self, prompts: list[list[int]], new: int) -> Answer:
        context = self._context(len(prompts), max(len(p) for p in prompts) + new)
        begun = time.perf_counter()
        entries = [(row, i, id_, i == len(p) - 1) for row, p in enumerate(prompts) for i, id_ in enumerate(p)]
        ids = [[id_] for id_ in self._decode(context, entries, likeliest)]
        first = time.perf_counter()
        for step in range(new - 1):
            entries = [(row, len(p) + step, ids[row][-1], True) for row, p in enumerate(prompts)]
            for row, id_ in enumerate(self._decode(context, entries, likeliest)):
                ids[row].append(id_)
        return Answer(first - begun, time.perf_counter() - first, ids)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Return (S, vocab): what is to follow each token of one row."""
        context = self._context(1, len(tokens))
        return np.stack(self._decode(context, [(0, i, token, True) for i, token in enumerate(tokens)], np.copy))

    def _context(self, rows: int, length: int) -> llama_cpp.llama_context_p:
        """An empty cache of a workload's size. It is kept, so that only the first measurement touches new memory."""
        length = -(-length // 256) * 256  # what it rounds to by itself
        if (rows, length) not in self.contexts:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = rows * length, rows
            params.n_batch = params.n_ubatch = CHUNK
            params.n_threads = params.n_threads_batch = self.threads
            self.contexts[rows, length] = llama_cpp.llama_init_from_model(self.model, params)
        context = self.contexts[rows, length]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        return context

    def _decode(self, context: llama_cpp.llama_context_p, entries: Entries, of: Callable[[np.ndarray], T]) -> list[T]:
        """Feed ids as (row, position, id, is its successor wanted?); returns what `of` makes of those logits, in order."""
        batch, successors = self.batch, []
        for begin in range(0, len(entries), CHUNK):
            chunk = entries[begin : begin + CHUNK]
            for i, (row, position, id_, wanted) in enumerate(chunk):
                batch.token[i], batch.pos[i], batch.logits[i] = id_, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.n_tokens = len(chunk)
            if status := llama_cpp.llama_decode(context, batch):
                raise SystemExit(f"llama_decode: {status}")
            for i, (*_, wanted) in enumerate(chunk):
                if wanted:
                    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (self.n_vocab,))
                    successors.append(of(logits))
        return successors
