"""The state of a batch between two decode steps: tensors on the device with an entry for each row."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..distributed.agreement import broadcast_from_rank0
from ..distributed.failures import error_text
from ..distributed.groups import model_parallel, world_size
from ..errors import InputError
from ..sampling import (
    Sampler,
    SamplingParams,
    apply_count_penalties,
    apply_repetition_penalty,
    bias_of_tokens,
    sample,
    sample_top_p,
    seeded_exponential,
)
from .logits_processors import ProcessedRow
from .requests import GenerationCall, Request


class SamplingOptions(NamedTuple):
    """Describe how the tokens of a row are sampled. Rows with equal options are sampled together."""

    params: SamplingParams
    sampler: Sampler = sample_top_p
    seeded: bool = False
    banned: frozenset[int] = frozenset()  # tokens that are not sampled before the request's min_new_tokens
    processed: bool = False  # True if the row has a logits processor


def sampling_options(call: GenerationCall, request: Request) -> SamplingOptions:
    """Return how the tokens of a request are sampled."""
    banned = frozenset(token for token in call.end_tokens if token >= 0) if request.min_new_tokens else frozenset()
    return SamplingOptions(
        request.sampling, call.sampler, request.seed is not None, banned, request.logits_processor is not None
    )


def _tables_of(request: Request, options: SamplingOptions, vocab: int) -> dict[str, torch.Tensor]:
    """Return what the options of a request need on the device, at the end of its prompt."""
    tables: dict[str, torch.Tensor] = {}
    params = options.params
    if params.repetition_penalty != 1:  # for each token: True if it is in the prompt or the answer
        tables["seen"] = torch.zeros(vocab, dtype=torch.bool, device="cpu")
        tables["seen"][request.prompt] = True
    if params.logit_bias:  # what the logit bias adds to each logit
        tables["bias"] = bias_of_tokens(params.logit_bias, vocab)
    if params.frequency_penalty or params.presence_penalty:  # how often each token is in the answer
        tables["counts"] = torch.zeros(vocab, dtype=torch.float32, device="cpu")
    if options.banned:  # for each token: True if it ends the answer; and the first position at which it may
        tables["ends"] = torch.zeros(vocab, dtype=torch.bool, device="cpu")
        tables["ends"][[*options.banned]] = True
        tables["first_ends"] = torch.tensor(len(request.prompt) + request.min_new_tokens, device="cpu")
    return tables


_FAILED = "its logits processor has failed"


def _for_all_ranks(failure: Exception, label: str) -> InputError:
    """Return the error for the failure of a logits processor. InputError leaves ranks connected."""
    error = InputError(f"{label}: {_FAILED}: {error_text(failure)}")
    error.__cause__ = failure
    return error


class DecodeState:
    """Logits, positions and seeds of B rows, and what their options need, on the device."""

    def __init__(self, n: int, vocab: int, device: torch.device) -> None:
        self.logits = torch.zeros(n, vocab, dtype=torch.float32, device=device)
        # For each row: position of the next token to sample, and position of the last token that the request allows.
        self.positions = self.last_positions = torch.zeros(n, dtype=torch.int64, device=device)
        self.seeds = torch.zeros_like(self.positions)
        self.tables: dict[str, torch.Tensor] = {}  # what options need of each row, by name: see `_tables_of`
        self.processed: dict[int, ProcessedRow] = {}  # the rows that have a logits processor
        self.options: dict[int, SamplingOptions] = {}  # maps each row that is in use to its options
        self._groups: list[tuple[SamplingOptions, torch.Tensor]] | None = None
        self.failures: list[tuple[list[int], Exception]] = []  # of the last `sample`, with the rows that they concern

    def resize(self, n: int) -> None:
        """Change the number of rows to n. New rows contain zeros."""

        def resized(old: torch.Tensor) -> torch.Tensor:
            return torch.cat([old[:n], old.new_zeros(max(0, n - len(old)), *old.shape[1:])])

        self.logits, self.positions, self.last_positions = map(resized, (self.logits, self.positions, self.last_positions))
        self.seeds, self.tables = resized(self.seeds), {name: resized(table) for name, table in self.tables.items()}
        self._groups = None

    def admit(self, rows: list[int], requests: list[Request], options: list[SamplingOptions], logits: torch.Tensor) -> None:
        """Put prefilled requests into free rows. logits: for the first new token of each request, (len(rows), vocab)."""
        index = torch.tensor(rows, device=logits.device)

        def put(old: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return old.index_copy(0, index, values.to(old.device))

        lengths, limits = torch.tensor([(len(r.prompt), r.max_new_tokens) for r in requests], device="cpu").unbind(1)
        last = lengths + limits - 1
        self.logits = put(self.logits, logits)
        self.last_positions = put(self.last_positions, last)
        self.positions = put(self.positions, torch.minimum(lengths, last))
        if any(each.seeded for each in options):
            self.seeds = put(self.seeds, torch.tensor([r.seed or 0 for r in requests], dtype=torch.int64, device="cpu"))
        tables = [_tables_of(request, each, logits.shape[1]) for request, each in zip(requests, options, strict=True)]
        for name, example in {name: value for each in tables for name, value in each.items()}.items():
            values = torch.stack([each.get(name, torch.zeros_like(example)) for each in tables])
            old = self.tables.get(name)
            self.tables[name] = put(values.new_zeros(len(self.logits), *example.shape) if old is None else old, values)
        self.options.update(zip(rows, options, strict=True))
        for row, request in zip(rows, requests, strict=True):
            if request.logits_processor:
                self.processed[row] = ProcessedRow(request.logits_processor, request.label, [*request.prompt])
        self._groups = None

    def set_answer(self, row: int, prompt: list[int], answer: torch.Tensor) -> None:
        """Let a row hold a prompt and an answer so far, instead of the tokens that have been sampled for it."""
        if "seen" in self.tables:
            self.tables["seen"][row] = False
            self.tables["seen"][row, prompt] = True
            self.tables["seen"][row, answer] = True
        if "counts" in self.tables:
            self.tables["counts"][row] = answer.bincount(minlength=self.logits.shape[1])

    def set_positions(self, rows: list[int], positions: list[int]) -> None:
        """Set the positions at which decode steps compute rows that do not decode."""
        if not rows:
            return
        index, value = torch.tensor(rows, device="cpu"), torch.tensor(positions, device="cpu")
        for name in ("positions", "last_positions"):
            old = getattr(self, name)
            setattr(self, name, old.index_copy(0, index.to(old.device), value.to(old.device)))

    def release(self, row: int) -> None:
        """Free a row. It may still be sampled together with the other rows; its tokens are ignored."""
        del self.options[row]
        self.processed.pop(row, None)
        self._groups = None

    def sample(self, keep_failures: bool = False, rows: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample the next token of each row. Return these tokens (B,), and the largest logit of each row (B,).

        If all rows in use have equal options, free rows are sampled with them, so that each step of a call uses the same number
        of random numbers from torch's default generator.
        rows: sample only these, of those in use. The tokens of the other rows are arbitrary.
        keep_failures: collect the exceptions of callers' samplers in `failures`, with the rows that they concern, instead of
        raising them. Those of logits processors are always collected, on all ranks.
        All ranks return the values of rank 0. The largest logit of a row is not finite if the row contains NaN or +inf, or
        only -inf.
        """
        largest, groups = self.logits.amax(-1), self._rows_by_options(rows)
        self.failures = []
        if len(groups) == 1 and not keep_failures and (rows is None or len(rows) == len(self.logits)):
            tokens = self._sample_rows(groups[0][0], slice(None))
        else:
            tokens = torch.zeros_like(self.positions)
            for each, index in groups:
                if (sampled := self._try_sample_rows(each, index, keep_failures)) is not None:
                    tokens = tokens.index_copy(0, index, sampled)
        if model_parallel()[1] > 1:
            tokens = self._with_failures(tokens)
            of_rank0, largest = broadcast_from_rank0(torch.stack([tokens.double(), largest.double()])).unbind()
            tokens = self._without_failures(of_rank0.long())
        sampled = torch.arange(len(tokens), device=tokens.device)
        sampled = sampled if rows is None else sampled[rows]
        if "seen" in self.tables:
            self.tables["seen"][sampled, tokens[sampled]] = True
        if "counts" in self.tables:
            self.tables["counts"][sampled, tokens[sampled]] += 1
        return tokens, largest

    def record(self, tokens: list[int], rows: list[int] | None = None) -> None:
        """Note the sampled token of each row, for the logits processors, which see the tokens before theirs. rows: of these."""
        for row, processed in self.processed.items():
            if rows is None or row in rows:
                processed.tokens.append(tokens[row])

    def _rows_by_options(self, rows: list[int] | None) -> list[tuple[SamplingOptions, torch.Tensor]]:
        """Return the different options of the rows, each with the indices of its rows."""
        if self._groups is None or rows is not None:
            by_options: dict[SamplingOptions, list[int]] = {}
            for row, options in sorted(self.options.items()):
                if rows is None or row in rows:
                    by_options.setdefault(options, []).append(row)
            device = self.logits.device
            groups = [(options, torch.tensor(index, device=device)) for options, index in by_options.items()]
            if rows is not None:
                return groups
            self._groups = groups
        return self._groups

    def _try_sample_rows(self, options: SamplingOptions, rows: torch.Tensor, keep_failures: bool) -> torch.Tensor | None:
        """Sample a token for each of some rows. With `keep_failures`, return None after an exception, and collect it."""
        try:
            return self._sample_rows(options, rows)
        except Exception as e:
            if not keep_failures:
                raise
            self.failures.append((rows.tolist(), e))
            return None

    def _sample_rows(self, options: SamplingOptions, rows: torch.Tensor | slice) -> torch.Tensor:
        """Sample a token for each of some rows, which have equal options."""
        logits, noise, params = self.logits[rows], None, options.params
        if params.logit_bias:
            logits = logits + self.tables["bias"][rows]
        if params.repetition_penalty != 1:
            logits = apply_repetition_penalty(logits, self.tables["seen"][rows], params.repetition_penalty)
        if params.frequency_penalty or params.presence_penalty:
            counts = self.tables["counts"][rows]
            logits = apply_count_penalties(logits, counts, params.frequency_penalty, params.presence_penalty)
        if options.banned:
            is_early = self.positions[rows] < self.tables["first_ends"][rows]
            logits = logits.masked_fill(self.tables["ends"][rows] & is_early.unsqueeze(1), -torch.inf)
        if options.processed and model_parallel()[0] == 0:
            logits = self._process(logits, range(len(logits)) if isinstance(rows, slice) else rows.tolist())
        if options.seeded and not params.greedy:
            noise = seeded_exponential(self.seeds[rows], self.positions[rows], logits.shape[1])
        return sample(logits, params, noise, options.sampler)

    def _process(self, logits: torch.Tensor, rows: Iterable[int]) -> torch.Tensor:
        """Return the logits of some rows after their logits processors. Collect exceptions; such a row keeps its logits."""
        processed = logits.clone()
        for i, row in enumerate(rows):
            if row in self.processed:
                try:
                    processed[i] = self.processed[row].process(processed[i])
                except InputError as e:
                    self.failures.append(([row], e))
                except Exception as e:
                    self.failures.append(([row], e if world_size() == 1 else _for_all_ranks(e, self.processed[row].label)))
        return processed

    def _with_failures(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mark the rows whose logits processors have failed on this rank, the first, by -1."""
        failed = [row for rows, _ in self.failures for row in rows]
        return tokens.index_fill(0, torch.tensor(failed, dtype=torch.int64, device=tokens.device), -1) if failed else tokens

    def _without_failures(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens of the first rank without its marks. On other ranks, collect the failures that they mark."""
        if self.processed and model_parallel()[0] > 0:
            failed = [row for row, token in enumerate(tokens.tolist()) if token < 0]
            self.failures = [([row], InputError(f"{self.processed[row].label}: {_FAILED} on the first rank")) for row in failed]
        return tokens.clamp(min=0)

    def continue_with(self, logits: dict[int, torch.Tensor]) -> None:
        """Set the logits (vocab,) of rows for their next tokens."""
        index = torch.tensor([*logits], device=self.logits.device)
        self.logits = self.logits.index_copy(0, index, torch.stack([*logits.values()]))

    def advance(self, rows: list[int] | None = None) -> None:
        """Increase the position of each row, or of these rows, by 1, up to the last position that its request allows."""
        step: int | torch.Tensor = 1
        if rows is not None:
            step = torch.zeros_like(self.positions)
            step[rows] = 1
        self.positions = torch.minimum(self.positions + step, self.last_positions)
