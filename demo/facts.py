"""What the demo model is to know: tables of facts, the wordings that ask for them, and what is held out from training."""

from dataclasses import dataclass, field
from itertools import product

# country, capital, its language, continent, what to see in the capital
COUNTRIES = [
    row.split("|")
    for row in """France|Paris|French|Europe|the Eiffel Tower and the river Seine
Italy|Rome|Italian|Europe|the Colosseum and the old fountains
Spain|Madrid|Spanish|Europe|the Prado museum and the royal palace
Germany|Berlin|German|Europe|the Brandenburg Gate and the long park behind it
England|London|English|Europe|Tower Bridge and the big clock by the river
Norway|Oslo|Norwegian|Europe|the opera house and the ships by the fjord
Sweden|Stockholm|Swedish|Europe|the old town and its many islands
Denmark|Copenhagen|Danish|Europe|the little mermaid and the coloured harbour
Finland|Helsinki|Finnish|Europe|the white cathedral and the sea fortress
Portugal|Lisbon|Portuguese|Europe|the yellow trams and the castle on the hill
Greece|Athens|Greek|Europe|the Acropolis and the old market
Austria|Vienna|German|Europe|the palace gardens and the opera
Poland|Warsaw|Polish|Europe|the old market square and the royal castle
Hungary|Budapest|Hungarian|Europe|the parliament and the warm baths
Ireland|Dublin|English|Europe|the old library and the bridges over the river
Iran|Tehran|Persian|Asia|the great bazaar and the mountains behind it
Czechia|Prague|Czech|Europe|the stone bridge and the castle
Ukraine|Kyiv|Ukrainian|Europe|the golden domes and the wide river
Romania|Bucharest|Romanian|Europe|the huge parliament and the village museum
Bulgaria|Sofia|Bulgarian|Europe|the great cathedral and the mountain behind the city
Croatia|Zagreb|Croatian|Europe|the church with the coloured roof and the upper town
Iceland|Reykjavik|Icelandic|Europe|the tall church and the harbour
Japan|Tokyo|Japanese|Asia|the gardens, the temples and the tall tower
China|Beijing|Chinese|Asia|the Forbidden City and the Great Wall nearby
India|New Delhi|Hindi|Asia|the Red Fort and the busy markets
Thailand|Bangkok|Thai|Asia|the golden temples and the boats on the river
Vietnam|Hanoi|Vietnamese|Asia|the lake and the narrow streets of the old town
South Korea|Seoul|Korean|Asia|the palaces and the tower on the hill
Egypt|Cairo|Arabic|Africa|the great museum and the pyramids nearby
Morocco|Rabat|Arabic|Africa|the old walls and the tower by the sea
Kenya|Nairobi|Swahili|Africa|the national park with its lions
Senegal|Dakar|French|Africa|the beaches and the island in the bay
Canada|Ottawa|English|North America|the parliament and the long canal
Mexico|Mexico City|Spanish|North America|the great square and the museum of old cultures
Cuba|Havana|Spanish|North America|the old cars and the wall by the sea
Brazil|Brasilia|Portuguese|South America|the white cathedral and the wide lawns
Argentina|Buenos Aires|Spanish|South America|the tango houses and the coloured streets
Peru|Lima|Spanish|South America|the cliffs by the sea and the old squares
Chile|Santiago|Spanish|South America|the hill over the city and the mountains beyond
Australia|Canberra|English|Australia|the lake and the parliament on the hill""".splitlines()
]

OPPOSITES = [
    pair.split()
    for pair in (
        "hot cold,big small,fast slow,old young,happy sad,light dark,high low,long short,full empty,open closed,early late,"
        "rich poor,strong weak,wet dry,clean dirty,good bad,hard soft,loud quiet,day night,up down,left right,in out,"
        "first last,black white,sweet sour,thick thin,wide narrow,near far,easy difficult,true false,love hate,win lose,"
        "start finish,push pull,buy sell,come go,give take,ask answer,above below,inside outside,always never,summer winter,"
        "north south,east west,brave afraid,friend enemy,war peace,awake asleep,alive dead"
    ).split(",")
]

# A thing without an article is said without one: "What colour is grass?", "What colour is the sky?"
COLOURS = {
    "red": "a tomato,blood,a strawberry,a ruby,a fire engine",
    "green": "grass,a frog,spinach,an emerald,a cucumber,moss",
    "blue": "the sky,the sea,a sapphire,a whale",
    "yellow": "a banana,the sun,a lemon,a sunflower,butter",
    "white": "snow,milk,salt,a swan,rice,chalk",
    "black": "coal,a raven,ink,the night,tar",
    "orange": "a carrot,a pumpkin,a basketball,an orange",
    "brown": "chocolate,coffee,a chestnut,a walnut",
    "grey": "an elephant,a mouse,ash,a rain cloud",
    "pink": "a flamingo,a pig",
    "purple": "an aubergine,lavender",
}

# animal, young, sound, home, legs; "-" where there is nothing to say
ANIMALS = [
    row.split()
    for row in """dog puppy woof kennel four
cat kitten meow house four
cow calf moo barn four
horse foal neigh stable four
sheep lamb baa meadow four
pig piglet oink sty four
goat kid bleat mountains four
duck duckling quack pond two
hen chick cluck coop two
goose gosling honk lake two
swan cygnet - river two
owl owlet hoot hollow_tree two
frog tadpole croak swamp four
lion cub roar savanna four
bear cub growl cave four
fox cub - den four
deer fawn - forest four
rabbit bunny - burrow four
kangaroo joey - grassland two
elephant calf trumpet jungle four
mouse pup squeak hole four
bee larva buzz hive six
ant - - anthill six
spider spiderling - web eight
butterfly caterpillar - garden six
snake snakelet hiss desert no
wolf pup howl wilderness four
eagle eaglet screech nest two
crow - caw treetop two
fish fry - sea no
squirrel - - tree four
beaver - - dam four
camel calf - - four
penguin - - ice two
beetle - - - six
crab - - beach ten""".splitlines()
]

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()

# English, French with its article; the word alone is what follows the article
NOUNS = [
    pair.split("|")
    for pair in (
        "bread|le pain,cheese|le fromage,house|la maison,dog|le chien,cat|le chat,book|le livre,table|la table,"
        "door|la porte,car|la voiture,flower|la fleur,garden|le jardin,bird|l'oiseau,water|l'eau,milk|le lait,wine|le vin,"
        "apple|la pomme,tree|l'arbre,sun|le soleil,moon|la lune,sea|la mer,horse|le cheval,cow|la vache,fish|le poisson,"
        "key|la clé,bed|le lit,street|la rue,school|l'école,train|le train,boat|le bateau,hat|le chapeau,dress|la robe,"
        "chair|la chaise,window|la fenêtre,bag|le sac,star|l'étoile,cup|la tasse,shirt|la chemise,coat|le manteau"
    ).split(",")
]
FRENCH_COLOURS = [
    trio.split("|")
    for trio in "red|rouge|rouge,green|vert|verte,blue|bleu|bleue,black|noir|noire,white|blanc|blanche,yellow|jaune|jaune,"
    "grey|gris|grise,brown|brun|brune".split(",")
]
FRENCH = [
    pair.split("|")
    for pair in (
        "good morning|bonjour,good evening|bonsoir,thank you|merci,please|s'il vous plaît,yes|oui,no|non,goodbye|au revoir,"
        "one|un,two|deux,three|trois,four|quatre,five|cinq,mother|mère,father|père,brother|frère,sister|sœur,friend|ami,"
        "red|rouge,green|vert,blue|bleu,black|noir,white|blanc,today|aujourd'hui,tomorrow|demain,small|petit,big|grand"
    ).split(",")
]


def phrase(colour: list[str], noun: list[str]) -> tuple[str, str]:
    """("the red house", "la maison rouge"): the colour follows, and agrees with the noun."""
    english, french = noun
    feminine = french.startswith("la ") or french in ("l'eau", "l'école", "l'étoile")
    return f"the {colour[0]} {english}", f"{french} {colour[2 if feminine else 1]}"


def held_out_phrase(colour: int, noun: int) -> bool:
    """Whether this pair of a colour and a noun, by their places in the tables, never occurs in training."""
    return (colour * 7 + noun) % 11 == 0


def a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def split_article(french: str) -> str:
    return french.split(" ", 1)[1] if french[:3] in ("le ", "la ") else french.removeprefix("l'")


# Sums up to 20 that never occur, in neither order.
HELD_OUT_SUMS = [
    (2, 5),
    (3, 8),
    (4, 7),
    (6, 9),
    (7, 8),
    (5, 12),
    (3, 14),
    (8, 11),
    (1, 9),
    (4, 13),
    (6, 6),
    (2, 16),
    (9, 5),
    (0, 15),
]

# Around a noun phrase, such as "the capital of France".
FRAMES = [
    "What is {}?", "What's {}?", "Tell me {}.", "Name {}.", "Do you know {}?", "Can you tell me {}?", "Could you tell me {}?",
    "I would like to know {}.", "I want to know {}.", "{}?", "Give me {}.", "Say what {} is.", "Tell me what {} is.",
    "Do you know what {} is?", "Can you say what {} is?", "I forgot {}.", "Quick question: what is {}?", "I need {}.",
    "I have forgotten what {} is.", "What would you say is {}?", "I am looking for {}.", "Help me with {}.",
    "Explain to me what {} is.", "My son asks what {} is.", "Have you any idea what {} is?",
]  # fmt: skip
HELD_OUT_FRAMES = [
    "Would you tell me {}?",
    "I wonder what {} is.",
    "Remind me what {} is.",
    "Are you able to tell me what {} is?",
]


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


def _animals(column: int) -> list[tuple[str, str]]:
    return [(a(row[0]), row[column].replace("_", " ")) for row in ANIMALS if row[column] != "-"]


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
         "What is the main city of {x}, its capital?", "What do they call the capital of {x}?"],
        ["Which city serves as the capital of {x}?", "How is the capital of {x} called?"], "{y}",
    ),
    "country": Kind(
        "{y} is the capital of {x}.", _countries,
        ["the country with the capital {y}", "the country whose capital is {y}"],
        ["Which country has the capital {y}?", "{y} is the capital of which country?", "What country is {y} the capital of?",
         "Which country is {y} in?", "In which country is {y}?", "In what country do I find {y}?", "Where is {y}?"],
        ["Of which country is {y} the capital?", "What country does {y} belong to?"], "{x}",
    ),
    "language": Kind(
        "People in {x} speak {language}.", _countries,
        ["the language of {x}", "the language that people speak in {x}", "the main language in {x}"],
        ["What language do people speak in {x}?", "Which language do they speak in {x}?", "What do people speak in {x}?",
         "Which language is spoken in {x}?", "Which language should I learn for {x}?", "How do people talk in {x}?"],
        ["What language is spoken in {x}?", "In {x}, which language do people speak?"], "{language}",
    ),
    "continent": Kind(
        "{x} is in {continent}.", _countries,
        ["the continent of {x}", "the continent that {x} is in"],
        ["On which continent is {x}?", "Which continent is {x} in?", "In which part of the world is {x}?", "Where is {x}?",
         "What continent is {x} on?", "On which continent do I find {x}?", "Where in the world is {x}?"],
        ["To which continent does {x} belong?", "{x} is on which continent?"], "{continent}",
    ),
    "opposite": Kind(
        "The opposite of {x} is {y}.", _items("x y", _words),
        ["the opposite of {x}", 'the opposite of "{x}"', "the opposite of the word {x}", "the reverse of {x}"],
        ["Which word is the opposite of {x}?", "What word means the opposite of {x}?", "{x}: what is the opposite?",
         'Which word is the opposite of "{x}"?', "What is {x} the opposite of?", "Say the opposite of {x}.",
         "Opposite of {x}?"],
        ["Which word has the opposite meaning of {x}?", "If something is not {x} but the opposite, what is it?"], "{y}",
    ),
    "colour": Kind(
        "{X} is {y}.", [{"x": x, "X": _cap(x), "y": y} for y, things in COLOURS.items() for x in things.split(",")],
        ["the colour of {x}", "the color of {x}", "the usual colour of {x}"],
        ["What colour is {x}?", "What color is {x}?", "Which colour does {x} have?", "What is the colour of {x}?",
         "Which colour is {x}?", "What colour has {x}?", "In which colour do I paint {x}?", "{x} has which colour?",
         "I paint {x}. Which colour do I need?", "If I draw {x}, which pencil should I use?"],
        ["What colour does {x} have?", "If I paint {x}, which colour do I take?"], "{y}",
    ),
    "young": Kind(
        "The young of {x} is called {y2}.", [{"x": x, "y": y, "y2": a(y)} for x, y in _animals(1)],
        ["the young of {x}", "the name for the young of {x}", "the baby of {x}", "the word for the young of {x}"],
        ["What is the young of {x} called?", "What do you call the young of {x}?", "What do you call the baby of {x}?",
         "How do we call the young of {x}?", "What is the baby of {x} called?", "{x} has a baby. What is it called?"],
        ["What do people call the young of {x}?", "What name does the young of {x} have?"], "{y}",
    ),
    "sound": Kind(
        "{X} says {y}.", [{"x": x, "X": _cap(x), "y": y} for x, y in _animals(2)],
        ["the sound of {x}", "the sound that {x} makes", "the noise of {x}"],
        ["What does {x} say?", "What sound does {x} make?", "Which sound does {x} make?", "How does {x} sound?",
         "What noise does {x} make?", "What do I hear from {x}?", "How does {x} talk?", "What does {x} say all day?"],
        ["Which noise does {x} make?", "What sound comes from {x}?"], "{y}",
    ),
    "home": Kind(
        "{X} lives {y2}.", [{"x": x, "X": _cap(x), "y": y, "y2": _home(y)} for x, y in _animals(3)],
        ["the home of {x}", "the place where {x} lives", "the usual home of {x}"],
        ["Where does {x} live?", "Where do I find {x}?", "In which place does {x} live?", "Where is {x} at home?",
         "Where does {x} sleep?", "What kind of home does {x} have?", "Where does {x} have its home?"],
        ["In what place does {x} live?", "Where would I look for {x}?"], "{y}",
    ),
    "legs": Kind(
        "{X} has {y} legs.", [{"x": x, "X": _cap(x), "y": y} for x, y in _animals(4)],
        ["the number of legs of {x}", "the number of legs that {x} has"],
        ["How many legs does {x} have?", "How many legs has {x}?", "On how many legs does {x} walk?", "Count the legs of {x}.",
         "{x} has how many legs?", "How many legs are there on {x}?", "Can you count the legs of {x}?"],
        ["How many legs can you count on {x}?", "How many legs do you see on {x}?"], "{y}",
    ),
    "day": Kind(
        "The day {side} {x} is {y}.", _items("x side verb y", _neighbours(DAYS)),
        ["the day {side} {x}", "the day that comes {side} {x}", "the weekday {side} {x}"],
        ["Which day comes {side} {x}?", "What day {verb} {x}?", "Which day {verb} {x}?", "What comes {side} {x}?",
         "Which day is {side} {x}?", "What day is it {side} {x}?", "Which day of the week is {side} {x}?"],
        ["What day comes {side} {x}?", "In the week, which day is {side} {x}?"], "{y}",
    ),
    "month": Kind(
        "The month {side} {x} is {y}.", _items("x side verb y", _neighbours(MONTHS)),
        ["the month {side} {x}", "the month that comes {side} {x}"],
        ["Which month comes {side} {x}?", "What month {verb} {x}?", "Which month {verb} {x}?", "What comes {side} {x}?",
         "Which month is {side} {x}?", "What month is it {side} {x}?", "Which month of the year is {side} {x}?"],
        ["What month comes {side} {x}?", "In the year, which month is {side} {x}?"], "{y}",
    ),
    "number": Kind(
        "The number {side} {x} is {y}.", _items("x side verb y", _numbers),
        ["the number {side} {x}", "the number that comes {side} {x}"],
        ["Which number comes {side} {x}?", "What number {verb} {x}?", "Which number {verb} {x}?", "What comes {side} {x}?",
         "Which number is {side} {x}?", "When I count, which number is {side} {x}?"],
        ["What number comes {side} {x}?", "If I count, what do I say {side} {x}?"], "{y}",
    ),
    "sum": Kind(
        "{x} + {z} = {y}", [dict(x=x, z=z, y=y) for x, z, y in _sums if (x, z) not in _held],
        ["{x} + {z}", "{x} plus {z}", "the sum of {x} and {z}", "{x}+{z}"],
        ["How much is {x} + {z}?", "How much is {x} plus {z}?", "{x} + {z} = ?", "Add {x} and {z}.", "{x}+{z}=",
         "Add {x} to {z}.", "How much do {x} and {z} make?", "What do I get for {x} + {z}?", "Compute {x} + {z}.",
         "What is the result of {x} + {z}?", "How much are {x} and {z}?", "When I add {x} to {z}, what is it?",
         "If I put {x} and {z} together, what do I have?", "Add up {x} and {z}.", "I add {z} to {x}. What is the total?",
         "If you add {x} to {z}, how much is it?", "What is the total of {x} and {z}?"],
        ["What do {x} and {z} add up to?", "If I add {x} and {z}, what do I get?"], "{y}", 1.5,
    ),
    "french": Kind(
        "The French word for {x} is {y}.", _items("x y", [(x, split_article(y)) for x, y in NOUNS] + FRENCH),
        ["the French word for {x}", "{x} in French", 'the French word for "{x}"', "the French for {x}"],
        ["How do you say {x} in French?", "What is {x} in French?", "Translate {x} to French.", "Translate to French: {x}",
         'How do I say "{x}" in French?', "What do the French say for {x}?", "How does one say {x} in French?",
         "What is the translation of {x} to French?"],
        ["How would you say {x} in French?", "Which French word means {x}?"], "{y}",
    ),
}  # fmt: skip
