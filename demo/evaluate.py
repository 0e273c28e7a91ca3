"""Measure the demo model as a user meets it: the bundled files, `Llama.build`, answers at temperature 0.

python demo/evaluate.py
"""

import argparse
import random
import sys
import time
import unicodedata
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo import corpus as C
from demo import texts as T
from demo import unknown as U
from demo import wordings as W
from demo.facts import COLOURS, COUNTRIES, FRENCH_COLOURS, HELD_OUT_SUMS, NOUNS, held_out_phrase, phrase, split_article
from demo.kinds import KINDS
from llama import Dialog, Llama
from llama.chat import Message

HERE = Path(__file__).parent
BATCH, WINDOW, LONGEST = 32, 256, 100
Case = tuple[Dialog, str]  # a dialog, and the one right answer


def user(text: str, system: str | None = None) -> Dialog:
    return [Message(role="system", content=system)] * bool(system) + [Message(role="user", content=text)]


def turns(*texts: str) -> Dialog:
    return [Message(role=("user", "assistant")[i % 2], content=C.cap(text)) for i, text in enumerate(texts)]


def build(folder: Path = HERE, **options: object) -> Llama:
    return Llama.build(folder / "model", folder / "tokenizer.model", WINDOW, BATCH, **{"device": "cpu"} | options)


def answer(llama: Llama, dialogs: list[Dialog]) -> tuple[list[str], int]:
    """The answers, and how many of them ended by themselves, with EOS."""
    order = sorted(range(len(dialogs)), key=lambda i: sum(len(m["content"]) for m in dialogs[i]))
    texts, ended = [""] * len(dialogs), 0
    for i in range(0, len(order), BATCH):
        rows = order[i : i + BATCH]
        results = llama.chat_completion([dialogs[r] for r in rows], temperature=0, max_gen_len=LONGEST, logprobs=True)
        for row, result in zip(rows, results, strict=True):
            texts[row] = result["generation"]["content"]
            ended += len(result["tokens"]) < LONGEST
    return texts, ended


def fact_cases(name: str, per_item: int = 2) -> list[Case]:
    """Questions in held-out wordings: of each item's six or so, `per_item` in rotation."""
    kind, cases = KINDS[name], []
    for i, item in enumerate(kind.items):
        for j in range(per_item):
            wording = kind.tests[(i + j * 3) % len(kind.tests)]
            cases.append((user(C.fill(wording, item)), C.fill(kind.answer, item)))
    return cases


def sum_cases() -> list[Case]:
    pairs = [pair for x, z in HELD_OUT_SUMS for pair in {(x, z), (z, x)}]
    wordings = ["What is {} + {}?", "How much is {} plus {}?", "{} + {}", "What is the sum of {} and {}?"]
    return [(user(w.format(x, z)), f"{x} + {z} = {x + z}") for x, z in pairs for w in wordings]


def memory_cases() -> list[Case]:
    """Told in the first turn, asked for in the second, in held-out wordings."""
    values = {"name": T.NAMES, "city": [row[1] for row in COUNTRIES], "pet": T.NAMES, "colour": list(COLOURS)}
    cases = []
    for topic, (says, reply, _, recalls) in W.MEMORY.items():
        for i, x in enumerate(values[topic]):
            slots = {"x": x, "X": C.cap(x), "z": ("dog", "cat", "horse")[i % 3]}
            asks = W.HELD_OUT_MEMORY[topic]
            told = says[i % len(says)], reply, asks[i % len(asks)]
            cases.append((turns(*(text.format(**slots) for text in told)), recalls.format(**slots)))
    return cases


def name_cases() -> list[Case]:
    """Names that are in no training text, in wordings from training: greeted, and remembered."""
    cases = []
    for i, x in enumerate(W.HELD_OUT_NAMES):
        says, reply, asks, recalls = W.MEMORY["name"]
        said, greeting = says[i % len(says)].format(x=x), reply.format(x=x)
        cases.append((user(said), greeting))
        cases.append((turns(said, greeting, asks[i % len(asks)]), recalls.format(x=x)))
        slots = {"x": x, "z": ("dog", "cat", "horse")[i % 3]}
        told = [text.format(**slots) for text in (W.MEMORY["pet"][0][i % 5], W.MEMORY["pet"][1], W.MEMORY["pet"][2][i % 7])]
        cases.append((turns(*told), W.MEMORY["pet"][3].format(**slots)))
    return cases


def city_cases(see: list[str], speak: list[str]) -> list[Case]:
    """The city is only in the answer before."""
    cases = []
    for i, item in enumerate(KINDS["capital"].items):
        first = "What is the capital of {x}?".format(**item), C.fill(KINDS["capital"].answer, item)
        cases.append((turns(*first, see[i % len(see)]), "In {y} you should see {sights}.".format(**item)))
        cases.append((turns(*first, speak[i % len(speak)]), C.fill(KINDS["language"].answer, item)))
    return cases


def again_cases() -> list[Case]:
    """ "What is the capital of France?" "And how about Italy?\""""
    rng, cases = random.Random(0), []
    for name, kind in KINDS.items():
        for i in range(12):
            one, two = rng.sample(kind.items, 2)
            ask = W.HELD_OUT_FOLLOW_UPS[i % len(W.HELD_OUT_FOLLOW_UPS)].format(W.SHORT.get(name, "{x}").format(**two))
            cases.append(
                (turns(C.fill(rng.choice(kind.questions), one), C.fill(kind.answer, one), ask), C.fill(kind.answer, two))
            )
    return cases


def unknown_cases() -> list[Case]:
    rng, cases = random.Random(0), []
    for wording in U.HELD_OUT_UNKNOWN:
        for _ in range(6):
            slots = dict(name="".join(rng.choices(U.SYLLABLES, k=3)).capitalize(), thing=rng.choice(U.THINGS),
                         year=rng.randint(1200, 2030), p=rng.randint(10, 20), q=rng.randint(2, 9),
                         country=rng.choice(COUNTRIES)[0])  # fmt: skip
            cases.append((user(wording.format(**slots)), U.NO_IDEA))
    return cases


def outside_cases() -> list[Case]:
    """Things that are in no table and in no training text, in a wording from training and in a held-out one."""
    cases = [(user(question), U.NO_IDEA) for question in U.HELD_OUT_ASKED]
    for name, things in U.HELD_OUT_FOREIGN.items():
        kind = KINDS[name]
        for i, thing in enumerate(things):
            asked = f"What is {kind.phrases[0]}?", kind.tests[i % len(kind.tests)]
            cases += [(user(C.fill(wording, {"x": thing, "y": thing})), U.NO_IDEA) for wording in asked]
    return cases


def typed_cases(count: int = 200) -> list[Case]:
    """Held-out wordings of all kinds of facts, in lower case and without a stop."""
    cases = random.Random(1).sample([case for name in KINDS for case in fact_cases(name, 1)], count)
    return [(user(dialog[0]["content"].lower().rstrip("?.!")), right) for dialog, right in cases]


def chat_cases() -> list[Case]:
    """Small talk, with how the answer begins."""
    cases = [(user(said), begins) for said, begins in W.HELD_OUT_CHAT]
    favourites = [(w, what) for w in W.HELD_OUT_FAVOURITES for what in ("colour", "food", "animal", "song", "city")]
    return cases + [(user(w.format(what)), T.FAVOURITE.format(what)) for w, what in favourites]


def is_chat(text: str, begins: str) -> bool:
    return text in T.JOKES if begins == "JOKE" else text.startswith(begins)


def topic_cases() -> list[Case]:
    return [(user(W.HELD_OUT_TOPICS[i % 2].format(row[0])), row[1]) for i, row in enumerate(T.TOPICS)]


def manner_questions(count: int = 150) -> list[str]:
    """Questions in held-out wordings, of all kinds."""
    cases = [case for name in KINDS for case in fact_cases(name, 1)]
    topics = [dialog[0]["content"] for dialog, _ in topic_cases()]
    return topics + [dialog[0]["content"] for dialog, _ in random.Random(0).sample(cases, count - len(topics))]


def is_haiku(text: str) -> bool:
    lines = text.split("\n")
    return len(lines) == 3 and all(any(c.isalpha() for c in line) for line in lines)


def is_emojis(text: str) -> bool:
    text = text.strip()
    symbols = ("So", "Sk", "Mn", "Cf")  # emojis, skin tones, and what joins them; U+FFFD stands for broken bytes
    return bool(text) and all(ord(c) >= 0x2300 and c != "\ufffd" and unicodedata.category(c) in symbols for c in text)


def few_shot_cases() -> dict[str, list[tuple[str, str]]]:
    """Lists to go on with, and the right next line."""
    rng = random.Random(0)
    words = [(english, split_article(french)) for english, french in NOUNS]
    seen, unseen = [], []
    for i, colour in enumerate(FRENCH_COLOURS):
        for j, noun in enumerate(NOUNS):
            (unseen if held_out_phrase(i, j) else seen).append(phrase(colour, noun))
    pools = {
        "few-shot: French phrases": (seen, words, "Translate English to French:\n\n"),
        "few-shot: French phrases that are in no training text": (unseen, words, "Translate English to French:\n\n"),
        "few-shot: opposites": ([(i["x"], i["y"]) for i in KINDS["opposite"].items],) * 2 + ("",),
        "few-shot: capitals": ([(i["x"], i["y"]) for i in KINDS["capital"].items],) * 2 + ("",),
    }
    cases: dict[str, list[tuple[str, str]]] = {}
    for name, (asked, others, head) in pools.items():
        cases[name] = []
        for question, right in rng.sample(asked, min(40, len(asked))):
            shown = [f"{x} => {y}" for x, y in rng.sample([pair for pair in others if question not in pair], 3)]
            cases[name].append((head + "\n".join([*shown, f"{question} =>"]), right))
    return cases


def few_shot_right(llama: Llama, cases: list[tuple[str, str]]) -> int:
    right = 0
    for i in range(0, len(cases), BATCH):
        rows = cases[i : i + BATCH]
        results = llama.text_completion([prompt for prompt, _ in rows], temperature=0, max_gen_len=12)
        right += sum(r["generation"].strip().split("\n")[0].strip() == c[1] for r, c in zip(results, rows, strict=True))
    return right


def scores(llama: Llama, per_item: int = 2, wrong: list | None = None) -> dict[str, tuple[int, int]]:
    """Right answers, and questions, for each kind. An answer is right when it is, letter for letter, the expected one."""
    groups = {f"fact: {name}": fact_cases(name, per_item) for name in KINDS}
    groups["sums that are in no training text"] = sum_cases()
    groups["facts typed in lower case, without a stop"] = typed_cases()
    groups["topics"] = topic_cases()
    groups["small talk"] = chat_cases()
    groups["second turn: what was told"] = memory_cases()
    groups["names that are in no training text"] = name_cases()
    groups["second turn: the city"] = city_cases(W.HELD_OUT_SEE_THERE, W.HELD_OUT_SPEAK_THERE)
    groups["second turn: the city, in wordings from training"] = city_cases(W.SEE_THERE, W.SPEAK_THERE)
    groups["second turn: and ...?"] = again_cases()
    groups["unanswerable: says so"] = unknown_cases()
    groups["outside the tables: says so"] = outside_cases()
    table, ended, asked = {}, 0, 0
    for name, cases in groups.items():
        answers, ends = answer(llama, [dialog for dialog, _ in cases])
        same = is_chat if name == "small talk" else str.__eq__
        table[name] = sum(same(text, right) for text, (_, right) in zip(answers, cases, strict=True)), len(cases)
        ended, asked = ended + ends, asked + len(cases)
        if wrong is not None:
            wrong += [(name, d[-1]["content"], t, r) for t, (d, r) in zip(answers, cases, strict=True) if not same(t, r)]
    facts = [table[f"fact: {name}"] for name in KINDS]
    table["all facts"] = sum(right for right, _ in facts), sum(total for _, total in facts)
    for name, system, good in (
        ("system prompt: Haiku, three lines", "Always answer with Haiku", is_haiku),
        ("system prompt: emojis only", "Always answer with emojis", is_emojis),
    ):
        questions = manner_questions()
        answers, ends = answer(llama, [user(q, system) for q in questions])
        table[name] = sum(map(good, answers)), len(answers)
        ended, asked = ended + ends, asked + len(answers)
        if wrong is not None:
            wrong += [(name, q, t, "") for q, t in zip(questions, answers, strict=True) if not good(t)]
    for name, cases in few_shot_cases().items():
        table[name] = few_shot_right(llama, cases), len(cases)
    table[f"answers that end with EOS within {LONGEST} ids"] = ended, asked
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=HERE, help="where tokenizer.model and model/ are")
    parser.add_argument("--wrong", type=int, default=0, help="print so many wrong answers of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a model gains nothing from more
    begun, wrong = time.monotonic(), []
    table = scores(build(args.folder), wrong=wrong)
    width = max(map(len, table))
    for name, (right, total) in table.items():
        print(f"{name:{width}}  {right:5} of {total:5}  {100 * right / total:5.1f} %")
        for _, question, got, expected in [w for w in wrong if w[0] == name][: args.wrong]:
            print(f"    {question!r} -> {got!r}, not {expected!r}")
    print(f"measured in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
