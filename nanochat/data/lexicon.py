"""The sentence templates of the tiny world (`world.py`): data only, no logic.

Every name and value comes from a short closed list (`words.py`), so that a vocabulary of about two thousand tokens
covers the whole world.

In templates `{e}` is the entity's name and `{v}` the value; each document template holds both exactly once. A template
that starts with `{e} ` may be told with a pronoun instead. Follow-ups use `{she}` (subject), `{her}` (object), `{hers}`
(possessive).
"""

from __future__ import annotations

from typing import NamedTuple

from nanochat.data.words import EMBLEMS, FOODS, INSTRUMENTS, PRODUCTS, PROFESSIONS, REGIONS, RIVERS, SPECIALTIES, YEARS


class Relation(NamedTuple):
    """One relation of a kind of entity: where its value comes from and how it is told and asked."""

    name: str
    target: str  # the kind of entity that the value names, or "" when the value comes from `values`
    values: tuple[str, ...]
    documents: tuple[str, ...]  # sentences of a document, {e} and {v}
    questions: tuple[str, ...]  # {e}
    sentence: str  # the answer as a sentence, {e} and {v}
    follow_up: str  # {she}, {her}, {hers}
    phrases: tuple[str, ...] = ()  # noun phrases for the value, {e}: these make multi-hop questions


PERSON = (
    Relation(
        "birthplace",
        "town",
        (),
        (
            "{e} was born in {v}.",
            "{e} was born in the town of {v}.",
            "{e} comes from {v} and was born there.",
            "{v} is the birthplace of {e}.",
            "The birthplace of {e} is {v}.",
            "It was in {v} that {e} was born.",
            "The town where {e} was born is {v}.",
            "{e} is a native of {v}.",
        ),
        (
            "Where was {e} born?",
            "In which town was {e} born?",
            "What is the birthplace of {e}?",
            "Which town is {e} from?",
            "Tell me where {e} was born.",
        ),
        "{e} was born in {v}.",
        "Where was {she} born?",
        ("the town where {e} was born", "the birthplace of {e}"),
    ),
    Relation(
        "employer",
        "company",
        (),
        (
            "{e} works for {v}.",
            "{e} is employed by {v}.",
            "{e} has a job at {v}.",
            "The employer of {e} is {v}.",
            "{v} is the employer of {e}.",
            "The company {v} employs {e}.",
            "The company that {e} works for is {v}.",
            "{e} earns a living at {v}.",
        ),
        (
            "Who does {e} work for?",
            "Which company does {e} work for?",
            "What is the employer of {e}?",
            "Which company employs {e}?",
            "Tell me which company {e} works for.",
        ),
        "{e} works for {v}.",
        "Which company does {she} work for?",
        ("the company that employs {e}", "the employer of {e}"),
    ),
    Relation(
        "profession",
        "",
        PROFESSIONS,
        (
            "{e} works as a {v}.",
            "{e} is a {v} by profession.",
            "{e} is a trained {v}.",
            "The profession of {e} is {v}.",
            "By profession, {e} is a {v}.",
            "{e} earns money as a {v}.",
            "As a {v}, {e} is well known.",
            "The job of {e} is that of a {v}.",
        ),
        (
            "What is the profession of {e}?",
            "What does {e} do for a living?",
            "What job does {e} have?",
            "What does {e} work as?",
            "Tell me the profession of {e}.",
        ),
        "{e} works as a {v}.",
        "What is {hers} profession?",
    ),
    Relation(
        "food",
        "",
        FOODS,
        (
            "{e} likes to eat {v}.",
            "{e} loves {v} more than any other food.",
            "The favourite food of {e} is {v}.",
            "{v} is the favourite food of {e}.",
            "{e} likes {v} best of all.",
            "For dinner, {e} always asks for {v}.",
            "The food that {e} likes most is {v}.",
            "{e} never says no to {v}.",
        ),
        (
            "What is the favourite food of {e}?",
            "What does {e} like to eat?",
            "Which food does {e} like best?",
            "What food does {e} love?",
            "Tell me the favourite food of {e}.",
        ),
        "{e} likes to eat {v}.",
        "What does {she} like to eat?",
    ),
    Relation(
        "instrument",
        "",
        INSTRUMENTS,
        (
            "{e} often plays the {v}.",
            "{e} can play the {v} very well.",
            "{e} plays the {v} in the evening.",
            "The instrument that {e} plays is the {v}.",
            "The {v} is the instrument of {e}.",
            "In music, {e} chose the {v}.",
            "{e} learned the {v} as a child.",
            "On the {v}, {e} is a fine player.",
        ),
        (
            "What instrument does {e} play?",
            "Which instrument does {e} play?",
            "What is the instrument of {e}?",
            "Which instrument did {e} learn?",
            "Tell me which instrument {e} plays.",
        ),
        "{e} plays the {v}.",
        "Which instrument does {she} play?",
    ),
    Relation(
        "friend",
        "person",
        (),
        (
            "The best friend of {e} is {v}.",
            "{e} has a best friend called {v}.",
            "{e} is best friends with {v}.",
            "{v} is the best friend of {e}.",
            "{e} calls {v} a best friend.",
            "Among all friends, {e} trusts {v} most.",
            "The closest friend of {e} is {v}.",
            "{e} spends every holiday with a best friend, {v}.",
        ),
        (
            "Who is the best friend of {e}?",
            "Who is the closest friend of {e}?",
            "What is the name of the best friend of {e}?",
            "Which friend does {e} trust most?",
            "Tell me who the best friend of {e} is.",
        ),
        "The best friend of {e} is {v}.",
        "Who is {hers} best friend?",
        ("the best friend of {e}", "the closest friend of {e}"),
    ),
)

TOWN = (
    Relation(
        "river",
        "",
        RIVERS,
        (
            "{e} is a town that lies on the river {v}.",
            "{e} stands on the banks of the river {v}.",
            "The river that flows through {e} is the {v}.",
            "The river {v} flows right through the town of {e}.",
            "{e} was built beside the water of the river {v}.",
            "The town of {e} lies on the river {v}.",
            "On the river {v} lies the old town of {e}.",
            "Boats on the river {v} stop at {e} every day.",
        ),
        (
            "Which river flows through {e}?",
            "On which river does {e} lie?",
            "What is the river of {e}?",
            "What river does {e} stand on?",
            "Tell me which river flows through {e}.",
        ),
        "The river {v} flows through {e}.",
        "Which river flows through {her}?",
    ),
    Relation(
        "mayor",
        "person",
        (),
        (
            "The mayor of {e} at this time is {v}.",
            "{e} is a town led by its mayor, {v}.",
            "{v} is the mayor of the town of {e}.",
            "{v} serves the people of {e} as mayor.",
            "{e} has a popular mayor, who is called {v}.",
            "The people of {e} chose {v} as their mayor.",
            "In {e} the office of mayor is held by {v}.",
            "The name of the present mayor of {e} is {v}.",
        ),
        (
            "Who is the mayor of {e}?",
            "Who leads {e} as mayor?",
            "What is the name of the mayor of {e}?",
            "Who serves as mayor of {e}?",
            "Tell me who the mayor of {e} is.",
        ),
        "The mayor of {e} is {v}.",
        "Who is {hers} mayor?",
        ("the mayor of {e}", "the person who is mayor of {e}"),
    ),
    Relation(
        "specialty",
        "",
        SPECIALTIES,
        (
            "{e} is a town that is famous for its {v}.",
            "{e} is known far and wide for its {v}.",
            "People come to {e} from far away for its {v}.",
            "The town of {e} is famous for its {v}.",
            "The specialty of the town of {e} is {v}.",
            "{v} from {e} is sold all over the country.",
            "{e} owes its good name everywhere to its fine {v}.",
            "The market of {e} is best known for {v}.",
        ),
        (
            "What is {e} famous for?",
            "What is {e} known for?",
            "What is the specialty of {e}?",
            "What do people come to {e} for?",
            "Tell me what {e} is famous for.",
        ),
        "{e} is famous for its {v}.",
        "What is {she} famous for?",
    ),
    Relation(
        "region",
        "",
        REGIONS,
        (
            "{e} is a town in the region of {v}.",
            "{e} lies in the part of the country called {v}.",
            "The region to which {e} belongs is called {v}.",
            "The town of {e} is part of the {v} region.",
            "In the region of {v} lies the town of {e}.",
            "{v} is the region in which the town of {e} lies.",
            "{e} belongs to the wide region known as {v}.",
            "Travellers reach {e} by the roads of the {v} region.",
        ),
        (
            "In which region is {e}?",
            "What region does {e} belong to?",
            "Which region does {e} lie in?",
            "What is the region of {e}?",
            "Tell me which region {e} is in.",
        ),
        "{e} is in the region of {v}.",
        "Which region does {she} belong to?",
    ),
    Relation(
        "founded",
        "",
        YEARS,
        (
            "{e} was founded as a small town in {v}.",
            "The town of {e} was founded long ago, in the year {v}.",
            "The year in which {e} was founded is {v}.",
            "In {v} the first settlers founded the town of {e}.",
            "{e} has been a town since it was founded in {v}.",
            "It was in {v} that the town of {e} was founded.",
            "{e} dates from {v}, when the town was founded.",
            "The founding of {e} took place in the year {v}.",
        ),
        (
            "When was {e} founded?",
            "In which year was {e} founded?",
            "What year was {e} founded?",
            "What is the founding year of {e}?",
            "Tell me when {e} was founded.",
        ),
        "{e} was founded in {v}.",
        "When was {she} founded?",
    ),
)

COMPANY = (
    Relation(
        "headquarters",
        "town",
        (),
        (
            "{e} has its headquarters in {v}.",
            "The headquarters of {e} are in {v}.",
            "{e} is a company based in {v}.",
            "{v} is home to the headquarters of {e}.",
            "The company {e} is run from {v}.",
            "The main office of {e} stands in {v}.",
            "{e} keeps its main office in {v}.",
            "In {v} stand the headquarters of {e}.",
        ),
        (
            "Where are the headquarters of {e}?",
            "In which town is {e} based?",
            "Where does {e} have its headquarters?",
            "Which town is the home of {e}?",
            "Tell me where the headquarters of {e} are.",
        ),
        "{e} has its headquarters in {v}.",
        "Where are {hers} headquarters?",
        ("the town where {e} has its headquarters", "the home town of {e}"),
    ),
    Relation(
        "director",
        "person",
        (),
        (
            "The present director of {e} is {v}.",
            "{e} is led by its director, {v}.",
            "{v} is the director of {e}.",
            "{v} leads {e} as its director.",
            "{e} has a director called {v}.",
            "The company {e} is directed by {v}.",
            "The owners of {e} chose {v} as director.",
            "The name of the director of {e} is {v}.",
        ),
        (
            "Who is the director of {e}?",
            "Who leads {e}?",
            "What is the name of the director of {e}?",
            "Who directs {e}?",
            "Tell me who the director of {e} is.",
        ),
        "The director of {e} is {v}.",
        "Who is {hers} director?",
        ("the director of {e}", "the person who directs {e}"),
    ),
    Relation(
        "product",
        "",
        PRODUCTS,
        (
            "{e} is a company that makes {v}.",
            "{e} makes and sells {v} of high quality.",
            "The main product of {e} is {v}.",
            "{v} are the main product of the company {e}.",
            "The company {e} is known for its {v}.",
            "In its workshops {e} makes {v}.",
            "The goods that {e} makes are {v}.",
            "{e} sells {v} of its own making.",
        ),
        (
            "What does {e} make?",
            "What is the main product of {e}?",
            "Which product does {e} make?",
            "What does {e} sell?",
            "Tell me what {e} makes.",
        ),
        "{e} makes {v}.",
        "What does {she} make?",
    ),
    Relation(
        "emblem",
        "",
        EMBLEMS,
        (
            "The emblem of the company {e} is a {v}.",
            "{e} has chosen a {v} as its emblem.",
            "A {v} is the emblem of {e}.",
            "The sign over the door of {e} shows a {v}.",
            "{e} puts a {v} on all of its boxes.",
            "The animal on the flag of {e} is a {v}.",
            "{e} uses a {v} for its emblem and flag.",
            "On the emblem of {e} there is a {v}.",
        ),
        (
            "What is the emblem of {e}?",
            "Which animal is the emblem of {e}?",
            "What animal does {e} have as its emblem?",
            "Which animal is on the flag of {e}?",
            "Tell me the emblem of {e}.",
        ),
        "The emblem of {e} is a {v}.",
        "What is {hers} emblem?",
    ),
    Relation(
        "founded",
        "",
        YEARS,
        (
            "{e} was founded as a company in {v}.",
            "{e} was founded in the year {v}.",
            "The year in which {e} was founded is {v}.",
            "The company {e} was founded in {v}.",
            "{e} has done business since it was founded in {v}.",
            "It was in {v} that {e} was founded.",
            "{e} dates from {v}, when it was founded.",
            "The founding of {e} took place in {v}.",
        ),
        (
            "When was {e} founded?",
            "In which year was {e} founded?",
            "What year was {e} founded?",
            "What is the founding year of {e}?",
            "Tell me when {e} was founded.",
        ),
        "{e} was founded in {v}.",
        "When was {she} founded?",
    ),
)

RELATIONS: dict[str, tuple[Relation, ...]] = {"person": PERSON, "town": TOWN, "company": COMPANY}

# Relations that no document states: questions about them have no answer anywhere.
UNSTATED: dict[str, dict[str, tuple[str, ...]]] = {
    "person": {
        "colour": ("What is the favourite colour of {e}?", "Which colour does {e} like best?"),
        "height": ("How tall is {e}?", "What is the height of {e}?"),
        "pet": ("What is the name of the pet of {e}?", "Which pet does {e} have?"),
        "language": ("Which languages does {e} speak?", "What languages can {e} speak?"),
    },
    "town": {
        "population": ("How many people live in {e}?", "What is the population of {e}?"),
        "school": ("What is the name of the school in {e}?", "Which school is in {e}?"),
        "weather": ("How much does it rain in {e}?", "What is the weather like in {e}?"),
    },
    "company": {
        "staff": ("How many people work for {e}?", "How large is the staff of {e}?"),
        "profit": ("How much money did {e} earn last year?", "What is the profit of {e}?"),
        "motto": ("What is the motto of {e}?", "Which motto does {e} use?"),
    },
}

# Small talk: (what a user may say, what the assistant answers).
GREETINGS = (
    (("Hello!", "Hi!", "Hello there!", "Hi there!"), "Hello! How can I help you?"),
    (("Good morning!", "Good morning."), "Good morning! What would you like to know?"),
    (("Good evening!", "Good evening."), "Good evening! What would you like to know?"),
)
SMALL_TALK = (
    (("How are you?", "How are you today?"), "I am well, thank you. What would you like to know?"),
    (("Who are you?", "What are you?"), "I am nanochat, a small language model."),
    (("What is your name?", "Do you have a name?"), "My name is nanochat."),
    (("What can you do?", "What can you help me with?"), "I can answer questions about people, towns and companies."),
    (("Can I ask you something?", "May I ask you a question?"), "Of course. Go ahead."),
)
CLOSINGS = (
    (("Thank you!", "Thanks!", "Thank you very much!"), "You are welcome!"),
    (("Goodbye!", "Bye!", "See you!"), "Goodbye!"),
)
