"""What there is in the drawn world, and how captions speak of it."""

from data.config import DRAWN_SIZE

SIDE, CELL, CELLS = DRAWN_SIZE, 16, 4
BACKGROUND = (24, 24, 32)
COLORS = {
    "red": (225, 45, 45),
    "green": (50, 190, 70),
    "blue": (55, 95, 235),
    "yellow": (240, 215, 55),
    "purple": (165, 60, 205),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
POSITIONS = {"top left": (8, 8), "top right": (56, 8), "bottom left": (8, 56), "bottom right": (56, 56)}
OPPOSITE = {"top left": "bottom right", "top right": "bottom left", "bottom left": "top right", "bottom right": "top left"}
LETTERS = {  # 5 x 5, drawn at twice the size
    "A": "01110 10001 11111 10001 10001",
    "C": "01111 10000 10000 10000 01111",
    "E": "11111 10000 11110 10000 11111",
    "H": "10001 10001 11111 10001 10001",
    "I": "11111 00100 00100 00100 11111",
    "L": "10000 10000 10000 10000 11111",
    "N": "10001 11001 10101 10011 10001",
    "O": "01110 10001 10001 10001 01110",
    "S": "01111 10000 01110 00001 11110",
    "T": "11111 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 01110",
    "X": "10001 01010 00100 01010 10001",
}

# no training scene holds these; evaluation does, to tell what was learned by heart from what was composed
HELD_OUT = (("purple", "triangle"), ("yellow", "square"), ("white", "cross"))

# what a reader must know or work out
COLOR_CLUES = {
    "grass": "green",
    "snow": "white",
    "a banana": "yellow",
    "a tomato": "red",
    "the sky": "blue",
    "a plum": "purple",
}
SHAPE_CLUES = {"with three sides": "triangle", "with four sides": "square", "without corners": "circle", "like a plus": "cross"}
COUNT_CLUES = {
    "a bicycle has wheels": 2,
    "a person has eyes": 2,
    "a triangle has sides": 3,
    "a triangle has corners": 3,
    "a square has sides": 4,
    "a car has wheels": 4,
}

CAPTIONS = {
    "single": ("a {color} {shape}", "there is a {color} {shape}", "draw a {color} {shape}"),
    "position": ("a {color} {shape} in the {position}", "in the {position} a {color} {shape}"),
    "count": ("{number} {color} {plural}", "there are {number} {color} {plural}"),
    "two": ("{a} and {b}", "both {a} and {b}"),
    "relation": ("{a} {relation} {b}", "{relation} {b} there is {a}"),
    "word": ("the word {word} in {color}", "{word} written in {color}"),
    "reasoning color": ("a {shape} in the color of {thing}", "draw a {shape} with the color of {thing}"),
    "reasoning shape": ("a {color} shape {clue}", "there is a {color} shape {clue}"),
    "reasoning count": ("as many {color} {plural} as {clue}", "draw as many {color} {plural} as {clue}"),
    "reasoning position": ("a {color} {shape} in the corner opposite the {position}",),
}
INSTRUCTIONS = {
    "recolor": ("make the {shape} {color}", "change the color of the {shape} to {color}"),
    "remove": ("remove the {shape}", "take the {shape} away"),
    "add": ("add a {color} {shape}", "also draw a {color} {shape}"),
    "move": ("move the {shape} to the {position}", "put the {shape} in the {position}"),
    "replace": ("replace the {shape} with a {color} {other}", "turn the {shape} into a {color} {other}"),
    "word": ("change the word to {word}", "write {word} there"),
    "combine": ("the shape of the {one} in the color of the {two}", "draw the shape of the {one} with the color of the {two}"),
    "pick": ("the {one} picture",),
    "reasoning recolor": ("make the shape {clue} {color}",),
    "reasoning paint": ("make the {shape} the color of {thing}",),
    "reasoning remove": ("remove the shape {clue}", "take the shape {clue} away"),
    "reasoning move": ("move the {shape} to the corner opposite the {position}",),
}


def _words(phrases: object) -> set[str]:
    return {word for phrase in phrases for word in str(phrase).split() if "{" not in word}  # type: ignore[attr-defined]


VOCABULARY = tuple(
    sorted(
        {
            *_words(phrase for phrases in (*CAPTIONS.values(), *INSTRUCTIONS.values()) for phrase in phrases),
            *_words((*COLOR_CLUES, *SHAPE_CLUES, *COUNT_CLUES, *RELATIONS, *POSITIONS)),
            *COLORS,
            *SHAPES,
            *PLURALS.values(),
            *NUMBERS.values(),
            *LETTERS,
            "first",
            "second",
        }
    )
)
