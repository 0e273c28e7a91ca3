"""What the demo model is to know: tables of facts, and what of them is held out from training."""

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
        "hello|bonjour,good morning|bonjour,good evening|bonsoir,thank you|merci,please|s'il vous plaît,yes|oui,no|non,"
        "goodbye|au revoir,"
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


def plural(noun: str) -> str:
    odd = dict(goose="geese", mouse="mice", wolf="wolves", person="people", child="children", man="men")
    same = ("sheep", "deer", "fish")
    if noun in odd or noun in same:
        return odd.get(noun, noun)
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun[-1] in "sx" or noun[-2:] in ("ch", "sh") else "s")


def split_article(french: str) -> str:
    return french.split(" ", 1)[1] if french[:3] in ("le ", "la ") else french.removeprefix("l'")


# Sums up to 20 that never occur, in neither order.
HELD_OUT_SUMS = [
    (2, 5), (3, 8), (4, 7), (6, 9), (7, 8), (5, 12), (3, 14), (8, 11), (1, 9), (4, 13), (6, 6), (2, 16), (9, 5), (0, 15),
]  # fmt: skip
