"""Prefill: run prompts through the engine's forward, side by side and in chunks."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from .. import tuning
from ..distributed.progress import progress
from ..sampling import ranked_logprobs
from .forward import EngineForward, EngineLayer, ForwardContext
from .kv_cache import RaggedBatch, prefill_chunks
from .packed_sequences import pack_sequences
from .prefix_cache import PrefixCache, n_shared
from .requests import Request, ScoringRequest, TokenScore, token_score


@dataclass(eq=False)
class PrefillRow:
    """A row of the KV cache, and the prompt to prefill into it.

    score_from: index of the first token whose log probability is wanted, 1 or more; None to score no token.
    n_top: how many of the likeliest tokens are wanted, too.
    multiple: `start` is a multiple of this number.
    start: number of leading tokens that are not computed, because they are in the row already, or will be copied there.
    source: None, or the row from which they will be copied as soon as its own prefill has ended.
    """

    row: int
    request: Request
    score_from: int | None = None
    n_top: int = 0
    multiple: int = 1
    start: int = 0
    source: int | None = None
    n_computed: int = 0
    scores: list[TokenScore] = field(default_factory=list)  # of the tokens from `score_from` on
    last_hidden: torch.Tensor | None = None  # hidden state of the last token, (1, dim); None until computed

    @property
    def n_cached(self) -> int:
        """Return the number of tokens that are in the cache."""
        return self.start + self.n_computed

    @property
    def first_hidden(self) -> int:
        """Return the index of the first token whose hidden state is needed."""
        last = len(self.request.prompt) - 1
        return last if self.score_from is None else min(self.score_from - 1, last)

    @property
    def last_target(self) -> list[int]:
        """Return the token after the prompt; -1 if it is not known, because it is to be generated."""
        return [-1 if self.request.next_token is None else self.request.next_token]

    @property
    def max_start(self) -> int:
        """Return the largest possible value of `start`.

        At least two tokens are computed, since attention rounds a single token as in a decode step.
        """
        return max(0, min(self.first_hidden, len(self.request.prompt) - 2))


def share_prefix(place: PrefillRow, prefixes: PrefixCache, prefilling: list[PrefillRow], spare: list[int]) -> int | None:
    """Take the first tokens of a prompt from the row that shares the most with it.

    If a row in `prefilling` shares considerably more, `place` waits for the end of that row's prefill. What the row of `place`
    held before may be saved in one of the rows `spare`. Return the row in which it was saved, or None.
    """
    prompt, limit = place.request.prompt, place.max_start
    source, place.start = prefixes.find(prompt, limit, place.multiple, place.row)
    saved = prefixes.take(place.row, source, place.start, spare)
    for other in prefilling:
        n = n_shared(other.request.prompt, prompt, limit, place.multiple)
        if n - place.start >= tuning.MIN_AWAITED_PREFIX:
            place.start, place.source = n, other.row
    place.request.num_cached_tokens = place.start
    return saved


class Prefill:
    """Prefill rows of the KV cache with prompts, in chunks of at most max_tokens tokens, counted over all prompts.

    quiet: show no progress. After the last chunk, `scores` and `last_hidden` of the rows are complete.
    """

    def __init__(self, forward: EngineForward, rows: list[PrefillRow], max_tokens: int, quiet: bool) -> None:
        self.forward, self.rows, self.max_tokens, self.quiet = forward, rows, max_tokens, quiet
        self.chunks: Iterator[list[tuple[int, int, int]]] | None = None  # None before the first chunk
        self.next_chunk: list[tuple[int, int, int]] | None = None

    @property
    def finished(self) -> bool:
        """Return True after the last chunk."""
        return self.chunks is not None and self.next_chunk is None

    def begin(self) -> None:
        """Divide the tokens that are to be computed into chunks."""
        lengths = [len(each.request.prompt) - each.start for each in self.rows]
        chunks = list(prefill_chunks(lengths, self.max_tokens, tuning.ATTENTION_CHUNK))
        bar = progress(chunks, lambda chunk: sum(n for _, _, n in chunk), "reading prompts", "tokens")
        self.chunks = iter(chunks if self.quiet else bar)
        self.next_chunk = next(self.chunks, None)

    def run_chunk(self) -> None:
        """Run the next chunk."""
        if self.chunks is None:
            self.begin()
        assert self.chunks is not None
        pieces = [(self.rows[i], self.rows[i].start + done, n) for i, done, n in self.next_chunk or []]
        tokens, needed, targets = list[int](), list[int](), list[int]()  # targets: the token after each needed hidden state
        for each, first, n in pieces:
            prompt, skipped = each.request.prompt, max(0, each.first_hidden - first)
            needed += range(len(tokens) + skipped, len(tokens) + n)
            targets += [*prompt, *each.last_target][first + skipped + 1 : first + n + 1]
            tokens += prompt[first : first + n]
        device = self.forward.device
        batch = RaggedBatch.from_segments([(each.row, first, n) for each, first, n in pieces], device)
        indices = torch.tensor(needed, dtype=torch.int64, device=device)
        hidden = self.forward.hidden_states(torch.tensor(tokens, device=device), batch, logits_indices=indices)
        scored = torch.tensor([i for i, token in enumerate(targets) if token >= 0], dtype=torch.int64, device=device)
        following = torch.tensor([token for token in targets if token >= 0], dtype=torch.int64, device=device)
        scores = iter(score_tokens(self.forward.logits, hidden[scored], following, max(each.n_top for each, _, _ in pieces)))
        n_needed = 0
        for each, first, n in pieces:
            each.n_computed += n
            n_targets = max(0, min(n, first + n - each.first_hidden))
            n_needed += n_targets
            if each.n_cached == len(each.request.prompt):
                each.last_hidden = hidden[n_needed - 1 : n_needed]
                n_targets -= each.last_target == [-1]
            each.scores += [score.with_top(each.n_top) for score in itertools.islice(scores, n_targets)]
        self.next_chunk = next(self.chunks, None)

    @property
    def last_hidden(self) -> torch.Tensor:
        """Return the hidden state of the last token of each prompt, (B, dim)."""
        return torch.cat([each.last_hidden for each in self.rows if each.last_hidden is not None])


def side_by_side(lengths: list[int]) -> list[list[int]]:
    """Divide sequences of these lengths, in order, into batches of at most PREFILL_CHUNK tokens, or of one longer sequence.

    Return the indices of each batch.
    """
    batches: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if length > room:
            batches, room = [*batches, []], tuning.PREFILL_CHUNK
        batches[-1].append(i)
        room -= length
    return batches


def states_of_layers(forward: EngineForward, sequences: list[list[int]], layers: list[int]) -> list[torch.Tensor]:
    """Return hidden states (N, dim) of sequences with N tokens together, computed side by side and without the KV cache.

    layers: numbers of the states, as in `hidden_states.py`.
    """
    states: dict[int, torch.Tensor] = {}
    numbers = itertools.count()

    def record_input(layer: EngineLayer, h: torch.Tensor, context: ForwardContext, cache: torch.Tensor | None) -> torch.Tensor:
        if (i := next(numbers)) in layers:
            states[i] = h
        return layer.forward(h, context, cache)

    tokens = torch.tensor([token for sequence in sequences for token in sequence], device=forward.device)
    batch = RaggedBatch.from_segments([(row, 0, len(each)) for row, each in enumerate(sequences)], forward.device)
    states[len(forward.layers)] = forward.hidden_states(tokens, batch, use_cache=False, layer_fn=record_input)
    return [states[layer] for layer in layers]


def score_sequences(forward: EngineForward, requests: list[ScoringRequest], n_top: int) -> list[list[TokenScore]]:
    """Return the scores of the tokens of each request, computed side by side and without the KV cache.

    requests: sorted by their tokens, so that those that begin alike follow each other.
    """
    sequences = [request.inputs for request in requests]
    tokens, indices, batch = pack_sequences(sequences, forward.prefix_multiple(score_only=True), forward.device)
    following = torch.tensor([token for request in requests for token in request.scored], device=forward.device)
    needed = [i for request, places in zip(requests, indices, strict=True) for i in places[-len(request.scored) :]]
    logits_indices = torch.tensor(needed, dtype=torch.int64, device=forward.device)
    inputs = torch.tensor(tokens, device=forward.device)
    hidden = forward.hidden_states(inputs, batch, use_cache=False, logits_indices=logits_indices)
    scores = iter(score_tokens(forward.logits, hidden, following, n_top))
    return [list(itertools.islice(scores, len(request.scored))) for request in requests]


def score_tokens(
    logits: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, following: torch.Tensor, n_top: int = 0
) -> list[TokenScore]:
    """Return the score of each token `following[i]`, given the hidden state `hidden[i]`. hidden: (N, dim)."""
    scores: list[TokenScore] = []
    for i in range(0, len(hidden), tuning.LOGPROB_CHUNK):
        chunk = logits(hidden[i : i + tuning.LOGPROB_CHUNK])
        targets = following[i : i + len(chunk)]
        values = [each.tolist() for each in ranked_logprobs(chunk, targets, n_top)]
        is_greedy = (chunk.argmax(-1) == targets).tolist()
        scores += [token_score(values, j, n_top)._replace(is_greedy=is_greedy[j]) for j in range(len(chunk))]
    return scores
