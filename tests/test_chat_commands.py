"""Commands of a conversation, and lines that are messages: save, load, read, set, retry and quoted blocks."""

import json
from pathlib import Path

import pytest

from llama import InputError, Llama
from llama.chat import UNSAFE_ERROR
from llama.cli.commands import complete, help_text
from llama.cli.user_input import UserInput, read_input

from . import conversations
from .conversations import GreedyConversation, complete_dialog, message
from .support import assert_raises

llama, conversation = conversations.llama, conversations.conversation  # fixtures


def test_the_system_command_shows_sets_and_removes_the_system_text(conversation: GreedyConversation) -> None:
    conversation.send("/system")
    conversation.send("/system Answer with a  poem.")
    assert conversation.send("seven?") == complete_dialog(
        conversation.llama, [message("system", "Answer with a  poem."), message("user", "seven?")]
    )
    conversation.send("/system")
    conversation.send("/system Be short.")
    assert len(conversation.exchanges) == 1 and conversation.dialog()[0] == message("system", "Be short.")
    conversation.send("/clear")
    assert conversation.dialog() == [message("system", "Be short.")]
    conversation.send("/system -")
    assert conversation.dialog() == []
    assert conversation.messages == [
        "there is no system text",
        "the system text is: Answer with a  poem.",
        "the system text is: Answer with a  poem.",
        "the system text is: Be short.; the conversation continues, /clear clears it",
        "the conversation is cleared",
        "there is no system text",
    ]


def test_save_writes_the_dialog_to_a_new_file_and_never_overwrites(conversation: GreedyConversation, tmp_path: Path) -> None:
    conversation.send("/system 你是一位诗人")
    with pytest.raises(InputError, match="the conversation is empty: nothing to save"):
        conversation.send(f"/save {tmp_path}/early.json")
    conversation.send("写")
    name = tmp_path / "a talk.json"
    conversation.send(f"/save {name}")
    saved = json.loads(name.read_text(encoding="utf-8"))
    assert saved == conversation.dialog() and len(saved) == 3
    assert conversation.send("seven?") == complete_dialog(conversation.llama, [*saved, message("user", "seven?")])
    for bad, error in {
        str(name): f"{name} exists already; give another name",
        f"{tmp_path}/no/folder.json": f"{tmp_path}/no/folder.json cannot be written: No such file or directory",
        str(tmp_path): f"{tmp_path} exists already",
        "": "give a file name, as in /save talk.json",
        "~nobody-of-that-name/x": "~nobody-of-that-name/x cannot be written: ",
        "nul\0": "cannot be written: ",
    }.items():
        assert_raises(lambda bad=bad: conversation.send(f"/save {bad}"), InputError, error)  # type: ignore[misc]
    assert json.loads(name.read_text(encoding="utf-8")) == saved and len(conversation.dialog()) == 5
    assert conversation.messages[1:] == [f"saved in {name}"] and list(tmp_path.iterdir()) == [name]


def test_load_continues_a_saved_conversation(conversation: GreedyConversation, tmp_path: Path) -> None:
    conversation.send("/system Be short.")
    conversation.send("good morning")
    conversation.send(f"/save {tmp_path}/a talk.json")
    saved = conversation.dialog()
    conversation.send("/clear")
    conversation.send("/system -")
    conversation.send(f'/load "{tmp_path}/a talk.json"')
    assert conversation.messages[-1] == f"loaded from {tmp_path}/a talk.json: 1 exchange, and a system text"
    assert conversation.dialog() == saved
    assert conversation.send("seven?") == complete_dialog(conversation.llama, [*saved, message("user", "seven?")])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "talk.json is not JSON ("),
        ("[" * 100_000, "talk.json is not JSON ("),
        (b"\xff", "is not text in UTF-8 (byte 0 is 0xff); convert it"),
        ('"good morning"', "holds 'good morning' (str); it must be a list of messages, as /save writes it"),
        ("[]", "holds [] (list); it must be a list of messages"),
        ("[5]", "message 0 is 5 (int); it must be a dict"),
        ('[{"role": "user", "content": "a"}]', "ends with a 'user' message; it must end with an answer"),
        ('[{"role": "assistant", "content": "a"}]', "message 0 is by 'assistant', but must be by 'user'"),
        ('[{"role": "user", "content": "[INST]"}, {"role": "assistant", "content": "a"}]', UNSAFE_ERROR),
    ],
)
def test_load_refuses_a_file_that_holds_no_conversation(
    conversation: GreedyConversation, tmp_path: Path, content: str | bytes | None, error: str
) -> None:
    path = tmp_path / "talk.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_raises(lambda: conversation.send(f"/load {path}"), InputError, error, "" if error == UNSAFE_ERROR else str(path))
    assert conversation.dialog() == []


def test_read_asks_with_the_text_of_a_file_and_a_question_after_it(
    conversation: GreedyConversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "my notes.txt"):
        Path(name).write_text("\ufeff/clear\none, two\n", encoding="utf-8")
    for line in ("notes.txt", "my notes.txt", "notes.txt seven?", "'my notes.txt'  seven? ", '"notes.txt"'):
        conversation.send(f"/read {line}", max_chunks=1)
    questions = [text for text, _ in conversation.exchanges]
    assert [text.removeprefix("/clear\none, two") for text in questions] == ["", "", "\n\nseven?", "\n\nseven?", ""]
    Path("empty").write_text("\n")
    Path("large").write_text("sea " * 2_600_000)
    for name, error in {
        "": "give a file name, as in /read notes.txt",
        "no.txt what?": "cannot be read: No such file or directory",
        "empty": "empty contains no text",
        "large": "large has 10,400,000 bytes, and a file may have 10,000,000",
        str(tmp_path): "is a folder or a device, not a file",
    }.items():
        assert_raises(lambda name=name: conversation.send(f"/read {name}"), InputError, error)  # type: ignore[misc]
    assert [text for text, _ in conversation.exchanges] == questions


def test_set_shows_and_changes_the_options_of_the_next_answers(conversation: GreedyConversation) -> None:
    for line in ("temperature 2", "top_p=1.0", "max-gen-len 20", "seed 5", "verbose on", "system Be short."):
        conversation.send(f"/set {line}")
    first = conversation.send("good morning")
    assert first == conversation.send("/retry")  # the seed is the same
    conversation.send("/set seed 6")
    assert first != conversation.send("/retry")
    dialog = [message("system", "Be short."), message("user", "good morning")]
    want = conversation.llama.chat_completion([dialog], 2, 1.0, 20, seed=[5])[0]["generation"]["content"]
    assert first == want and conversation.speed is not None and "answer: 20 tokens, " in conversation.speed
    conversation.send("/set max_gen_len none")
    conversation.send("/set")
    assert [row.split(maxsplit=1) for row in conversation.messages[-1].split("\n")] == [
        ["temperature", "2"], ["top_p", "1.0"], ["top_k", "0"], ["min_p", "0.0"], ["repetition_penalty", "1.0"],
        ["frequency_penalty", "0.0"], ["presence_penalty", "0.0"], ["typical_p", "1.0"],
        ["max_gen_len", "none"], ["seed", "6"], ["verbose", "on"], ["system", "Be short."],
    ]  # fmt: skip
    conversation.send("/set top_k")
    assert conversation.messages[-1].split() == ["top_k", "0"]
    conversation.send("/set system none")
    assert conversation.system is None
    before = dict(conversation.options)
    for line, error in {
        "temperature -1": "temperature is -1 (int); it must be a number, from 0",
        "temperature hot": "temperature is 'hot' (str); it must be a number, from 0",
        "temperature none": "temperature is 'none' (str); it must be a number, from 0",
        "top_k 1.5": "top_k is 1.5 (float); it must be a whole number",
        "max_gen_len -3": "max_gen_len is -3 (int); it must be a whole number, 0 or more",
        "seed x": "seed is 'x' (str); it must be a whole number from -2**63",
        "verbose yes": "verbose is 'yes' (str); it must be on or off",
        "temprature 1": "temprature is not an option; the options are temperature, top_p,",
    }.items():
        assert_raises(lambda line=line: conversation.send(f"/set {line}"), InputError, error)  # type: ignore[misc]
    assert conversation.options == before


def test_help_exit_and_blank_lines_have_no_answer(llama: Llama) -> None:
    for leave in ("/exit", "/quit", "/bye", "exit", " quit "):
        conversation = GreedyConversation(llama)
        assert conversation.send("/help") is conversation.send("/?") is conversation.send("   ") is None
        assert conversation.messages == [help_text()] * 2 and not conversation.done
        assert conversation.send(leave) is None and conversation.done and conversation.dialog() == []
    assert max(map(len, help_text().split("\n"))) <= 110


def test_only_a_known_command_that_is_typed_is_a_command(conversation: GreedyConversation) -> None:
    for line, error in {
        "/sytem x": "/sytem is not a command; did you mean /system? To send this line as a message, begin it with //",
        "/HELP": "did you mean /help?",
        "/q": "did you mean /quit?",
        "/rety": "did you mean /retry?",
        "/clear the table": "/clear takes nothing after it; to send this line as a message, begin it with //",
    }.items():
        assert_raises(lambda line=line: conversation.send(line), InputError, error)  # type: ignore[misc]
    for line in ("/etc/passwd is what?", "/ is the root", "/oops", "exit the house", "quit?"):
        conversation.send(line, max_chunks=1)
        assert conversation.exchanges[-1][0] == line
    conversation.send("//clear", max_chunks=1)
    assert conversation.exchanges[-1][0] == "/clear"
    for line in ("/clear", "/sytem", "exit", "//x"):
        conversation.send(line, max_chunks=1, typed=False)
        assert conversation.exchanges[-1][0] == line


@pytest.mark.parametrize(
    ("lines", "text", "may_be_command"),
    [
        (["good morning"], "good morning", True),
        (["good morning\n"], "good morning", True),  # a paste of one line, with its newline
        (["/clear\nthe table\n"], "/clear\nthe table", False),  # a paste
        (['"""one\ntwo"""\n'], "one\ntwo", False),
        (['"""one\ntwo', "three"], '"""one\ntwo', False),
        (['"""', "/clear", "", ' two"""'], "/clear\n\n two", False),
        (['"""/clear"""'], "/clear", False),
        (['"""one', "two\nthree", '"""  '], "one\ntwo\nthree", False),
        (['/system """Be', 'short."""'], "/system Be\nshort.", True),
        (["one\\", "two\\", "three"], "one\ntwo\nthree", True),
        (['say """hi"""'], 'say """hi"""', True),
    ],
)
def test_a_paste_a_quoted_block_and_continued_lines_are_one_message(lines: list[str], text: str, may_be_command: bool) -> None:
    prompts, remaining = [], list(lines)

    def read_line(prompt: str) -> str | None:
        prompts.append(prompt)
        return remaining.pop(0) if remaining else None

    entry = read_input(read_line)
    assert entry == UserInput(text, may_be_command)
    assert prompts[0] == "> " and set(prompts[1:]) <= {"... "} and remaining == lines[len(prompts) :]
    again = read_input(lambda _: entry.as_typed)  # from the history
    if not text.startswith("/system"):
        assert again == UserInput(text, may_be_command and "\n" not in text)
    assert read_input(lambda _: None) is None


@pytest.mark.parametrize("lines", [['"""one', "two"], ["one\\"]])
def test_an_unfinished_message_is_discarded_at_the_end_of_the_input(lines: list[str]) -> None:
    remaining = list(lines)
    assert read_input(lambda _: remaining.pop(0) if remaining else None) is None


def test_tab_completes_commands_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("talk.json").write_text("")
    Path("talks").mkdir()
    assert complete("/re") == ["/retry", "/read "] and complete("/x") == []
    assert complete("/load ta") == ["/load talk.json", "/load talks/"]
    assert complete("/system ta") == [] and complete("ta") is complete("") is None
