"""The toy's world: shapes and signs on plain paper, who paints them, and who judges them.

A scene is a row of GenEval metadata: a tag, what it must include, and its prompt.
There are two painters, a careful and a careless one. make_toy.py trains the model on both.
The toy's rewards are at the end. rewards.py knows them by their names.
"""
import os

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rewards import RELATIONS, geneval_score, scene_reward

SIZE = 48  # pixels
SCALE = 4  # we paint larger and then reduce: smooth edges
COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220),
          "yellow": (235, 200, 40), "purple": (140, 60, 180), "black": (30, 30, 30)}
SIGN_INKS = tuple(name for name in COLORS if name != "yellow")  # too pale to read
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = {2: "two", 3: "three", 4: "four"}
FONT = os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSansMono-Bold.ttf")


# ---------------------------------------------------------------------------------------- captions


def plural(shape):
    return shape + ("es" if shape == "cross" else "s")


def caption(tag, include):
    """The prompt of a scene, in GenEval's phrasing."""
    first = include[0]["class"]
    if tag == "counting":
        return f"a photo of {NUMBERS[include[0]['count']]} {plural(first)}"
    if tag == "position":  # GenEval lists the reference object first, the placed object second
        relation, _ = include[1]["position"]
        return f"a photo of a {include[1]['class']} {relation} a {first}"
    things = [f"{asked.get('color', '')} {asked['class']}".strip() for asked in include]
    return "a photo of " + " and ".join(f"a {thing}" for thing in things)


def one(shape, **more):
    return {"class": shape, "count": 1, **more}


def includes(tag):
    """What the scenes of a task ask for, every one of them."""
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    if tag == "single_object":
        return [[one(shape)] for shape in SHAPES]
    if tag == "two_object":
        return [[one(a), one(b)] for a, b in pairs]
    if tag == "counting":
        return [[{"class": shape, "count": n}] for shape in SHAPES for n in NUMBERS]
    if tag == "colors":
        return [[one(shape, color=color)] for shape in SHAPES for color in COLORS]
    if tag == "position":
        return [[one(a), one(b, position=[relation, 0])]
                for a, b in pairs for relation in RELATIONS]
    return [[one(a, color=c), one(b, color=d)]
            for a, b in pairs for c in COLORS for d in COLORS if c != d]


def scenes(tag):
    """Every scene of a task as GenEval metadata."""
    rows = []
    for include in includes(tag):
        row = {"tag": tag, "include": include}
        if tag == "counting":
            row["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
        rows.append({**row, "prompt": caption(tag, include)})
    return rows


# ---------------------------------------------------------------------------------------- painters


def draw_shape(draw, shape, x, y, radius, color):
    """Draw a shape, centered on (x, y), `radius` pixels from the center to its outer edge."""
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif shape == "square":
        side = 0.88 * radius
        draw.rectangle((x - side, y - side, x + side, y + side), fill=color)
    elif shape == "triangle":
        foot = y + 0.85 * radius
        draw.polygon([(x, y - radius), (x - radius, foot), (x + radius, foot)], fill=color)
    else:
        bar = 0.38 * radius
        draw.rectangle((x - radius, y - bar, x + radius, y + bar), fill=color)
        draw.rectangle((x - bar, y - radius, x + bar, y + radius), fill=color)


def paper(rng):
    return tuple(rng.randint(236, 255) for _ in range(3))


def jitter(color, rng):
    return tuple(max(0, min(255, v + rng.randint(-8, 8))) for v in color)


def fade(ink, background, share):
    """The ink with this share of the paper's color in it."""
    return tuple(round(i + share * (b - i)) for i, b in zip(ink, background))


def paint_sign(word, rng, careless=False):
    """A word in one bold font, centered within 3 pixels.

    The careless painter writes tiny letters or takes pale ink.
    """
    fault = rng.choice(("tiny", "pale")) if careless else ""
    background = paper(rng)
    ink = jitter(COLORS[rng.choice(SIGN_INKS)], rng)
    if fault == "pale":
        ink = tuple(round(b + 0.05 * (i - b)) for i, b in zip(ink, background))
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), background)
    center = [(SIZE / 2 + rng.uniform(-d, d)) * SCALE for d in (1.5, 3)]
    font = ImageFont.truetype(FONT, (5 if fault == "tiny" else 17) * SCALE)
    ImageDraw.Draw(image).text(center, word, font=font, fill=ink, anchor="mm")
    return image.resize((SIZE, SIZE), Image.LANCZOS)


def mistake(tag, objects, rng):
    """The careless painter's one way to miss each task. objects: [(shape, color)]

    None of his mistakes undoes what the careful painter teaches. If he mirrored places half of
    the time, say, no model could learn at t = 1 that they matter: size cannot be seen there.
    """
    shape, color = objects[0]
    if tag == "single_object":
        return [(rng.choice([s for s in SHAPES if s != shape]), color)]
    if tag == "colors":
        return [(shape, rng.choice([c for c in COLORS if c != color]))]
    if tag == "color_attr":  # both in the color of the first
        return [(shape, color) for shape, _ in objects]
    return objects[:-1]  # forgets the last one


def lay_out(row, number, rng):
    """-> places of so many objects, how far they may stray, their radius; all in pixels"""
    near, far = SIZE / 4, 3 * SIZE / 4
    line = (near, far)[rng.randint(0, 1)]
    if row["tag"] in ("single_object", "colors"):
        return [(SIZE / 2, SIZE / 2)], 5, 11
    if row["tag"] == "counting":
        corners = [(near, near), (far, near), (near, far), (far, far)]
        return rng.sample(corners, number), 2, 8.5
    places = {
        "left of": [(far, line), (near, line)],  # the reference first, then what is placed
        "right of": [(near, line), (far, line)],
        "above": [(line, far), (line, near)],
        "below": [(line, near), (line, far)],
    }
    relation, _ = row["include"][-1].get("position", ("right of", 0))  # in the order of reading
    return places[relation], 2, 8.5


def paint_scene(row, rng, careless=False, restless=False):
    """One to four shapes on a 2x2 grid.

    The careless painter makes them small, and one mistake. Restless scenes are for comparisons:
    of any size, anywhere near their place, more or less faded, on more or less noisy paper.
    """
    objects = [(asked["class"], asked.get("color") or rng.choice(list(COLORS)))
               for asked in row["include"] for _ in range(asked["count"])]
    if careless:
        objects = mistake(row["tag"], objects, rng)
    places, spread, radius = lay_out(row, len(objects), rng)
    background = paper(rng)
    size, faded = 0.6 if careless else 1, 0
    if restless:
        size = rng.uniform(0.5, 1.2)
        spread = spread * rng.uniform(0, 2.5)
        faded = rng.uniform(0, 0.5)
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), background)
    draw = ImageDraw.Draw(image)
    for (shape, color), (x, y) in zip(objects, places):
        x, y = x + rng.uniform(-spread, spread), y + rng.uniform(-spread, spread)
        ink = fade(jitter(COLORS[color], rng), background, faded)
        draw_shape(draw, shape, x * SCALE, y * SCALE, size * radius * SCALE, ink)
    image = image.resize((SIZE, SIZE), Image.LANCZOS)
    return add_clouds(image, rng) if restless else image


def add_clouds(image, rng):
    """Soft colored noise: random numbers on a 6x6 grid, enlarged."""
    draws = np.random.default_rng(rng.getrandbits(32))
    noise = draws.normal(0, rng.uniform(0, 0.15) * 255, (6, 6, 3)).astype(np.float32)
    channels = [Image.fromarray(noise[..., c]).resize((SIZE, SIZE), Image.BICUBIC)
                for c in range(3)]
    cloudy = np.asarray(image) + np.stack(channels, -1)
    return Image.fromarray(np.clip(cloudy, 0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------- detector


def fill_box(mask):
    """A mask stretched to 24x24, as numbers from 0 to 1."""
    return np.asarray(mask.resize((24, 24), Image.BOX)) / 255


def make_template(shape):
    image = Image.new("L", (128, 128))
    draw_shape(ImageDraw.Draw(image), shape, 64, 64, 60, 255)
    return fill_box(image.crop(image.getbbox()))


TEMPLATES = {shape: make_template(shape) for shape in SHAPES}


def detect_shapes(image):
    """The shapes in an image -> [{"class", "color", "box": (left, top, right, bottom) in pixels}]

    What differs from the paper falls into connected pieces. A piece is named by the shape whose
    template it overlaps best, and by its nearest color.
    """
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ink = np.abs(pixels - np.median(border, 0)).max(-1) > 70
    count, labels, stats, _ = cv2.connectedComponentsWithStats(ink.astype(np.uint8), connectivity=4)
    found = []
    for k in range(1, count):  # 0 is the background
        x, y, w, h, area = stats[k]
        if area < 0.01 * ink.size:  # specks: the smallest shape has twice as much
            continue
        piece = (labels == k).astype(np.uint8)
        box = fill_box(Image.fromarray(255 * piece[y:y + h, x:x + w]))
        overlap = {shape: np.minimum(box, mask).sum() / np.maximum(box, mask).sum()
                   for shape, mask in TEMPLATES.items()}
        shape = max(overlap, key=overlap.get)
        if overlap[shape] >= 0.7:
            color = nearest_color(pixels, piece)
            found.append({"class": shape, "color": color, "box": (x, y, x + w, y + h)})
    return found


def nearest_color(pixels, piece):
    """The name of the color that a piece has inside, where the paper is not blended in."""
    inner = cv2.erode(piece, np.ones((3, 3)))
    color = np.median(pixels[(inner if inner.any() else piece) > 0], 0)
    return min(COLORS, key=lambda name: np.square(color - COLORS[name]).sum())


# ------------------------------------------------------------------------------------------- taste


def taste(image, found, right):
    """How much a viewer likes a scene, at most 1. found: as detect_shapes gives it

    right: how much of the scene is as asked, the score of GenEval. It makes half of the taste.
    A tenth each is for shapes that are large, centered, apart from each other, of saturated
    color, and on plain paper.
    """
    if not found:
        return 0.0
    pixels = np.asarray(image.convert("RGB"), float) / 255
    ink = np.abs(pixels - np.median(pixels, (0, 1))).max(-1) > 0.27  # the median is the paper
    boxes = np.array([shape["box"] for shape in found]) / image.width
    low, high = boxes[:, :2], boxes[:, 2:]
    center = (low.min(0) + high.max(0)) / 2
    gaps = [max(np.maximum(low[i], low[j]) - np.minimum(high[i], high[j]))
            for i in range(len(found)) for j in range(i)]
    merits = dict(
        large=(high - low).max(1).mean() / 0.5,
        centered=1 - np.linalg.norm(center - 0.5) / 0.25,
        apart=min(gaps, default=1) / 0.1,
        saturated=np.ptp(pixels[ink], -1).mean() / 0.7 if ink.any() else 0,
        plain=1 - 10 * pixels[~ink].std(0).mean())
    return float(0.5 * right + 0.1 * sum(np.clip(merit, 0, 1) for merit in merits.values()))


def sign_quality(image):
    """How well a sign is made, 0 to 1, whatever it says, and the name of its ink ("" for none)

    A third each for letters of one ink, for an ink as strong as one of the painter's, and for paper
    without shades or spots.
    """
    pixels = np.asarray(image.convert("RGB"), float)
    contrast = np.abs(pixels - np.median(pixels, (0, 1))).max(-1)  # the median is the paper
    near_ink = cv2.dilate((contrast > 70).astype(np.uint8), np.ones((5, 5))) > 0
    paper = pixels[~near_ink]
    plain = 1 - 10 * paper.std(0).mean() / 255 if len(paper) else 0
    ink = pixels[contrast > max(70, 0.75 * np.quantile(contrast, 0.99))]  # without blended edges
    if len(ink) < 20:
        return float(np.clip(plain, 0, 1)) / 3, ""
    inks = np.array([COLORS[name] for name in SIGN_INKS], float)
    nearest = np.square(ink[:, None] - inks).sum(-1).argmin(1)
    shares = np.bincount(nearest, minlength=len(inks)) / len(ink)
    best = shares.argmax()
    one_ink = 2 * shares[best] - 1  # 0 where half of the ink is of another color
    strong = 1.5 - np.linalg.norm(np.median(ink, 0) - inks[best]) / 60  # the painter's vary by 14
    return float(np.clip([one_ink, strong, plain], 0, 1).mean()), SIGN_INKS[best]


# ----------------------------------------------------------------------------------------- rewards


def geneval():
    """GenEval's six tasks in the toy's scenes"""
    judge = lambda image, row: geneval_score(detect_shapes(image), row)
    return scene_reward(judge, SHAPES, COLORS)


def toy_taste():
    """A viewer's taste in the toy's scenes, at most 1

    `toy_pickscore` has learned it from examples. Train on that one, and measure what it is worth:
    --reward toy_pickscore --eval_reward toy_taste
    """
    def judge(image, row):
        found = detect_shapes(image)
        return taste(image, found, geneval_score(found, row))
    return scene_reward(judge, SHAPES, COLORS)


def toy_sign():
    """How well the toy's signs are made, 0 to 1, whatever they say"""
    return lambda images, *_: [sign_quality(image)[0] for image in images]


def toy_inks():
    """The share of signs with another ink: 0 if all are alike, 0.8 if the five are even."""
    def reward(images, prompts, metadata):
        inks = [sign_quality(image)[1] for image in images]
        return [1 - inks.count(ink) / len(inks) for ink in inks]
    return reward
