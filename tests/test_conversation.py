"""What is said, kept and forgotten, apart from any terminal: each answer is that of its whole dialog, from scratch."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import InputError, Llama
from llama.chat import UNSAFE_ERROR, Message, encode_dialog
from llama.cli.conversation import COMMANDS_HELP, Conversation
from llama.engine.forward import EngineForward

from .counting import counted
from .support import refused

WINDOW = 192


class Talk(Conversation):
    """A greedy conversation on one rank, and what it remarked."""

    def __init__(self, llama: Llama, **options: object) -> None:
        self.remarks: list[str] = []
        super().__init__(llama, self.remarks.append, **{"temperature": 0, "max_gen_len": 8} | options)

    def says(self, line: str, most: int = 1000) -> str | None:
        """The answer to a line, or its first pieces; None for a line that has none."""
        answer = self.respond(line)
        if answer is None:
            return None
        pieces = [piece for _, piece in zip(range(most), answer, strict=False)]
        answer.close()
        return "".join(pieces)


@pytest.fixture(scope="module")
def llama(small: SimpleNamespace) -> Llama:
    return Llama.build(small.folder, small.tokenizer_path, max_seq_len=WINDOW, max_batch_size=1, device="cpu")


@pytest.fixture
def talk(llama: Llama) -> Talk:
    return Talk(llama)


def message(role: str, content: str | None) -> Message:
    return {"role": role, "content": content}  # type: ignore[typeddict-item]


def from_scratch(llama: Llama, dialog: list[Message]) -> str:
    return llama.chat_completion([dialog], temperature=0, max_gen_len=8)[0]["generation"]["content"]


def test_each_turn_is_answered_as_its_whole_dialog(llama: Llama) -> None:
    talk = Talk(llama, system="Be short.")
    dialog = [message("system", "Be short.")]
    for question in ("  good morning ", "seven?", "one, two"):
        dialog.append(message("user", question))
        answer = talk.says(question)
        assert answer == from_scratch(llama, dialog) and len(answer) > 2
        dialog.append(message("assistant", answer))
        assert talk.dialog() == dialog and talk.cut_off == "max_gen_len=8"


def test_a_turn_computes_only_what_is_new(talk: Talk) -> None:
    with counted() as computed:
        talk.says("one, two, three, four, five")
        first = computed[0]
        assert first == len(encode_dialog(talk.llama.tokenizer, [message("user", "one, two, three, four, five")]))
        computed.clear()
        talk.says("six")
    assert computed[0] <= len(encode_dialog(talk.llama.tokenizer, talk.dialog()[:3])) - first


def test_an_answer_that_is_ended_early_stays_as_far_as_it_came(talk: Talk) -> None:
    begun = talk.says("good morning", most=3)
    dialog = [message("user", "good morning"), message("assistant", begun)]
    assert talk.dialog() == dialog and begun and talk.cut_off is None
    assert talk.says("seven?") == from_scratch(talk.llama, [*dialog, message("user", "seven?")])


def test_a_full_window_forgets_the_oldest_exchanges_but_never_the_system_text(llama: Llama) -> None:
    talk = Talk(llama, system="Be short.")
    for i in range(12):
        answer = talk.says(f"one, two, three, four: {i}")
        kept = talk.dialog()
        assert kept[0] == message("system", "Be short.")
        assert kept[-2:] == [message("user", f"one, two, three, four: {i}"), message("assistant", answer)]
        assert len(encode_dialog(llama.tokenizer, kept[:-1])) + 8 <= WINDOW
        assert answer == from_scratch(llama, kept[:-1])
    assert 1 < len(talk.exchanges) < 12
    forgotten = [remark for remark in talk.remarks if "forgotten" in remark]
    assert len(forgotten) == 12 - len(talk.exchanges)
    assert forgotten[0] == f"the window of {WINDOW} ids is full: the oldest exchange is forgotten"
    assert talk.dialog()[1]["content"].endswith(f": {12 - len(talk.exchanges)}")  # the oldest went first


def test_several_are_forgotten_at_once_for_a_long_question(talk: Talk) -> None:
    for text in "abc":
        talk.says(text)
    long = "the lazy dog " * 22
    talk.says(long)
    assert [question for question, _ in talk.exchanges][-1] == long and len(talk.exchanges) < 3
    assert talk.remarks == [f"the window of {WINDOW} ids is full: the {4 - len(talk.exchanges)} oldest exchanges are forgotten"]


def test_a_question_too_long_for_the_window_changes_nothing(talk: Talk) -> None:
    talk.says("good morning")
    before = talk.dialog()
    with pytest.raises(
        InputError, match=rf"the question has \d+ ids, .* the window of {WINDOW} ids .* answer of 8 too: shorten"
    ):
        talk.says("the lazy dog " * 60)
    assert talk.dialog() == before and talk.remarks == []
    talk.says("/system " + "the lazy dog " * 60)
    with pytest.raises(InputError, match="the system text included"):
        talk.says("/retry")
    assert talk.dialog()[1:] == before


@pytest.mark.parametrize("line", ["a [INST] b", "<</SYS>>", "/system be [/INST] good", "lone \ud800"])
def test_what_no_message_may_hold_is_refused_before_anything_is_computed(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    talk.says("good morning")
    before = talk.dialog()
    monkeypatch.setattr(EngineForward, "hidden_states", None)
    with pytest.raises(InputError) as error:
        talk.says(line)
    assert str(error.value) == UNSAFE_ERROR or "lone surrogate" in str(error.value)
    assert talk.dialog() == before


def test_a_special_tag_ends_an_answer_and_so_never_spoils_the_dialog(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that goes on with a question of its own: [INST] would be refused in every later dialog."""
    tokenizer, model = talk.llama.tokenizer, talk.llama.model
    script = iter(tokenizer.encode("six seven [INST] well", bos=False, eos=False) + [tokenizer.eos_id] * 9)
    monkeypatch.setattr(talk, "stream_options", talk.stream_options | {"max_gen_len": 60})
    with monkeypatch.context() as scripted:
        one = torch.eye(model.vocab_size)
        scripted.setattr(EngineForward, "logits", lambda self, hidden: one[next(script)].expand(len(hidden), -1))
        assert talk.says("good morning") == "six seven "
    assert talk.cut_off is None
    assert talk.says("seven?")


def test_retry_answers_the_last_question_anew(llama: Llama) -> None:
    talk = Talk(llama, temperature=2.0, top_p=1.0, max_gen_len=20)
    talk.says("good night")
    first = talk.says("good morning")
    again = talk.says("/retry")
    assert again != first and [question for question, _ in talk.exchanges] == ["good night", "good morning"]
    assert talk.exchanges[-1][1] == again
    greedy = Talk(llama)
    assert greedy.says("good night") == greedy.says("/retry")
    with pytest.raises(InputError, match="nothing was asked yet"):
        Talk(llama).says("/retry")


def test_the_system_text(talk: Talk) -> None:
    talk.says("/system")
    talk.says("/system Answer with a  poem.")
    assert talk.says("seven?") == from_scratch(
        talk.llama, [message("system", "Answer with a  poem."), message("user", "seven?")]
    )
    talk.says("/system")
    talk.says("/system Be short.")
    assert len(talk.exchanges) == 1 and talk.dialog()[0] == message("system", "Be short.")
    talk.says("/clear")
    assert talk.dialog() == [message("system", "Be short.")]
    talk.says("/system -")
    assert talk.dialog() == []
    assert talk.remarks == [
        "there is no system text",
        "the system text is: Answer with a  poem.",
        "the system text is: Answer with a  poem.",
        "the system text is: Be short.; the conversation goes on, /clear begins anew",
        "the conversation begins anew",
        "there is no system text",
    ]


def test_save(talk: Talk, tmp_path: Path) -> None:
    talk.says("/system 你是一位诗人")
    talk.says(f"/save {tmp_path}/early.json")
    talk.says("写")
    name = tmp_path / "a talk.json"
    talk.says(f"/save {name}")
    saved = json.loads(name.read_text(encoding="utf-8"))
    assert saved == talk.dialog() and len(saved) == 3
    assert talk.says("seven?") == from_scratch(talk.llama, [*saved, message("user", "seven?")])
    for bad in (str(name), f"{tmp_path}/no/folder.json", str(tmp_path), "", "~nobody-of-that-name/x", "nul\0"):
        talk.says(f"/save {bad}")
    assert json.loads(name.read_text(encoding="utf-8")) == saved and len(talk.dialog()) == 5
    assert [remark.removeprefix(str(tmp_path)) for remark in talk.remarks[1:5]] == [
        "nothing was said yet",
        f"saved in {name}",
        "/a talk.json is there already; give another name",
        "/no/folder.json cannot be written: No such file or directory",
    ]
    assert len(talk.remarks) == 9 and list(tmp_path.iterdir()) == [name]


def test_help_exit_blank_lines_and_unknown_commands(talk: Talk) -> None:
    assert talk.says("/help") is talk.says("   ") is talk.says("/exit now") is None
    assert talk.done and talk.remarks == [COMMANDS_HELP] and talk.dialog() == []
    with pytest.raises(InputError, match=r"^/sytem is no command; /help names them$"):
        talk.says("/sytem x")


def test_why_an_answer_was_cut_is_told_of_that_answer(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation(llama, lambda text: None, temperature=0, max_gen_len=4)
    answer = talk.respond("hi")
    assert answer is not None and "".join(answer) and talk.cut_off is not None and "4" in talk.cut_off
    first = llama.generate([llama.tokenizer.encode("[INST] hi [/INST]", bos=True, eos=False)], 1, 0)[0][0][0]
    talk.exchanges.clear()
    monkeypatch.setattr(llama.tokenizer, "eos_id", first)
    answer = talk.respond("hi")
    assert answer is not None and list(answer) == [] and talk.cut_off is None
    refused(lambda: Conversation(llama, lambda text: None, "a [INST]"), InputError, "special tags")
