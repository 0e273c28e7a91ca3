"""What goes into a call, checked, and what comes out of it."""

import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from ..chat import Dialog, check_dialog, encode_dialog, is_unsafe
from ..errors import InputError, check_flag, describe
from ..sampling import SamplingParams
from ..tokenizer import Tokenizer, check_text
from .checks import common_prefix_length
from .incremental_text import check_stop
from .requests import GenerationCall, Request


def partition_by_length(lengths: list[int], hands: int) -> list[list[int]]:
    """Which rows each of so many replicas takes: the long ones divided evenly, each one's in order."""
    by_length = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [sorted(by_length[hand::hands]) for hand in range(hands)]


def to_list(given: Iterable[Any], name: str, wanted: str) -> list[Any]:
    """What a list, a tuple, a generator, an array or a tensor holds. Raises InputError for anything else."""
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes, bytearray, Mapping, Set)):
        found = given.tolist() if hasattr(given, "tolist") else list(given)
        if isinstance(found, list):  # what an array of no dimensions holds is none
            return found
    raise InputError(f"{name} is {describe(given)}; it must be {wanted}")


def check_texts(texts: Iterable[str], what: str, each: str | None = None) -> tuple[list[str], list[str]]:
    """Texts, all of which can be encoded, and what errors call them: `each`. Raises InputError for others."""
    texts = to_list(texts, what, "a list of texts, as in [text]")
    names = labels(each or f"{what.removesuffix('s')} {{}}", texts)
    for name, text in zip(names, texts, strict=True):
        check_text(text, name)
    return texts, names


def labels(each: str, items: Sequence[Any]) -> list[str]:
    """What errors call them: "prompt {}" numbers them, "the prompt" is the only one."""
    return [each.format(row) for row in range(len(items))]


def check_prompts(prompts: list[list[int]], names: list[str], tokenizer: Tokenizer, window: int) -> None:
    """Raise InputError, with the prompt's name, unless each holds ids of the tokenizer and fits into the window."""
    for name, prompt in zip(names, prompts, strict=True):
        if not prompt:
            raise InputError(f"{name} holds no ids; begin it with BOS ({tokenizer.bos_id})")
        for id_ in prompt:
            if isinstance(id_, bool) or not isinstance(id_, numbers.Integral) or not 0 <= int(id_) < tokenizer.n_words:
                last = tokenizer.n_words - 1
                raise InputError(f"{name}: {describe(id_)} is no token id; ids are whole numbers from 0 to {last}")
        if len(prompt) > window:
            raise InputError(
                f"{name} has {len(prompt)} ids, but the window holds max_seq_len={window}; "
                "shorten it, or build with a larger max_seq_len"
            )


def check_max_gen_len(max_gen_len: int) -> None:
    if isinstance(max_gen_len, bool) or not isinstance(max_gen_len, numbers.Integral) or int(max_gen_len) < 0:
        raise InputError(f"max_gen_len is {describe(max_gen_len)}; it must be a whole number, 0 or more")


def validate_options(max_gen_len: int | None = None, stop: str | Sequence[str] = (), **sampling: Any) -> None:
    """Raise InputError for options that a call would refuse, without a model. sampling: arguments of `SamplingParams`."""
    SamplingParams(**sampling)
    check_stop(stop)
    if max_gen_len is not None:
        check_max_gen_len(max_gen_len)


def normalize_seeds(seed: int | Iterable[int] | None, rows: int) -> list[int] | list[None]:
    """One seed, or None, for each row, within 64 bits of two's complement."""
    if seed is None:
        return [None] * rows
    several = isinstance(seed, Iterable) and not isinstance(seed, (str, bytes))
    seeds: list[Any] = to_list(seed, "seed", "a whole number, or one for each prompt") if several else [seed]  # type: ignore[arg-type]
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not -(2**63) <= int(value) < 2**64:
            raise InputError(
                f"seed is {describe(value)}; it must be a whole number from -2**63 to 2**64 - 1, or one for each prompt"
            )
    if several and len(seeds) != rows:
        raise InputError(f"{len(seeds)} seeds, but {rows} prompts; give one seed, or one for each prompt")
    signed = [(int(value) + 2**63) % 2**64 - 2**63 for value in seeds]
    return signed if several else signed * rows


@dataclass(frozen=True)
class ScoringRequest:
    """The tokens of a prompt with its continuation, of which those from `start` on are to be scored."""

    tokens: list[int]
    start: int
    label: str  # what errors call it


class RequestBuilder:
    """Check a call's arguments, and turn them into requests of tokens. Nothing is computed."""

    def __init__(self, tokenizer: Tokenizer, max_seq_len: int) -> None:
        self.tokenizer, self.max_seq_len = tokenizer, max_seq_len

    def from_tokens(
        self,
        prompts: Iterable[Iterable[int]],
        max_gen_len: int,
        seed: int | Iterable[int] | None,
        sampling: SamplingParams,
        logprobs: bool = False,
        echo: bool = False,
        stop_token: int | None = None,
    ) -> GenerationCall:
        words = self.tokenizer.n_words
        whole = isinstance(stop_token, numbers.Integral) and not isinstance(stop_token, bool)
        if stop_token is not None and not (whole and 0 <= int(stop_token) < words):
            raise InputError(
                f"stop_token is {describe(stop_token)}; it must be a token, from 0 to {words - 1}, or None for EOS"
            )
        given = to_list(prompts, "prompt_tokens", "a list of lists of token ids")
        names = labels("prompt {}", given)
        rows = [to_list(prompt, name, "a list of token ids") for prompt, name in zip(given, names, strict=True)]
        requests = self._requests(rows, names, max_gen_len, normalize_seeds(seed, len(rows)))
        return GenerationCall(requests, sampling, logprobs, echo, stop_token=None if stop_token is None else int(stop_token))

    def from_texts(
        self,
        prompts: Iterable[str],
        max_gen_len: int | None,
        seed: int | Iterable[int] | None,
        sampling: SamplingParams,
        stop: str | Sequence[str],
        logprobs: bool = False,
        echo: bool = False,
        reuse: bool = False,
        details: bool = False,
        label: str = "prompt {}",
    ) -> GenerationCall:
        texts, names = check_texts(prompts, "prompts", label)
        encoded = [self._encode(text) for text in texts]
        requests = self._requests(encoded, names, max_gen_len, normalize_seeds(seed, len(texts)))
        return GenerationCall(requests, sampling, logprobs, echo, check_stop(stop), reuse, details)

    def from_dialogs(
        self,
        dialogs: Iterable[Dialog],
        max_gen_len: int | None,
        seed: int | Iterable[int] | None,
        sampling: SamplingParams,
        stop: str | Sequence[str],
        logprobs: bool = False,
        reuse: bool = False,
        details: bool = False,
        label: str = "dialog {}",
    ) -> GenerationCall:
        """The request of a dialog that is not safe is over, and has no prompt."""
        dialogs = to_list(dialogs, "dialogs", "a list of dialogs, as in [dialog]")
        names = labels(label, dialogs)
        for name, dialog in zip(names, dialogs, strict=True):
            check_dialog(dialog, name)
        seeds, safe = normalize_seeds(seed, len(dialogs)), [row for row, dialog in enumerate(dialogs) if not is_unsafe(dialog)]
        encoded = [encode_dialog(self.tokenizer, dialogs[row]) for row in safe]
        asked = self._requests(encoded, [names[row] for row in safe], max_gen_len, [seeds[row] for row in safe])
        requests = [Request([], 0, finish_reason="stop") for _ in dialogs]
        for row, request in zip(safe, asked, strict=True):
            requests[row] = request
        return GenerationCall(requests, sampling, logprobs, False, check_stop(stop), reuse, details)

    def for_infilling(
        self, prefixes: Iterable[str], suffixes: Iterable[str], suffix_first: bool
    ) -> tuple[list[str], list[str], list[list[int]]]:
        """Return the texts, checked, and the prompt of each pair: in Code Llama's format of prefix, suffix and middle."""
        tokenizer = self.tokenizer
        check_flag(suffix_first, "suffix_first")
        before, _ = check_texts(prefixes, "prefixes", "prefix {}")
        after, _ = check_texts(suffixes, "suffixes", "suffix {}")
        if len(before) != len(after):
            raise InputError(f"{len(before)} prefixes, but {len(after)} suffixes; give one to each")
        if min(tokenizer.prefix_id, tokenizer.middle_id, tokenizer.suffix_id, tokenizer.eot_id) < 0:
            raise InputError(
                "this tokenizer has no tokens for infilling (▁<PRE>, ▁<MID>, ▁<SUF>, ▁<EOT>), so its model cannot; "
                "use Code Llama 7B or 13B with their own tokenizer.model"
            )
        prompts = []
        for prefix, suffix in zip(before, after, strict=True):
            known, rest = tokenizer.encode(prefix, bos=False, eos=False), tokenizer.encode_infilling(suffix)
            if suffix_first:
                prompt = [tokenizer.prefix_id, tokenizer.suffix_id, *rest, tokenizer.middle_id, *known]
            else:
                prompt = [tokenizer.prefix_id, *known, tokenizer.suffix_id, *rest, tokenizer.middle_id]
            prompts.append([tokenizer.bos_id, *prompt])
        return before, after, prompts

    def for_scoring(self, prompts: Iterable[str], continuations: Iterable[str]) -> list[ScoringRequest]:
        prompts, _ = check_texts(prompts, "prompts")
        continuations, _ = check_texts(continuations, "continuations")
        if len(prompts) != len(continuations):
            raise InputError(f"{len(prompts)} prompts, but {len(continuations)} continuations; give one to each")
        found = []
        for row, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
            ids = self._encode(prompt + continuation)
            found.append(
                ScoringRequest(ids, common_prefix_length(ids, self._encode(prompt)), f"prompt {row} with its continuation")
            )
        check_prompts([s.tokens for s in found], [s.label for s in found], self.tokenizer, self.max_seq_len)
        for row, scored in enumerate(found):
            if scored.start == len(scored.tokens):
                raise InputError(
                    f"continuation {row} is {describe(continuations[row])}, which adds no id to its prompt; give some text"
                )
        return found

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=True, eos=False)

    def _requests(
        self, prompts: list[list[int]], names: list[str], max_gen_len: int | None, seeds: Sequence[int | None]
    ) -> list[Request]:
        check_prompts(prompts, names, self.tokenizer, self.max_seq_len)
        most = self.max_seq_len if max_gen_len is None else max_gen_len
        check_max_gen_len(most)
        return [
            Request(
                [int(id_) for id_ in prompt], min(int(most), self.max_seq_len - len(prompt)), seed, name
            )  # NumPy's are welcome
            for prompt, name, seed in zip(prompts, names, seeds, strict=True)
        ]
