"""How the demo model is asked for facts: wordings of each kind, in training and held out."""

from dataclasses import dataclass, field
from itertools import product

from demo.facts import (
    ANIMALS,
    COLOURS,
    COUNTRIES,
    DAYS,
    FRENCH,
    HELD_OUT_SUMS,
    MONTHS,
    NOUNS,
    OPPOSITES,
    a,
    plural,
    split_article,
)

# Around a noun phrase, such as "the capital of France".
FRAMES = [
    "What is {}?", "What's {}?", "Tell me {}.", "Name {}.", "Do you know {}?", "Can you tell me {}?", "Could you tell me {}?",
    "I would like to know {}.", "I want to know {}.", "{}?", "Give me {}.", "Say what {} is.", "Tell me what {} is.",
    "Do you know what {} is?", "Can you say what {} is?", "I forgot {}.", "Quick question: what is {}?", "I need {}.",
    "I have forgotten what {} is.", "What would you say is {}?", "I am looking for {}.", "Help me with {}.",
    "Explain to me what {} is.", "My son asks what {} is.", "Have you any idea what {} is?", "Would you tell me {}?",
    "I wonder what {} is.", "Remind me what {} is.", "Are you able to tell me what {} is?", "what is {}", "whats {}",
    "Let me know {}.", "I am trying to find out what {} is.", "It would be nice to know {}.", "What do you think {} is?",
    "I have to write down {}.", "If you know {}, tell me.", "My homework is about {}.", "Do you have {} for me?",
]  # fmt: skip
HELD_OUT_FRAMES = [
    "Could I ask you what {} is?", "Please find out {} for me.", "I cannot remember {}.", "Someone asked me for {}.",
]  # fmt: skip


@dataclass
class Kind:
    """Facts of one kind. `phrases` go into the frames, `wordings` stand alone; all are templates over an item's slots."""

    answer: str
    items: list[dict[str, str]]
    phrases: list[str]
    wordings: list[str]
    held_out: list[str]  # never in training, beside HELD_OUT_FRAMES around the first phrase
    key: str = ""  # the answer in one word
    rare: float = 1.0  # how often, against the number of items
    questions: list[str] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.questions = self.wordings * 3 + [frame.format(p) for frame, p in product(FRAMES, self.phrases)]
        self.tests = self.held_out + [frame.format(self.phrases[0]) for frame in HELD_OUT_FRAMES]


def _items(names: str, rows: list) -> list[dict[str, str]]:
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


def _neighbours(words: list[str]) -> list[tuple[str, str, str, str]]:
    pairs = list(zip(words, words[1:] + words[:1], strict=True))
    return [(x, "after", "follows", y) for x, y in pairs] + [(y, "before", "precedes", x) for x, y in pairs]


def _animals(column: int) -> list[dict[str, str]]:
    known = [(row[0], row[column].replace("_", " ")) for row in ANIMALS if row[column] != "-"]
    return [{"x": a(n), "X": _cap(a(n)), "n": n, "p": plural(n), "y": y, "y2": a(y)} for n, y in known]


PLACES = "hollow_tree:in,lake:on,river:on,pond:on,mountains:in the,savanna:on the,sea:in the,grassland:on the,desert:in the,"
PLACES += "jungle:in the,forest:in the,wilderness:in the,treetop:in,ice:on the,beach:on the,meadow:on,garden:in"
_preposition = dict(pair.split(":") for pair in PLACES.replace("_", " ").split(","))


def _home(home: str) -> str:
    before = _preposition.get(home, "in")
    return f"{before} {home}" if before.endswith("the") else f"{before} {a(home)}"


def _cap(text: str) -> str:
    return text[0].upper() + text[1:]


_countries = _items("x y language continent sights", COUNTRIES)
_words = [(x, y) for x, y in OPPOSITES] + [(y, x) for x, y in OPPOSITES]
_sums = [(str(i), str(j), str(i + j)) for i in range(21) for j in range(21 - i)]
_numbers = [n for n in _neighbours([str(i) for i in range(31)]) if {n[0], n[3]} != {"0", "30"}]
_held = {(str(i), str(j)) for i, j in HELD_OUT_SUMS} | {(str(j), str(i)) for i, j in HELD_OUT_SUMS}

KINDS = {
    "capital": Kind(
        "The capital of {x} is {y}.", _countries,
        ["the capital of {x}", "the capital city of {x}", "{x}'s capital", "the name of the capital of {x}"],
        ["Which city is the capital of {x}?", "What city is {x}'s capital?", "{x} has which capital?", "Capital of {x}?",
         "What is the main city of {x}, its capital?", "What do they call the capital of {x}?",
         "Which city serves as the capital of {x}?", "How is the capital of {x} called?",
         "If I want to see the capital of {x}, which city do I go to?", "Could you give me the capital city for {x}?",
         "What city do they govern {x} from?", "Is there a capital of {x}?"],
        ["I am at school and asked for {x}: which city is its capital?", "Do you happen to know {x}'s capital city?"], "{y}",
    ),
    "country": Kind(
        "{y} is the capital of {x}.", _countries,
        ["the country with the capital {y}", "the country whose capital is {y}"],
        ["Which country has the capital {y}?", "{y} is the capital of which country?", "What country is {y} the capital of?",
         "Which country is {y} in?", "In which country is {y}?", "In what country do I find {y}?", "Where is {y}?",
         "Of which country is {y} the capital?", "What country does {y} belong to?",
         "{y} is a capital, but of which country?", "If I stand in {y}, what country am I in?", "{y} lies in which country?"],
        ["To which country do I travel when I visit {y}?", "{y}: which country is it the capital of?"], "{x}",
    ),
    "language": Kind(
        "People in {x} speak {language}.", _countries,
        ["the language of {x}", "the language that people speak in {x}", "the main language in {x}"],
        ["What language do people speak in {x}?", "Which language do they speak in {x}?", "What do people speak in {x}?",
         "Which language is spoken in {x}?", "Which language should I learn for {x}?", "How do people talk in {x}?",
         "What language is spoken in {x}?", "In {x}, which language do people speak?",
         "When I talk to people in {x}, what language should I use?", "Which language would I hear on the streets of {x}?",
         "What language is used in {x}?"],
        ["I am moving to {x}. Which language will I need?", "Which language do children learn at home in {x}?"], "{language}",
    ),
    "continent": Kind(
        "{x} is in {continent}.", _countries,
        ["the continent of {x}", "the continent that {x} is in"],
        ["On which continent is {x}?", "Which continent is {x} in?", "In which part of the world is {x}?", "Where is {x}?",
         "What continent is {x} on?", "On which continent do I find {x}?", "Where in the world is {x}?",
         "To which continent does {x} belong?", "{x} is on which continent?",
         "If I look for {x} on a map, which continent do I turn to?", "What part of the globe is {x} in?", "Is {x} in Europe?",
         "Is {x} in Asia?", "Is {x} in Africa?", "Is {x} in America?"],
        ["Is {x} in Europe, or on another continent?", "On the globe, which continent does {x} lie on?"], "{continent}",
    ),
    "opposite": Kind(
        "The opposite of {x} is {y}.", _items("x y", _words),
        ["the opposite of {x}", 'the opposite of "{x}"', "the opposite of the word {x}", "the reverse of {x}",
         "the contrary of {x}"],
        ["Which word is the opposite of {x}?", "What word means the opposite of {x}?", "{x}: what is the opposite?",
         'Which word is the opposite of "{x}"?', "What is {x} the opposite of?", "Say the opposite of {x}.",
         "Opposite of {x}?", "Which word has the opposite meaning of {x}?", "The opposite of {x} is what?",
         "If something is not {x} but the opposite, what is it?", "What do you call the opposite of {x}?",
         "I mean the opposite of {x}. Which word is it?", "Find the opposite of {x}.", "Which word says the opposite of {x}?",
         "Find a word that means the opposite of {x}.", "{x} is one word. What is its opposite?", "What is not {x} at all?",
         "{x} and its opposite: what is the other word?", "Is there an opposite of {x}?", "Opposite: {x}",
         "What is the other way round from {x}?", "If I do not mean {x}, what do I mean?", "How do I say the opposite of {x}?",
         "{x} has an opposite. Which one?", "What goes with {x} as its opposite?",
         "I say {x}, you say the opposite. What do you say?", "What do you get when you turn {x} into its opposite?",
         "Can you turn {x} into the opposite?", "You hear {x}. Now say the opposite."],
        ["What is the exact opposite if somebody says {x}?",
         "Which word would you put against {x} as its opposite?"], "{y}", 1.6,
    ),
    "colour": Kind(
        "{X} is {y}.", [{"x": x, "X": _cap(x), "y": y} for y, things in COLOURS.items() for x in things.split(",")],
        ["the colour of {x}", "the color of {x}", "the usual colour of {x}"],
        ["What colour is {x}?", "What color is {x}?", "Which colour does {x} have?", "What is the colour of {x}?",
         "Which colour is {x}?", "What colour has {x}?", "In which colour do I paint {x}?", "{x} has which colour?",
         "I paint {x}. Which colour do I need?", "If I draw {x}, which pencil should I use?",
         "What colour does {x} have?", "If I paint {x}, which colour do I take?",
         "When you look at {x}, what colour do you see?", "How would you describe the colour of {x}?", "Is {x} red?",
         "Is {x} blue?", "Is {x} green?", "I see {x}. Which colour is it?"],
        ["Tell me which colour {x} usually has.", "What colour would a child paint {x}?"], "{y}",
    ),
    "young": Kind(
        "The young of {x} is called {y2}.", _animals(1),
        ["the young of {x}", "the name for the young of {x}", "the baby of {x}", "the word for the young of {x}"],
        ["What is the young of {x} called?", "What do you call the young of {x}?", "What do you call the baby of {x}?",
         "How do we call the young of {x}?", "What is the baby of {x} called?", "{x} has a baby. What is it called?",
         "What do people call the young of {x}?", "What name does the young of {x} have?", "What is a baby of {x}?",
         "When {x} has a baby, which name do we use for it?", "How should I call the baby of {x}?",
         "What is a baby {n} called?", "What are baby {p} called?", "What is a young {n} called?",
         "What do you call a baby {n}?", "What are the young of {p} called?", "What do you call young {p}?"],
        ["Which word do we use for the young of {x}?", "I saw the baby of {x}. What is the word for it?"], "{y}",
    ),
    "sound": Kind(
        "{X} says {y}.", _animals(2),
        ["the sound of {x}", "the sound that {x} makes", "the noise of {x}"],
        ["What does {x} say?", "What sound does {x} make?", "Which sound does {x} make?", "How does {x} sound?",
         "What noise does {x} make?", "What do I hear from {x}?", "How does {x} talk?", "What does {x} say all day?",
         "Which noise does {x} make?", "What sound comes from {x}?",
         "If I hear {x}, what does it sound like?", "Which sound do you hear when {x} is near?", "What do {p} say?",
         "What sound do {p} make?", "Which noise do {p} make?", "How do {p} talk?"],
        ["What would {x} say if I met it?", "Can you tell me which sound {x} makes?"], "{y}",
    ),
    "home": Kind(
        "{X} lives {y2}.", [item | {"y2": _home(item["y"])} for item in _animals(3)],
        ["the home of {x}", "the place where {x} lives", "the usual home of {x}"],
        ["Where does {x} live?", "Where do I find {x}?", "In which place does {x} live?", "Where is {x} at home?",
         "Where does {x} sleep?", "What kind of home does {x} have?", "Where does {x} have its home?",
         "In what place does {x} live?", "Where would I look for {x}?",
         "Where does {x} go when it goes home?", "What place does {x} call its home?", "Where do {p} live?",
         "Where can I find {p}?", "Where do {p} sleep?", "In which place do {p} live?"],
        ["In what kind of place would I meet {x}?", "Where do you think {x} sleeps at night?"], "{y}",
    ),
    "legs": Kind(
        "{X} has {y} legs.", _animals(4),
        ["the number of legs of {x}", "the number of legs that {x} has"],
        ["How many legs does {x} have?", "How many legs has {x}?", "On how many legs does {x} walk?", "Count the legs of {x}.",
         "{x} has how many legs?", "How many legs are there on {x}?", "Can you count the legs of {x}?",
         "How many legs can you count on {x}?", "How many legs do you see on {x}?",
         "With how many legs does {x} get around?", "What number of legs does {x} have?", "How many legs do {p} have?",
         "How many legs have {p}?", "On how many legs do {p} walk?", "Does {x} have four legs?", "Does {x} have two legs?"],
        ["Does {x} have four legs, or how many?", "I am drawing {x}. How many legs should I draw?"], "{y}",
    ),
    "day": Kind(
        "The day {side} {x} is {y}.", _items("x side verb y", _neighbours(DAYS)),
        ["the day {side} {x}", "the day that comes {side} {x}", "the weekday {side} {x}", "the day that {verb} {x}"],
        ["Which day comes {side} {x}?", "What day {verb} {x}?", "Which day {verb} {x}?", "What comes {side} {x}?",
         "Which day is {side} {x}?", "What day is it {side} {x}?", "Which day of the week is {side} {x}?",
         "What day comes {side} {x}?", "In the week, which day is {side} {x}?", "Which weekday comes {side} {x}?",
         "What weekday {verb} {x}?", "Name the day {side} {x}.", "The day {side} {x} is called what?",
         "Today is {x}. What day comes {side} it?", "What is the day right {side} {x}?", "I know {x}. What comes {side} it?",
         "What is one day {side} {x}?", "Day {side} {x}?", "When {x} is today, what day comes {side} that?",
         "Looking at the week, what day do I find {side} {x}?", "Which day do we have {side} {x}?"],
        ["I have a party on the day {side} {x}. When is that?", "Which day of the week do you say {side} {x}?"], "{y}", 1.8,
    ),
    "month": Kind(
        "The month {side} {x} is {y}.", _items("x side verb y", _neighbours(MONTHS)),
        ["the month {side} {x}", "the month that comes {side} {x}", "the month that {verb} {x}"],
        ["Which month comes {side} {x}?", "What month {verb} {x}?", "Which month {verb} {x}?", "What comes {side} {x}?",
         "Which month is {side} {x}?", "What month is it {side} {x}?", "Which month of the year is {side} {x}?",
         "What month comes {side} {x}?", "In the year, which month is {side} {x}?", "Name the month {side} {x}.",
         "The month {side} {x} is called what?", "It is {x}. Which month comes {side} it?", "Month {side} {x}?",
         "What is the month right {side} {x}?", "I know {x}. What comes {side} it?", "What is one month {side} {x}?",
         "When it is {x} now, what month comes {side} that?",
         "Looking at the calendar, what month do I find {side} {x}?", "Which month do we have {side} {x}?"],
        ["My birthday is in the month {side} {x}. When is that?",
         "Which month of the year do you write {side} {x}?"], "{y}", 1.8,
    ),
    "number": Kind(
        "The number {side} {x} is {y}.", _items("x side verb y", _numbers),
        ["the number {side} {x}", "the number that comes {side} {x}", "the number that {verb} {x}"],
        ["Which number comes {side} {x}?", "What number {verb} {x}?", "Which number {verb} {x}?", "What comes {side} {x}?",
         "Which number is {side} {x}?", "When I count, which number is {side} {x}?",
         "What number comes {side} {x}?", "If I count, what do I say {side} {x}?", "Name the number {side} {x}.",
         "Number {side} {x}?", "I count to {x}. Which number is {side} it?", "What is the number right {side} {x}?",
         "I know {x}. What comes {side} it?", "{side} {x}, which number comes?", "Which whole number is just {side} {x}?",
         "Which number would you say {side} {x}?", "On a ruler, what number stands {side} {x}?"],
        ["I am counting. Which number is there {side} {x}?", "Write the number that stands {side} {x}."], "{y}", 1.4,
    ),
    "sum": Kind(
        "{x} + {z} = {y}", [dict(x=x, z=z, y=y) for x, z, y in _sums if (x, z) not in _held],
        ["{x} + {z}", "{x} plus {z}", "the sum of {x} and {z}", "{x}+{z}"],
        ["How much is {x} + {z}?", "How much is {x} plus {z}?", "{x} + {z} = ?", "Add {x} and {z}.", "{x}+{z}=",
         "Add {x} to {z}.", "How much do {x} and {z} make?", "What do I get for {x} + {z}?", "Compute {x} + {z}.",
         "What is the result of {x} + {z}?", "How much are {x} and {z}?", "When I add {x} to {z}, what is it?",
         "If I put {x} and {z} together, what do I have?", "Add up {x} and {z}.", "I add {z} to {x}. What is the total?",
         "If you add {x} to {z}, how much is it?", "What is the total of {x} and {z}?",
         "What do {x} and {z} add up to?", "If I add {x} and {z}, what do I get?",
         "What is the answer to {x} + {z}?", "{x} and {z} together make how much?",
         "I have {x} apples and buy {z} more. How many apples do I have?",
         "There are {x} boys and {z} girls. How many children is that?", "Can you add {x} and {z}?"],
        ["What will I have if I add {x} and {z}?", "I have {x} coins and find {z} more. How many is that?"], "{y}", 1.6,
    ),
    "french": Kind(
        "The French word for {x} is {y}.", _items("x y", [(x, split_article(y)) for x, y in NOUNS] + FRENCH),
        ["the French word for {x}", "{x} in French", 'the French word for "{x}"', "the French for {x}"],
        ["How do you say {x} in French?", "What is {x} in French?", "Translate {x} to French.", "Translate to French: {x}",
         'How do I say "{x}" in French?', "What do the French say for {x}?", "How does one say {x} in French?",
         "What is the translation of {x} to French?", "How would you say {x} in French?", "Which French word means {x}?",
         "Translate {x} into French.", "{x} in French, please.",
         "If I speak French, what do I call {x}?", "What would a French person say for {x}?", "In French, what is {x}?",
         "What is French for {x}?"],
        ["What is it in French when I say {x}?", "Do you know how the French say {x}?"], "{y}",
    ),
}  # fmt: skip
