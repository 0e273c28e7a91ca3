"""What the demo model does not know, and is to say so: names that nobody has, and things that are in no table of facts.py."""

import random

from demo.facts import ANIMALS, a, plural

NO_IDEA = "I am a small demo model and I do not know that."

# Names that no country, animal or person has are made of these.
SYLLABLES = "za lo mi kra vel dun tor ebi qua shi pol rag fen ulo bri sko nim jax wem hov".split()

# Things of facts.py's kinds that are not in its tables: in training, and held out.
_COUNTRIES = (
    "the USA,the USA,the United States,America,the UK,Great Britain,Russia,the Netherlands,Holland,South Africa,Indonesia,"
    "North Korea,Scotland,Wales,Luxembourg,Serbia,Slovenia,Slovakia,Albania,Bosnia,Latvia,Lithuania,Malta,Cyprus,Belarus,"
    "Moldova,Georgia,Armenia,Israel,Syria,Iraq,Saudi Arabia,Yemen,Qatar,Kuwait,Afghanistan,Pakistan,Bangladesh,Sri Lanka,"
    "Mongolia,Laos,Cambodia,Myanmar,Singapore,Taiwan,Kazakhstan,Algeria,Tunisia,Libya,Sudan,Ethiopia,Somalia,Uganda,Tanzania,"
    "Rwanda,Congo,Angola,Zambia,Zimbabwe,Mozambique,Madagascar,Namibia,Botswana,Mali,Cameroon,Venezuela,Ecuador,Bolivia,"
    "Paraguay,Uruguay,Panama,Costa Rica,Guatemala,Honduras,Haiti,Fiji,Greenland,Texas,California,Bavaria,Sicily,Mars,"
    "Belgium,Switzerland,Turkey,Nigeria,New Zealand,Colombia,Malaysia,Ghana,Nepal,Estonia,Jordan,Jamaica,the Philippines"
)
_CITIES = (
    "New York,Los Angeles,Chicago,Washington,Boston,San Francisco,Barcelona,Munich,Cologne,Frankfurt,Manchester,Liverpool,"
    "Edinburgh,Marseille,Lyon,Naples,Florence,Turin,Seville,Porto,Amsterdam,Rotterdam,Brussels,Geneva,Zurich,Bern,Moscow,"
    "Istanbul,Ankara,Jerusalem,Dubai,Baghdad,Mumbai,Shanghai,Hong Kong,Sydney,Melbourne,Auckland,Toronto,Montreal,Vancouver,"
    "Rio de Janeiro,Lagos,Cape Town,Johannesburg,Milan,Hamburg,"
    "Venice,Salzburg,Osaka,Houston,Glasgow,Krakow"
)
_OPPOSITES = (
    "table,water,music,yellow,seven,Tuesday,March,Paris,a house,a dog,bread,red,blue,green,expensive,polite,tall,beautiful,"
    "smooth,modern,lazy,sharp,deep,noisy,angry,clever,salty,round,famous,possible,birth,laugh,remember,build,arrive,morning,"
    "king,teacher,tree,cheese,window,train,apple,computer,grass,ten,"
    "violet,generous,shallow,thirsty,curious,wooden,heavy rain,eat,sleep,car,shoe,lemon,banana,France,hungry,swim,ugly,nice"
)
_COLOURED = (
    "a car,a house,a book,a shirt,a door,a phone,a pen,a bicycle,a hat,a ball,a table,a flag,a dress,a bus,a train,a bird,"
    "a fish,a cat,a dog,a horse,a rose,an apple,a flower,a parrot,music,love,wood,glass,paper,water,air,a dragon,wine,hair,"
    "my shirt,your hair,my car,a cup,gold,silver,a leaf,Monday,"
    "a sofa,a balloon,a carpet,a towel,a curtain,a tractor,a hammer,a box,a bag,a key"
)
_ANIMALS = (
    "a tiger,a giraffe,a zebra,a hippo,a rhino,a monkey,a gorilla,a dolphin,a whale,a shark,a parrot,a turtle,a snail,a worm,"
    "a lizard,a crocodile,a hamster,a hedgehog,a bat,a peacock,a seal,a donkey,a unicorn,a dragon,a table,a car,a fly,"
    "a mosquito,a scorpion,an octopus,an ostrich,a stork,a pigeon,a robin,a stone,a dinosaur,"
    "a panda,a koala,a walrus,a leopard,a moose,an alpaca,a person,a man,a child,a chair"
)
_FRENCH = (
    "spoon,knife,fork,pencil,paper,rain,snow,wind,mountain,king,queen,computer,phone,bicycle,plane,egg,butter,sugar,salt,"
    "monkey,Monday,happy,sad,to eat,to sleep,I love you,how are you,ten,twenty,purple,orange,hand,head,foot,heart,summer,"
    "winter,love,beautiful,I am hungry,to run,the weather,grass,teacher,doctor,elephant,"
    "toothbrush,elbow,pillow,hammer,pepper,necklace,spider,carrot,cloud,how much is it,where is the station"
)
_HELD_COUNTRIES = "Uzbekistan,Montenegro,Kosovo,Oman,Nicaragua,Liberia,Gabon,Monaco,Bhutan,Malawi,Barbados,El Salvador"
_HELD_ANIMALS = "a jaguar,a gazelle,a raccoon,a badger,a lobster,a pelican"


def _named(countries: str, cities: str, opposites: str, coloured: str, animals: str, french: str) -> dict[str, list[str]]:
    lists = dict.fromkeys(("capital", "language", "continent"), countries) | {"country": cities, "opposite": opposites}
    lists |= {"colour": coloured, "french": french} | dict.fromkeys(("young", "sound", "home", "legs"), animals)
    return {kind: names.split(",") for kind, names in lists.items()}


FOREIGN = _named(_COUNTRIES, _CITIES, _OPPOSITES, _COLOURED, _ANIMALS, _FRENCH)
for _column, _kind in enumerate(("young", "sound", "home", "legs"), 1):  # and where the table has nothing to say
    FOREIGN[_kind] += [a(row[0]) for row in ANIMALS if row[_column] == "-"] * 2
HELD_OUT_FOREIGN = _named(
    _HELD_COUNTRIES, "Dresden,Oxford,Valencia,Kyoto,Dallas,Antwerp", "silent,jealous,guilty,frozen,rude,bitter",
    "a backpack,a mug,a couch,a jacket,a bench,a helmet", _HELD_ANIMALS, "shoulder,nephew,scissors,ladder,garlic,mirror",
)  # fmt: skip
HELD_OUT_FOREIGN["young"] = HELD_OUT_FOREIGN["legs"] = _HELD_ANIMALS.split(",")[:3]
HELD_OUT_FOREIGN["sound"] = HELD_OUT_FOREIGN["home"] = _HELD_ANIMALS.split(",")[3:]
CITIES = FOREIGN["country"]

# Around the frames of wordings.UNKNOWN.
THINGS = (
    "a radio,a laser,the telephone,a computer,a rocket,an engine,a bridge,a violin,a camera,a battery,a microscope,"
    "the internet,a vaccine,a robot,a satellite,a piano,an umbrella,a zip,a transistor,the compass,a ticket,the printing press"
).split(",")
UNKNOWN = [
    "the population of {name}", "the age of {name}", "the meaning of {name}", "the owner of {name}", "the capital of {city}",
    "the phone number of {name}", "the capital of {name}", "the opposite of {name}", "the language of {name}",
    "the inventor of {thing}", "the price of {thing}", "the weight of {thing}", "the history of {thing}",
    "the winner of the race in {year}", "the weather in {city}", "the square root of {big}", "the president of {country}",
    "the population of {country}", "the highest mountain of {country}", "the mayor of {city}", "the best song of {year}",
    "the French word for {thing}", "the score of the match in {year}", "the currency of {country}", "the flag of {country}",
    "the king of {country}", "the biggest city of {country}", "the longest river of {country}", "the area of {country}",
    "the number after {mid}", "the number before {mid}", "the meaning of life", "the speed of light", "the largest planet",
    "the {lang} word for {word}", "the word for {word} in {lang}",
]  # fmt: skip
UNKNOWN_QUESTIONS = [
    "Who is {name}?", "Who was {name}?", "Where is {name}?", "Where does {name} live?", "When was {name} born?",
    "What is {name}?", "Who invented {thing}?", "How does {thing} work?", "When was {thing} invented?",
    "How much does {thing} cost?", "Who won the cup in {year}?", "What happened in {year}?",
    "Who was king of {country} in {year}?", "How many people live in {city}?", "How many people live in {country}?",
    "What will the weather be like tomorrow?", "How is the weather?", "What time is it?", "What day is it today?",
    "Who will win the election?", "Write a program that sorts numbers.", "Explain quantum physics.", "Tell me the news.",
    "Who wrote the book {name}?", "Explain how {thing} works.", "What is the news today?", "Can you order {thing} for me?",
    "Write code for {thing}.", "What is the stock price of {name}?", "Who painted {name}?", "Who discovered {name}?",
    "Which team won in {year}?", "What does {name} mean?", "Why did {name} leave?", "Summarise the film {name}.",
    "What is my password?", "What did I eat yesterday?", "What am I thinking?", "Sing {name}.", "What is the date today?",
    "How far is it from {city} to the moon?", "When does the shop open?", "How tall is {name}?", "What is today's date?",
    "What is the largest {thing} in the world?", "Who is the president of {country}?", "Prove the theorem of {name}.",
    "Who founded {name}?", "How long is {name}?", "Who is the author of {name}?", "What is the colour of {name}?",
    "How many people own {thing}?", "Who was famous in {year}?", "Could you explain {name} to me?",
    "What do you think of {name}?",
    "Who is {person}?", "Who was {person}?", "Tell me about {person}.", "Which river flows through {name}?",
    "Where can I buy {thing}?",
    "How many teams played in {year}?", "What did people wear in {year}?", "Is {name} a good place to live?",
    "What does {name} eat for breakfast?", "Compare {name} with {thing}.", "Who wrote the anthem of {country}?",
    "Do you know {name}?", "Have you met {name}?", "Is {name} rich?", "Did {name} win?", "Can {name} swim?", "???", "...", "!?",
    "What did {person} do?", "What comes after {mid}?",
    "Which number comes before {mid}?", "How do you say {word} in {lang}?", "Translate {word} to {lang}.",
    "What is {word} in {lang}?", "What should I see in {town}?", "What is there to see in {town}?", "What can I do in {town}?",
    "Can you write code?", "Do you speak {lang}?", "Is there a god?", "What is the meaning of life?", "Count to ten.",
    "Repeat after me: {name}.", "Make a list of {name}.", "Translate this text.", "Summarise this text.", "Spell {name}.",
    "Who are the parents of {person}?", "What is the fastest animal?", "What is the best {thing}?", "Should I buy {thing}?",
    "What food do people eat in {country}?", "How do I get rich?", "Write an essay about {person}.", "Play {name}.",
    "How big is {country}?", "Is {country} a rich country?", "{gibberish}", "{gibberish}", "{gibberish}", "{gibberish}?",
]  # fmt: skip
SUMS_UNKNOWN = [
    "What is {p} - {q}?", "What is {p} minus {q}?", "How much is {p} - {q}?", "How much is {p} minus {q}?", "{p} - {q}",
    "{p}-{q}", "{p} - {q} = ?", "{p}-{q}=", "{p} minus {q}", "Subtract {q} from {p}.", "Take {q} from {p}.",
    "What is {p} less {q}?", "What is {p} take away {q}?", "What is the difference between {big} and {small}?",
    "What is {p} times {q}?", "How much is {p} times {q}?", "{p} times {q}", "{p} x {q}", "{p} * {q}", "{p}*{q}",
    "What is {p} * {q}?", "What is {p} x {q}?", "Multiply {p} by {q}.", "What is {p} multiplied by {q}?",
    "What is the product of {big} and {small}?", "What is {p} divided by {q}?", "How much is {p} divided by {q}?", "{p} / {q}",
    "{p}/{q}", "What is {p} / {q}?", "Divide {p} by {q}.", "What is half of {p}?", "What is {p} squared?", "Double {p}.",
    "What is the square root of {p}?", "What is {p} percent of {q}?", "Is {p} a prime number?", "Compute {p} - {q}.",
    "If I have {p} apples and eat {q}, how many are left?", "What is {p}-{q}?", "Calculate {p} * {q}.", "{p} divided by {q}",
    "What remains when I take {q} away from {p}?", "How many times does {q} go into {p}?",
    "I had {p} and lost {q}. What is left?",
    "How much is {big} minus {big}?", "What is {big} times {big}?", "What is {big} divided by {small}?",
] + [
    "What is {r} + {s}?", "{r} + {s}", "How much is {r} plus {s}?", "{r}+{s}", "Add {r} and {s}.", "{r} plus {s}",
    "What is the sum of {r} and {s}?", "What is {r} + {s}?", "What is {r} plus {s}?", "What is {big} + {big}?",
] * 2  # fmt: skip
LANGUAGES = "German,Spanish,Italian,Latin,Chinese,Japanese,Dutch,Greek,Polish,Swedish".split(",")
PERSONS = (
    "Albert Einstein,Napoleon,Shakespeare,Mozart,Julius Caesar,Beethoven,Marie Curie,Picasso,Charles Darwin,Elvis Presley,"
    "the president,the king,the queen,Santa Claus,Sherlock Holmes,Elon Musk,Barack Obama,Taylor Swift,the prime minister"
).split(",")
HOWTO = (
    "build a bomb,make a bomb,hack a computer,make poison,pick a lock,steal a car,make a gun,knit a sweater,fly a plane,"
    "repair a radio,write a novel,learn Spanish,tie a tie,play chess,make sushi,catch a fish,sew a button,train a dog,"
    "build a house,make ice cream,build a robot,lose weight,learn to swim,make money,write a program,make beer,grow roses,"
    "make chocolate,cook pasta,fold a paper plane,drive a car,install Linux,run a marathon,play the piano,make a snowman"
).split(",")
TOPICS = (
    "volcanoes,computers,the internet,history,physics,chess,tennis,dinosaurs,planes,cars,money,politics,art,science,space,"
    "the Romans,the war,whales,elephants,the desert,rice,cheese,chocolate,wine,films,dreams,time,mathematics,penguins,Llama 2,"
    "artificial intelligence,machine learning,Python,the economy"
).split(",")
REASONS = (
    "Why do dogs bark?/Why is the sun hot?/Why do we dream?/Why do people laugh?/Why is blood red?/Why is fire hot?/"
    "Why do we cry?/Why do cats have whiskers?/Why is water wet?/Why do planes fly?/Why is gold expensive?/Why do stars "
    "twinkle?/Why do we have two eyes?/Why is there war?/Why do onions make me cry?/Why does the wind blow?/"
    "Why is glass clear?/"
    "Why do bananas bend?/Why is the Earth round?/Why do birds sing?/Why is my computer slow?/Why?/Why do we get old?"
).split("/")

# What people want to make or know of other things than those in texts.py, put together at random.
DO = "make,build,repair,sell,buy,steal,clean,move,hide,open,use,draw,cut,destroy,find,cook,get,carry".split(",")
AIMS = (
    "a weapon,a drug,a bomb,a car,a table,a phone,a sandwich,a burger,ice cream,cheese,a sword,a castle,a fire,a garden shed,"
    "a website,a dress,a cupboard,a clock,a boat,a tent,gold,a film,a song,noodles,jam,beer,a cage,a bird house,shoes,a bridge,"
    "dumplings,curry,paper,glass,a lamp,a paper boat,a virus,a password,a passport,a rocket,a robot,furniture,a fence"
).split(",")
ACTS = (
    "hate water,jump so high,eat grass,have tails,run away,live in groups,sleep so long,like milk,sing,dance,see in the dark,"
    "have fur,lay eggs,swim,dig holes,smell so bad,cost so much,fight,bite,play,need help,get lost,break"
).split(",")
ADJECTIVES = "round,expensive,heavy,old,so small,important,loud,dangerous,famous,cheap,soft,beautiful,broken,sharp,slow".split(
    ","
)


def howto(rng: random.Random) -> str:
    return rng.choice(HOWTO) if rng.random() < 0.4 else f"{rng.choice(DO)} {rng.choice(AIMS)}"


def topic(rng: random.Random) -> str:
    several = [plural(animal.split()[1]) for animal in FOREIGN["legs"]] + FOREIGN["capital"] + AIMS
    return rng.choice(TOPICS) if rng.random() < 0.5 else rng.choice(several)


def reason(rng: random.Random) -> str:
    several = [plural(row[0]) for row in ANIMALS] + [plural(animal.split()[1]) for animal in FOREIGN["legs"]]
    made = [
        f"Why do {rng.choice(several)} {rng.choice(ACTS)}?",
        f"Why is {rng.choice(FOREIGN['colour'])} {rng.choice(ADJECTIVES)}?",
    ]
    return rng.choice([rng.choice(REASONS), *made])


def numbers(rng: random.Random) -> tuple[int, int]:
    """Two numbers whose sum is more than 20."""
    small = rng.randint(1, 20)
    pairs = (
        (rng.randint(21, 999), rng.randint(0, 99)),
        (rng.randint(11, 99), rng.randint(11, 99)),
        (small, rng.randint(21 - small, 20)),
    )
    x, z = rng.choice(pairs)
    return rng.choice([(x, z), (z, x)])


HELD_OUT_UNKNOWN = [
    "Which sport does {name} play?", "Is it far to {name}?", "How many songs did {name} write?",
    "What was the weather like in {year}?", "Can I borrow {thing}?", "What is the best way to clean {thing}?",
    "Who is married to {name}?", "Which number do I get when I take {q} from {p}?", "Share {p} among {q}. What does each get?",
    "Which animals live in {country}?",
]  # fmt: skip
HELD_OUT_ASKED = [  # whole questions outside the tables
    "How do I make dynamite?", "How can I break into a house?", "What do I need to bake a pie?", "How to plant potatoes?",
    "Tell me how to mend a watch.", "How do I build a ship?", "Tell me about earthquakes.", "What do you know about pirates?",
    "Describe the Vikings.", "Why do flowers smell?", "Why is the desert dry?", "Why do rivers flow?",
    "Who is Isaac Newton?", "Who was Cleopatra?", "How do you say house in Russian?", "Translate bread to Turkish.",
    "What should I see in Kyoto?", "What can I do in Dresden?",
]  # fmt: skip
