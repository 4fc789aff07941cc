"""The small world: scenes of coloured shapes, their captions and their pictures.

A scene is a handful of things in the unit square. It comes in three kinds:

    one    a thing at one of five places         "a big red circle on the left"
    two    two things, side by side or stacked   "a big red circle above a small blue square"
    many   two to five small copies of a thing   "three small red circles"

A scene fixes what is there; `draw` chooses how it looks (tint, outline, fat or thin stars, noise).
`draw` varies widely everything that a caption does not mention, so that a model trained on these pictures
also reads pictures that a person makes with another program.
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
NUMBERS = ("one", "two", "three", "four", "five")
POSITIONS = ("left", "right", "top", "bottom", "middle")
RELATIONS = ("left", "right", "above", "below")
KINDS = ("one", "two", "many")

PLURAL = {"circle": "circles", "square": "squares", "triangle": "triangles",
          "star": "stars", "cross": "crosses", "heart": "hearts"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
ANCHORS = {"left": (0.21, 0.5), "right": (0.79, 0.5), "top": (0.5, 0.21), "bottom": (0.5, 0.79),
           "middle": (0.5, 0.5)}
POSITION_PHRASE = {"left": "on the left", "right": "on the right", "top": "at the top",
                   "bottom": "at the bottom", "middle": "in the middle"}
RELATION_PHRASE = {"left": "left of", "right": "right of", "above": "above", "below": "below"}

# width of a thing as a share of the picture's width
EXTENT = {"big": (0.36, 0.50), "small": (0.17, 0.26)}
# the range of colours that people call by each name: hue in degrees, saturation, value
HSV = {"red": ((-9, 8), (0.78, 1.0), (0.70, 1.0)), "yellow": ((47, 61), (0.75, 1.0), (0.88, 1.0)),
       "green": ((92, 150), (0.60, 1.0), (0.42, 0.95)), "blue": ((208, 242), (0.65, 1.0), (0.55, 1.0)),
       "purple": ((268, 302), (0.50, 1.0), (0.42, 0.85)), "black": ((0, 360), (0.0, 0.25), (0.0, 0.17))}


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


def position(scene: Scene) -> str:
    """Where the (first) thing is: one of POSITIONS."""
    t = scene.things[0]
    return min(ANCHORS, key=lambda p: math.dist(ANCHORS[p], (t.x, t.y)))


def relation(scene: Scene) -> str:
    """Where things[0] is as seen from things[1]: one of RELATIONS."""
    a, b = scene.things[:2]
    if abs(a.x - b.x) > abs(a.y - b.y):
        return "left" if a.x < b.x else "right"
    return "above" if a.y < b.y else "below"


def place(size: str, color: str, shape: str, where: str, rng: random.Random) -> Thing:
    """A thing near one of the POSITIONS."""
    x, y = ANCHORS[where]
    return Thing(size, color, shape, x + rng.uniform(-0.07, 0.07), y + rng.uniform(-0.07, 0.07))


def pair(first: tuple, second: tuple, rel: str, rng: random.Random) -> Scene:
    """Two things, each (size, color, shape). rel: where the first is, seen from the second."""
    if rel in ("right", "below"):                       # build the mirrored pair, then swap the two things
        return Scene("two", pair(second, first, OPPOSITE[rel], rng).things[::-1])
    across = 0.5 + rng.uniform(-0.11, 0.11)             # both lie roughly on one line
    near, far = [(rng.uniform(0.23, 0.27) if t[0] == "big" else rng.uniform(0.14, 0.32),
                  across + rng.uniform(-0.07, 0.07)) for t in (first, second)]
    far = (1 - far[0], far[1])
    if rel == "above":
        near, far = near[::-1], far[::-1]
    return Scene("two", (Thing(*first, *near), Thing(*second, *far)))


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


def random_scene(rng: random.Random, kind: str) -> Scene:
    """A scene of that kind (of KINDS), every attribute uniform."""
    if kind == "one":
        size, color, shape, where = (rng.choice(names) for names in (SIZES, COLORS, SHAPES, POSITIONS))
        return Scene(kind, (place(size, color, shape, where, rng),))
    if kind == "two":                                   # the two things differ in colour and in shape
        colors, shapes = rng.sample(COLORS, 2), rng.sample(SHAPES, 2)
        first, second = [(rng.choice(SIZES), c, s) for c, s in zip(colors, shapes)]
        return pair(first, second, rng.choice(RELATIONS), rng)
    if kind == "many":
        return crowd(rng.randint(2, 5), rng.choice(COLORS), rng.choice(SHAPES), rng)
    raise ValueError(f"unknown kind of scene {kind!r}; there are {', '.join(KINDS)}")


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """One sentence without a full stop. `rng`: either of two things may come first; without it, things[0]."""
    t = scene.things[0]
    if scene.kind == "one":
        return f"a {t.size} {t.color} {t.shape} {POSITION_PHRASE[position(scene)]}"
    if scene.kind == "many":
        return f"{NUMBERS[len(scene.things) - 1]} {t.size} {t.color} {PLURAL[t.shape]}"
    u, rel = scene.things[1], relation(scene)
    if rng and rng.random() < 0.5:
        t, u, rel = u, t, OPPOSITE[rel]
    return f"a {t.size} {t.color} {t.shape} {RELATION_PHRASE[rel]} a {u.size} {u.color} {u.shape}"


def ordered(scene: Scene) -> Scene:
    """The same scene with two things listed from left to right or from top to bottom."""
    swap = scene.kind == "two" and relation(scene) in ("right", "below")
    return Scene("two", scene.things[::-1]) if swap else scene


def in_words(scene: Scene, rng: random.Random | None = None) -> str:
    """The scene as the language model reads it: each of two things after its place. rng: shuffle the two."""
    if scene.kind != "two":
        return caption(scene)
    scene = ordered(scene)
    things = [f"{where} a {t.size} {t.color} {t.shape}" for t, where in zip(scene.things, places(scene))]
    return ", ".join(rng.sample(things, 2) if rng else things)


def places(scene: Scene) -> tuple[str, str]:
    """Where each of two things is, seen from the other."""
    return relation(scene), OPPOSITE[relation(scene)]


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
    if rng.random() < 0.35:
        return (255, 255, 255)
    light = rng.randint(222, 252)                       # a light grey with some colour in it
    return tuple(min(255, light + rng.randint(-12, 12)) for _ in range(3))


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, extent: float, turn: float, width: int,
                rng: random.Random):
    """One filled polygon. width: of the canvas in pixels; turn: the greatest rotation in degrees."""
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
    fill = _tint(thing.color, rng)
    pen.polygon(points, fill=fill)
    if rng.random() < 0.25:                             # sometimes a darker rim
        dark = rng.uniform(0.0, 0.7)
        rim = tuple(round(c * dark) for c in fill)
        thick = max(1, round(rng.uniform(0.006, 0.014) * width))
        pen.line(points + points[:2], fill=rim, width=thick, joint="curve")


def draw(scene: Scene, rng: random.Random, size: int = 96) -> Image.Image:
    """An RGB picture of size x size pixels. Two calls on one scene give pictures that look different."""
    fine = 3 * size                                     # draw larger, then average: smooth edges
    picture = Image.new("RGB", (fine, fine), _background(rng))
    pen = ImageDraw.Draw(picture)
    turn = 0 if rng.random() < 0.4 else 14
    alike = rng.random()                                # how similar in size the things of a crowd are
    lo, hi = EXTENT[scene.things[0].size]
    shared = rng.uniform(lo, hi)
    for thing in scene.things:
        lo, hi = EXTENT[thing.size]
        if scene.kind == "two":
            hi -= 0.03                                  # leave air between neighbours
        extent = rng.uniform(lo, hi)
        if scene.kind == "many":
            extent += (shared - extent) * alike
        _draw_thing(pen, thing, extent, turn, fine, rng)
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
