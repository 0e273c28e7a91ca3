"""Fixtures and helpers for the tests of conversations: a conversation at temperature 0 without a terminal."""

from types import SimpleNamespace

import pytest

from llama import Llama
from llama.chat import Message
from llama.cli.commands import respond
from llama.cli.conversation import Conversation
from llama.cli.user_input import UserInput

MAX_SEQ_LEN = 192


class GreedyConversation(Conversation):
    """A conversation at temperature 0 that records its status messages in a list."""

    def __init__(self, llama: Llama, **options: object) -> None:
        self.messages: list[str] = []
        super().__init__(llama, self.messages.append, **{"temperature": 0, "max_gen_len": 8} | options)

    def send(self, line: str, max_chunks: int = 1000, typed: bool = True) -> str | None:
        """Send a line; return the first `max_chunks` chunks of the answer, or None for a command without an answer."""
        answer = respond(self, UserInput(line, may_be_command=typed))
        if answer is None:
            return None
        chunks = [chunk for _, chunk in zip(range(max_chunks), answer, strict=False)]
        answer.close()
        return "".join(chunks)


@pytest.fixture(scope="module")
def llama(small: SimpleNamespace) -> Llama:
    return Llama.build(small.folder, small.tokenizer_path, max_seq_len=MAX_SEQ_LEN, max_batch_size=1, device="cpu")


@pytest.fixture
def conversation(llama: Llama) -> GreedyConversation:
    return GreedyConversation(llama)


def message(role: str, content: str | None) -> Message:
    return {"role": role, "content": content}  # type: ignore[typeddict-item]


def complete_dialog(llama: Llama, dialog: list[Message]) -> str:
    """Return the greedy answer to a whole dialog, computed without a conversation."""
    return llama.chat_completion([dialog], temperature=0, max_gen_len=8)[0]["generation"]["content"]
