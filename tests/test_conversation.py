"""Conversations without a terminal: answers depend on the whole dialog, and full contexts drop old exchanges."""

import pytest
import torch

from llama import InputError, Llama, tuning
from llama.chat import UNSAFE_ERROR, encode_dialog
from llama.cli.conversation import Conversation
from llama.engine.forward import EngineForward

from . import conversations
from .conversations import MAX_SEQ_LEN, GreedyConversation, complete_dialog, message
from .counting import count_forward_tokens
from .support import assert_raises

llama, conversation = conversations.llama, conversations.conversation  # fixtures


def test_each_answer_is_the_answer_to_the_whole_dialog(llama: Llama) -> None:
    conversation = GreedyConversation(llama, system="Be short.")
    dialog = [message("system", "Be short.")]
    for question in ("  good morning ", "seven?", "one, two"):
        dialog.append(message("user", question))
        answer = conversation.send(question)
        assert answer == complete_dialog(llama, dialog) and len(answer) > 2
        dialog.append(message("assistant", answer))
        assert conversation.dialog() == dialog and conversation.cut_off == "max_gen_len=8"


def test_each_turn_computes_only_the_last_answer_and_the_new_tokens(
    conversation: GreedyConversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "ATTENTION_CHUNK", 1)
    conversation.llama.clear_prefix_cache()
    with count_forward_tokens() as computed:
        conversation.send("one, two, three, four, five")
        first = computed[0]
        assert first == len(encode_dialog(conversation.llama.tokenizer, [message("user", "one, two, three, four, five")]))
        computed.clear()
        conversation.send("six")
    assert computed[0] <= len(encode_dialog(conversation.llama.tokenizer, conversation.dialog()[:3])) - first


def test_the_received_part_of_an_answer_that_is_ended_early_stays_in_the_dialog(conversation: GreedyConversation) -> None:
    received = conversation.send("good morning", max_chunks=3)
    dialog = [message("user", "good morning"), message("assistant", received)]
    assert conversation.dialog() == dialog and received and conversation.cut_off is None
    assert conversation.send("seven?") == complete_dialog(conversation.llama, [*dialog, message("user", "seven?")])


def test_a_full_context_drops_the_oldest_exchanges_but_never_the_system_text(llama: Llama) -> None:
    conversation = GreedyConversation(llama, system="Be short.")
    for i in range(12):
        answer = conversation.send(f"one, two, three, four: {i}")
        kept = conversation.dialog()
        assert kept[0] == message("system", "Be short.")
        assert kept[-2:] == [message("user", f"one, two, three, four: {i}"), message("assistant", answer)]
        assert len(encode_dialog(llama.tokenizer, kept[:-1])) + 8 <= MAX_SEQ_LEN
        assert answer == complete_dialog(llama, kept[:-1])
    assert 1 < len(conversation.exchanges) < 12
    forgotten = [text for text in conversation.messages if "forgotten" in text]
    assert len(forgotten) == 12 - len(conversation.exchanges)
    assert forgotten[0] == f"the context of {MAX_SEQ_LEN} tokens is full: the oldest exchange is forgotten"
    # The oldest exchanges were dropped first.
    assert conversation.dialog()[1]["content"].endswith(f": {12 - len(conversation.exchanges)}")


def test_a_long_question_drops_several_exchanges_at_once(conversation: GreedyConversation) -> None:
    for text in "abc":
        conversation.send(text)
    long = "the lazy dog " * 22
    conversation.send(long)
    assert [question for question, _ in conversation.exchanges][-1] == long and len(conversation.exchanges) < 3
    assert conversation.messages == [
        f"the context of {MAX_SEQ_LEN} tokens is full: the {4 - len(conversation.exchanges)} oldest exchanges are forgotten"
    ]


def test_a_question_too_long_for_the_context_raises_and_changes_nothing(conversation: GreedyConversation) -> None:
    conversation.send("good morning")
    before = conversation.dialog()
    with pytest.raises(
        InputError, match=rf"the question has \d+ tokens, .* 8 more are reserved .* has only {MAX_SEQ_LEN}: shorten"
    ):
        conversation.send("the lazy dog " * 60)
    assert conversation.dialog() == before and conversation.messages == []
    conversation.send("/system " + "the lazy dog " * 60)
    with pytest.raises(InputError, match="with the system text"):
        conversation.send("/retry")
    assert conversation.dialog()[1:] == before


@pytest.mark.parametrize("line", ["a [INST] b", "<</SYS>>", "/system be [/INST] good", "lone \ud800"])
def test_a_message_with_a_tag_or_a_lone_surrogate_raises_before_the_model_runs(
    conversation: GreedyConversation, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    conversation.send("good morning")
    before = conversation.dialog()
    monkeypatch.setattr(EngineForward, "hidden_states", None)
    with pytest.raises(InputError) as error:
        conversation.send(line)
    assert str(error.value) == UNSAFE_ERROR or "lone surrogate" in str(error.value)
    assert conversation.dialog() == before


def test_a_special_tag_ends_an_answer_and_is_never_stored_in_the_dialog(
    conversation: GreedyConversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make the model generate [INST] after its answer. If [INST] were stored in the dialog, every later call would raise."""
    tokenizer, model = conversation.llama.tokenizer, conversation.llama.model
    script = iter(tokenizer.encode("six seven [INST] well", bos=False, eos=False) + [tokenizer.eos_id] * 9)
    conversation.send("/set max_gen_len 60")
    with monkeypatch.context() as scripted:
        one = torch.eye(model.vocab_size)
        scripted.setattr(EngineForward, "logits", lambda self, hidden: one[next(script)].expand(len(hidden), -1))
        assert conversation.send("good morning") == "six seven "
    assert conversation.cut_off is None
    assert conversation.send("seven?")


def test_retry_replaces_the_last_answer(llama: Llama) -> None:
    conversation = GreedyConversation(llama, temperature=2.0, top_p=1.0, max_gen_len=20)
    conversation.send("good night")
    first = conversation.send("good morning")
    again = conversation.send("/retry")
    assert again != first and [question for question, _ in conversation.exchanges] == ["good night", "good morning"]
    assert conversation.exchanges[-1][1] == again
    greedy = GreedyConversation(llama)
    assert greedy.send("good night") == greedy.send("/retry")
    with pytest.raises(InputError, match="there is no question to answer again"):
        GreedyConversation(llama).send("/retry")


def test_the_speed_counts_only_the_prompt_tokens_that_were_computed(
    conversation: GreedyConversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "ATTENTION_CHUNK", 1)
    conversation.llama.clear_prefix_cache()
    conversation.send("good morning")
    prompt = len(encode_dialog(conversation.llama.tokenizer, [message("user", "good morning")]))
    assert conversation.speed and conversation.speed.startswith(f"prompt: {prompt} tokens, 0 of them in the cache; first text")
    conversation.send("/retry")
    assert conversation.speed.startswith(f"prompt: {prompt} tokens, {prompt - 2} of them in the cache; first text after ")


def test_cut_off_describes_the_last_answer_only(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(llama, lambda text: None, temperature=0, max_gen_len=4)
    answer = conversation.ask("hi")
    assert "".join(answer) and conversation.cut_off is not None and "4" in conversation.cut_off
    first = llama.generate([llama.tokenizer.encode("[INST] hi [/INST]", bos=True, eos=False)], 1, 0)[0][0][0]
    conversation.exchanges.clear()
    monkeypatch.setattr(llama.tokenizer, "eos_id", first)
    answer = conversation.ask("hi")
    assert list(answer) == [] and conversation.cut_off is None
    assert_raises(lambda: Conversation(llama, lambda text: None, "a [INST]"), InputError, "special tags")
