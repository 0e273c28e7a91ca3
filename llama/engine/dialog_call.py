"""Build a call from dialogs. On several ranks, rank 0 encodes dialogs that a chat template renders."""

from collections.abc import Iterable
from typing import Any

from ..chat import Dialog, Llama2Format
from ..distributed.agreement import decides_alone, run_on_all_ranks, run_on_rank0
from .call_options import CallOptions
from .request_builder import RequestBuilder
from .requests import GenerationCall


class DialogCall:
    """A function that builds a call from dialogs. It may be called once."""

    def __init__(
        self,
        builder: RequestBuilder,
        dialogs: Iterable[Dialog],
        options: CallOptions,
        label: str = "dialog {}",
        continue_answer: bool | None = False,
        **call_options: Any,
    ) -> None:
        """label, continue_answer: see `RequestBuilder.check_dialogs`. call_options: see `RequestBuilder.from_dialogs`."""
        self.builder, self.options, self.call_options = builder, options, call_options
        self.given = dialogs, label, continue_answer
        self.encoded: tuple[list[Dialog], list[str], list[list[int] | None]] | None = None

    def encode_on_rank0(self, name: str) -> None:
        """On several ranks, let rank 0 encode the dialogs, and keep its tokens. All ranks must call this.

        A template may use the time or a random choice, so ranks that render it may get different texts. Llama 2's format uses
        neither, so each rank encodes it for itself. name: the public method that makes the call.
        Raises InputError on every rank if ranks were given different dialogs or templates, and the error of rank 0's rendering.
        """
        builder = self.builder
        if decides_alone() or type(builder.chat_format) is Llama2Format:
            return
        dialogs, labels = run_on_all_ranks(
            lambda: builder.check_dialogs(*self.given), must_match=lambda checked: (name, self._fingerprint(*checked))
        )
        self.encoded = dialogs, labels, run_on_rank0(lambda: builder.encode_dialogs(dialogs, labels))

    def __call__(self) -> GenerationCall:
        if self.encoded is None:
            dialogs, labels = self.builder.check_dialogs(*self.given)
            self.encoded = dialogs, labels, self.builder.encode_dialogs(dialogs, labels)
        return self.builder.from_dialogs(*self.encoded, self.options, **self.call_options)

    def _fingerprint(self, dialogs: list[Dialog], labels: list[str]) -> tuple[object, ...]:
        """Return values that differ between ranks that would encode the dialogs differently."""
        chat_format, tokenizer = self.builder.chat_format, self.builder.tokenizer
        texts = [[(message["role"], message["content"]) for message in dialog] for dialog in dialogs]
        template = getattr(chat_format, "template", None)  # a caller's own format need not have one
        return texts, labels, type(chat_format).__name__, template, type(tokenizer).__name__, tokenizer.n_words
