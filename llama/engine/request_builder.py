"""Check the arguments of a call, and build requests from tokens, texts or dialogs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..chat import LLAMA_2, ChatFormat, Dialog, continues_answer, is_unsafe
from ..errors import InputError, check_flag, describe, is_integer
from ..tokenizer import Tokenizer, check_text, encode_prompt
from .call_options import CallOptions, PromptOptions, to_list
from .checks import common_prefix_length
from .requests import GenerationCall, Request, ScoringRequest


def check_texts(texts: Iterable[str], name: str, label: str | None = None) -> tuple[list[str], list[str]]:
    """Return a list of the texts, and a list of labels that name the texts in errors. Raise InputError for an invalid text.

    name: name of the argument in errors. label: template of the labels, such as "prompt {}"; the default is made from `name`.
    A text is invalid if UTF-8 cannot encode it.
    """
    texts = to_list(texts, name, "a list of texts, as in [text]")
    text_labels = labels(label or f"{name.removesuffix('s')} {{}}", texts)
    for text_label, text in zip(text_labels, texts, strict=True):
        check_text(text, text_label)
    return texts, text_labels


def labels(template: str, items: Sequence[Any]) -> list[str]:
    """Return a label for each item, to name the item in errors. "{}" in the template stands for the index of the item."""
    return [template.format(i) for i in range(len(items))]


def check_prompts(prompts: list[list[int]], prompt_labels: list[str], tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Raise InputError unless each prompt has 1 to max_seq_len tokens, all of them valid for the tokenizer."""
    for label, prompt in zip(prompt_labels, prompts, strict=True):
        check_tokens(prompt, label, tokenizer)
        if len(prompt) > max_seq_len:
            raise InputError(
                f"{label} has {len(prompt)} tokens, more than max_seq_len={max_seq_len}; "
                "shorten it, or build with a larger max_seq_len"
            )


def check_tokens(tokens: list[Any], label: str, tokenizer: Tokenizer) -> None:
    """Raise InputError unless there is at least one token, and all are valid for the tokenizer."""
    if not tokens:
        raise InputError(f"{label} has no tokens; begin it with BOS ({tokenizer.bos_id})")
    for token in tokens:
        if not is_integer(token) or not 0 <= int(token) < tokenizer.n_words:
            last = tokenizer.n_words - 1
            raise InputError(f"{label}: {describe(token)} is no token; tokens are whole numbers from 0 to {last}")


class RequestBuilder:
    """Check the arguments of calls, and build their requests. No model is needed.

    what_guesses: see `Engine`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_seq_len: int,
        chat_format: ChatFormat = LLAMA_2,
        what_guesses: Callable[[str | None], str] = lambda _: "",
    ) -> None:
        self.tokenizer, self.max_seq_len, self.chat_format = tokenizer, max_seq_len, chat_format
        self.what_guesses = what_guesses

    def from_tokens(
        self,
        prompts: Iterable[Iterable[int]],
        options: CallOptions,
        logprobs: bool | None = False,
        echo: bool | None = False,
        stop_token: int | None = None,
        top_logprobs: int | None = 0,
        include_eos: bool | None = False,
    ) -> GenerationCall:
        """Build a `GenerationCall` from prompts given as tokens. stop_token: token that ends an answer, in place of EOS."""
        n_words = self.tokenizer.n_words
        if stop_token is not None and not (is_integer(stop_token) and 0 <= int(stop_token) < n_words):
            raise InputError(
                f"stop_token is {describe(stop_token)}; it must be a token, from 0 to {n_words - 1}, or None for EOS"
            )
        if stop_token is not None and options.ignores_eos():
            raise InputError(f"stop_token={stop_token} stands in for EOS, which ignore_eos=True ignores; leave one of them out")
        prompt_list = to_list(prompts, "prompt_tokens", "a list of lists of tokens")
        prompt_labels = labels("prompt {}", prompt_list)
        rows = [to_list(prompt, label, "a list of tokens") for prompt, label in zip(prompt_list, prompt_labels, strict=True)]
        return self._call(
            rows, prompt_labels, options, logprobs=logprobs, echo=echo, top_logprobs=top_logprobs, include_eos=include_eos,
            stop_token=None if stop_token is None else int(stop_token),
        )  # fmt: skip

    def from_texts(
        self,
        prompts: Iterable[str | Iterable[int]],
        options: CallOptions,
        logprobs: bool | None = False,
        echo: bool | None = False,
        details: bool | None = False,
        top_logprobs: int | None = 0,
        label: str = "prompt {}",
        keep_space: bool | None = False,
    ) -> GenerationCall:
        """Build a `GenerationCall` from prompts given as texts or tokens. keep_space: see `Llama`."""
        check_flag(keep_space, "keep_space")
        encoded, text_labels = self._encode_each(prompts, "prompts", label)
        continued = [bool(keep_space)] * len(encoded)
        return self._call(
            encoded, text_labels, options, continued, logprobs=logprobs, echo=echo, stop=(), details=details,
            top_logprobs=top_logprobs,
        )  # fmt: skip

    def check_dialogs(
        self, dialogs: Iterable[Dialog], label: str = "dialog {}", continue_answer: bool | None = False
    ) -> tuple[list[Dialog], list[str]]:
        """Return the dialogs as a list, and a label for each, for errors. Raise InputError for one that has a wrong form.

        label: template of the labels. continue_answer: see `Llama`.
        """
        check_flag(continue_answer, "continue_answer")
        dialogs = to_list(dialogs, "dialogs", "a list of dialogs, as in [dialog]")
        dialog_labels = labels(label, dialogs)
        for dialog_label, dialog in zip(dialog_labels, dialogs, strict=True):
            self.chat_format.check(dialog, dialog_label, continue_answer)
        return dialogs, dialog_labels

    def encode_dialogs(self, dialogs: list[Dialog], dialog_labels: list[str]) -> list[list[int] | None]:
        """Return the tokens of each dialog that `check_dialogs` has accepted; None for one with special tags such as [INST]."""
        return [
            None if is_unsafe(dialog, self.chat_format.tags) else self.chat_format.encode(self.tokenizer, dialog, dialog_label)
            for dialog, dialog_label in zip(dialogs, dialog_labels, strict=True)
        ]

    def from_dialogs(
        self,
        dialogs: list[Dialog],
        dialog_labels: list[str],
        encoded: list[list[int] | None],
        options: CallOptions,
        logprobs: bool | None = False,
        details: bool | None = False,
        top_logprobs: int | None = 0,
    ) -> GenerationCall:
        """Build a `GenerationCall` from dialogs and what `encode_dialogs` has made of them.

        A dialog without tokens gets empty requests that are already finished.
        """
        continued = [continues_answer(dialog) for dialog in dialogs]
        return self._call(
            encoded, dialog_labels, options, continued, logprobs=logprobs, stop=(), details=details, top_logprobs=top_logprobs
        )

    def for_infilling(
        self, prefixes: Iterable[str], suffixes: Iterable[str], suffix_first: bool | None
    ) -> tuple[list[str], list[str], list[list[int]]]:
        """Check prefixes and suffixes. Return both as lists, and the prompt of each pair in Code Llama's infilling format."""
        tokenizer = self.tokenizer
        check_flag(suffix_first, "suffix_first")
        prefixes, _ = check_texts(prefixes, "prefixes", "prefix {}")
        suffixes, _ = check_texts(suffixes, "suffixes", "suffix {}")
        if len(prefixes) != len(suffixes):
            raise InputError(f"{len(prefixes)} prefixes, but {len(suffixes)} suffixes; give one suffix for each prefix")
        if min(tokenizer.prefix_id, tokenizer.middle_id, tokenizer.suffix_id, tokenizer.eot_id) < 0:
            raise InputError(
                "this tokenizer has no tokens for infilling (▁<PRE>, ▁<MID>, ▁<SUF>, ▁<EOT>), so its model cannot infill; "
                "use Code Llama 7B or 13B with their own tokenizer.model"
            )
        prompts = []
        for prefix, suffix in zip(prefixes, suffixes, strict=True):
            prefix_tokens = tokenizer.encode(prefix, bos=False, eos=False)
            suffix_tokens = tokenizer.encode_infilling(suffix)
            if suffix_first:
                prompt = [tokenizer.prefix_id, tokenizer.suffix_id, *suffix_tokens, tokenizer.middle_id, *prefix_tokens]
            else:
                prompt = [tokenizer.prefix_id, *prefix_tokens, tokenizer.suffix_id, *suffix_tokens, tokenizer.middle_id]
            prompts.append([tokenizer.bos_id, *prompt])
        return prefixes, suffixes, prompts

    def for_scoring(
        self, prompts: Iterable[Any], continuations: Iterable[Any]
    ) -> tuple[list[ScoringRequest], list[int | None]]:
        """Build a `ScoringRequest` for each continuation. Also return, for each prompt, the number of its continuations.

        That number is None if the prompt has a single continuation, not in a list. Prompts are texts or lists of tokens, and
        continuations texts, lists of tokens, or lists of these. Two texts are tokenized as one; the continuation starts at the
        first token that differs from the tokens of the prompt alone.
        """
        prompts = to_list(prompts, "prompts", "a list of texts, or of lists of tokens")
        continuations = to_list(continuations, "continuations", "a list with one entry for each prompt")
        if len(prompts) != len(continuations):
            raise InputError(
                f"{len(prompts)} prompts, but {len(continuations)} continuations; give one continuation for each prompt"
            )
        requests, counts = list[ScoringRequest](), list[int | None]()
        for i, (prompt, given) in enumerate(zip(prompts, continuations, strict=True)):
            several = None if isinstance(given, str) else to_list(given, f"continuation {i}", "a text, or a list")
            is_list = several is not None and not all(map(is_integer, several))
            if several == []:
                raise InputError(f"continuation {i} is an empty list; give some text or tokens")
            choices = several if is_list and several else [given if several is None else several]
            counts.append(len(choices) if is_list else None)
            before = self._prompt_to_score(prompt, f"prompt {i}")
            for j, choice in enumerate(choices):
                name = f"continuation {i}" + f", choice {j}" * is_list
                requests.append(self._scoring_request(prompt, before, choice, i, name))
        return requests, counts

    def _prompt_to_score(self, prompt: Any, label: str) -> list[int]:
        """Return the tokens of a prompt that is given as a text or as tokens."""
        if isinstance(prompt, str):
            check_text(prompt, label)
            return self._encode(prompt)
        tokens = to_list(prompt, label, "a text, or a list of tokens")
        check_tokens(tokens, label, self.tokenizer)
        return [int(token) for token in tokens]

    def _scoring_request(self, prompt: Any, before: list[int], continuation: Any, i: int, name: str) -> ScoringRequest:
        """Build the request of prompt i, with tokens `before`, and a continuation, which errors call `name`."""
        label = f"prompt {i} with its continuation"
        if isinstance(continuation, str):
            if not isinstance(prompt, str):
                raise InputError(f"{name} is a text, but prompt {i} is {describe(prompt)}; give tokens for both, or two texts")
            check_text(continuation, name)
            tokens = self._encode(prompt + continuation)
            start = common_prefix_length(tokens, before)
        else:
            following = to_list(continuation, name, "a text, or a list of tokens")
            if following:
                check_tokens(following, name, self.tokenizer)
            tokens, start = before + [int(token) for token in following], len(before)
        if start == len(tokens):
            raise InputError(f"{name} is {describe(continuation)}, which adds no token to its prompt; give some text")
        if len(tokens) > self.max_seq_len + 1:  # the last token is scored, and not computed
            raise InputError(
                f"{label} has {len(tokens)} tokens, more than max_seq_len + 1 = {self.max_seq_len + 1}; shorten it, "
                "or build with a larger max_seq_len"
            )
        return ScoringRequest(tokens, start, label)

    def for_perplexity(self, text: str | Iterable[int], stride: int | None) -> list[tuple[list[int], list[int]]]:
        """Divide the tokens of a text into windows. Return the tokens before those that a window scores, and the latter.

        Each token but the first is scored once. The last token of a window is not computed, so windows have up to
        max_seq_len + 1 tokens.
        """
        length = self.max_seq_len
        step = max(1, length // 2) if stride is None else stride
        if not is_integer(step) or not 1 <= int(step) <= length:
            raise InputError(f"stride is {describe(step)}; it must be a whole number from 1 to max_seq_len = {length}")
        if isinstance(text, str):
            check_text(text, "the text")
        tokens = self._encode(text) if isinstance(text, str) else to_list(text, "the text", "a text, or a list of tokens")
        check_tokens(tokens, "the text", self.tokenizer)
        if len(tokens) < 2:
            raise InputError("the text has a single token, and nothing to score after it; give some text")
        ends = [*range(min(length + 1, len(tokens)), len(tokens), int(step)), len(tokens)]
        begins = [1, *ends[:-1]]
        return [(tokens[max(0, end - length - 1) : begin], tokens[begin:end]) for begin, end in zip(begins, ends, strict=True)]

    def for_hidden_states(self, texts: Iterable[str | Iterable[int]]) -> tuple[list[list[int]], list[str]]:
        """Return the tokens of each text, and a label for each, for errors. A text may be given as tokens."""
        rows, row_labels = self._encode_each(texts, "texts", "text {}")
        check_prompts(rows, row_labels, self.tokenizer, self.max_seq_len)
        return [[int(token) for token in row] for row in rows], row_labels

    def _encode_each(self, texts: Iterable[str | Iterable[int]], name: str, label: str) -> tuple[list[list[int]], list[str]]:
        """Return the tokens of texts, each given as a text, which BOS begins, or as tokens, and a label for each text."""
        items = to_list(texts, name, "a list of texts, as in [text], or of lists of tokens")
        item_labels = labels(label, items)
        rows = []
        for item, item_label in zip(items, item_labels, strict=True):
            if isinstance(item, str):
                check_text(item, item_label)
                item = self._encode(item)
            rows.append(to_list(item, item_label, "a string, or a list of tokens"))
        return rows, item_labels

    def _encode(self, text: str) -> list[int]:
        return encode_prompt(self.tokenizer, text)

    def _call(
        self,
        prompts: Sequence[list[int] | None],
        prompt_labels: list[str],
        options: CallOptions,
        continued: Sequence[bool] = (),
        **call_options: Any,
    ) -> GenerationCall:
        """Build a `GenerationCall`. prompts: the tokens of each; None for a dialog that is refused.

        continued: for each prompt, `Request.continues_prompt`; by default, no answer continues its prompt.
        """
        safe = [(prompt, label) for prompt, label in zip(prompts, prompt_labels, strict=True) if prompt is not None]
        check_prompts([prompt for prompt, _ in safe], [label for _, label in safe], self.tokenizer, self.max_seq_len)
        n, n_words = options.n_answers(), self.tokenizer.n_words
        options.check_tokens(n_words)
        speculate = self.what_guesses(options.speculate())
        requests = []
        for prompt, label, own in zip(prompts, prompt_labels, options.of_prompts(len(prompts)), strict=True):
            requests += self._requests_of_prompt(prompt, label, own, n)
        for request, continues in zip(requests, [each for each in continued for _ in range(n)], strict=False):
            request.continues_prompt = continues
        call = GenerationCall(
            requests, stop_token_ids=options.stop_token_ids, ignore_eos=options.ignores_eos(), speculate=speculate,
            **call_options,
        )  # fmt: skip
        if len(call.end_tokens) >= n_words - 1 and any(request.min_new_tokens for request in requests):
            raise InputError("stop_token_ids has all tokens, and min_new_tokens lets none of them be chosen; leave one out")
        return call

    def _requests_of_prompt(self, prompt: list[int] | None, label: str, options: PromptOptions, n: int) -> list[Request]:
        """Return the requests for n answers to one prompt."""
        if prompt is None:
            return [Request([], 0, finish_reason="stop") for _ in range(n)]
        tokens, room = [int(token) for token in prompt], self.max_seq_len - len(prompt)  # int() converts NumPy's integers
        limit = room if options.max_gen_len is None else min(options.max_gen_len, room)
        return [
            Request(
                tokens, limit, options.seed_of_answer(i), label, sampling=options.sampling, stop=options.stop,
                min_new_tokens=options.min_new_tokens, logits_processor=options.logits_processor,
            )
            for i in range(n)
        ]  # fmt: skip
