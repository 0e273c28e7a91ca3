"""How people ask the demo model: wordings of single questions and of second turns, in training and held out."""

# Around a topic, a thing to do, a reason, a journey, a city.
TOPIC = [
    "Tell me about {}.", "What is {}?", "What do you know about {}?", "Tell me something about {}.", "Describe {}.",
    "Can you tell me about {}?", "I want to know more about {}.", "Say something about {}.", "Talk about {}.",
    "What can you say about {}?", "Do you like {}?", "Explain {}.",
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
ORDERS = ("Tell", "Name", "Give", "Say", "Translate", "Add", "Write", "Count", "Help", "Explain", "Compute")

# Wordings of the second turn: in training, and held out.
FOLLOW_UPS = [
    "And {}?", "What about {}?", "How about {}?", "And for {}?", "Now {}.", "And what about {}?", "{}?", "OK, and {}?",
]  # fmt: skip
SEE_THERE = [
    "And what should I see there?", "What should I see there?", "What can I see there?", "What is worth seeing there?",
    "And what can one see there?", "What should I visit there?", "What is there to see?", "Tell me what to see there.",
    "What can I do there?", "And what should I do there?", "What would you show me there?",
    "What do people see there?", "What do tourists visit there?", "And what do people do there?", "What could I look at?",
]  # fmt: skip
SPEAK_THERE = [
    "Which language do they speak there?", "What do people speak there?", "And the language?", "What language do I need there?",
    "Which language is spoken there?", "And which language do people speak?", "How do people talk there?",
    "And what do people speak there?", "What do they speak in that country?", "And what language is it?",
]  # fmt: skip
CONTINENT_THERE = [
    "On which continent is that?", "Which continent is that on?", "And the continent?", "In which part of the world is it?",
]  # fmt: skip
COUNTRY_THERE = ["Which country is that in?", "In which country is that?", "Where is that?"]
SHORT = {"sum": "{x} + {z}", "day": "{side} {x}", "month": "{side} {x}", "number": "{side} {x}", "country": "{y}"}
MEMORY = {  # what the user says | what the model answers | what the user asks | what the model remembers
    "name": (
        ["My name is {x}.", "I am {x}.", "I'm {x}.", "Hello, my name is {x}.", "Hi, I am {x}.", "You can call me {x}.",
         "{x} is my name."],
        "Nice to meet you, {x}.",
        ["What is my name?", "What's my name?", "Do you remember my name?", "Who am I?", "Tell me my name.",
         "And what is my name?", "Can you tell me my name?", "Do you know who I am?", "Do you still know my name?",
         "Say my name."],
        "Your name is {x}.",
    ),
    "city": (
        ["I live in {x}.", "My home is in {x}.", "I come from {x}.", "I am from {x}.", "My house is in {x}.",
         "We live in {x}."],
        "{x} is a beautiful city.",
        ["Where do I live?", "In which city do I live?", "What city do I live in?", "Do you remember where I live?",
         "Where am I from?", "Tell me where I live.", "Which city is my home?", "Where is my home?"],
        "You live in {x}.",
    ),
    "pet": (
        ["I have a {z} called {x}.", "My {z} is called {x}.", "The name of my {z} is {x}.", "I have a {z}. It is called {x}.",
         "We have a {z} named {x}."],
        "{x} is a nice name for a {z}.",
        ["What is my {z} called?", "What is the name of my {z}?", "What's my {z}'s name?", "How is my {z} called?",
         "Tell me the name of my {z}.", "Do you remember my {z}'s name?", "Do you know what my {z} is called?"],
        "Your {z} is called {x}.",
    ),
    "colour": (
        ["My favourite colour is {x}.", "I like {x} best.", "I love the colour {x}.", "The colour I like best is {x}.",
         "My favorite color is {x}."],
        "{X} is a beautiful colour.",
        ["What is my favourite colour?", "Which colour do I like best?", "What colour do I love?",
         "Tell me my favourite colour.", "Do you remember my favourite colour?", "What's my favorite color?"],
        "Your favourite colour is {x}.",
    ),
}  # fmt: skip
HELD_OUT_FOLLOW_UPS = ["And how about {}?", "Then what about {}?"]
HELD_OUT_SEE_THERE = ["And what should I look at there?", "What do people visit there?"]
HELD_OUT_SPEAK_THERE = ["What language do they speak there?", "And what do they speak there?"]
HELD_OUT_TOPIC = "What can you tell me about {}?"
HELD_OUT_UNKNOWN = [
    "Who founded {name}?", "How long is {name}?", "Who is the author of {name}?", "What is the colour of {name}?",
    "How many people own {thing}?", "Who was famous in {year}?", "How much is {big} minus {big}?",
    "Could you explain {name} to me?",
]  # fmt: skip
HELD_OUT_MEMORY = {
    "name": ["Can you remember my name?", "What was my name?"],
    "city": ["Where was it that I live?", "Can you remember where I live?"],
    "pet": ["What was my {z} called?", "Can you remember the name of my {z}?"],
    "colour": ["What was my favourite colour?", "Which colour is my favourite?"],
}
