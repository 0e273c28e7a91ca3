"""Encode dialogs and answers whose probability is measured."""

from typing import Any

from llama import Llama


def encode_answer(llama: Llama, dialog: list[Any], answer: str) -> list[int]:
    """Return the tokens of a dialog and of an answer to it, which begin with those of the dialog alone.

    A template may begin an answer by a text, such as "<think>", that it leaves out of an answer that is given. Then the
    answer's tokens follow that text.
    """
    prompt = llama.encode_dialog(dialog)
    tokens = llama.encode_dialog([*dialog, {"role": "assistant", "content": answer}], continue_answer=True)
    if tokens[: len(prompt)] == prompt:
        return tokens
    return prompt + llama.tokenizer.encode_infilling(answer.lstrip())
