"""Continuous batching: run the requests of all calls together through the engine's forward.

Each request waits for a free row of the KV cache, is prefilled once, and then decodes together with the other rows. When a
request ends, the next waiting request gets its row, and is prefilled before the next decode step. Requests of a call that
begins while others run join the batch. Free rows between others are decoded too, and their results ignored. Prompts that begin
with the same tokens are prefilled with these tokens once: see `prefix_cache`.

    row 0   a a a a A A A A A | c c C C C      lower case: prompt tokens; requests that start together share a prefill
    row 1   b b B B B B B B B   B B B B B      upper case: new tokens, one per decode step; c begins when a has ended
"""

import collections
from collections.abc import Sequence

from .. import compat, tuning
from ..distributed.agreement import broadcast_from_rank0, is_true_on_all_ranks
from ..distributed.progress import progress
from ..errors import LlamaError
from ..model import Transformer
from .backend import Backend
from .batch import Batch
from .checks import check_logprobs
from .decode_state import sampling_options
from .events import Event, RunningCall, RunningRequest
from .forward import EngineForward
from .prefill import Prefill, PrefillRow, share_prefix
from .requests import GeneratedToken, GenerationCall, Request, TokenScore
from .shared_state import CacheOwner, SharedState
from .speculation import Speculation

MAX_DECODERS = 8  # decode functions of different numbers of rows that are kept, because each allocates memory


class Scheduler(Batch):
    """Run calls: admit waiting requests to free rows, decode all rows together, and free the rows of ended requests.

    A scheduler exists while calls run. The next call after that creates a new one.
    """

    def __init__(self, model: Transformer, forward: EngineForward, backend: Backend, shared: SharedState, name: str) -> None:
        super().__init__(model, forward, backend, shared)
        self.weights_version = forward.weights_version()
        self.hooks = [hooks for module in model.modules() for hooks in compat.forward_hooks(module)]
        shared.owner = self.owner = CacheOwner(name)
        self.cache.sync_streams()
        overrun_logits, self.cache.logits = self.cache.logits, None
        if overrun_logits is not None and not broadcast_from_rank0(overrun_logits.amax(-1).sum()).isfinite():
            self.prefixes.clear()
            self.cache.data.zero_()  # a step that the previous call launched ahead may have written NaN into the cache
        is_unchanged = self.cache.is_unchanged() and self.cache.weights_version == self.weights_version
        if not is_true_on_all_ranks(is_unchanged, forward.device):
            self.prefixes.clear()  # on all ranks, so that all skip the same tokens
        self.cache.weights_version = self.weights_version
        self.cache.record_version()
        self.waiting: collections.deque[tuple[RunningCall, int]] = collections.deque()  # calls and indices of their requests
        self.n_idle = 0  # steps for which free rows have waited for others to become free, summed over these rows
        self.shows_progress = False

    def submit(self, call: GenerationCall) -> RunningCall:
        running_call = self.begin(call)
        self.enqueue(running_call, range(len(call.requests)))
        return running_call

    def begin(self, call: GenerationCall) -> RunningCall:
        """Add a call, none of whose requests is to run yet."""
        max_rows = self.model.params.max_batch_size
        if not self.calls and len(call.requests) > max_rows:
            self.shows_progress = True
            self.bar = progress(call.requests, lambda _: 1, "answering", "prompts")
            next(self.bar, None)
        # Clear the prefixes for scores, too, if their last digits depend on what is shared: equal calls then give equal digits.
        may_share = self.forward.notices_edits() and (self.forward.is_batch_invariant or not call.score_only)
        if not is_true_on_all_ranks(may_share, self.forward.device):
            self.prefixes.clear()
        self.n_submitted += 1
        return RunningCall(call, 0)

    def enqueue(self, running_call: RunningCall, indices: Sequence[int]) -> None:
        """Let requests of a call wait for free rows."""
        if running_call not in self.calls:
            self.calls.append(running_call)
        running_call.n_unfinished += len(indices)
        self.waiting += ((running_call, index) for index in indices)

    def suits(self, backend: Backend, n_words: int | None) -> bool:
        return backend.name == self.backend.name and (n_words or self.model.vocab_size) == self.forward.n_words

    def why_broken(self) -> str | None:
        """Return the reason why the calls cannot continue; None if they can.

        They cannot if other code has used the KV cache, or if the model has been changed between two steps.
        """
        if why := self.shared.why_not_owner(self.owner):
            return why
        if not self.cache.is_unchanged():
            return "the model's forward, or code of yours, has written into its KV cache since the call began"
        if (len(self.calls) > 1 or any(each.call.watched for each in self.calls)) and (
            any(self.hooks) or not self.cache.belongs_to(self.model) or self.forward.weights_version() != self.weights_version
        ):
            return "the model has been changed since the call began"
        return None

    def step(self) -> None:
        """Prefill waiting requests into free rows, and sample the next token of each row. Add events to the calls.

        A failure of one call is stored in its `error`, and the other calls go on. Any other failure raises.
        """
        self.release_ended()
        if not self.running and not self.waiting:
            return
        if why := self.why_broken():
            self.end_early(why)
            return
        self.cache.sync_streams()
        try:
            if self.decoding:
                self.run_pending_step()
            self.pending_step = None
            self.resize()
            if self.waiting and not self.awaits_rows():
                self.admit()
            while self.prefills:
                self.run_prefill_chunk()
                if self.decoding and not self.is_alone:  # let no row of another call wait for more than a chunk
                    break
            if self.decoding:
                self.sample()
            if self.speculates:
                self.sample_accepted()
            self.record_step_time()  # with the sampling of accepted tokens, which takes longer than the step of a tiny model
        finally:
            self.cache.record_version()

    def release_ended(self) -> None:
        """Free the rows of requests that their callers have ended, and forget calls that have ended."""
        prefilling: set[int] = set()
        if self.prefills:  # a prefill goes on, unless all of its requests have ended
            for prefill in [each for each in self.prefills if all(self.is_ended(place.row) for place in each.rows)]:
                self.drop_prefill(prefill)
            prefilling = {place.row for prefill in self.prefills for place in prefill.rows}
        for row in [row for row in self.running if self.is_ended(row) and row not in prefilling]:
            self.release(row)
        if any(call.ended for call in self.calls):
            self.calls = [call for call in self.calls if not call.ended]
            self.waiting = collections.deque(waiting for waiting in self.waiting if not waiting[0].ended)

    def resize(self) -> None:
        """Set the number of rows to what the running and waiting requests need.

        As long as a single call runs, the number stays the same, so that each step uses the same number of random numbers from
        torch's default generator.
        """
        max_rows = self.model.params.max_batch_size
        wanted = min(len(self.running) + len(self.waiting), max_rows)
        wanted = max(wanted, *(row + 1 for row in self.running), self.n_rows if self.is_alone else 0)
        if not self.is_alone and self.forward.device.type == "cuda":
            wanted = min(1 << (wanted - 1).bit_length(), max_rows)  # each number of rows is captured, or compiled, anew
        if wanted != self.n_rows:
            before, self.n_rows = self.n_rows, wanted
            self.state.resize(wanted)
            self.park([row for row in range(before, wanted) if row not in self.running and self.prefixes.tokens[row]])
            if wanted not in self.decoders:
                if len(self.decoders) >= MAX_DECODERS:
                    self.decoders.clear()
                self.decoders[wanted] = self.backend.begin(self.forward, wanted)

    def awaits_rows(self) -> bool:
        """Return True if waiting requests should enter later, together with those for rows that are about to become free.

        A prefill stops all rows for at least the time of a decode step, since both read all weights. So one prefill for several
        rows is worth as much as one step of all rows, and free rows may wait for as many steps in total. Requests do not wait
        if there are free rows for all of them.
        """
        n_free, decoding = self.n_rows - len(self.running), self.decoding.values()
        n_steps = min((each.request.max_new_tokens - each.num_generated for each in decoding), default=0)
        waits = 0 < n_free < len(self.waiting) and 0 < n_steps and self.n_idle + n_free * n_steps <= self.n_rows
        self.n_idle = self.n_idle + n_free if waits and not self.is_alone else 0
        return self.n_idle > 0

    def admit(self) -> None:
        """Put waiting requests into free rows, and prepare their prefills.

        A prompt that shares its beginning with another prompt that is yet to be prefilled gets a later prefill than that.
        """
        free = [row for row in range(self.n_rows) if row not in self.running]
        is_beside_others = bool(self.decoding) and not self.is_alone  # before the rows below are added to `running`
        if not (taken := free[: len(self.waiting)]):
            return
        spare = [row for row in range(len(self.prefixes.tokens)) if row not in self.running and row not in taken]
        self.zero_nonfinite_rows(taken, self.state.logits[taken].amax(-1).tolist())
        stages: dict[int, int] = {}  # maps a row to the index of its prefill among those prepared here
        places: list[list[PrefillRow]] = []
        for row in taken:
            running_call, index = self.waiting.popleft()
            call, request = running_call.call, running_call.call.requests[index]
            self.running[row] = RunningRequest(running_call, index, request)
            if request.finish_reason and not call.scores_prompts:
                self.release(row)
                continue
            multiple = self.forward.prefix_multiple(call.score_only)
            place = PrefillRow(row, request, call.score_from(request), call.top_logprobs or 0, multiple)
            others = [*self.prefilling.values(), *(each for prefill in places for each in prefill)]
            saved = share_prefix(place, self.prefixes, others, spare)
            if saved is not None and saved < self.n_rows:
                self.park([saved])
            stages[row] = 0 if place.source is None else stages.get(place.source, -1) + 1
            places += [[] for _ in range(stages[row] + 1 - len(places))]
            places[stages[row]].append(place)
        max_tokens = tuning.PREFILL_CHUNK_BESIDE_DECODING if is_beside_others else tuning.PREFILL_CHUNK
        quiet = self.shows_progress  # one progress bar at a time
        self.prefills += [Prefill(self.forward, rows, max_tokens, quiet) for rows in places]
        self.park([each.row for rows in places for each in rows])

    def drop_prefill(self, prefill: Prefill) -> None:
        """Remove a prefill. Rows that have waited for tokens of its rows compute these tokens themselves."""
        self.prefills.remove(prefill)
        rows = [place.row for place in prefill.rows]
        for place in prefill.rows:
            if place.n_computed:
                self.zero_row(place.row)  # it may hold NaN, which nobody has looked for yet
        for place in self.prefilling.values():
            if place.source in rows:
                place.start, place.source = len(self.prefixes.tokens[place.row]), None
                place.request.num_cached_tokens = place.start

    def run_prefill_chunk(self) -> None:
        """Run a chunk of the first prefill. After its last chunk, its requests begin to decode."""
        prefill, self.step_began = self.prefills[0], None
        rows = [place.row for place in prefill.rows]
        try:
            prefill.run_chunk()
        except Exception as e:
            if len(self.calls) == 1:
                raise
            self.drop_prefill(prefill)
            for row in rows:
                self.fail_row(row, e)
                self.release(row)
            return
        if not prefill.finished:
            self.park(rows)
            return
        del self.prefills[0]
        for place in prefill.rows:
            self.prefixes.hold(place.row, place.request.prompt)
        for place in self.prefilling.values():
            if place.source in rows:
                self.prefixes.take(place.row, place.source, place.start, [])
                place.source = None
        admitted = [self.running[row] for row in rows]
        requests = [each.request for each in admitted]
        options = [sampling_options(each.running_call.call, each.request) for each in admitted]
        self.state.admit(rows, requests, options, self.forward.logits(prefill.last_hidden))
        for place, each in zip(prefill.rows, admitted, strict=True):
            if kind := each.running_call.call.speculate:
                self.speculate(place.row, each.request, kind)
            if place.score_from is not None:
                self.report_prompt(place, each)
            if self.is_ended(place.row):
                self.release(place.row)
        self.park([row for row in rows if row not in self.running])

    def report_prompt(self, place: PrefillRow, running: RunningRequest) -> None:
        """Report the tokens of a prompt with their log probabilities. With `echo`, the first token has the value 0.0."""
        call, scores, first = running.running_call.call, place.scores, place.score_from or 0
        if call.echo:
            scores, first = [TokenScore(0.0, [] if place.n_top else None), *scores], 0
        try:
            check_logprobs(self.model, [score.logprob for score in scores], place.request.label)
        except LlamaError as e:
            self.fail_row(place.row, e)
            return
        pairs = zip([*place.request.prompt, place.request.next_token or 0][first:], scores, strict=False)
        tokens = (GeneratedToken(running.index, token, *score) for token, score in pairs)
        running.running_call.events += [Event(token, running.index, in_prompt=True) for token in tokens]

    def speculate(self, row: int, request: Request, kind: str) -> None:
        """Begin to guess the answer to a request in a row. kind: "prompt" or "draft"."""
        if self.speculation is None:
            decode_runs = self.backend.begin_runs(self.forward)
            self.speculation = Speculation(decode_runs, self.backend.n_computed, self.shared.step_costs, self.shared.loss_limit)
        self.speculation.admit(row, request, self.shared.draft if kind == "draft" else None)
