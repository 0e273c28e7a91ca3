"""Score sequences: compute the log probabilities of given tokens, without generating anything."""

import torch

from .. import tuning
from ..distributed.progress import progress
from ..distributed.threads import pool_released_if_long
from ..sampling import SamplingParams
from .checks import check_logprobs, device_of
from .engine import Engine
from .leading import check_led
from .packed_sequences import divide_sequences, shared_with_previous
from .prefill import score_sequences, score_tokens
from .reference_loop import move_buffers
from .requests import GenerationCall, Request, ScoringRequest, TokenScore
from .shared_state import CacheOwner


@pool_released_if_long()
def score(engine: Engine, requests: list[ScoringRequest], n_top: int = 0) -> list[list[TokenScore]]:
    """Return the scores of the tokens of each request, with the n_top likeliest tokens at each position.

    Sequences are computed side by side, up to PREFILL_CHUNK tokens at a time; a longer sequence is computed alone. Tokens with
    which sequences of a batch begin alike are computed once. If long prefixes are shared, the sequences are prefilled into rows
    of the KV cache instead, so that a prefix is computed once for all batches, or for several calls. A modified model computes
    one sequence at a time. Raises NonFiniteError for log probabilities that are not finite.
    """
    engine.check_sizes()
    check_led(engine)
    if why := engine.why_reference_loop():
        with engine.whole_calls_ended():
            engine.announce(why)
            move_buffers(engine.model)
            engine.shared.owner = CacheOwner("score")  # open streams cannot continue: the forward overwrites the cache
        one_by_one = progress(requests, lambda request: len(request.inputs), "scoring", "tokens")
        return [score_with_forward(engine, request, n_top) for request in one_by_one]
    forward = engine.forward()
    sequences, multiple = [request.inputs for request in requests], forward.prefix_multiple(score_only=True)
    serves_later_calls = forward.is_batch_invariant and len(requests) <= forward.cache.data.shape[2]
    shortest = tuning.MIN_KEPT_PREFIX if serves_later_calls else tuning.MIN_CACHED_PREFIX
    if shares_long_prefixes(sequences, shortest, multiple):
        return score_in_rows(engine, requests, n_top)
    batches = divide_sequences(sequences, multiple)
    results: dict[int, list[TokenScore]] = {}
    for batch in progress(batches, lambda batch: sum(len(sequences[i]) for i in batch), "scoring", "tokens"):
        results.update(zip(batch, score_side_by_side(engine, [requests[i] for i in batch], n_top), strict=True))
    return [results[i] for i in range(len(requests))]


def score_side_by_side(engine: Engine, requests: list[ScoringRequest], n_top: int) -> list[list[TokenScore]]:
    """Score sequences, sorted by their tokens, in one forward without the KV cache."""
    with torch.inference_mode(), engine.computing():
        leader = engine.shared.leader
        results = leader.score(requests, n_top) if leader else score_sequences(engine.forward(), requests, n_top)
    for request, scores in zip(requests, results, strict=True):
        check_logprobs(engine.model, [each.logprob for each in scores], request.label)
    return results


def score_with_forward(engine: Engine, request: ScoringRequest, n_top: int) -> list[TokenScore]:
    """Score a sequence by the model's own forward."""
    device = device_of(engine.model)
    with torch.inference_mode(), engine.computing():
        logits = engine.model.forward(torch.tensor([request.inputs], device=device), 0)[0, :, : engine.n_words].float()
        following = torch.tensor(request.scored, device=device)
        scores = score_tokens(lambda rows: rows, logits[-len(following) :], following, n_top)
    check_logprobs(engine.model, [each.logprob for each in scores], request.label)
    return scores


def score_in_rows(engine: Engine, requests: list[ScoringRequest], n_top: int) -> list[list[TokenScore]]:
    """Score sequences as a call of the scheduler, in an order in which those that share the most tokens follow each other."""
    order = sorted(range(len(requests)), key=lambda i: requests[i].tokens)
    prompts = [
        Request(r.inputs, 0, label=r.label, score_from=r.start, next_token=r.tokens[-1]) for r in (requests[i] for i in order)
    ]
    call = GenerationCall(
        prompts, SamplingParams(), logprobs=True, top_logprobs=n_top, name="score", score_only=True
    )  # fmt: skip
    results: list[list[TokenScore]] = [[] for _ in requests]
    for token in engine.run(call):
        results[order[token.prompt_index]].append(TokenScore(token.logprob, token.top_logprobs, token.is_greedy))
    return results


def shares_long_prefixes(sequences: list[list[int]], shortest: int, multiple: int) -> bool:
    """Return True if at least a third of all tokens are in prefixes of `shortest` tokens or more that sequences share.

    The prefix cache then saves more than batches of sequences side by side, each of which computes a shared prefix again.
    multiple: prefixes are shared in multiples of this number.
    """
    shared = shared_with_previous(sorted(sequences), multiple)
    return 3 * sum(n for n in shared if n >= shortest) >= sum(map(len, sequences)) > 0
