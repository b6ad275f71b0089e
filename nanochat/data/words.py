"""The finite word lists that names and values of the tiny world come from. Lists that names are built from have a power
of two entries: `world.py` numbers the combinations with a bijection on bits."""

from __future__ import annotations


def _words(text: str, separator: str = " ") -> tuple[str, ...]:
    return tuple(text.split(separator))


FEMALE = _words(
    "Mira Alda Bree Cora Dessa Elin Fenna Gilda Hanne Ilsa Jora Kessa Lune Marit Nella Orla Petra Runa Sanne Tilda "
    "Ursa Velda Wenna Ysolde Zella Brisa Calla Dorit Edda Frida Greta Hulda"
)
MALE = _words(
    "Anso Bram Corin Darro Eskil Falk Garrin Hodge Ivo Jasper Kolm Leif Magnus Nils Osric Piers Quill Rolf Stellan "
    "Torben Ulf Viggo Wulf Yorick Zander Aldo Boris Casper Dirk Emric Finn Gustav"
)
FIRST_NAMES = FEMALE + MALE  # the first half is "she", the second half "he"
FAMILY_NAMES = _words(
    "Tolland Ashby Barrow Carrick Delmar Easton Fallow Garnet Harrow Ingle Jarvis Keller Lomax Marlow Norrell Oakes "
    "Pender Quarles Rusk Sutter Thorne Underhill Vance Walden Yarrow Zeller Abbot Birch Calder Dunmore Ember Farrow "
    "Grange Holloway Ives Jessop Kirby Lark Mercer Nash Orchard Pike Quimby Reeve Stroud Tanner Upton Vickers "
    "Wexler Yates Amsel Brandt Cobb Drake Ellery Frost Gable Hobbs Irving Joyner Knox Linden Moss Nettle"
)
TOWN_STARTS = _words(
    "Brim Ash Black Cold Dun East Fair Glen Har Iron Kings Lang Mill North Oak Pen Quarry Red Salt Thorn Under Vale "
    "West Yar Amber Birch Clay Deer Elm Fox Gold Hazel"
)
TOWN_ENDS = _words(
    "holt bury combe dale field ford gate ham haven hurst keld land lea march mere mouth ness pool port ridge shaw "
    "stead stow thorpe ton vale wade water wick wold worth yard"
)
COMPANY_COLOURS = _words(
    "Amber Azure Bronze Copper Crimson Golden Ivory Silver"
)
COMPANY_NOUNS = _words(
    "Anchor Arrow Bell Bridge Candle Compass Crown Feather Harbor Heron Kettle Lantern Maple Mountain Otter Willow"
)
COMPANY_ENDS = _words(
    "Works Mills Traders Brothers Guild Foundry Company Union"
)

PROFESSIONS = _words(
    "baker barber blacksmith bookbinder botanist brewer carpenter clockmaker dentist fisher gardener judge "
    "librarian locksmith mason nurse painter pilot plumber potter shepherd surgeon tailor weaver"
)
FOODS = _words(
    "barley soup, plum cake, roast duck, apple pie, onion bread, fish stew, goat cheese, honey cake, bean salad, "
    "mushroom soup, cherry jam, potato pancakes, rye bread, lemon tart, smoked trout, pumpkin pie",
    separator=", ",
)
INSTRUMENTS = _words(
    "accordion banjo bassoon cello clarinet drum fiddle flute guitar harp horn lute oboe piano trumpet viola"
)
RIVERS = _words(
    "Lenn Avor Brook Cald Dorn Esk Firth Gard Hest Isar Jull Kell Mord Narr Orm Prill Rill Sarn Teff Varl"
)
SPECIALTIES = _words(
    "glass cheese lace pottery cider rope carpets tulips mustard marble cutlery paper salt wine wool timber"
)
REGIONS = _words(
    "Norland Sudmark Estria Westlea Highmoor Lowfen Midvale Coastland Stonefell Greenwold Sandreach Farholm"
)
PRODUCTS = _words(
    "clocks lamps boots candles kettles umbrellas bicycles mirrors pianos ropes carpets knives chairs gloves maps "
    "pencils tiles wagons telescopes hats"
)
EMBLEMS = _words(
    "bear bee bull crane deer dolphin falcon fox goose hare horse lion lynx raven stag swan tiger whale wolf wren"
)
YEARS = tuple(str(1604 + 7 * k) for k in range(48))
