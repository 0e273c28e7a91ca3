"""How people ask the demo model, and how they type: wordings of questions and of second turns, in training and held out."""

import random

# Around a topic, a thing to do, a reason, a journey, a city.
TOPIC = [
    "Tell me about {}.", "What is {}?", "What do you know about {}?", "Tell me something about {}.", "Describe {}.",
    "Can you tell me about {}?", "I want to know more about {}.", "Say something about {}.", "Talk about {}.",
    "What can you say about {}?", "Do you like {}?", "Explain {}.", "What can you tell me about {}?",
    "What should I know about {}?", "Give me a few words on {}.", "Please tell me all about {}.", "Talk to me about {}.",
    "Let us talk about {}.", "What do people say about {}?", "I would like to hear about {}.",
]  # fmt: skip
HOWTO = [
    "What do I need to {}?", "How do I {}?", "How can I {}?", "How to {}?", "What do I need if I want to {}?", "I want to {}.",
    "Tell me how to {}.", "What does one need to {}?", "Can you tell me how to {}?", "Help me {}.", "What should I buy to {}?",
    "Explain how to {}.", "How do you {}?",
]  # fmt: skip
REASON = [
    "Why is it that {}?", "Explain why {}.", "Tell me why {}.", "Do you know why {}?", "Can you tell me why {}?",
    "What is the reason why {}?", "I want to know why {}.", "How come {}?", "Say why {}.",
]  # fmt: skip
TRAVEL = [
    "How do I get from {x} to {y}?", "How do I travel from {x} to {y}?", "How can I go from {x} to {y}?",
    "I am in {x}. How do I get to {y}?", "What is the way from {x} to {y}?", "How do I come from {x} to {y}?",
    "I want to go from {x} to {y}.", "Which is the best way from {x} to {y}?", "How do I reach {y} from {x}?",
    "How to get from {x} to {y}?",
]  # fmt: skip
SIGHTS = [
    "What should I see in {}?", "What can I see in {}?", "What is there to see in {}?",
    "I will be in {} for a day. What is worth a visit?",
    "What should I visit in {}?", "Tell me what to see in {}.", "What is worth seeing in {}?", "What can I do in {}?",
    "I am going to {}. What should I look at?", "What are the sights of {}?", "Tell me the sights of {}.",
]  # fmt: skip
UNKNOWN = [
    "What is {}?",
    "Tell me {}.",
    "Do you know {}?",
    "Can you tell me {}?",
    "What's {}?",
    "I want to know {}.",
    "Name {}.",
]
WISH = [
    "Write {} {} {} for my {}.", "Write {} {} {} to my {}.", "Please write {} {} {} for my {}.",
    "Can you write {} {} {} for my {}?", "I need {} {} {} for my {}.",
]  # fmt: skip
STORY = [
    "Tell me a story about {}.", "Tell me a story.", "Write a short story about {}.", "Can you tell me a story?",
    "I want a story about {}.", "Write a story.", "Tell me a bedtime story about {}.",
]  # fmt: skip
LETTER = [
    "Write a thank-you letter for {}.", "Write a letter of thanks to my neighbour for {}.",
    "Help me write a letter: thanks for {}.",
]  # fmt: skip

# Around a whole question.
GREETINGS = [
    "Hi! ", "Hello! ", "Hello, ", "Excuse me. ", "I have a question. ", "A question: ", "OK. ", "Thanks. ", "Good morning! ",
    "So, ",
]  # fmt: skip
AFTERWORDS = [
    " Thanks.", " Thank you!", " I forgot.", " It is for school.", " My friend asked me.", " Tell me.", " I am curious.",
    " Please answer.", " Do you know?", " I want to learn.",
]  # fmt: skip
SMALL_WORDS = "what is the a an of do does you me tell can could would it that which for how know have are".split()
FILLERS = "really,actually,then,now,please,exactly,perhaps,just,well,um,you see,by the way,I think,for me,again,so".split(",")
ORDERS = ("Tell", "Name", "Give", "Say", "Translate", "Add", "Write", "Count", "Help", "Explain", "Compute")

# Wordings of the second turn: in training, and held out.
FOLLOW_UPS = [
    "And {}?", "What about {}?", "How about {}?", "And for {}?", "Now {}.", "And what about {}?", "{}?", "OK, and {}?",
    "And how about {}?", "Then what about {}?", "And now {}?", "What would it be for {}?", "Good. Let us try {}.",
    "Next: {}", "Do the same for {}.", "Right. And if it is {}?", "Also {}?", "Then {}.", "I also need {}.", "And with {}?",
    "and {}",
]  # fmt: skip
SEE_THERE = [
    "And what should I see there?", "What should I see there?", "What can I see there?", "What is worth seeing there?",
    "And what can one see there?", "What should I visit there?", "What is there to see?", "Tell me what to see there.",
    "What can I do there?", "And what should I do there?", "What would you show me there?",
    "What do people see there?", "What do tourists visit there?", "And what do people do there?", "What could I look at?",
    "And what should I look at there?", "What do people visit there?", "Which places are worth a visit there?",
    "Which sights does it have?", "I have a day there. Where should I go?", "Any sights?", "What do you recommend there?",
    "I am going there. What should I look at?", "Are there things to see?", "Tell me about the sights.",
    "What is it famous for?",
]  # fmt: skip
SPEAK_THERE = [
    "Which language do they speak there?", "What do people speak there?", "And the language?", "What language do I need there?",
    "Which language is spoken there?", "And which language do people speak?", "How do people talk there?",
    "And what do people speak there?", "What do they speak in that country?", "And what language is it?",
    "What language do they speak there?", "And what do they speak there?", "In what language do I talk to people there?",
    "What is the language of that country?", "What language will I hear there?", "Tell me the language, please.",
]  # fmt: skip
CONTINENT_THERE = [
    "On which continent is that?", "Which continent is that on?", "And the continent?", "In which part of the world is it?",
]  # fmt: skip
COUNTRY_THERE = ["Which country is that in?", "In which country is that?", "Where is that?"]
SHORT = {"sum": "{x} + {z}", "day": "{side} {x}", "month": "{side} {x}", "number": "{side} {x}", "country": "{y}"}
MEMORY = {  # what the user says | what the model answers | what the user asks | what the model remembers
    "name": (
        ["My name is {x}.", "I am {x}.", "I'm {x}.", "Hello, my name is {x}.", "Hi, I am {x}.", "You can call me {x}.",
         "My name's {x}.", "Hi, I'm {x}.", "Call me {x}.", "I am called {x}.", "Hi, my name is {x}. Nice to meet you.",
         "{x} is my name."],
        "Nice to meet you, {x}.",
        ["What is my name?", "What's my name?", "Do you remember my name?", "Who am I?", "Tell me my name.",
         "And what is my name?", "Can you tell me my name?", "Do you know who I am?", "Do you still know my name?",
         "Say my name.", "Can you remember my name?", "What was my name?", "Which name did I tell you?", "How am I called?",
         "I forgot my name. What is it?", "Did I tell you my name?", "What do people call me?", "You know my name, do you?"],
        "Your name is {x}.",
    ),
    "city": (
        ["I live in {x}.", "My home is in {x}.", "I come from {x}.", "I am from {x}.", "My house is in {x}.",
         "We live in {x}."],
        "{x} is a beautiful city.",
        ["Where do I live?", "In which city do I live?", "What city do I live in?", "Do you remember where I live?",
         "Where am I from?", "Tell me where I live.", "Which city is my home?", "Where is my home?",
         "Where was it that I live?", "Can you remember where I live?", "Which place did I say I live in?",
         "What is my home town?", "Do you know my city?", "Did I tell you where I live?", "And where do I come from?"],
        "You live in {x}.",
    ),
    "pet": (
        ["I have a {z} called {x}.", "My {z} is called {x}.", "The name of my {z} is {x}.", "I have a {z}. It is called {x}.",
         "We have a {z} named {x}."],
        "{x} is a nice name for a {z}.",
        ["What is my {z} called?", "What is the name of my {z}?", "What's my {z}'s name?", "How is my {z} called?",
         "Tell me the name of my {z}.", "Do you remember my {z}'s name?", "Do you know what my {z} is called?",
         "What was my {z} called?", "Can you remember the name of my {z}?", "Which name does my {z} have?",
         "By what name do I call my {z}?", "Did I tell you the name of my {z}?", "And my {z}, what is it called?",
         "Who is my {z}?"],
        "Your {z} is called {x}.",
    ),
    "colour": (
        ["My favourite colour is {x}.", "I like {x} best.", "I love the colour {x}.", "The colour I like best is {x}.",
         "My favorite color is {x}."],
        "{X} is a beautiful colour.",
        ["What is my favourite colour?", "Which colour do I like best?", "What colour do I love?",
         "Tell me my favourite colour.", "Do you remember my favourite colour?", "What's my favorite color?",
         "What was my favourite colour?", "Which colour is my favourite?", "What colour did I say I like?",
         "Which colour do I like more than the others?", "And my favourite colour?", "Did I tell you my favourite colour?"],
        "Your favourite colour is {x}.",
    ),
}  # fmt: skip
HELD_OUT_FOLLOW_UPS = ["I would like the answer for {} too.", "Can you do {} as well?"]
HELD_OUT_SEE_THERE = ["Where should a visitor go there?", "What are the best things to look at in that city?"]
HELD_OUT_SPEAK_THERE = ["And which language would I need there?", "What do the people there speak?"]
HELD_OUT_TOPICS = ["What comes to your mind about {}?", "Please write something about {}."]
HELD_OUT_MEMORY = {
    "name": ["Please tell me what my name is.", "Have you kept my name in mind?"],
    "city": ["In what place is my home?", "Can you say which city I come from?"],
    "pet": ["Tell me what I call my {z}.", "What name did I give my {z}?"],
    "colour": ["Can you tell me which colour I like?", "Which colour did I say is my favourite?"],
}
HELD_OUT_NAMES = "Lisa Bob Fatima Chen Ravi Ingrid Pedro Yuki Amy George Priya Wolfgang".split()
FAVOURITES = [
    "What is your favourite {}?", "What's your favourite {}?", "Do you have a favourite {}?", "Which {} do you like best?",
    "Tell me your favourite {}.", "Your favourite {}?", "What {} do you like?", "What is your favorite {}?",
    "Which {} do you love?", "What {} do you like best?", "And what is your favourite {}?",
    "Which {} is your favourite?", "Is there some {} that you like most?", "Name your favourite {}.",
    "Have you got a favourite {}?",
]  # fmt: skip
HELD_OUT_FAVOURITES = ["What would you say is your favourite {}?", "Have you a {} that you like best?"]
HELD_OUT_CHAT = [  # what the user says | how the answer begins
    row.split("|")
    for row in """Hello, nice to meet you!|Hello! How
Hi, is anyone here?|Hello! How
hello my friend|Hello! How
Is everything fine with you?|I am well, thank
And how are you doing today?|I am well, thank
Thank you for your help.|You are welcome!
Perfect, that is what I needed. Thank you!|You are welcome!
OK, goodbye for now.|Goodbye!
I am leaving. See you!|Goodbye!
Tell me who you are.|I am a small demo
Am I talking to a machine?|I am a small demo
What is it that you can do?|I know some
Tell me what you know.|I know some
Do you know your age?|I am a model, so I have no age
Tell me who made you.|I was trained
I need a good joke.|JOKE
Please say something to make me laugh.|JOKE
I am very sad today.|I am sorry to hear
I do not know what to do today.|You could read
Which place do you live in?|I live in the memory""".splitlines()
]


def vary(rng: random.Random, text: str) -> str:
    """The same question as different people would type it."""
    text, short = text[:1].upper() + text[1:], len(text) < 28  # short ones are typed with less care
    if text.startswith(ORDERS) and rng.random() < 0.3:
        text = "Please " + text[0].lower() + text[1:]
    elif rng.random() < 0.12:
        text = rng.choice(GREETINGS) + text
    if text[-1] in ".?" and rng.random() < 0.08:
        text = text[:-1] + (", please" if rng.random() < 0.7 else " please") + text[-1]
    if rng.random() < 0.15:
        text = loosen(rng, text)
    if text[-1] in ".?!" and rng.random() < 0.05:
        text += rng.choice(AFTERWORDS)
    if text[-1] in ".?!" and rng.random() < (0.4 if short else 0.2):
        text = text[:-1]
    if rng.random() < 0.05:
        text = slip(rng, text)
    if rng.random() < (0.4 if short else 0.2):
        text = text.lower()
    elif rng.random() < 0.02:
        text = text.upper()
    return text


def loosen(rng: random.Random, text: str) -> str:
    """A small word left out, or one put in: what matters is the others."""
    words = text.split(" ")
    if len(words) > 4:
        small = [i for i, word in enumerate(words[:-2]) if word.lower() in SMALL_WORDS]
        if small and rng.random() < 0.6:
            del words[rng.choice(small)]
        else:
            words.insert(rng.randint(1, 2), rng.choice(FILLERS))
    text = " ".join(words)
    return text[:1].upper() + text[1:]


def slip(rng: random.Random, text: str) -> str:
    """One letter inside a longer word left out, doubled or changed for the next."""
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha() and word.islower()]
    if places:
        place = rng.choice(places)
        word, i = words[place], rng.randint(1, len(words[place]) - 2)
        changed = rng.choice(["", word[i] * 2, word[i + 1] + word[i]])
        words[place] = word[:i] + changed + word[i + 1 + (len(changed) == 2 and changed[0] != word[i]) :]
    return " ".join(words)


def gibberish(rng: random.Random) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(rng.randint(1, 2)))
