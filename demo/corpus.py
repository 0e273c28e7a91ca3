"""The demo model's training text: an endless, seeded stream of documents made from the tables beside this file.

`python corpus.py 20` prints 20 of them.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))

from demo import texts as T
from demo import unknown as U
from demo import wordings as W
from demo.facts import (
    ANIMALS,
    COLOURS,
    COUNTRIES,
    DAYS,
    FRENCH,
    FRENCH_COLOURS,
    NOUNS,
    OPPOSITES,
    a,
    held_out_phrase,
    phrase,
    plural,
    split_article,
)
from demo.kinds import KINDS
from llama.chat import Message


class Exchange(NamedTuple):
    """What the user says, what the model answers, and what it answers where the system prompt asks for another manner."""

    question: str
    answer: str
    haiku: str
    emojis: str
    word: str


@dataclass(frozen=True)
class Document:
    """A dialog that ends with an answer, or a plain text."""

    dialog: tuple[Message, ...] = ()
    text: str = ""

    def plain(self) -> str:
        return self.text or "\n".join(m["content"] for m in self.dialog)


def cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def fill(template: str, item: dict[str, str]) -> str:
    return cap(template.format(**item))


PHRASES = [
    phrase(colour, noun) for i, colour in enumerate(FRENCH_COLOURS) for j, noun in enumerate(NOUNS) if not held_out_phrase(i, j)
]


class Writer:
    """Writes documents, at random by its seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.names = list(KINDS)
        self.weights = [len(kind.items) ** 0.8 * kind.rare for kind in KINDS.values()]

    def one(self, options: list) -> object:
        return self.rng.choice(options)

    def maybe(self, chance: float) -> bool:
        return self.rng.random() < chance

    def fact(self) -> Exchange:
        name = self.rng.choices(self.names, self.weights)[0]
        return self.ask(name, self.one(KINDS[name].items))

    def ask(self, name: str, item: dict[str, str]) -> Exchange:
        kind = KINDS[name]
        key = kind.key.format(**item)
        haiku = self.haiku(T.FACT_HAIKUS[name], item | {"key": key, "Key": cap(key)})
        emojis = T.FACT_EMOJIS[name]
        if name == "colour":
            emojis = T.COLOUR_EMOJIS[key]
        elif name in ("young", "sound", "home", "legs"):
            emojis = T.ANIMAL_EMOJIS.get(item["x"].split()[1], "") + emojis
        return Exchange(fill(self.one(kind.questions), item), fill(kind.answer, item), haiku, emojis, cap(key))

    def haiku(self, lines: str, item: dict[str, str] | None = None) -> str:
        return "\n".join(fill(line, item or {}) for line in lines.split("/"))

    def topic(self) -> Exchange:
        name, text, haiku, emojis = self.one(T.TOPICS)
        frames = list(W.TOPIC)
        if name.endswith("s"):
            frames[1] = "What are {}?"
        poem, word = self.haiku(haiku), cap(name.removeprefix("the "))
        if self.maybe(0.15):
            order, kind = self.one(["Write", "Make", "Give me"]), self.one(["a haiku", "a short poem", "a poem"])
            return Exchange(f"{order} {kind} about {name}.", poem, poem, emojis, word)
        return Exchange(self.one(frames).format(name), text, poem, emojis, word)

    def howto(self) -> Exchange:
        what, needs, steps, emojis = self.one(T.HOWTO)
        question, haiku = self.one(W.HOWTO).format(what), self.haiku(self.one(T.HOWTO_HAIKUS))
        return Exchange(question, f"You need {needs}. {steps}", haiku, emojis, cap(needs.split(",")[0]))

    def reason(self) -> Exchange:
        what, why = self.one(T.REASONS)
        frames, words = list(W.REASON), what.split()
        if "is" in words:  # "the sky is blue": "Why is the sky blue?"
            words.remove("is")
            frames += [f"Why is {' '.join(words)}?"] * 4
        elif words[1] in T.STEMS:  # "ice floats": "Why does ice float?"
            frames += [" ".join(["Why does", words[0], T.STEMS[words[1]], *words[2:]]) + "?"] * 4
        elif what == "the moon shines":
            frames += ["Why does the moon shine?"] * 4
        else:
            frames += [f"Why do {what}?"] * 4
        answer = self.one([f"{cap(what)} because {why}."])  # one way to say it, so far
        question = self.one(frames).format(what)
        return Exchange(question, answer, self.haiku(self.one(T.REASON_HAIKUS)), T.REASON_EMOJIS, "Nature")

    def travel(self) -> Exchange:
        places = [row[1] for row in COUNTRIES] + [row[0] for row in COUNTRIES] + ["Rome", "Oslo", "Milan", "Hamburg"]
        x, y = self.rng.sample(places, 2)
        haiku = self.haiku(T.TRAVEL_HAIKU, {"x": x, "y": y})
        answer = f"You can go from {x} to {y} by train or by plane. The plane is faster."
        return Exchange(self.one(W.TRAVEL).format(x=x, y=y), answer, haiku, self.one(T.TRAVEL_EMOJIS), "Train")

    def sights(self) -> Exchange:
        country, city, _, _, sights = self.one(COUNTRIES)
        if self.maybe(0.25):
            item = next(item for item in KINDS["capital"].items if item["x"] == country)
            both = "The capital of {x} is {y}. People in {x} speak {language}.".format(**item)
            return Exchange(self.one(W.TOPIC).format(country), both, self.haiku(T.FACT_HAIKUS["capital"], {"key": city}),
                            T.FACT_EMOJIS["country"], country)  # fmt: skip
        haiku = self.haiku(T.FACT_HAIKUS["capital"], {"key": city})
        answer = f"In {city} you should see {sights}."
        return Exchange(self.one(W.SIGHTS).format(city), answer, haiku, T.FACT_EMOJIS["capital"], "Museums")

    def chat(self) -> Exchange:
        said, answer = self.one(T.CHAT)
        if answer == "JOKE":
            answer = self.one(T.JOKES)
        question, haiku = self.one(said.split("/")), self.haiku(self.one(T.CHAT_HAIKUS))
        if self.maybe(0.08):
            what = self.one(T.FAVOURITES)
            question, answer = self.one(W.FAVOURITES).format(what), T.FAVOURITE.format(what)
        elif self.maybe(0.04):
            question, answer = self.untold(self.one(list(W.MEMORY))), T.UNTOLD
        return Exchange(question, answer, haiku, T.CHAT_EMOJIS, cap(answer.split()[0].strip("!,.")))

    def untold(self, topic: str) -> str:
        return self.one(W.MEMORY[topic][2]).format(z=self.one(T.PETS))

    def foreign(self, name: str) -> dict[str, str]:
        """In place of an item of facts of this kind: something that is not in the table."""
        made = self.maybe(0.15) and name in ("capital", "language", "continent", "country", "opposite")
        thing = self.made_up() if made else self.one(U.FOREIGN[name])
        noun = thing.split()[-1]
        return {"x": thing, "y": thing, "n": noun, "p": plural(noun)}

    def named(self) -> str:
        """A first name, often one that nobody has: names are to be copied, not known."""
        if self.maybe(0.6):
            return self.one(T.NAMES)
        sounds = [self.one("bcdfghjklmnprstvwyz") + self.one("aeiou") for _ in range(self.rng.randint(1, 3))]
        name = "".join(sounds).capitalize() + self.one(["", self.one("lnrst")])
        return self.named() if name in W.HELD_OUT_NAMES else name

    def made_up(self) -> str:
        name = "".join(self.rng.choices(U.SYLLABLES, k=self.rng.choice([2, 3]))).capitalize()
        return f"{self.one(T.NAMES)} {name}" if self.maybe(0.2) else name

    def unknown(self) -> Exchange:
        rng, row, number = self.rng, self.one(COUNTRIES), self.rng.randint
        r, s = U.numbers(rng)
        slots = dict(name=self.made_up(), thing=self.one(U.THINGS), year=number(1200, 2030), big=number(100, 9999), r=r, s=s,
                     small=number(3, 99), city=self.one(COUNTRIES)[1], country=row[0], mid=number(32, 999), p=number(1, 30),
                     q=number(0, 20), lang=self.one(U.LANGUAGES), word=self.one(FRENCH + NOUNS)[0], town=self.one(U.CITIES),
                     person=self.one(U.PERSONS), gibberish=W.gibberish(rng))  # fmt: skip
        kind = rng.choices(["foreign", "frame", "question", "sum", "howto", "topic", "reason"], [38, 10, 20, 14, 7, 6, 5])[0]
        if kind == "foreign":
            name = self.one(list(U.FOREIGN))
            question = fill(self.one(KINDS[name].questions), self.foreign(name))
        else:
            question = {
                "frame": lambda: self.one(W.UNKNOWN).format(self.one(U.UNKNOWN)),
                "question": lambda: self.one(U.UNKNOWN_QUESTIONS),
                "sum": lambda: self.one(U.SUMS_UNKNOWN),
                "howto": lambda: self.one(W.HOWTO).format(U.howto(rng)),
                "topic": lambda: self.one(W.TOPIC).format(U.topic(rng)),
                "reason": lambda: U.reason(rng),
            }[kind]()
        haiku = self.haiku(self.one(T.GENERAL_HAIKUS))
        return Exchange(question.format(**slots), U.NO_IDEA, haiku, T.NO_IDEA_EMOJIS, "Unknown")

    def wish(self) -> Exchange:
        occasion, text = self.one(T.WISHES)
        who = self.one(T.RELATIVES)
        what = self.one(["wish", "card", "greeting", "message"])
        size = self.one(["a short", "a", "a nice", "me a", "a kind", "a little"])
        question = self.one(W.WISH).format(size, occasion, what, who).replace("need me a", "need a")
        return Exchange(question, text.format(who=who), self.haiku(T.WISH_HAIKU), T.WISH_EMOJIS, "Congratulations")

    def story(self, animal: str | None = None) -> str:
        trouble, tried, helped, ended = self.one(T.TROUBLES)
        animal = animal or self.one(["bear", "bear", *T.HEROES])
        hero = f"{'little' if self.maybe(0.5) else self.one(T.ADJECTIVES)} {animal}"
        helper = self.one(T.HELPERS)
        slots = {"hero": hero, "trouble": trouble[0], "helper": helper, "Helper": cap(helper)}
        middle = self.rng.sample(tried, self.rng.randint(1, min(2, len(tried))))
        sentences = [self.one(T.OPENINGS), *middle, "Then " + self.one(helped).replace("{Helper}", "{helper}"), self.one(ended)]
        return " ".join(sentences).format(**slots)

    def story_wanted(self) -> Exchange:
        hero = self.one(T.HEROES)
        story = self.story(hero)
        return Exchange(self.one(W.STORY).format(a(hero)), story, self.haiku(T.STORY_HAIKU), T.STORY_EMOJIS, cap(hero))

    def letter(self) -> str:
        favour, after = self.one(T.FAVOURS)
        lines = [self.one(after)] + ([self.one(T.RETURNS).format(day=self.one(DAYS))] if self.maybe(0.8) else [])
        sign = f"\n\n{self.one(T.ENDS)}\n{self.one(T.SIGNERS)}"
        when = self.one(["while we were away", "while we were on holiday", "last week", "when we were in the mountains"])
        who, thank, much = self.one(T.PEOPLE), self.one(["t", "T"]), self.one(["", "", "so much "])
        return f"Dear {who},\n\n{thank}hank you {much}for {favour} {when}. {' '.join(lines)}{sign}"

    def letter_wanted(self) -> Exchange:
        text = self.letter()
        favour = text.split(" for ", 1)[1].split(" while")[0].split(" when we")[0].split(" last")[0]
        return Exchange(self.one(W.LETTER).format(favour), text, self.haiku(T.CHAT_HAIKUS[1]), T.THANKS_EMOJIS, "Thanks")

    def exchange(self) -> Exchange:
        makers = [
            self.fact, self.topic, self.howto, self.reason, self.travel, self.sights, self.chat, self.unknown, self.wish,
            self.story_wanted, self.letter_wanted,
        ]  # fmt: skip
        return self.rng.choices(makers, [60, 6, 3, 4, 2, 4, 11, 18, 4, 2, 1])[0]()

    def single(self) -> Document:
        question, answer, haiku, emojis, word = self.exchange()
        manner = self.rng.choices(["", "plain", "haiku", "emojis", "word"], [64, 13, 9, 9, 5])[0]
        systems = {"plain": T.PLAIN_SYSTEMS, "haiku": T.HAIKU_SYSTEMS, "emojis": T.EMOJI_SYSTEMS, "word": T.WORD_SYSTEMS}
        answers = {"": answer, "plain": answer, "haiku": haiku, "emojis": emojis, "word": word}
        return self.dialog([(W.vary(self.rng, question), answers[manner])], self.one(systems[manner]) if manner else None)

    def dialog(self, exchanges: list[tuple[str, str]], system: str | None = None) -> Document:
        messages = [Message(role="system", content=system)] if system else []
        for question, answer in exchanges:
            messages += [Message(role="user", content=question), Message(role="assistant", content=answer)]
        return Document(dialog=tuple(messages))

    def conversation(self) -> Document:
        """Several turns, of which the last one needs, or does not need, what came before."""
        pick = self.rng.choice(
            [self.remember, self.remember, self.about_city, self.about_city, self.same_again, self.same_again, self.loose]
        )
        system = self.one(T.PLAIN_SYSTEMS) if self.maybe(0.15) else None
        return self.dialog([(W.vary(self.rng, q), answer) for q, answer in pick()], system)

    def small_talk(self) -> list[tuple[str, str]]:
        return [self.exchange()[:2]]

    def remember(self) -> list[tuple[str, str]]:
        told = self.rng.sample(list(W.MEMORY), self.rng.choice([1, 1, 2]))
        turns: list[tuple[str, str]] = []
        asked = None
        for topic in told:
            cities = [row[1] for row in COUNTRIES] + U.CITIES
            x = {"city": self.one(cities), "colour": self.one(list(COLOURS))}.get(topic) or self.named()
            slots = {"x": x, "X": cap(x), "z": self.one(T.PETS)}
            says, reply, asks, recalls = W.MEMORY[topic]
            turns.append((self.one(says).format(**slots), reply.format(**slots)))
            if asked is None or self.maybe(0.5):
                asked = (self.one(asks).format(**slots), recalls.format(**slots))
            if self.maybe(0.3):
                turns += self.small_talk()
        if self.maybe(0.1):
            turns = self.small_talk() + turns
        if self.maybe(0.08):  # asked for what was not told
            asked = self.untold(self.one([topic for topic in W.MEMORY if topic not in told])), T.UNTOLD
        return turns if self.maybe(0.15) and len(turns) == 1 else [*turns, asked]

    def about_city(self) -> list[tuple[str, str]]:
        row = self.one(COUNTRIES)
        item = next(item for item in KINDS["capital"].items if item["x"] == row[0])
        first = self.rng.choice(["capital", "capital", "country"])
        turns = [self.ask(first, item)[:2]]
        see = self.one(W.SEE_THERE), self.sights_of(row)[1]
        speak = self.one(W.SPEAK_THERE), fill(KINDS["language"].answer, item)
        continent = self.one(W.CONTINENT_THERE), fill(KINDS["continent"].answer, item)
        if self.maybe(0.15):
            return [self.sights_of(row), (self.one(W.COUNTRY_THERE), fill(KINDS["country"].answer, item))]
        follow = [see, see, see, speak, speak, continent]
        return turns + self.rng.sample(follow, self.rng.choice([1, 1, 2]))

    def sights_of(self, row: list[str]) -> tuple[str, str]:
        return f"What should I see in {row[1]}?", f"In {row[1]} you should see {row[4]}."

    def same_again(self) -> list[tuple[str, str]]:
        """One kind of fact, asked again and again: "What is the capital of France?", then "And Italy?"."""
        name = self.rng.choices(self.names, self.weights)[0]
        kind = KINDS[name]
        items = self.rng.sample(kind.items, self.rng.choice([2, 2, 3]))
        turns = [self.ask(name, items[0])[:2]]
        for item in items[1:]:
            known = name not in U.FOREIGN or self.maybe(0.82)
            short = W.SHORT.get(name, "{x}").format(**item if known else self.foreign(name))
            turns += [(cap(self.one(W.FOLLOW_UPS).format(short)), fill(kind.answer, item) if known else U.NO_IDEA)]
        return turns

    def loose(self) -> list[tuple[str, str]]:
        turns = [self.exchange()[:2] for _ in range(self.rng.choice([2, 2, 3]))]
        if self.maybe(0.3):
            turns.append(("Thank you!", "You are welcome!"))
        if self.maybe(0.2):
            turns.insert(0, ("Hello!", "Hello! How can I help you?"))
        return turns

    def few_shot(self) -> Document:
        """A list that goes on as it began."""
        rng = self.rng
        style = rng.choices(
            ["french", "opposites", "capitals", "young", "sums", "colours", "languages"], [10, 2, 2, 1, 1, 1, 1]
        )[0]
        if style == "french":
            words = (
                [(x, split_article(y)) for x, y in NOUNS]
                + [tuple(pair) for pair in FRENCH]
                + [(f"the {x}", y) for x, y in NOUNS]
            )
            pairs = [self.one(PHRASES) if self.maybe(0.35) else self.one(words) for _ in range(9)]
        else:
            pairs = {
                "opposites": [(x, y) for x, y in OPPOSITES] + [(y, x) for x, y in OPPOSITES],
                "capitals": [(row[0], row[1]) for row in COUNTRIES],
                "languages": [(row[0], row[2]) for row in COUNTRIES],
                "young": [(row[0], row[1]) for row in ANIMALS if row[1] != "-"],
                "sums": [(f"{i['x']} + {i['z']}", i["y"]) for i in KINDS["sum"].items],
                "colours": [(i["x"].split(" ", 1)[-1], i["y"]) for i in KINDS["colour"].items],
            }[style]
            pairs = rng.sample(pairs, 9)
        arrow = rng.choice([" => ", " => ", " => ", " -> ", ": ", " = "])
        head = rng.choice(T.FEW_SHOT_HEADS[style])
        lines = [f"{x}{arrow}{y}" for x, y in pairs[: rng.randint(4, 8)]]
        return Document(text=(head + rng.choice(["\n\n", "\n\n", "\n"]) if head else "") + "\n".join(lines))

    def text(self) -> Document:
        style = self.rng.choices(["story", "letter", "reason", "facts", "topic", "howto", "wish"], [30, 14, 12, 25, 5, 3, 3])[0]
        if style == "story":
            return Document(text=self.story() + self.one(["", " The end."]))
        if style == "letter":
            return Document(text=self.letter())
        if style == "reason":
            what, why = self.one(T.REASONS)
            frame = self.one(["The reason why {} is that {}.", "{} because {}.", "The reason that {} is that {}."])
            return Document(text=cap(frame.format(what, why)))
        if style == "topic":
            return Document(text=self.topic()[1])
        if style == "howto":
            what, needs, steps, _ = self.one(T.HOWTO)
            return Document(text=f"To {what}, you need {needs}. {steps}")
        if style == "wish":
            return Document(text=self.wish()[1])
        return Document(text=" ".join(self.fact()[1] for _ in range(self.rng.choice([1, 1, 2, 3]))))

    def document(self) -> Document:
        maker = self.rng.choices([self.single, self.conversation, self.few_shot, self.text], [59, 21, 7, 13])[0]
        return maker()


def documents(seed: int) -> Iterator[Document]:
    """The corpus: as many documents as one takes, always the same ones for a seed."""
    writer = Writer(seed)
    while True:
        yield writer.document()


if __name__ == "__main__":
    stream = documents(1)
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 20):
        print(next(stream).plain(), end="\n----\n")
