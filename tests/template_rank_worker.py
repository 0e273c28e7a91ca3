"""Make chat calls with a template that renders a different text on each rank.

test_template_ranks.py runs this script on 2 ranks.
template_rank_worker.py OUT FOLDER MODEL_PARALLEL_SIZE: each rank writes its answers and its error messages to OUT.RANK.json.
"""

import json
import os
import sys
from typing import Any

from llama import InputError, Llama
from llama.cli.complete import check_lengths
from llama.cli.conversation import Conversation
from llama.hugging_face.chat_template import TemplateFormat
from llama.hugging_face.template_process import TemplateProcess
from tests.agreement_worker import LAST, RANK, error_of


def dialog(*texts: str) -> Any:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def answers(llama: Llama) -> dict[str, Any]:
    """Return what must be the same on all ranks, for dialogs of which each rendering has other tokens."""
    several = [dialog("one"), dialog("two", "three", "four")]
    results: dict[str, Any] = {"several": llama.chat_completion(several, 0, max_gen_len=4, details=True)}
    results["iterator"] = [*llama.iter_chat_completion(iter(several), 0, max_gen_len=4)]
    results["sampled"] = llama.chat_completion([dialog("one", "tw")], 1, n=2, max_gen_len=4, continue_answer=True)
    with llama.chat_completion_stream(dialog("one"), 0, max_gen_len=4) as stream:
        results["stream"] = ["".join(stream), stream.prompt_tokens]
    return results


def errors(llama: Llama) -> list[str]:
    """Return the errors of calls that fail on rank 0, on the last rank, or because the ranks differ."""
    is_last = RANK == LAST
    calls: list[Any] = [
        lambda: llama.chat_completion([dialog("a"), dialog("refuse")], max_gen_len=2),
        lambda: llama.chat_completion([dialog("escape")], max_gen_len=2),
        lambda: llama.chat_completion([dialog("last" if is_last else "first")], max_gen_len=2),
        lambda: llama.chat_completion([dialog("a")] * (2 if is_last else 1), max_gen_len=2),
        lambda: llama.chat_completion([5 if is_last else dialog("a")], max_gen_len=2),  # type: ignore[list-item]
        lambda: llama.chat_completion([dialog("a")], temperature=-1 if is_last else 0.5, max_gen_len=2),
        lambda: llama.chat_completion_stream(dialog("a")) if is_last else llama.chat_completion([dialog("a")], max_gen_len=2),
        lambda: llama.text_completion(["a"], max_gen_len=2) if is_last else llama.chat_completion([dialog("a")], max_gen_len=2),
        lambda: llama.chat_completion([dialog("a " * 300)], max_gen_len=2),
    ]
    messages = [error_of(call) for call in calls]
    chat_format: Any = llama.chat_format
    if is_last:
        llama.chat_format = TemplateFormat(chat_format.template + "!", chat_format.path, chat_format.roles)
    messages.append(error_of(calls[0]))
    llama.chat_format = chat_format
    if not is_last:  # no file can be opened, for example
        chat_format.process.render = lambda *_: open("/no/such/file")
    try:
        messages.append(error_of(lambda: llama.chat_completion([dialog("a")], max_gen_len=2)))
    except OSError as e:
        messages.append(f"{type(e).__name__}: {e}")
    chat_format.process = TemplateProcess()
    return messages


def conversation(llama: Llama) -> list[Any]:
    """Return the exchanges that a conversation still has after more than fit into the context."""
    talk, kept = Conversation(llama, lambda _: None, temperature=0, max_gen_len=30), []
    for i in range(8):
        "".join(talk.ask(f"{i} sea shells by the sea shore"))
        kept.append([*talk.exchanges])
    try:
        talk.ask("a " * 300)
    except InputError as e:
        kept.append([("refused", str(e)[:12])])
    return kept


def main(out: str, folder: str, model_parallel_size: str) -> None:
    llama = Llama.build(
        folder, max_seq_len=128, max_batch_size=4, model_parallel_size=int(model_parallel_size), device="cpu", seed=1
    )
    results: dict[str, Any] = {"answers": answers(llama), "errors": errors(llama), "conversation": conversation(llama)}
    records = [{"messages": dialog("one")}] * 40
    results["lengths"] = error_of(lambda: check_lengths(llama, records, [str(i) for i in range(40)], 20))
    results["afterwards"] = answers(llama)["several"]
    with open(f"{out}.{os.environ['RANK']}.json", "w") as f:
        json.dump(results, f)


if __name__ == "__main__":
    main(*sys.argv[1:])
