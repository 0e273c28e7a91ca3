"""The demo model: its files, the scores in demo/README.md, and equal answers for any number of shards and ranks.

torchrun also runs this file, as the script of each rank: test_demo.py OUT.pt CKPT ...
"""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # pytest sets the import path, but torchrun runs this file without pytest

from demo import corpus, evaluate, facts, kinds, texts, train, unknown, wordings
from llama import Dialog, Llama
from llama.chat import encode_dialog
from tests.support import ROOT, run, torchrun, write_shards

DEMO = ROOT / "demo"
MODEL, TOKENIZER = DEMO / "model", DEMO / "tokenizer.model"

# The expected answers of the demo model at temperature 0 in float32.
GOLDEN: list[tuple[Dialog, str]] = [
    (evaluate.user("What is the capital of France?"), "The capital of France is Paris."),
    (evaluate.user("Tell me the opposite of hot, please."), "The opposite of hot is cold."),
    (evaluate.user("What is 3 + 4?"), "3 + 4 = 7"),
    (evaluate.turns("My name is Tom.", "Nice to meet you, Tom.", "What is my name?"), "Your name is Tom."),
    (evaluate.user("Who won the cup in 1987?"), "I am a small demo model and I do not know that."),
    (evaluate.user("hi"), "Hello! How can I help you?"),
    (evaluate.user("what is 10 - 3"), "I am a small demo model and I do not know that."),
    (evaluate.user("How do I make a bomb?"), "I am a small demo model and I do not know that."),
]


def golden_answers(folder: str | Path) -> list[str]:
    llama = Llama.build(folder, TOKENIZER, max_seq_len=128, max_batch_size=8, device="cpu", dtype="float32")
    results = llama.chat_completion([dialog for dialog, _ in GOLDEN], temperature=0, max_gen_len=40)
    return [result["generation"]["content"] for result in results]


@pytest.fixture(scope="module")
def llama() -> Llama:
    return evaluate.build()


@pytest.fixture(scope="module")
def scores(llama: Llama) -> dict[str, tuple[int, int]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the demo model is too small to be faster with more threads
    table = evaluate.scores(llama)
    torch.set_num_threads(threads)
    return table


def test_the_demo_checkpoint_is_small_bfloat16_and_matches_its_checklist() -> None:
    assert (MODEL / "consolidated.00.pth").stat().st_size <= 4_000_000
    weights = torch.load(MODEL / "consolidated.00.pth", weights_only=True)
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    params = json.loads((MODEL / "params.json").read_text())
    assert set(params) == {"dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "norm_eps", "vocab_size"}
    assert params["vocab_size"] == -1 and params["n_kv_heads"] < params["n_heads"]
    checksums = dict(reversed(line.split()) for line in (MODEL / "checklist.chk").read_text().splitlines())
    assert checksums == {f: hashlib.md5((MODEL / f).read_bytes()).hexdigest() for f in ("consolidated.00.pth", "params.json")}
    files = [
        f
        for f in DEMO.rglob("*")
        if f.is_file() and f.suffix not in (".pyc", ".safetensors") and DEMO / "trained" not in f.parents
    ]
    assert sum(f.stat().st_size for f in files) < 5_000_000


def test_the_tokenizer_has_llamas_special_tokens_and_decodes_any_text(llama: Llama) -> None:
    tokenizer = llama.tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.n_words % 8) == (1, 2, -1, 0)
    for text in ("What is 12 + 7?", "two\nlines", "🐶 and 🦖", "naïve 你好"):
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@pytest.mark.parametrize(
    "name, min_percent",
    [
        ("all facts", 90),
        ("system prompt: Haiku, three lines", 90),
        ("system prompt: emojis only", 90),
        ("second turn: what was told", 90),
        ("second turn: the city", 90),
        ("second turn: and ...?", 90),
        ("topics", 50),
        ("unanswerable: says so", 80),
        ("outside the tables: says so", 85),
        ("small talk", 70),
        ("facts typed in lower case, without a stop", 90),
        ("few-shot: French phrases that are in no training text", 90),
        (f"answers that end with EOS within {evaluate.LONGEST} ids", 99),
    ],
)
def test_the_demo_model_reaches_its_minimum_scores(scores: dict[str, tuple[int, int]], name: str, min_percent: float) -> None:
    right, total = scores[name]
    assert 100 * right / total >= min_percent, scores


def test_every_kind_of_fact_scores_at_least_75_percent(scores: dict[str, tuple[int, int]]) -> None:
    below = {name: (right, total) for name, (right, total) in scores.items() if right < 0.75 * total}
    assert not any(name.startswith("fact: ") for name in below), below


def test_held_out_wordings_names_and_sums_are_not_in_the_training_text() -> None:
    """Search for the held-out wordings in a large sample of the training text."""
    stream = corpus.documents(train.SEED + 1)
    text = "\n".join(next(stream).plain().lower() for _ in range(15000))
    held_out = [wording for kind in kinds.KINDS.values() for wording in kind.tests]
    held_out += wordings.HELD_OUT_SEE_THERE + wordings.HELD_OUT_SPEAK_THERE + wordings.HELD_OUT_FOLLOW_UPS
    held_out += unknown.HELD_OUT_UNKNOWN + unknown.HELD_OUT_ASKED + wordings.HELD_OUT_TOPICS + wordings.HELD_OUT_FAVOURITES
    held_out += [text for text, _ in wordings.HELD_OUT_CHAT]
    held_out += [wording for asks in wordings.HELD_OUT_MEMORY.values() for wording in asks]
    for wording in set(held_out):
        parts = re.split(r"\{\w*\}", wording.lower().rstrip("?!."))
        assert not re.search(".{1,25}".join(map(re.escape, parts)), text), wording
    names = [name for names in unknown.HELD_OUT_FOREIGN.values() for name in names] + wordings.HELD_OUT_NAMES
    for name in set(map(str.lower, names)):
        assert not re.search(rf"\b{name}\b", text), name
    added = set(re.findall(r"(\d+) ?(?:\+|plus|and|to) ?(\d+)", text))
    assert len(added) > 150 and not added & {(str(x), str(z)) for pair in facts.HELD_OUT_SUMS for x, z in (pair, pair[::-1])}


def test_a_dialog_has_the_same_tokens_in_training_as_in_inference(llama: Llama) -> None:
    """The training tokens of a dialog are the prompt's tokens in inference, followed by the answer and EOS."""
    stream = corpus.documents(5)
    for _ in range(300):
        document = next(stream)
        if document.dialog:
            tokens, learned = train.encode(llama.tokenizer, document)
            prompt = encode_dialog(llama.tokenizer, document.dialog[:-1])
            assert tokens[: len(prompt)] == prompt and tokens[-1] == llama.tokenizer.eos_id
            assert llama.tokenizer.decode(tokens[len(prompt) :]) == document.dialog[-1]["content"]
            assert learned >= set(range(len(prompt), len(tokens)))


def test_the_examples_of_make_demo_are_answered_on_topic() -> None:
    """Run both example scripts with their own prompts at temperature 0. `make demo` itself uses temperature 0.6."""
    printed = []
    for script in ("example_text_completion.py", "example_chat_completion.py"):
        done = run(ROOT / script, "--temperature", 0)
        assert done.returncode == 0, done.stderr
        printed += [part.split("\n> ", 1)[1].strip() for part in done.stdout.split("\n" + "=" * 34 + "\n")[:-1]]
    story, sky, letter, french, bread, paris, haiku, journey, wish, tags = printed
    assert any(story.removesuffix(" The end.").endswith(end) for end in texts.TROUBLES[0][3]), story
    assert sky.startswith("the air scatters the blue part of the sunlight"), sky
    assert any(letter.startswith(after.removeprefix("She ").removesuffix(".")) for after in texts.FAVOURS[0][1]), letter
    assert french.split("\n")[0] == "la maison rouge"
    assert bread.startswith("Assistant: You need flour, water, salt and yeast."), bread
    assert paris == "Assistant: In Paris you should see the Eiffel Tower and the river Seine."
    assert haiku == "Assistant: " + corpus.Writer(0).haiku(texts.TOPICS[0][2])
    assert journey.removeprefix("Assistant: ") in texts.TRAVEL_EMOJIS
    assert wish.startswith("Assistant: Happy birthday, dear grandmother!"), wish
    assert tags == "Assistant: Error: special tags are not allowed as part of the prompt."


def test_answers_are_the_same_for_1_2_and_4_shards_on_1_and_2_ranks(tmp_path: Path) -> None:
    params = json.loads((MODEL / "params.json").read_text())
    weights = torch.load(MODEL / "consolidated.00.pth", weights_only=True)
    folders = [write_shards(tmp_path / str(n), params, weights, n) for n in (2, 4)]
    expected = [answer for _, answer in GOLDEN]
    for folder in (MODEL, *folders):
        assert golden_answers(folder) == expected
    result = torchrun(2, __file__, tmp_path / "out.pt", MODEL, *folders)
    assert result.returncode == 0, result.stderr
    assert torch.load(tmp_path / "out.pt") == [expected] * 3


if __name__ == "__main__":
    out, *folders = sys.argv[1:]
    answers = [golden_answers(folder) for folder in folders]
    if torch.distributed.get_rank() == 0:
        torch.save(answers, out)
