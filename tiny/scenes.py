"""The small world: scenes of coloured shapes, their descriptions and their pictures.

A scene is a handful of things in the unit square. It comes in four kinds:

    one    a thing at one of five places          "In the middle is a big red circle."
    two    two things, side by side or stacked    "At the top is a big red circle, at the bottom a small .."
    three  three things, in a row or in a column  "On the left is a big red circle, in the middle a small .."
    many   two to six small copies of a thing     "There are three small red circles."

A scene fixes what is there; `draw` chooses how it looks (tint, background, outline, fat or thin stars,
noise). `draw` varies widely everything that a description does not mention, so that a model trained on these
pictures also reads pictures that a person makes with another program.

Six of the 36 pairs of colour and shape are held out (`UNSEEN`): no scene for training has one of them. A
model that names a red star has therefore put it together from red things and from stars.
"""

import colorsys
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLORS = ("red", "yellow", "green", "blue", "purple", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = ("big", "small")
NUMBERS = ("one", "two", "three", "four", "five", "six")
POSITIONS = ("left", "right", "top", "bottom", "middle")
RELATIONS = ("left", "right", "above", "below")
KINDS = ("one", "two", "three", "many")
UNSEEN = {("red", "star"), ("yellow", "heart"), ("green", "cross"), ("blue", "triangle"),
          ("purple", "square"), ("black", "circle")}    # every colour and every shape once

PLURAL = {"circle": "circles", "square": "squares", "triangle": "triangles",
          "star": "stars", "cross": "crosses", "heart": "hearts"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
ANCHORS = {"left": (0.21, 0.5), "right": (0.79, 0.5), "top": (0.5, 0.21), "bottom": (0.5, 0.79),
           "middle": (0.5, 0.5)}
POSITION_PHRASE = {"left": "on the left", "right": "on the right", "top": "at the top",
                   "bottom": "at the bottom", "middle": "in the middle"}

# width of a thing as a share of the picture's width; three things in a line need more room
EXTENT = {"big": (0.36, 0.50), "small": (0.17, 0.26)}
EXTENT_OF_THREE = {"big": (0.26, 0.30), "small": (0.15, 0.19)}
# the range of colours that people call by each name: hue in degrees, saturation, value
HSV = {"red": ((-9, 8), (0.78, 1.0), (0.70, 1.0)), "yellow": ((47, 61), (0.75, 1.0), (0.88, 1.0)),
       "green": ((92, 150), (0.60, 1.0), (0.42, 0.95)), "blue": ((208, 242), (0.65, 1.0), (0.55, 1.0)),
       "purple": ((268, 302), (0.50, 1.0), (0.42, 0.85)), "black": ((0, 360), (0.0, 0.25), (0.0, 0.17))}
CONTRAST = 80       # least distance in RGB of a thing from the background; black and white are 442 apart


# ----------------------------------------------------------------------------------------------
# scenes

@dataclass(frozen=True)
class Thing:
    size: str       # of SIZES
    color: str      # of COLORS
    shape: str      # of SHAPES
    x: float        # centre in the unit square,
    y: float        # y downwards


@dataclass(frozen=True)
class Scene:
    kind: str       # of KINDS
    things: tuple   # of Thing


def is_seen(scene: Scene) -> bool:
    """Whether none of its things is one of the pairs held out."""
    return not any((t.color, t.shape) in UNSEEN for t in scene.things)


def position(scene: Scene) -> str:
    """Where the (first) thing is: one of POSITIONS."""
    t = scene.things[0]
    return min(ANCHORS, key=lambda p: math.dist(ANCHORS[p], (t.x, t.y)))


def relation(scene: Scene) -> str:
    """Where things[0] is as seen from things[1]: one of RELATIONS. For scenes of two things."""
    a, b = scene.things[:2]
    if abs(a.x - b.x) > abs(a.y - b.y):
        return "left" if a.x < b.x else "right"
    return "above" if a.y < b.y else "below"


def is_row(scene: Scene) -> bool:
    """Whether two or three things are side by side; otherwise they are stacked."""
    return relation(scene) in ("left", "right")


def ordered(scene: Scene) -> Scene:
    """The same scene with two or three things listed from left to right or from top to bottom."""
    if scene.kind not in ("two", "three"):
        return scene
    return Scene(scene.kind, tuple(sorted(scene.things, key=lambda t: t.x if is_row(scene) else t.y)))


def where_each(scene: Scene) -> tuple:
    """The place of each thing, in the order of scene.things: words of POSITIONS. A crowd has none: ()."""
    if scene.kind == "many":
        return ()
    if scene.kind == "one":
        return (position(scene),)
    first, last = ("left", "right") if is_row(scene) else ("top", "bottom")
    names = (first, "middle", last) if scene.kind == "three" else (first, last)
    name_of = dict(zip(ordered(scene).things, names))
    return tuple(name_of[t] for t in scene.things)


def place(size: str, color: str, shape: str, where: str, rng: random.Random) -> Thing:
    """A thing near one of the POSITIONS."""
    x, y = ANCHORS[where]
    return Thing(size, color, shape, x + rng.uniform(-0.07, 0.07), y + rng.uniform(-0.07, 0.07))


def line(looks: list, row: bool, rng: random.Random) -> Scene:
    """Two or three things, each (size, color, shape), from left to right (row) or from top to bottom."""
    across = 0.5 + rng.uniform(-0.11, 0.11)             # all lie roughly on one line
    things = []
    for i, look in enumerate(looks):
        if len(looks) == 3:
            slack = 0.012 if look[0] == "big" else 0.03
            along = (0.17, 0.5, 0.83)[i] + rng.uniform(-slack, slack)
        else:
            along = rng.uniform(0.23, 0.27) if look[0] == "big" else rng.uniform(0.14, 0.32)
            along = 1 - along if i else along
        spot = (along, across + rng.uniform(-0.07, 0.07))
        things.append(Thing(*look, *(spot if row else spot[::-1])))
    return Scene("two" if len(looks) == 2 else "three", tuple(things))


def crowd(number: int, color: str, shape: str, rng: random.Random) -> Scene:
    """`number` small things of one colour and shape that do not touch."""
    spots = []
    while len(spots) < number:
        spot = (rng.uniform(0.14, 0.86), rng.uniform(0.14, 0.86))
        if all(math.dist(spot, s) > 0.28 for s in spots):
            spots.append(spot)
        elif rng.random() < 0.02:                       # there may be no room left: start over
            spots = []
    return Scene("many", tuple(Thing("small", color, shape, x, y) for x, y in spots))


def _any_scene(rng: random.Random, kind: str) -> Scene:
    if kind == "one":
        size, color, shape, where = (rng.choice(names) for names in (SIZES, COLORS, SHAPES, POSITIONS))
        return Scene(kind, (place(size, color, shape, where, rng),))
    if kind in ("two", "three"):                        # the things differ in colour and in shape
        n = 2 if kind == "two" else 3
        looks = [(rng.choice(SIZES), c, s) for c, s in zip(rng.sample(COLORS, n), rng.sample(SHAPES, n))]
        scene = line(looks, rng.random() < 0.5, rng)
        return Scene(kind, tuple(rng.sample(scene.things, n)))
    if kind == "many":
        return crowd(rng.randint(2, 6), rng.choice(COLORS), rng.choice(SHAPES), rng)
    raise ValueError(f"unknown kind of scene {kind!r}; there are {', '.join(KINDS)}")


def random_scene(rng: random.Random, kind: str, seen: bool = True) -> Scene:
    """A scene of that kind (of KINDS), every attribute uniform, the things in random order.

    seen: no thing is one of the pairs in UNSEEN. Otherwise at least one thing is.
    """
    while True:
        scene = _any_scene(rng, kind)
        if is_seen(scene) == seen:
            return scene


def phrases(scene: Scene) -> tuple:
    """For each thing, in the order of scene.things: "a big red circle on the left". One for a crowd."""
    t = scene.things[0]
    if scene.kind == "many":
        return (f"{NUMBERS[len(scene.things) - 1]} {t.size} {t.color} {PLURAL[t.shape]}",)
    return tuple(f"a {t.size} {t.color} {t.shape} {POSITION_PHRASE[where]}"
                 for t, where in zip(scene.things, where_each(scene)))


def in_words(scene: Scene, rng: random.Random | None = None) -> str:
    """The phrases of the ordered scene, joined by commas, without a full stop. rng: in random order."""
    said = phrases(ordered(scene))
    return ", ".join(rng.sample(said, len(said)) if rng else said)


def sentence(scene: Scene, rng: random.Random | None = None) -> str:
    """The scene described in English: "On the left is a big red circle, on the right a small blue square."

    From left to right or from top to bottom; rng: in random order.
    """
    if scene.kind == "many":
        return f"There are {phrases(scene)[0]}."
    scene = ordered(scene)
    said = [(POSITION_PHRASE[where], f"a {t.size} {t.color} {t.shape}")
            for t, where in zip(scene.things, where_each(scene))]
    (where, what), *others = rng.sample(said, len(said)) if rng else said
    return ", ".join([f"{where.capitalize()} is {what}", *map(" ".join, others)]) + "."


# ----------------------------------------------------------------------------------------------
# pictures

def _outline(shape: str, rng: random.Random) -> list:
    """Corners of a shape in [-1, 1]^2, y down: a fresh variant each time."""
    if shape == "circle":
        return [(math.cos(a * math.pi / 20), math.sin(a * math.pi / 20)) for a in range(40)]
    if shape == "square":
        return [(-0.92, -0.92), (0.92, -0.92), (0.92, 0.92), (-0.92, 0.92)]
    if shape == "triangle":                             # isosceles: equilateral, narrow or flat
        half, top = rng.uniform(0.75, 1.0), rng.uniform(0.8, 1.0)
        return [(0, -top), (half, 0.8), (-half, 0.8)]
    if shape == "star":
        inner = rng.uniform(0.36, 0.52)                 # 0.38 is the pentagram
        radii = [1.0 if i % 2 == 0 else inner for i in range(10)]
        return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]
    if shape == "cross":
        a, b = rng.uniform(0.2, 0.4), rng.uniform(0.92, 1.0)
        return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
                (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    if shape == "heart":
        return _heart(rng)
    raise ValueError(f"unknown shape {shape!r}; there are {', '.join(SHAPES)}")


def _heart(rng: random.Random) -> list:
    if rng.random() < 0.5:                              # a smooth curve
        dent = rng.uniform(4.0, 6.5)
        angles = [a * math.pi / 20 for a in range(40)]
        return [(math.sin(a) ** 3, (2.5 - 13 * math.cos(a) + dent * math.cos(2 * a) + 2 * math.cos(3 * a)
                                    + math.cos(4 * a)) / 15) for a in angles]
    r, y = rng.uniform(0.46, 0.54), rng.uniform(-0.5, -0.3)     # two discs and a tip, as drawing programs do
    tip, tilt = rng.uniform(0.85, 1.0), rng.uniform(0.1, 0.6)   # the discs' arcs run from the dent to a flank
    arc = [math.pi + (math.pi + tilt) * i / 12 for i in range(13)]
    right = [(1 - r + r * math.cos(a), y + r * math.sin(a)) for a in arc]
    return right + [(0, tip)] + [(-px, py) for px, py in reversed(right)]


def _tint(color: str, rng: random.Random) -> tuple:
    h, s, v = (rng.uniform(*span) for span in HSV[color])
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(h / 360 % 1, s, v))


def _background(rng: random.Random) -> tuple:
    """White, a light tint, or anything from nearly black to light grey, with a little colour in it."""
    dice = rng.random()
    if dice < 0.3:
        return (255, 255, 255)
    grey, hue = (rng.randint(222, 252), 12) if dice < 0.6 else (rng.randint(30, 230), 18)
    return tuple(min(255, grey + rng.randint(-hue, hue)) for _ in range(3))


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, extent: float, fill: tuple, outline: bool,
                turn: float, width: int, rng: random.Random):
    """One polygon, filled or as a thick line. turn: greatest rotation in degrees; width: of the canvas."""
    half = extent / 2
    angle = math.radians(rng.uniform(-turn, turn))
    cos, sin = math.cos(angle), math.sin(angle)
    stretch = rng.uniform(0.85, 1.15)                   # nobody draws a perfect circle or heart
    cx, cy = (min(max(c, half + 0.01), 0.99 - half) for c in (thing.x, thing.y))
    points = []
    for px, py in _outline(thing.shape, rng):
        px, py = px * min(stretch, 1), py / max(stretch, 1)
        x, y = cx + half * (px * cos - py * sin), cy + half * (px * sin + py * cos)
        points.append((x * width, y * width))
    rim, thick = None, 0.0
    if outline:
        rim, thick = fill, max(0.014, rng.uniform(0.05, 0.12) * extent)
    elif rng.random() < 0.25:                           # sometimes a darker rim
        dark = rng.uniform(0.0, 0.7)
        rim, thick = tuple(round(c * dark) for c in fill), rng.uniform(0.006, 0.014)
    if not outline:
        pen.polygon(points, fill=fill)
    if rim:
        pen.line(points + points[:2], fill=rim, width=max(1, round(thick * width)), joint="curve")


def draw(scene: Scene, rng: random.Random, size: int = 96, background: tuple | int | None = None,
         outline: bool | None = None) -> Image.Image:
    """An RGB picture of size x size pixels. Two calls on one scene give pictures that look different.

    background: an RGB triple or a grey value, by default random. outline: whether the things are drawn as
    thick lines instead of filled, by default in a quarter of the pictures.
    """
    paper = (background,) * 3 if isinstance(background, int) else background
    for _ in range(100):                                # until each thing stands out from the background
        fills = [_tint(t.color, rng) for t in scene.things]
        behind = paper or _background(rng)
        if all(math.dist(fill, behind) > CONTRAST for fill in fills):
            break
    if outline is None:
        outline = rng.random() < 0.25
    fine = 3 * size                                     # draw larger, then average: smooth edges
    picture = Image.new("RGB", (fine, fine), behind)
    pen = ImageDraw.Draw(picture)
    turn = 0 if rng.random() < 0.4 else 14
    alike = rng.random()                                # how similar in size the things of a crowd are
    shared = rng.uniform(*EXTENT["small"])
    for thing, fill in zip(scene.things, fills):
        lo, hi = (EXTENT_OF_THREE if scene.kind == "three" else EXTENT)[thing.size]
        if scene.kind == "two":
            hi -= 0.03                                  # leave air between neighbours
        extent = rng.uniform(lo, hi)
        if scene.kind == "many":
            extent += (shared - extent) * alike
        _draw_thing(pen, thing, extent, fill, outline, turn, fine, rng)
    picture = picture.reduce(3)
    return _weather(picture, rng) if rng.random() < 0.4 else picture


def _weather(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Uneven light and a little grain."""
    pixels = np.asarray(picture, dtype=np.float32)
    n = picture.width
    ramp = np.linspace(-0.5, 0.5, n, dtype=np.float32)
    shade = 1 + rng.uniform(-0.1, 0.1) * ramp[None, :, None] + rng.uniform(-0.1, 0.1) * ramp[:, None, None]
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal((n, n, 1), dtype=np.float32)
    pixels = pixels * shade + rng.uniform(0, 6) * noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
