"""Run the calls of a `Llama`: validate them on all ranks, divide them among replicas, and return or stream their answers."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch

from ..chat import UNSAFE_ERROR
from ..distributed.agreement import gather_from_replicas, run_on_all_ranks, run_on_rank0
from ..distributed.groups import part_of_calls, replica
from ..errors import InputError
from ..sampling import Sampler, sample_top_p
from ..tokenizer import Tokenizer
from .collect import collect_results, results_of_replaced_generate
from .dialog_call import DialogCall
from .engine import Engine
from .hidden_states import check_layers, hidden_states, number_of_layers
from .incremental_text import IncrementalText
from .leading import check_led
from .requests import GeneratedToken, GenerationCall, ScoringRequest, TokenScore, check_top_logprobs
from .results import GenerationResult, Score, score_result
from .scoring import score
from .stream import Stream, text_chunks, tokens_until_stop

T = TypeVar("T")
MakeCall = Callable[[], GenerationCall]


class Caller(Protocol):
    """What `Calls` needs of a `Llama`."""

    tokenizer: Tokenizer

    @property
    def engine(self) -> Engine: ...

    @property
    def generate(self) -> Callable[..., Any]: ...


def partition_by_length(lengths: list[int], n_replicas: int) -> list[list[int]]:
    """Divide rows of these lengths evenly among replicas. Return the sorted indices of each replica's rows."""
    by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [sorted(by_length[replica::n_replicas]) for replica in range(n_replicas)]


def shard_across_replicas(lengths: list[int], work: Callable[[list[int]], list[T]]) -> list[T]:
    """Divide rows among the replicas, and return one result for each row, in order.

    lengths: the number of tokens in each row. work: a function from a list of row indices to their results.
    """
    index, count = part_of_calls()
    parts = partition_by_length(lengths, count)
    results = gather_from_replicas(lambda: work(parts[index]))
    by_row = {
        row: result
        for part, part_results in zip(parts, results, strict=True)
        for row, result in zip(part, part_results, strict=True)
    }
    return [by_row[row] for row in range(len(lengths))]


class Calls:
    """The calls of a `Llama`, and what its sync methods return.

    A caller may replace the parts of `llama` at any time, even between a call and its first token, so each is looked up when it
    is needed. generate: the method `Llama.generate`; if `llama` has another one, whole answers come from that. sampler: returns
    the function that samples tokens: `sample_top_p`, or what a caller has put in its place.

    In all methods, name is the public method that makes the call, and make_call checks the call's arguments and builds it.
    """

    def __init__(self, llama: Caller, generate: Callable[..., Any], sampler: Callable[[], Sampler]) -> None:
        self.llama, self.own_generate, self.sampler = llama, generate, sampler

    def results(self, name: str, make_call: MakeCall, make_result: Callable[[GenerationResult], T]) -> list[T]:
        """Run a call to its end, and return one result for each request.

        If a caller has replaced `generate`, the replacement runs all calls but those of `generate` itself.
        """
        if name != "generate" and self._generate_is_replaced():
            return [*map(make_result, self._results_of_replacement(self.validate(name, make_call)))]
        with self.llama.engine.exclusive():
            return [*map(make_result, self._run_on_replicas(self.validate(name, make_call)))]

    def iter_results(self, name: str, make_call: MakeCall) -> Iterator[GenerationResult]:
        """Run a call like `results`, but yield each result as early as possible, in the order of the requests."""
        with self.llama.engine.exclusive():
            call = self.validate(name, make_call)
            if self._generate_is_replaced():
                return iter(self._results_of_replacement(call))
            if part_of_calls()[1] > 1:
                return iter(self._run_on_replicas(call))
            return collect_results(call, self._run(call, watched=True), self.llama.tokenizer)

    def tokens(self, name: str, make_call: MakeCall) -> Iterator[GeneratedToken]:
        """Begin a call, and yield each token as soon as it is generated."""
        call = self.validate(name, make_call)
        tokens = self._run(call, watched=True)
        return tokens_until_stop(call, tokens, self.llama.tokenizer) if call.has_stops else tokens

    def stream(self, name: str, make_call: MakeCall) -> Stream:
        """Begin a call with one request, and return the stream of its answer."""
        self.refuse_replaced_generate("streams")
        with self.llama.engine.exclusive():
            call = self.validate(name, make_call)
        (request,) = call.requests
        if not request.prompt:
            return Stream(request, (chunk for chunk in [UNSAFE_ERROR]))
        text = IncrementalText.of_answer(call, request, self.llama.tokenizer)
        return Stream(request, text_chunks(request, self._run(call, watched=True), text))

    def score(
        self, make_requests: Callable[[], tuple[list[ScoringRequest], list[int | None]]], top_logprobs: int | None
    ) -> list[Score] | list[list[Score]]:
        """Return what `Llama.score` returns. make_requests: see `RequestBuilder.for_scoring`."""
        engine, n_top = self.llama.engine, check_top_logprobs(top_logprobs)

        def score_rows(rows: list[int]) -> list[list[TokenScore]]:
            return score(engine, [requests[row] for row in rows], n_top)

        with engine.exclusive():
            requests, counts = run_on_all_ranks(
                make_requests, must_match=lambda checked: (checked, n_top, engine.why_reference_loop())
            )
            scores = shard_across_replicas([len(request.tokens) for request in requests], score_rows)
        results = iter([score_result(r, each, self.llama.tokenizer) for r, each in zip(requests, scores, strict=True)])
        return [next(results) if n is None else list(itertools.islice(results, n)) for n in counts]  # type: ignore[return-value]

    def hidden_states(
        self,
        name: str,
        make_rows: Callable[[], tuple[list[list[int]], list[str]]],
        reduce: Callable[[torch.Tensor], torch.Tensor],
        layers: int | Iterable[int] | None = None,
    ) -> list[torch.Tensor]:
        """Return `reduce` of the states (layers, tokens, dim) of each row of tokens.

        make_rows: returns the rows, and labels that name them in errors.
        """
        engine = self.llama.engine
        with engine.exclusive():
            rows, labels, chosen = run_on_all_ranks(
                lambda: (*make_rows(), check_layers(layers, number_of_layers(engine.model))),
                must_match=lambda checked: (name, checked, engine.why_reference_loop()),
            )
            return shard_across_replicas(
                [len(row) for row in rows],
                lambda some: hidden_states(engine, [rows[i] for i in some], [labels[i] for i in some], chosen, reduce),
            )

    def validate(self, name: str, make_call: MakeCall) -> GenerationCall:
        """Build a call, and check that it is the same on all ranks. If it has no seeds, rank 0 chooses seeds for replicas."""
        engine = self.llama.engine
        check_led(engine)
        if isinstance(make_call, DialogCall):
            make_call.encode_on_rank0(name)
        call = run_on_all_ranks(
            lambda: replace(make_call(), name=name),
            must_match=lambda call: (
                *(call, engine.why_reference_loop()),
                [request.logits_processor is not None for request in call.requests],
            ),
        )
        if self.sampler() is not sample_top_p and any(request.seed is not None for request in call.requests):
            raise InputError("seed is for this library's sample_top_p, and another has been put in its place; leave seed out")
        is_greedy = all(request.sampling.greedy for request in call.requests)
        if replica()[1] > 1 and not is_greedy and all(r.seed is None for r in call.requests):
            n = len(call.requests)
            seeds = run_on_rank0(lambda: torch.randint(-(2**63), 2**63 - 1, (n,)).tolist())
            for request, seed in zip(call.requests, seeds, strict=True):
                request.seed = seed
        return call

    def resolve(self, call: GenerationCall, watched: bool) -> GenerationCall:
        """Return a validated call with the tokens that end its answers and the sampler. watched: see `GenerationCall`."""
        if call.stop_token is None:
            tokenizer = self.llama.tokenizer
            more_eos_ids = getattr(tokenizer, "more_eos_ids", ())  # a caller's own tokenizer need not have it
            call = replace(call, stop_token=tokenizer.eos_id, more_eos_ids=more_eos_ids)
        return replace(call, sampler=self.sampler(), watched=watched)

    def refuse_replaced_generate(self, what: str) -> None:
        """Raise InputError if a caller has replaced `generate`. what: calls that the replacement cannot run."""
        if self._generate_is_replaced():
            raise InputError(
                f"generate has been replaced, and {what} do not go through it; use text_completion or chat_completion, "
                f"or override the method for {what} as well"
            )

    def _generate_is_replaced(self) -> bool:
        return getattr(self.llama.generate, "__func__", None) is not self.own_generate

    def _results_of_replacement(self, call: GenerationCall) -> list[GenerationResult]:
        return results_of_replaced_generate(self.llama.generate, call, self.llama.tokenizer, self.llama.engine.speculate)

    def _run_on_replicas(self, call: GenerationCall) -> list[GenerationResult]:
        """Divide a validated call among the replicas, run it to its end, and return one result for each request."""

        def run_rows(rows: list[int]) -> list[GenerationResult]:
            part = replace(call, requests=[call.requests[row] for row in rows])
            return list(collect_results(part, self._run(part), self.llama.tokenizer))

        return shard_across_replicas([len(request.prompt) for request in call.requests], run_rows)

    def _run(self, call: GenerationCall, watched: bool = False) -> Iterator[GeneratedToken]:
        return self.llama.engine.run(self.resolve(call, watched))
