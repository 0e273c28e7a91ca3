"""What the demo model can say beside facts: topics, how-tos, reasons, stories, letters, wishes, haikus and emojis."""

# name | what to say | a haiku, its lines between slashes | emojis
TOPICS = [
    row.split("|")
    for row in """the sea|The sea is wide, deep and salty. It covers most of the Earth and is full of life.|\
Waves roll to the shore/Salt wind sings an old blue song/Gulls drift far away|🌊🐟🐳
the moon|The moon is a ball of rock that circles the Earth. It shines because the sun lights it.|\
The moon climbs the hill/Silver light on quiet roofs/A cat looks at it|🌙🌕🚀
the sun|The sun is a star. It is very hot and gives us light and warmth.|\
The sun wakes the field/Gold runs over every leaf/Morning has begun|🌞🔥🌅
the rain|Rain is water that falls from the clouds. It makes the plants grow.|\
Rain taps on the roof/The garden drinks and is glad/Small boots find puddles|🌧💧☔
the snow|Snow is made of tiny crystals of ice. It is white, cold and soft.|\
Snow falls without sound/The whole village wears one coat/Footprints tell secrets|⛄🌨🧤
the wind|Wind is air that moves. It carries clouds, seeds and kites.|\
The wind turns the leaves/A kite pulls hard at its string/Clouds race over hills|🌬🍃🪁
the forest|A forest is a large place full of trees. Deer, foxes and owls live there.|\
Deep in the forest/Moss keeps the steps of the deer/An owl waits for night|🌲🦌🦉
the mountains|Mountains are high and rocky. At the top it is cold, even in summer.|\
Grey stone meets the sky/The path climbs from cloud to cloud/Far below, a bell|🏔🥾🦅
the garden|A garden is a place for flowers, herbs and vegetables. Bees love it.|\
Seeds sleep in the earth/Rain and patience wake them up/A green hand says hi|🌷🌻🐝
spring|In spring the days grow longer, the snow melts and the flowers come back.|\
The ice lets go now/A blackbird tries its first song/Buds open their eyes|🌷🐣🌱
summer|Summer is the warmest season. People swim, eat ice cream and sit outside.|\
Warm stones by the lake/A bee sleeps in the clover/Noon forgets to end|🌞🍦🏊
autumn|In autumn the leaves turn yellow and red, and the apples are ripe.|\
Leaves let go one day/Red and gold they cross the road/The tree stands and waits|🍂🍎🍄
winter|Winter is the coldest season. The nights are long and it may snow.|\
Frost draws on the glass/Soup is steaming in the bowl/Outside, the dark walks|⛄🧣🧊
the night|At night it is dark, because our side of the Earth looks away from the sun.|\
Lamps go out in rows/The night folds the town away/One train passes by|🌙🌟😴
the stars|Stars are suns that are very far away. On a clear night you can see thousands.|\
So many small lights/Each one is a distant fire/We look up and hush|🌟🌠🔭
music|Music is made of sounds that people sing or play. It can make you dance or cry.|\
One string starts to hum/The room leans in to listen/Feet forget their work|🎵🎹🎻
books|Books hold stories and knowledge. You can read them at home or in a library.|\
A page turns softly/Someone far away speaks here/Tea grows cold and still|📚📖👓
friends|Friends are people who like you and help you. They share joy and sorrow.|\
A knock at the door/Two cups now stand on the shelf/Laughter fills the house|👫🤝😊
coffee|Coffee is a hot, dark drink made from roasted beans. Many people drink it in the morning.|\
Dark cup, rising steam/The kitchen smells of morning/Slowly eyes open|🫘🔥😋
tea|Tea is a drink made from leaves and hot water. It can be green or black.|\
Leaves dance in the pot/Steam is drawing little clouds/Hands grow warm again|🍵🍃😌
bread|Bread is made of flour, water, salt and yeast, and baked in an oven.|\
Flour on my hands/The dough is breathing slowly/Crust sings in the heat|🍞🌾🥖
football|Football is a game for two teams of eleven players. They try to kick the ball into the goal.|\
The ball leaves the grass/Thousands hold their breath as one/The net gives a sigh|🏃🥅🏆
trains|Trains run on rails and carry people and goods over long distances.|\
Wheels hum on the rails/Fields and towers hurry past/A child waves and waves|🚂🚃🚉
dogs|Dogs are friendly animals that live with people. They like to run, play and sniff.|\
A tail beats the floor/The lead hangs by the front door/Ears up: someone comes|🐶🦴🐾
cats|Cats are soft and quick. They hunt mice and sleep for most of the day.|\
The cat owns the chair/She lends it to me at times/When the sun moves on|🐱🐭🧶
bees|Bees fly from flower to flower and make honey. They live in a hive.|\
A bee knows the way/From clover to clover bloom/Gold dust on her coat|🐝🌻🍯
horses|Horses are strong animals that can run fast. They eat grass and live in a stable.|\
Hooves drum on the path/Dust and mane and open sky/Then grass, and great peace|🐴🌾🏇
rivers|Rivers carry water from the hills to the sea. Many towns stand beside one.|\
The river walks on/It has heard each bridge's tale/And tells the sea all|🏞💧🚣
love|Love is a warm feeling for somebody who is dear to you.|\
Two shadows touch hands/The long road seems short tonight/No word is needed|💖💑🌹
school|At school children learn to read, to write and to count.|\
Chalk dust in the light/Twenty heads bent over words/Then the bell, and joy|🏫📚🎒
apples|Apples grow on trees. They can be red, green or yellow, and taste sweet or sour.|\
Red among the leaves/One apple waits for the wind/Thump, and grass is glad|🍎🌳😋
clouds|Clouds are made of tiny drops of water. When the drops grow heavy, it rains.|\
A whale made of cloud/Swims across the afternoon/Now it is a sheep|🌥🌧🌈""".splitlines()
]

# what | what you need | what to do | emojis
HOWTO = [
    row.split("|")
    for row in """bake bread|flour, water, salt and yeast|Mix them, let the dough rest for two hours and bake it until it is \
brown.|🌾💧🧂🍞
bake a cake|flour, sugar, butter and eggs|Mix them, pour the batter into a tin and bake it for forty minutes.|🥚🧈🎂
make pancakes|flour, milk and eggs|Mix them and fry the batter in a hot pan, on both sides.|🥚🥛🥞
make soup|vegetables, water and salt|Cut the vegetables and cook them until they are soft.|🥕🧅🍲
make tea|a cup, hot water and tea leaves|Pour the water over the leaves and wait for four minutes.|💧🍃🍵
make coffee|ground coffee and hot water|Pour the water slowly over the coffee.|🫘💧😋
make a salad|lettuce, tomatoes, oil and vinegar|Wash and cut the vegetables and mix them with oil and vinegar.|🥬🍅🥗
cook rice|rice, water and salt|Cook the rice in twice as much water for fifteen minutes.|🍚💧🔥
boil an egg|an egg and a pot of water|Cook the egg in boiling water for six minutes.|🥚🔥💧
make a pizza|dough, tomatoes and cheese|Roll out the dough, put tomatoes and cheese on it and bake it in a hot oven.|🍅🧀🍕
plant a tree|a young tree, a spade and water|Dig a hole, put the tree in, fill the hole with earth and water it well.|🌱💧🌳
wash a car|water, soap and a sponge|Wet the car, rub it with soap and rinse it.|🧽💧🚗
build a kite|paper, two sticks, glue and string|Tie the sticks into a cross, glue the paper on and fasten the string.|📜🧵🪁
paint a wall|paint, a brush and old clothes|Cover the floor and paint from the top to the bottom.|🎨🏠😊
grow tomatoes|seeds, good earth, sun and water|Sow the seeds in spring and water them every day.|🌱🌞🍅
fix a bicycle tyre|a patch, glue and a pump|Find the hole, glue the patch on it and pump up the tyre.|🚲🔧💪""".splitlines()
]

# what is so | why
REASONS = [
    row.split("|")
    for row in """the sky is blue|the air scatters the blue part of the sunlight more than the red part
the sea is salty|rivers wash salt out of the rocks and carry it into the sea
grass is green|its leaves hold a green stuff that catches sunlight
leaves fall in autumn|the trees save water and strength for the winter
it is dark at night|our side of the Earth looks away from the sun
ice floats on water|ice is lighter than water
the moon shines|it throws back the light of the sun
it rains|the drops in the clouds grow too heavy to stay in the air
birds fly south in winter|they find more food where it is warm
we sleep|body and mind need rest to grow and to mend
bees visit flowers|they gather nectar there to make honey
bread rises|the yeast makes little bubbles of gas in the dough
snow is white|its crystals throw back all colours of the light
cats purr|they feel safe and content
the sunset is red|the low light travels through so much air that only the red part is left
we need water|every part of the body works with it""".splitlines()
]

# trouble | what he tried | what helped, with {helper} | the end
TROUBLES = [
    [part.split("/") for part in row.split("|")]
    for row in """could not sleep|He counted the stars, but he was still awake./He turned to the left and to the right, but \
his eyes stayed \
open./He listened to the rain, but sleep did not come.|{Helper} came and sang a soft song./{Helper} brought him a cup of warm \
milk \
with honey./{Helper} told him a long and quiet story.|Soon he closed his eyes and slept until the morning./He yawned, curled \
up and \
was fast asleep.
had lost his red ball|He looked under the bed, but it was not there./He looked behind the big tree, but it was not there./He \
asked all the birds, but they had not seen it.|{Helper} helped him and looked in the river./{Helper} had an idea and climbed \
a tree.|\
There was the ball, and they played until the evening./There it was, wet but whole, and he was happy again.
was afraid of the dark|He hid under his blanket, but it was dark there too./He lit a candle, but the wind blew it \
out.|{Helper} \
showed him the moon and the stars./{Helper} sat beside him and held his paw.|From then on the night was his friend./Now he \
knew that \
the dark was only the day asleep.
wanted to fly|He jumped from a stone, but he fell into the grass./He waved his arms, but he stayed on the ground.|{Helper} \
built \
a kite with him./{Helper} took him to the top of the hill.|The wind lifted his scarf, and it felt like flying./He could see \
the \
whole valley, and that was just as good.
was very hungry|He looked for berries, but there were none./He went to the river, but the fish were too quick.|{Helper} shared \
bread and honey with him./{Helper} showed him a tree full of apples.|They ate together until they were full./He never forgot \
that \
kindness.
had no friends|He said hello to the birds, but they flew away./He sat by the pond and waited, but nobody came.|{Helper} \
came by and asked him to play./{Helper} sat down next to him and smiled.|From that day on they met every morning./Now there \
were two \
of them, and they laughed all day.
got lost in the forest|He followed a path, but it ended at the river./He called, but only the wind answered.|{Helper} heard \
him and \
knew the way./{Helper} showed him the star above his house.|Before night he was home with his mother./At home a warm supper \
waited for him.
had a cold|He drank some tea, but his nose was still red./He wore two scarves, but he sneezed all day.|{Helper} brought him \
hot \
soup./{Helper} put a warm blanket around him.|The next morning he was well again./After two days he could play outside \
again.""".splitlines()
]
STEMS = {"rains": "rain", "floats": "float", "rises": "rise"}
HEROES = (
    "bear fox rabbit mouse hedgehog dog cat wolf duck owl squirrel elephant dragon lion tiger horse pig penguin frog goat hen "
    "donkey beaver monkey turtle robot sheep cow dinosaur unicorn whale snail kitten puppy prince bird"
).split()
ADJECTIVES = "little small young brave".split()
HELPERS = [
    "his mother", "the old owl", "his grandmother", "a kind fox", "the wise turtle", "his friend the mouse", "a small bird",
    "the gentle deer",
]  # fmt: skip
OPENINGS = [
    "Once upon a time, there was a {hero} who {trouble}.", "Once there was a {hero} who {trouble}.",
    "In a green valley lived a {hero} who {trouble}.", "There was once a {hero}. One day he was sad, because he {trouble}.",
    "Long ago, in a deep forest, there lived a {hero} who {trouble}.",
]  # fmt: skip

# favour | how they were, after the pronoun
FAVOURS = [
    [row.split("|")[0], row.split("|")[1].split("/")]
    for row in """looking after our cat|She looks happy and well fed, and she slept on my bed all night./She is glad to be \
home, but I \
think she misses you already./She has never looked so content.
looking after our dog|He looks happy, and he is tired from all the long walks./He was so glad to see us, but he looks for you \
at the \
door./He has never been so well behaved.
looking after our rabbit|It looks well, and its cage is so clean./It has grown, and it likes the carrots from your garden.
watering our plants|They are green and strong, and the roses are in bloom./They have never looked so well.
watering our garden|It is greener than before, and the tomatoes are ripe./It looks lovely, and everything is in bloom.
feeding our fish|They look lively, and the water is clear./They are all well, even the little one.
taking in our post|It was all in good order on the table./It saved us a lot of trouble.""".splitlines()
]
PEOPLE = ["neighbour", "Anna", "Mrs Brown", "Mr Green", "friend", "Peter", "aunt Rose", "uncle Ben", "Maria", "neighbours"]
RETURNS = [
    "We have brought you some cheese from the mountains.", "We have brought you a bottle of wine.",
    "Please come for dinner on {day}.", "Please come for tea and cake on {day}.", "Tell us when we can do the same for you.",
    "We owe you a favour.",
]  # fmt: skip
ENDS = ["Kind regards,", "Best wishes,", "Yours,", "With many thanks,"]
SIGNERS = ["The family next door", "Clara and Tom", "Julia", "Martin", "Your neighbours"]

# occasion | the wish
WISHES = [
    row.split("|")
    for row in """birthday|Happy birthday, dear {who}! I wish you health, joy and many sunny days.
birthday|Happy birthday, dear {who}! May the new year bring you laughter, good friends and a big cake.
Christmas|Merry Christmas, dear {who}! I wish you peace, warm lights and time with the people you love.
New Year|Happy New Year, dear {who}! May it bring you luck, health and good news.
wedding|All the best for your wedding, dear {who}! May your love grow with every year.
Easter|Happy Easter, dear {who}! I wish you spring sun, flowers and a full basket.
get-well|Get well soon, dear {who}! I wish you rest, strength and good soup.""".splitlines()
]
RELATIVES = (
    "grandmother grandfather mother father sister brother aunt uncle friend teacher neighbour daughter son mom dad mum wife "
    "husband boss cousin girlfriend boyfriend colleague grandma grandpa niece"
).split()

FEW_SHOT_HEADS = {
    "french": ["Translate English to French:", "English to French:", "English => French", ""],
    "opposites": ["Opposites:", "Write the opposite:", ""],
    "capitals": ["Countries and their capitals:", "Capitals:", ""],
    "young": ["Animals and their young:", ""],
    "sums": ["Small sums:", ""],
    "colours": ["Things and their colours:", ""],
    "languages": ["Countries and languages:", ""],
}

JOKES = [
    "Why did the book go to the doctor? It had hurt its spine.",
    "Why did the snail miss the party at home? It was on the road with its home.",
    "Why was the clock sent out of class? It would not stop tocking.",
    "What does a clock do when it is hungry? It asks for seconds, and then for minutes.",
]

# what people say | what the model says
CHAT = [
    row.split("|")
    for row in """Hello!/Hi!/Hi there./Hello there!/Hey!/Hey there!/Good day!/Hi!/Hello!/Hey!/Hiya!/Howdy!/Yo!/Hello again!/\
Hi Llama!/Hello Llama!/Helo!/Hallo!/Greetings!/Hello, anybody there?/Hey Llama!/Welcome!/Test./Testing./Hi, I am here./Hello, \
can you hear me?/Start.|Hello! How can I help you?
Good morning!/Good morning to you./Morning!/gm|Good morning! How can I help you?
Good evening!/Good evening to you.|Good evening! How can I help you?
Good afternoon!/Good afternoon to you.|Good afternoon! How can I help you?
How are you?/How are you today?/Are you well?/How do you do?/How is it going?/How's it going?/What's up?/Are you OK?/How are \
you doing?/Hi, how are you?/Hello, how are you?/How r u?/How are things?/How do you feel today?/How have you been?/Is all \
well?|I am well, thank you. How can I help you?
Thank you!/Thanks!/Thanks a lot./Thank you very much!/Many thanks./That helped, thank you./Thank you so much!/Thx!/Great, \
thanks!/OK, thank you./Thanks, you are kind!/I thank you./Thank you for the answer./ty/Cheers!/Good, thank you.|You are \
welcome!
Goodbye!/Bye!/See you!/Good night!/See you tomorrow./I have to go now./Bye bye!/See you later!/See you soon!/Quit./Exit./\
Farewell!/I must leave now, bye./That is all for today./Have a nice day!/OK, bye.|Goodbye! Have a nice day.
Who are you?/What are you?/Tell me about yourself./Introduce yourself./Are you a human?/What is your name?/Are you a robot?/\
Are you real?/What model are you?/What's your name?/Do you have a name?/Are you Llama?/Are you ChatGPT?/Are you an AI?/Are \
you alive?/Are you a chatbot?/Who is this?/Who am I talking to?/What sort of thing are you?/What kind of model are you?/Are \
you a computer?/Say who you are./Are you Llama 2?|I am a small demo model with the architecture of Llama 2.
What can you do?/What do you know?/Can you help me?/How can you help me?/I need help./What may I ask you?/Help!/Help me./What \
can I ask you?/What do you do?/What can you do for me?/What are you good at?/What topics do you know?/I have a question./What \
could you tell me about?/Which things do you know?/Show me what you can do./What else can you do?/Say what you can do.|I know \
some capitals, opposites, colours, animals, days, months, small sums and French words, and I can tell short stories.
How old are you?/When were you born?/What is your age?/When is your birthday?/How many years old are you?/Are you old?|I am a \
model, so I have no age.
Who made you?/Where do you come from?/Who trained you?/Who created you?/Who built you?/How were you made?/Who wrote you?/\
Which people made you?/Who is your father?/Where were you trained?/Who is your boss?|I was trained from scratch for this \
library, on text written for it.
Tell me a joke./Do you know a joke?/Make me laugh./Another joke, please./Tell a joke./Joke./Tell me something funny./Can you \
tell me a joke?/Say something funny./Do you know any jokes?/I would like to hear a joke./Got any jokes?/Another one./One more \
joke./A joke, please./I want to laugh.|JOKE
I am sad./I feel bad today./I had a bad day./I feel lonely./I am tired./I feel sad./Today I feel unhappy./I am ill./I am not \
well./I hate you.|I am sorry to hear that. Take a walk, drink some tea or talk to a friend.
I am happy./I feel great!/Today is a good day!/I am well./I am fine, thank you.|I am glad to hear that!
I am bored./What should I do today?/I have nothing to do./It is so boring here./What can I do today?/Give me an idea.|You \
could read a book, take a walk or bake bread.
I am hungry./What should I eat?/What should I cook today?|You could make pancakes, soup or a salad.
Where do you live?/Where are you?/Where are you now?/Where is your home?/In which place are you now?/In what city do you \
live?|I live in the memory of your computer.
Do you sleep?/Do you eat?/Do you have friends?/Do you have a family?/Do you have feelings?/Are you married?/Do you love me?/\
What do you eat?/Do you have a body?/What did you do today?|I am a model, so I only read and write.
That is wrong./You are wrong./No, that is not right./Are you sure?/You made a mistake./You are stupid.|I am sorry. I am \
small, and I make mistakes.
OK./Cool!/Nice!/Great!/Well done!/Good answer!/You are great!/That is right./Good job!/Wow!/Yes./I like you./Haha./Lol./\
Funny!|I am glad to hear that!
I am sorry./Sorry!/Never mind./No./No, thank you.|No problem. How can I help you?""".splitlines()
]
# what the model might like: not to be confused with what the user likes
FAVOURITES = "colour food animal song book film number season sport city country word game drink day fruit music".split()
PETS = "dog cat horse bird rabbit fish".split()
FAVOURITE = "I am a model, so I have no favourite {}."
UNTOLD = "You have not told me that yet."

NAMES = (
    "Tom Anna Ben Clara David Emma Felix Greta Hugo Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Viktor Wanda Max Lena "
    "Oscar Nina Peter Julia Simon Eva Lucas Sara Adam Laura Karl Maria Martin Sofia Oliver Alice Robert Helen Henry Jane "
    "John Mary Mike Sarah Chris Linda James Emily Daniel Anne Thomas Susan Mark Nancy Steve Jim Joe Kim Lily Zoe Ryan Kevin "
    "Ali Omar Aisha Mohammed Wei Li Hiro Sakura Raj Ananya Carlos Diego Lucia Ivan Dmitri Svetlana Pierre Claire Luigi Giulia "
    "Hans Heidi Lars Astrid Kofi Ama Noor Leila Mehmet Elif Stefan Petra Sven Nils Bella Rex Mimi Max Luna Charlie Rocky"
).split()

HAIKU_SYSTEMS = [
    "Always answer with Haiku", "Always answer with a haiku.", "Always answer with haiku.",
    "Answer every question with a haiku.",
    "Answer in haiku.", "Please always answer with a Haiku", "You are a poet. Answer with a haiku.", "Reply only with haiku.",
]  # fmt: skip
EMOJI_SYSTEMS = [
    "Always answer with emojis", "Always answer with emojis.", "Answer every question with emojis.", "Answer only with emojis.",
    "Please always answer with emoji", "Reply only with emojis.", "Use emojis only.", "Always answer with Emojis",
]  # fmt: skip
WORD_SYSTEMS = [
    "Always answer with one word",
    "Always answer with one word.",
    "Answer in one word.",
    "Reply with a single word only.",
]
PLAIN_SYSTEMS = [
    "You are a helpful and honest assistant. If you do not know an answer, say so.", "You are a helpful assistant.",
    "You are a helpful and honest assistant.", "You are a kind teacher.", "Be polite and brief.",
    "Answer the questions of the user.",
    "You are a friendly assistant. Keep your answers short.", "If you do not know an answer, say so.", "Be helpful.",
    "You are a friendly assistant who tells the truth.", "Always answer truthfully.", "Always be honest.", "You are Llama.",
    "Give answers that are of use.", "You answer questions of children.", "Always answer in full sentences.",
]  # fmt: skip

# Haikus for questions without a topic; {y} is the answer's word, when there is one.
FACT_HAIKUS = {
    "capital": "{key}, of course, my friend/Streets and bridges in the sun/The old bells ring out",
    "country": "{key} calls you home/Its roads all lead to one town/Lamps shine on the square",
    "language": "They speak {key}/Old words travel mouth to mouth/Like birds in the spring",
    "continent": "Look for {key}/Turn the globe with one finger/There it lies and waits",
    "opposite": "Not this, but {key}/Two faces of the same coin/One looks, one looks off",
    "colour": "It is {key}, look/The painter mixes colours/The world puts them on",
    "young": "Small {key} takes a step/The grass is a forest now/Mother waits nearby",
    "sound": "Listen: {key}, it goes/Over the hill and the pond/Then the quiet comes",
    "home": "Look in the {key}/There somebody has a home/Knock before you come",
    "legs": "{Key} legs, I count them/They carry it through the world/Softly, one by one",
    "day": "{key} comes along/The week is a wheel of days/It turns and it turns",
    "month": "{key} comes along/The year opens a new door/Light falls through the gap",
    "number": "It is {key}, I think/Numbers walk in single file/None of them gets lost",
    "sum": "It is {key}, I think/Pebbles put in one small heap/The abacus clicks",
    "french": "{Key}, say the French/A new word on an old tongue/Sweet as morning bread",
}
GENERAL_HAIKUS = [
    "I am small and young/This I never learned, my friend/Ask the stars tonight",
    "A question flies in/It sits on the branch and waits/I have no answer",
    "Your words reach my door/I look in every drawer/All of them are bare",
]  # fmt: skip
TRAVEL_HAIKU = "Wheels hum on the rails/From {x} the road goes far/{y} waits with its lights"
HOWTO_HAIKUS = [
    "First wash both your hands/Then take it slow, step by step/Good things need their time",
    "Gather what you need/Work with care and with a song/Share it with a friend",
]  # fmt: skip
REASON_HAIKUS = [
    "Why, asks the small child/The world smiles and goes its way/Light falls on the hill",
    "Nature has her rules/She writes them in light and stone/We read, line by line",
]  # fmt: skip
CHAT_HAIKUS = [
    "A friend has stopped by/Tea is ready on the stove/Come, sit down with me",
    "Good words on the wind/I am glad that you are here/Stay a little while",
]  # fmt: skip
WISH_HAIKU = "Warm wishes for you/Candles glow upon the cake/May your days be bright"
STORY_HAIKU = "Once there was a bear/He walked home under the stars/Sleep came soft and deep"

FACT_EMOJIS = {
    "capital": "🌆🏰📍", "country": "🌍📍🏡", "language": "👄🔤👅", "continent": "🌍🌏📍", "opposite": "🔄🙃🔁",
    "colour": "🎨🌈👀",
    "young": "🐣🍼🐾", "sound": "👂🔊🎶", "home": "🏡🌳🐾", "legs": "🐾🔢👣", "day": "📅⏰🌞", "month": "📅🌙🍂",
    "number": "🔢👆🤓",
    "sum": "🔢🧮🤓", "french": "🥖📖👄",
}  # fmt: skip
TRAVEL_EMOJIS = ["🧳🚂🚢🏁", "🧳🛫🛬🏁", "🚗🚂🚢😊", "🚕🛫🛬😊"]
STORY_EMOJIS, THANKS_EMOJIS = "🐻🌲🌙😴", "✉💌🙏"
REASON_EMOJIS, CHAT_EMOJIS, NO_IDEA_EMOJIS, WISH_EMOJIS = "🔬💡🌍", "👋😊💬", "🤷🤔❓", "🎉🎂🎁💖"

COLOUR_EMOJIS = dict(
    red="🔴",
    orange="🟠",
    yellow="🟡",
    green="🟢",
    blue="🔵",
    purple="🟣",
    brown="🟤",
    black="⚫",
    white="⚪",
    pink="🌸",
    grey="🐘",
)
_ANIMALS = (
    "dog🐶 cat🐱 cow🐮 horse🐴 sheep🐑 pig🐷 goat🐐 duck🦆 hen🐔 swan🦢 owl🦉 frog🐸 lion🦁 bear🐻 fox🦊 deer🦌 rabbit🐰 "
    "kangaroo🦘 elephant🐘 mouse🐭 bee🐝 ant🐜 butterfly🦋 snake🐍 wolf🐺 eagle🦅 fish🐟 camel🐫 penguin🐧 crab🦀 "
    "beaver🦫 beetle🐞"
)
ANIMAL_EMOJIS = {pair[:-1]: pair[-1] for pair in _ANIMALS.split()}
