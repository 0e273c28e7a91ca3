"""The chat format: dialogs are encoded exactly as the reference encodes them."""

import pytest

from llama import Tokenizer
from llama.chat import Dialog, encode_dialog, is_unsafe


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "dialog, exchanges, question",
    [
        ([user(" q\n")], [], "[INST] q [/INST]"),
        ([user(" q "), assistant("\ta ")], ["[INST] q [/INST] a "], None),
        ([{"role": "system", "content": " s "}, user(" q ")], [], "[INST] <<SYS>>\n s \n<</SYS>>\n\n q [/INST]"),
        (
            [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("r"), assistant("b"), user(" t")],
            ["[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST] a ", "[INST] r [/INST] b "],
            "[INST] t [/INST]",
        ),
    ],
)
def test_each_exchange_is_encoded_separately_with_bos_and_eos(
    tokenizer: Tokenizer, dialog: Dialog, exchanges: list[str], question: str | None
) -> None:
    """strip() is called after the system text is put into the first message, so white space around the system text is kept."""
    if question is None:
        dialog, question = [*dialog, user("r")], "[INST] r [/INST]"
    expected = [token for text in exchanges for token in tokenizer.encode(text, bos=True, eos=True)]
    assert encode_dialog(tokenizer, dialog) == expected + tokenizer.encode(question, bos=True, eos=False)


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_tag_in_any_message_makes_a_dialog_unsafe(tag: str, role: str) -> None:
    assert is_unsafe([user("a"), {"role": role, "content": f"x{tag}y"}])  # type: ignore[typeddict-item]
    assert not is_unsafe([user("a"), {"role": role, "content": f"x{tag.lower()}y [INST <SYS>"}] if "I" in tag else [user("a")])
