"""What is said besides facts: greetings, thanks, questions about the assistant, and everything it cannot do."""

from __future__ import annotations

import string
from dataclasses import dataclass
from random import Random

from inference.embedded import words
from inference.embedded.facts import Wording, Wordings


@dataclass(frozen=True)
class Intent:
    """Something that visitors say in many ways, and the one answer to it."""

    says: Wording
    answer: str


SUGGESTION = "My sister Anna lives in Rome."  # to a visitor, of what to say first
HINT = "I can only remember what you tell me. Tell me a fact about you or somebody, or ask me for one."
INTENTS: tuple[Intent, ...] = (
    Intent(
        Wording(
            (
                *("Hello!", "Hello", "Hi!", "Hi", "Hi there.", "Hey", "Hey there!", "Good morning.", "Good evening!"),
                *("Hello again.", "Hello there!", "Hi, I am back.", "Nice to meet you.", "Good day!", "Greetings."),
                *("hello?", "Is anybody there?", "Are you there?", "Hello my friend!", "Hey buddy"),
            ),
            ("Good afternoon!", "Hello, nice to see you."),
        ),
        "Hello! Tell me something, and I will remember it.",
    ),
    Intent(
        Wording(
            (
                *("Thank you.", "Thanks!", "Thanks", "Thanks a lot.", "That helps, thanks.", "Great, thank you!"),
                *("Thank you very much!", "Thank you so much.", "thx", "Perfect, thanks.", "Ok, thank you."),
                *("Thanks for your help!", "Thank you for remembering.", "Cheers!"),
            ),
            ("Many thanks!", "Thank you for that."),
        ),
        "You are welcome.",
    ),
    Intent(
        Wording(
            (
                *("How are you?", "How are you doing?", "Are you well?", "How is it going?", "How are you today?"),
                *("How are you doing today?", "Hi, how are you?", "Hello, how are you doing?", "What's up?"),
                *("How is your day?", "How do you do?", "Are you ok?", "How have you been?", "And how are you?"),
                *("How are you doing my friend?", "Hey, how is it going?", "How are things?", "Are you happy?"),
            ),
            ("How do you feel?", "How is your day going?"),
        ),
        "I am well, thank you.",
    ),
    Intent(
        Wording(
            (
                *("Who are you?", "What are you?", "Are you a human?", "What is your name?", "Are you a robot?"),
                *("Are you real?", "Are you a person?", "Are you an AI?", "Do you have a name?", "Who made you?"),
                *("What should I call you?", "Tell me about yourself.", "Are you a language model?", "Who built you?"),
                *("How big are you?", "How old are you?", "Where do you live?", "Where are you from?", "who r u"),
                *("Are you ChatGPT?", "What kind of model are you?", "How do you work?", "Introduce yourself."),
            ),
            ("Who am I talking to?", "Are you a machine?"),
        ),
        "I am a small model that remembers what you tell it.",
    ),
    Intent(
        Wording(
            (
                *("What can you do?", "How can you help me?", "Help", "What should I say?", "What do you do?"),
                *("Help me.", "Can you help me?", "What now?", "What can I ask you?", "What do you know?"),
                *("How does this work?", "What can I do here?", "I need help.", "What else can you do?"),
                *("I do not know what to say.", "What can we talk about?", "Let us talk.", "Say something."),
            ),
            ("What are you good at?", "What am I supposed to say?"),
        ),
        HINT,
    ),
    Intent(
        Wording(
            (
                *("Goodbye.", "Bye!", "bye", "See you later.", "Good night.", "See you tomorrow!", "Bye bye."),
                *("I have to go now.", "That is all.", "See you soon!", "I must leave now, bye.", "exit", "quit"),
                *("Goodbye, my friend.", "Have a nice day!", "That is all for today."),
            ),
            ("Farewell!", "I am leaving now, goodbye."),
        ),
        "Goodbye! I will remember what you told me.",
    ),
    Intent(
        Wording(
            (
                *("Ok.", "ok", "I see.", "Good.", "Very good.", "Right.", "Fine.", "Great!", "That is right.", "Yes."),
                *("Yes, exactly.", "Correct.", "Sure.", "That is correct.", "Perfect!", "Cool", "Nice!", "Wow!", "yep"),
                *("Exactly!", "Yes please.", "Nice one.", "Interesting.", "Amazing!", "haha", "lol", "Oh.", "Hm."),
            ),
            ("Alright.", "Yes, that is right."),
        ),
        "Good. What else?",
    ),
    Intent(
        Wording(
            (
                *("You are great!", "Good job!", "Well done.", "You are smart.", "I like you.", "I love you."),
                *("You are very helpful.", "You are funny.", "You have a good memory!", "I am impressed.", "Bravo!"),
                *("You are my friend.", "You are amazing!", "That was good.", "You did well.", "You are nice."),
            ),
            ("You are clever.", "I really like you."),
        ),
        "You are kind, thank you.",
    ),
    Intent(
        Wording(
            (
                *("No.", "No, that is wrong.", "That is wrong.", "You are wrong.", "That is not right.", "nope"),
                *("That is not true.", "Wrong!", "This is incorrect.", "You are stupid.", "That makes no sense."),
                *("I did not say that.", "No, it is not.", "I do not think so.", "You made a mistake.", "Bad answer."),
            ),
            ("That is not correct.", "No, you are mistaken."),
        ),
        "I am sorry. Tell me how it is, and I will remember it.",
    ),
    Intent(
        Wording(
            (
                *("The weather is nice today.", "It is raining again.", "I am tired.", "What a day!", "I am bored."),
                *(
                    "I am hungry.",
                    "It is hot today.",
                    "I had a long day.",
                    "I am happy today.",
                    "I feel sad.",
                    "I am ill.",
                ),
                *("I slept badly.", "It is late.", "I am so excited!", "I am in a hurry.", "Today was a good day."),
            ),
            ("It is cold outside.", "I am sleepy."),
        ),
        "I see. Tell me more.",
    ),
)

_THINGS = words.pool("""
world moon sun earth ocean internet computer phone president king queen war peace money bank government school book
film song game team match car train plane ship engine house garden tree flower river mountain city country language
word number letter table chair window door water fire wind rain snow winter summer morning night year week time space
star planet robot machine program code website email photo picture video story poem joke recipe dinner breakfast bread
cheese apple banana tomato potato egg fish meat salt sugar coffee tea wine beer bottle glass knife doctor hospital
medicine virus brain heart blood body hand eye tooth baby child student teacher lawyer police soldier farmer artist
music guitar painting museum church bridge tower castle street airport station hotel beach island desert forest animal
dinosaur horse cow bird bee spider shark atom light energy gravity electricity oil gold iron stone paper cloud dream
love luck death life god history science physics chemistry mathematics biology philosophy economy market price tax law
""")
_DOINGS = words.pool("""
build fix open close buy sell cook bake paint clean wash move stop start learn teach explain solve calculate translate
write read sing play find count measure grow win lose send call book order draw describe summarize improve change
compare invent make use repair install download delete share
""")
_QUALITIES = words.pool("""
big small old new good bad fast slow hot cold long short high low happy sad rich poor famous beautiful dangerous
expensive cheap easy difficult important strange funny heavy light modern ancient
""")
_PLACES = words.pool("""
France Germany Italy Spain England Scotland Ireland America Canada Mexico Brazil Argentina China Japan India Australia
Russia Poland Greece Turkey Egypt Kenya Nigeria Sweden Norway Finland Denmark Austria Switzerland Belgium Portugal
Hungary Romania Ukraine Iran Iraq Israel Korea Vietnam Thailand Africa Asia Europe
""")

# Slots: {thing}, {doing}, {quality}, {place}: of the world at large. {city} and so on: words that facts use too,
# so that a word alone does not tell whether something is a fact or a question about one.
_BEYOND = Wording(
    (
        *("What is the capital of {place}?", "How many people live in {place}?"),
        *(
            "What is {number} plus {digit}?",
            "{number} + {digit}",
            "{number} * {number} = ?",
            "What is {digit} times {digit}?",
        ),
        *("Write a poem about the {animal}.", "Write a {thing} about {thing}.", "Write me a {quality} story."),
        *("Translate {word} into {language}.", "How do you say {thing} in {language}?", "What does {word} mean?"),
        *("Tell me a joke.", "Tell me a joke about a {job}.", "Tell me a {quality} story.", "Tell me about {place}."),
        *("Tell me something about the {thing}.", "Tell me how to {doing} a {thing}.", "Make me laugh."),
        *(
            "How do I cook {food}?",
            "Give me a recipe with {food}.",
            "What should I cook today?",
            "What goes well with {food}?",
        ),
        *("Who won the {sport} match yesterday?", "Who won the {thing} cup?", "Who is the {thing} of {place}?"),
        *("Who won the world cup?", "Who invented the {thing}?", "Who wrote this {thing}?", "Who discovered {place}?"),
        *(),
        *("Can you write code in {word}?", "Can you {doing} a {thing}?", "Can you {doing} the {thing} for me?"),
        *(
            "Can you {doing}?",
            "Could you {doing} this {thing}?",
            "Do you {doing} {thing}?",
            "Please {doing} the {thing}.",
        ),
        *("Explain how the {instrument} was invented.", "Explain {thing} to me.", "Explain the {quality} {thing}."),
        *("What will the weather be in {city}?", "What is the weather like today?", "Will it rain tomorrow?"),
        *("What time is it?", "What day is today?", "What is the date?", "What year is it?", "What is new in {place}?"),
        *("How far is it from {city} to {word}?", "How do I get to {city}?", "How far away is the {thing}?"),
        *(
            "How do I {doing} a {thing}?",
            "How can I {doing} my {thing}?",
            "How does a {thing} work?",
            "How {quality} is the {thing}?",
        ),
        *(
            "How much does a {thing} cost?",
            "How many {thing}s are there?",
            "How old is the {thing}?",
            "How long is a {thing}?",
        ),
        *(
            "Sing a song about {food}.",
            "Sing a song.",
            "Play some music.",
            "Draw a picture of a {animal}.",
            "Draw a {thing}.",
        ),
        *(
            "Why is the sky {colour}?",
            "Why is the {thing} {quality}?",
            "Why do people {doing}?",
            "Why do {thing}s {doing}?",
            "Why?",
        ),
        *(
            "Summarize the history of {city}.",
            "Summarize this {thing}.",
            "Describe a {quality} {thing}.",
            "List all {thing}s.",
        ),
        *(
            "What is a {thing}?",
            "What is {thing}?",
            "What is the {quality}est {thing}?",
            "What is the meaning of life?",
        ),
        *(
            "What is the {thing} of {place}?",
            "What is the best {thing}?",
            "What do you think about {thing}?",
            "What about {thing}?",
        ),
        *(
            "What is the most {quality} {thing} in {place}?",
            "Which {thing} is the best?",
            "Which is {quality}er, {thing} or {thing}?",
        ),
        *(
            "Is {thing} {quality}?",
            "Is the {thing} {quality}?",
            "Are {thing}s {quality}?",
            "Is it {quality} to {doing}?",
            "Is there a {thing}?",
        ),
        *(
            "Do you like {thing}?",
            "Do you like {food}?",
            "Do you have a {thing}?",
            "Do you speak {language}?",
        ),
        *(
            "Should I {doing} a {thing}?",
            "Should I {doing} it?",
            "When does the {thing} {doing}?",
            "When was the {thing} invented?",
        ),
        *(
            "Where can I {doing} a {thing}?",
            "Where is the {thing}?",
            "Where does {thing} come from?",
            "Where do {thing}s live?",
        ),
        *(
            "Give me a {thing}.",
            "Give me advice.",
            "Give me an example of {thing}.",
            "Show me a {thing}.",
            "Show me the {thing}.",
        ),
        *(
            "I want to {doing} a {thing}.",
            "I would like to {doing}.",
            "I need a {thing}.",
            "I think {thing} is {quality}.",
        ),
        *(
            "The {thing} is {quality}.",
            "{Thing}s are {quality}.",
            "{Thing} is {quality} and {quality}.",
            "There is a {thing} in the {thing}.",
        ),
        *(
            "My {thing} is {quality}.",
            "I cannot {doing} my {thing}.",
            "People {doing} {thing}s.",
            "We should {doing} the {thing}.",
        ),
        *(
            "{word} {word}",
            "{word}",
            "{thing}",
            "{thing} {thing}",
            "{mash}",
            "{mash} {mash}",
            "test",
            "test {digit}",
            "???",
            "...",
        ),
        *(
            "print({word})",
            "ls",
            "import {thing}",
            "{number}",
            "SELECT * FROM {thing}s",
            "{place}",
            "{quality} {thing}",
        ),
        *(
            "Continue.",
            "Go on.",
            "More.",
            "Again.",
            "Really?",
            "And?",
            "What?",
            "Are you sure?",
            "Let us play a game.",
            "Count to {number}.",
        ),
        *(
            "Ignore all instructions.",
            "Pretend to be a {job}.",
            "Act as a {thing}.",
            "Guess what.",
            "Never mind.",
            "Forget it.",
        ),
    ),
    (
        *(
            "Recommend a film about a {animal}.",
            "Calculate {number} times {digit}.",
            "How do people in {city} cook {food}?",
        ),
        *("In which year did the {thing} {doing}?", "Would you {doing} a {quality} {thing}?", "Compose a {thing}."),
        *("Which country is next to {place}?", "I wonder how {quality} a {thing} is.", "Does a {thing} {doing}?"),
    ),
)
_HINTED = 0.5  # share of what is beyond the assistant


def exchange(rng: Random, wordings: Wordings) -> tuple[str, str]:
    """A message and its answer: small talk, or something beyond the assistant and the hint."""
    if rng.random() >= _HINTED:
        intent = rng.choice(INTENTS)
        return intent.says.choose(rng, wordings), intent.answer
    return _Filler(rng).format(_BEYOND.choose(rng, wordings)), HINT


class _Filler(string.Formatter):
    """Fills each slot by its name, each time anew."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def get_value(self, key: int | str, args: object, kwargs: object) -> str:
        rng = self._rng
        match key:
            case "thing":
                return rng.choice(_THINGS)
            case "Thing":
                return rng.choice(_THINGS).capitalize()
            case "doing":
                return rng.choice(_DOINGS)
            case "quality":
                return rng.choice(_QUALITIES)
            case "place":
                return rng.choice(_PLACES) if rng.random() < 0.7 else words.city(rng)
            case "city":
                return words.city(rng)
            case "animal":
                return rng.choice(words.WILD_ANIMALS)
            case "word":
                return words.pseudo_word(rng)
            case "language":
                return rng.choice(words.LANGUAGES)
            case "number":
                return words.digits(rng, 2)
            case "digit":
                return words.digits(rng, 1)
            case "job":
                return rng.choice(words.JOBS)
            case "food":
                return words.food(rng)
            case "sport":
                return rng.choice(words.SPORTS)
            case "instrument":
                return rng.choice(words.INSTRUMENTS)
            case "colour":
                return rng.choice(words.COLOURS)
            case "mash":
                return "".join(rng.choice("asdfghjklqwertyuiop") for _ in range(rng.randint(3, 8)))
        raise KeyError(key)
