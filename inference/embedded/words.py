"""What facts are made of: pools of words, and values put together from them.

Values are compositional or pseudo-words, so that a model cannot answer from memory: it has to look the value up
in the conversation. Pure: a Random in, text out.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random


def pool(text: str) -> list[str]:
    """The words of `text`."""
    return text.split()


FIRST_NAMES = pool("""
Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Kate Leo Mia Noah Olga Paul Rosa Simon Tina Victor Wendy Adam
Bella Carlos Dora Erik Fatima George Hanna Ivan Julia Karl Lena Marco Nina Oscar Petra Ravi Sara Tom Uma Vera Walter
Yara Zoe Alice Boris Chloe Daniel Elif Frank Gita Hugo Irene Jack Kira Lucas Maria Nadia Omar Priya Quinn Robert Sofia
Theo Ursula Vincent Wanda Xavier Yusuf Zara Aisha Bruno Celine Diego Eva Finn Gloria Hassan Ines James Klara Liam
Magnus Nora Otto Pablo Rita Samuel Tara Ulrich Viola William Yoko Zeno Amir Beatrice Colin Diana Edgar Flora Gabriel
Helena Igor Jana Kevin Laura Martin Naomi Oliver Paula Roman Stella Tobias Valentina Wei Yasmin Ali Barbara Cedric Delia
Emil Frida Gustav Heidi Isaac Jasmin Kenji Linda Mateo Natalie Oleg Peter Rachel Stefan Teresa Vasco Winnie Ada Anton
Birgit Cora Dario Elena Fabian Greta Holger Isabel Joel Katrin Louis Mona Nils Olivia Philip Renata Sven Thea Viktor
Agnes Arthur Bianca Claus Doris Ernst Fiona Gregor Hilda Ilya Johan Kaya Lukas Mila Niko Odette Pia Ruben Silke Timo
""")
CITIES = pool("""
Rome Paris Oslo Berlin Madrid Vienna Prague Lisbon Dublin Athens Warsaw Cairo Delhi Tokyo Seoul Lima Quito Boston
Chicago Toronto Sydney Munich Hamburg Milan Naples Turin Lyon Porto Seville Bergen Malmo Gdansk Krakow Riga Vilnius
Tallinn Zagreb Sofia Tunis Accra Lagos Nairobi Mumbai Osaka Kyoto Hanoi Manila Havana Bogota Santiago Denver Seattle
Austin Dallas Houston Phoenix Geneva Zurich Basel Ghent Bruges Utrecht Leiden Aarhus Turku Split Bari Genoa Verona
""")
COLOURS = pool(
    "red blue green yellow orange purple pink brown black white grey teal turquoise violet gold silver beige"
)
SHADES = ["", "", "dark ", "light ", "pale ", "bright ", "deep ", "dusty ", "warm ", "cool "]
JOBS = pool("""
nurse teacher baker florist plumber lawyer dentist pilot farmer carpenter librarian chemist painter tailor butcher
waiter chef engineer surgeon translator gardener journalist photographer electrician mechanic accountant cashier
firefighter policeman sailor potter jeweller barber optician pharmacist architect biologist geologist postman driver
""")
JOB_FIELDS = ["", "", "", "junior ", "senior ", "retired ", "marine ", "night ", "travelling ", "freelance ", "chief "]
FOODS = pool("""
soup stew pie salad curry pasta pizza risotto noodles dumplings pancakes sandwich omelette casserole tart cake
""")
TASTES = pool("""
lentil mushroom pumpkin tomato onion apple cherry plum cheese spinach potato chicken salmon bean carrot leek garlic
walnut lemon rhubarb beetroot
""")
DRINKS = pool("tea coffee juice lemonade cider soda smoothie wine punch syrup")
DRINK_TASTES = pool("ginger mint apple cherry orange peach lemon grape pear vanilla honey elderflower berry mango")
ANIMALS = pool("""
dog cat rabbit parrot hamster turtle goldfish pony goat ferret lizard canary snake mouse duck owl
""")
WILD_ANIMALS = pool("""
fox otter dolphin elephant tiger penguin hedgehog falcon whale giraffe panda wolf badger heron lynx octopus squirrel
seal koala zebra bison raven
""")
HOBBIES = pool("""
painting knitting hiking sailing chess gardening climbing fishing baking cycling photography pottery dancing archery
birdwatching skating woodcarving origami juggling stargazing
""")
INSTRUMENTS = pool("piano violin guitar flute drums cello trumpet harp clarinet accordion saxophone banjo oboe organ")
LANGUAGES = pool("""
French German Spanish Italian Polish Turkish Arabic Hindi Japanese Korean Greek Dutch Swedish Finnish Czech Swahili
""")
ALLERGENS = pool("peanuts pollen milk eggs cats dust shrimp wheat soy strawberries bees latex celery mustard")
SPORTS = pool(
    "football tennis rugby hockey volleyball judo rowing badminton cricket fencing handball golf surfing boxing"
)
MONTHS = pool("January February March April May June July August September October November December")
DAYS = pool("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
STREETS = pool("Street Road Lane Avenue Square Alley Way Hill")
TREES = pool("Elm Oak Maple Cedar Birch Willow Chestnut Garden Mill Church Station Harbour Market River Bridge Castle")
COMPANY_SUFFIXES = pool("Labs Motors Bank Foods Airlines Systems Books Energy Design Toys Tools Media")
TITLE_ADJECTIVES = pool("""
Silent Golden Broken Hidden Last Frozen Red Distant Burning Endless Little Lost Crooked Secret Hollow Velvet
""")
TITLE_NOUNS = pool("""
Harbour Garden River Clock Mirror Forest Lantern Island Winter Bridge Key Orchard Tower Letter Piano Storm
""")
GIFTS = pool(
    "watch scarf kite telescope backpack blanket lamp vase teapot umbrella camera bicycle tent puzzle globe mug"
)
RELATIONS = [
    "best friend",
    *pool("""
sister brother mother father boss neighbour aunt uncle cousin grandmother
grandfather teacher doctor flatmate colleague daughter son wife husband landlord coach dentist nephew niece
mom dad mum grandma grandpa friend girlfriend boyfriend partner roommate neighbor child baby kid twin stepfather
stepmother godmother godfather sister-in-law brother-in-law cat dog horse parrot rabbit hamster lawyer
plumber trainer manager assistant student client customer guest tenant nanny tutor
"""),
    *("little sister", "big brother", "older sister", "younger brother", "old friend", "new colleague", "ex-wife"),
]
# Of nouns of a visitor's own: "wifi password", "gym locker", "train seat".
OWNERS = pool("""
wifi email bank gym work school office garden garage bike train bus parking locker phone laptop computer library
club team account tax passport insurance hotel holiday wedding party dinner lunch coffee blood hair eye shirt ring house
key map boat cabin tent cup mail voice game user customer order invoice member project class exam lab desk
""")
OWNED = pool("""
password number code name size type date day time place seat colour box key card address title level score
budget price limit plan goal rule nickname motto brand model shop station line gate floor street team group song film
dish cake flower stone planet season month
""")
ALONE = pool("""
password passcode pin nickname motto mascot surname school university office weight height salary
budget deadline goal dream fear costume playlist ringtone username locker seat ticket team neighbourhood bakery gym bank
hotel boat bike house garden plan secret weakness talent superpower zodiac blog website project
""")
_COMMON = {
    "food": pool("pizza sushi spaghetti chocolate rice tacos bread steak pancakes lasagna burgers cheese bananas"),
    "drink": pool("coffee tea water milk beer wine cola juice cocoa lemonade whisky"),
    "car": [
        "a Tesla",
        "a Volvo",
        "a Toyota",
        "a Honda",
        "a BMW",
        "a Ford",
        "an Audi",
        "a van",
        "a truck",
        "an old jeep",
    ],
    "job": [
        *("a software engineer", "a programmer", "a doctor", "a student", "a manager", "a scientist", "a designer"),
        *("a data scientist", "a police officer", "a bus driver", "a writer", "an actor", "an artist", "a soldier"),
    ],
    "city": [
        *("New York", "Los Angeles", "San Francisco", "London", "Barcelona", "Amsterdam", "Brussels", "Stockholm"),
        *("Copenhagen", "Helsinki", "Budapest", "Istanbul", "Moscow", "Beijing", "Shanghai", "Singapore", "Cape Town"),
        *("France", "Germany", "Italy", "Spain", "India", "Japan", "Canada", "Brazil", "Norway", "Mexico", "China"),
    ],
    "company": pool("Google Microsoft Siemens Amazon Apple Nokia Samsung Boeing Airbus Philips Nestle Intel"),
}


def _common(rng: Random, of: str) -> str | None:
    """Now and then, what a visitor is likely to say, beside what no one could guess."""
    return rng.choice(_COMMON[of]) if rng.random() < 0.15 else None


_ONSETS = pool("b br c d dr f g gr h j k kl l m n p pr qu r s st t tr v w z sh th")
_VOWELS = pool("a e i o u a e i o ai ea ou")
_CODAS = ["", "", "", "l", "n", "r", "s", "m", "k", "nd", "x", "th", "rn"]


def pseudo_word(rng: Random) -> str:
    """A pronounceable word of two or three syllables that is nobody's: 'Velmar', 'Trouka'."""
    syllables = rng.choice((2, 2, 3))
    word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables - 1))
    return (word + rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)).capitalize()


def _known_or_pseudo(rng: Random, known: Sequence[str], pseudo: float) -> str:
    return pseudo_word(rng) if rng.random() < pseudo else rng.choice(known)


def with_article(noun: str) -> str:
    """'a nurse', 'an owl'."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def first_name(rng: Random) -> str:
    """Mostly a common name, sometimes one that nobody has."""
    return _known_or_pseudo(rng, FIRST_NAMES, 0.25)


def full_name(rng: Random) -> str:
    """'Ada Velmar'."""
    return f"{first_name(rng)} {pseudo_word(rng)}"


def city(rng: Random) -> str:
    """'Oslo', 'Port Trouka', 'Velmar'."""
    known = _common(rng, "city")
    if known:
        return known
    prefix = rng.choice(("", "", "", "", "Port ", "New ", "Saint "))
    return prefix + _known_or_pseudo(rng, CITIES, 0.5 if not prefix else 1.0)


def age(rng: Random) -> str:
    """5 to 99."""
    return str(rng.randint(5, 99))


def day_of_year(rng: Random) -> str:
    """'14 March', 'March 14'."""
    day, month = rng.randint(1, 31), rng.choice(MONTHS)
    return f"{day} {month}" if rng.random() < 0.7 else f"{month} {day}"


def colour(rng: Random) -> str:
    """'dark teal'."""
    return rng.choice(SHADES) + rng.choice(COLOURS)


def job(rng: Random) -> str:
    """'a senior florist'."""
    return _common(rng, "job") or with_article(rng.choice(JOB_FIELDS) + rng.choice(JOBS))


def food(rng: Random) -> str:
    """'pumpkin risotto'."""
    return _common(rng, "food") or f"{rng.choice(TASTES)} {rng.choice(FOODS)}"


def drink(rng: Random) -> str:
    """'mint tea'."""
    return _common(rng, "drink") or f"{rng.choice(DRINK_TASTES)} {rng.choice(DRINKS)}"


def pet(rng: Random) -> str:
    """'a parrot called Miso'."""
    trait = rng.choice(("", "", "", "small ", "black ", "white ", "old ", "young "))
    animal = with_article(trait + rng.choice(ANIMALS))
    if rng.random() < 0.15:
        return animal
    return f"{animal} {rng.choice(('called', 'named'))} {_known_or_pseudo(rng, FIRST_NAMES, 0.6)}"


def digits(rng: Random, count: int) -> str:
    """`count` digits, the first not 0."""
    return str(rng.randint(10 ** (count - 1), 10**count - 1))


def phone(rng: Random) -> str:
    """'471-8935'."""
    return f"{digits(rng, 3)}-{digits(rng, rng.choice((3, 4)))}"


def car(rng: Random) -> str:
    """'a red Velmar'."""
    return _common(rng, "car") or f"{with_article(rng.choice(COLOURS))} {pseudo_word(rng)}"


def company(rng: Random) -> str:
    """'Trouka Labs'."""
    return _common(rng, "company") or f"{pseudo_word(rng)} {rng.choice(COMPANY_SUFFIXES)}"


def address(rng: Random) -> str:
    """'12 Elm Street'."""
    return f"{rng.randint(1, 180)} {_known_or_pseudo(rng, TREES, 0.3)} {rng.choice(STREETS)}"


def book(rng: Random) -> str:
    """'The Silent Harbour'."""
    return f"The {rng.choice(TITLE_ADJECTIVES)} {rng.choice(TITLE_NOUNS)}"


def day_and_hour(rng: Random) -> str:
    """'Tuesday at 14:30'."""
    return f"{rng.choice(DAYS)} at {rng.randint(7, 20)}:{rng.choice(('00', '15', '30', '45'))}"


def flight(rng: Random) -> str:
    """'KX 482'."""
    return f"{rng.choice('ABDEFGHKLMNPRSTUVWX')}{rng.choice('ABDEFGHKLMNPRSTUVWX')} {digits(rng, 3)}"


def gift(rng: Random) -> str:
    """'a pale green kite'."""
    return with_article(f"{colour(rng)} {rng.choice(GIFTS)}")


def year(rng: Random) -> str:
    """1600 to 2020."""
    return str(rng.randint(1600, 2020))


HIS = frozenset(
    pool("""
brother father boss uncle grandfather nephew son husband landlord coach dad grandpa boyfriend stepfather godfather
""")
)
HERS = frozenset(
    pool("""
sister mother aunt grandmother niece daughter wife mom mum grandma girlfriend stepmother godmother nanny
""")
)


def any_noun(rng: Random) -> str:
    """What somebody may call a thing of theirs: 'wifi password', 'motto', 'velmar code'."""
    draw = rng.random()
    if draw < 0.4:
        return rng.choice(ALONE)
    owner = rng.choice(OWNERS) if draw < 0.85 else pseudo_word(rng).lower()
    return f"{owner} {rng.choice(OWNED)}"


def any_value(rng: Random) -> str:
    """A value of whatever kind."""
    return rng.choice(_VALUES)(rng)


_VALUES = (
    *(pseudo_word, first_name, full_name, city, day_of_year, colour, food, company, book, day_and_hour, year, gift),
    *(
        phone,
        lambda rng: digits(rng, rng.randint(1, 6)),
        lambda rng: pseudo_word(rng).lower(),
        lambda rng: rng.choice(OWNED),
    ),
    lambda rng: f"{pseudo_word(rng).lower()}{rng.randint(1, 99)}",
)
