"""Rewards for flow_grpo.py: each a function of the images and what was asked for.

    reward(images: list[PIL.Image], prompts: list[str], metadata: list[dict]) -> list[float]

`--reward` takes a name of REWARDS below, your own "file:function", or a weighted sum "ocr:1,jpeg_compressibility:0.1".
The functions in REWARDS are factories: heavy imports and model loads happen when one is chosen. A reward never turns
a failure into a score: it raises, and the run stops with the reward's name and the prompt.
"""
import importlib
import io
import math
import os
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageDraw


class RewardError(ValueError):
    """What the user must know, in one line."""


# ------------------------------------------------------------------------------------------------- loading, scoring


def load(spec):
    """--reward -> {name: (function, weight)}. Raises RewardError for what cannot be loaded."""
    rewards = {}
    for term in spec.split(","):
        *parts, last = term.strip().split(":")
        try:
            weight = float(last) if parts else None
        except ValueError:
            weight = None
        if weight is None or not math.isfinite(weight):  # "my_file:nan" names a function
            parts, weight = [*parts, last], 1.0
        name = ":".join(parts)
        if name in rewards:
            raise RewardError(f"--reward {spec}: {name} is there twice")
        if len(parts) == 2:
            rewards[name] = (load_function(*parts), weight)
        elif name in REWARDS:
            try:
                rewards[name] = (REWARDS[name](), weight)
            except ImportError as error:
                raise RewardError(f"--reward {name}: {error}; pip install -r requirements.txt") from error
        else:
            raise RewardError(f"--reward {term}: choose from {', '.join(REWARDS)}, or give your own as file:function")
    return rewards


def load_function(file, function):
    """my_file:my_function, my_file.py in the current folder or anywhere that Python imports from."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(file.removesuffix(".py"))
    except Exception as error:  # whatever a user's file raises
        raise RewardError(f"--reward {file}:{function}: cannot import {file}: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise RewardError(f"--reward {file}:{function}: {file} has no function {function}")
    return getattr(module, function)


def score(rewards, images, prompts, metadata):
    """-> {name: scores of one reward, ..., "reward": their weighted sum}, lists of floats in the images' order"""
    scores = {}
    for name, (function, _) in rewards.items():
        try:
            values = [float(value) for value in function(list(images), list(prompts), list(metadata))]
        except RewardError as error:
            raise RewardError(f"reward {name}: {error}") from error
        except Exception as error:  # a user's function may raise anything; say where
            where = traceback.extract_tb(error.__traceback__)[:2][-1]  # the first line outside of this one
            raise RewardError(f"reward {name} failed: {type(error).__name__}: {error} ({os.path.basename(where.filename)}"
                              f" line {where.lineno}), scoring {len(images)} images from {prompts[0]!r} on") from error
        if len(values) != len(images):
            raise RewardError(f"reward {name} gave {len(values)} scores for {len(images)} images")
        for value, prompt in zip(values, prompts):
            if not math.isfinite(value):
                raise RewardError(f"reward {name} gave {value} for {prompt!r}")
        scores[name] = values
    weights = [weight for _, weight in rewards.values()]
    scores["reward"] = [sum(w * s for w, s in zip(weights, each)) for each in zip(*scores.values())]
    return scores


# ------------------------------------------------------------------------------------------------------ image size


def jpeg_kilobytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue()) / 1000


def jpeg_compressibility():
    """Minus the size as a JPEG of quality 95, in kilobytes: smooth images win (the reward of DDPO, arXiv 2305.13301)."""
    return lambda images, prompts, metadata: [-jpeg_kilobytes(image) for image in images]


def jpeg_incompressibility():
    """The size as a JPEG of quality 95, in kilobytes: detailed images win."""
    return lambda images, prompts, metadata: [jpeg_kilobytes(image) for image in images]


# -------------------------------------------------------------------------------------------------- text rendering


def ocr():
    """How much of the text in the prompt's double quotes can be read: r = max(1 - N_e / N_ref, 0) (section 5.1).

    N_e is the edit distance between the text that the engine reads and the N_ref letters asked for. As in the
    official code (ocr.py), case and spaces do not count, and a target that stands anywhere in what was read counts as
    distance 0. Engine: PaddleOCR's PP-OCRv6 detection and recognition (small) on onnxruntime, inside the `rapidocr`
    package. Raises RewardError for a prompt without quotes.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidocr import RapidOCR
    # One single-threaded engine a core is faster than one engine on all of them. Two defaults of rapidocr make tiny
    # images slow: it enlarges them to 736 pixels (limit_type: PaddleOCR does not) and pads each line to a width of 320.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    engines = [RapidOCR(params={"Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                                "Det.limit_type": "max", "Det.limit_side_len": 960, "Rec.rec_img_shape": [3, 48, 160]})
               for _ in range(cores)]

    def read(engine, image):
        bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
        return "".join(engine(bgr, use_cls=False).txts or ())  # no classifier: it only turns upside-down lines

    def read_share(k, images):  # every cores-th image, from the k-th
        return [read(engines[k], image) for image in images[k::cores]]

    def reward(images, prompts, metadata):
        targets = [quoted(prompt) for prompt in prompts]
        texts = [None] * len(images)
        with ThreadPoolExecutor(cores) as pool:
            for k, share in enumerate(pool.map(read_share, range(cores), [images] * cores)):
                texts[k::cores] = share
        return [text_score(text, target, Levenshtein.distance) for text, target in zip(texts, targets)]
    return reward


def quoted(prompt):
    """The text between the prompt's first two double quotes."""
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].strip():
        raise RewardError(f'the prompt {prompt!r} has no text in double quotes, such as: a sign that says "HELLO"')
    return parts[1]


def text_score(text, target, distance):
    text, target = (s.replace(" ", "").lower() for s in (text, target))
    if target in text:
        return 1.0
    return max(1 - distance(text, target) / len(target), 0.0)


# ----------------------------------------------------------------------------------------------------- composition


def geneval():
    """GenEval's six tasks, scored from what a detector finds (section 5.1). This detector knows the toy's shapes.

    Raises RewardError for prompts without GenEval metadata, or with objects or colours that the detector cannot know.
    """
    def reward(images, prompts, metadata):
        for prompt, row in zip(prompts, metadata):
            if "include" not in row:
                raise RewardError(f"the prompt {prompt!r} has no GenEval metadata; use a *_metadata.jsonl dataset")
            for asked in row["include"]:
                if asked["class"] not in SHAPES or asked.get("color", "red") not in COLORS:
                    raise RewardError(f"the prompt {prompt!r} asks for more than the toy's detector knows: "
                                      f"{', '.join(SHAPES)}; {', '.join(COLORS)}")
        return [geneval_score(detect_shapes(image), row) for image, row in zip(images, metadata)]
    return reward


def geneval_score(found, row):
    """The paper's rule-based reward: the mean of one or two terms for each object asked for; 1 is all as asked.

    found: [{"class", "color", "box": (left, top, right, bottom)}]; row: GenEval metadata. Counting gives
    1 - |N_found - N_asked| / N_asked. A colour or a place that was asked for is worth nothing while the count is wrong;
    else colour gives the same fraction and place 0 or 1. The official reward server adds an extra 1 after a wrong
    place, so that a failure scores 0.75; the paper does not, and this does not.
    """
    terms, groups = [], []
    for asked in row["include"]:
        objects = [o for o in found if o["class"] == asked["class"]]
        groups.append(objects)
        terms.append(1 - abs(asked["count"] - len(objects)) / asked["count"])
        counted = len(objects) == asked["count"]
        if "color" in asked:
            right = sum(o["color"] == asked["color"] for o in objects)
            terms.append(1 - abs(asked["count"] - right) / asked["count"] if counted else 0.0)
        if "position" in asked:
            relation, reference = asked["position"]
            placed = counted and groups[reference] and all(relation in relations(o["box"], r["box"])
                                                           for o in objects for r in groups[reference])
            terms.append(float(bool(placed)))
    return sum(terms) / len(terms)


def relations(box, reference):
    """Where a box lies from another: a set of "left of", "right of", "above", "below" (GenEval's rule).

    The distance of the centres must exceed a tenth of the boxes' summed sizes, and point within 60 degrees of the side.
    """
    centre, other = ((np.array(b[:2]) + b[2:]) / 2 for b in (box, reference))
    sizes = sum(np.array(b[2:]) - b[:2] for b in (box, reference))
    offset = centre - other
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * sizes, 0)
    if np.abs(beyond).max() < 1e-3:
        return set()
    x, y = beyond / np.linalg.norm(offset)
    return {name for name, yes in (("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5))
            if yes}


COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220),
          "yellow": (235, 200, 40), "purple": (140, 60, 180), "black": (30, 30, 30)}
SHAPES = ("circle", "square", "triangle", "cross")


def draw_shape(draw, shape, x, y, radius, color):
    """Draw one shape of the toy world, centred on (x, y), `radius` pixels from the centre to its outer edge."""
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif shape == "square":
        side = 0.88 * radius
        draw.rectangle((x - side, y - side, x + side, y + side), fill=color)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + 0.85 * radius), (x + radius, y + 0.85 * radius)], fill=color)
    else:
        bar = 0.38 * radius
        draw.rectangle((x - radius, y - bar, x + radius, y + bar), fill=color)
        draw.rectangle((x - bar, y - radius, x + bar, y + radius), fill=color)


def shape_templates(size=24):
    """{shape: its mask [size, size], 0 to 1, filling its box}"""
    templates = {}
    for shape in SHAPES:
        image = Image.new("L", (128, 128))
        draw_shape(ImageDraw.Draw(image), shape, 64, 64, 60, 255)
        templates[shape] = np.asarray(image.crop(image.getbbox()).resize((size, size), Image.BOX)) / 255
    return templates


TEMPLATES = shape_templates()


def detect_shapes(image):
    """The toy's shapes in an image: what differs from the paper, in connected pieces, each named by the shape whose
    template it overlaps best and by its nearest colour. -> [{"class", "color", "box"}]
    """
    import cv2
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    mask = (np.abs(pixels - np.median(border, 0)).max(-1) > 70).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    found = []
    for k in range(1, count):  # 0 is the background
        x, y, w, h, area = stats[k]
        if area < 0.01 * mask.size:  # specks: the smallest shape has twice as much
            continue
        piece = labels[y:y + h, x:x + w] == k
        box = np.asarray(Image.fromarray(255 * piece.astype(np.uint8)).resize((24, 24), Image.BOX)) / 255
        overlap = {s: np.minimum(box, t).sum() / np.maximum(box, t).sum() for s, t in TEMPLATES.items()}
        shape = max(overlap, key=overlap.get)
        if overlap[shape] < 0.7:
            continue
        inner = cv2.erode((labels == k).astype(np.uint8), np.ones((3, 3))) > 0  # without the blended edge
        color = np.median(pixels[inner if inner.any() else labels == k], 0)
        name = min(COLORS, key=lambda c: np.square(color - COLORS[c]).sum())
        found.append({"class": shape, "color": name, "box": (x, y, x + w, y + h)})
    return found


REWARDS = {"ocr": ocr, "geneval": geneval, "jpeg_compressibility": jpeg_compressibility,
           "jpeg_incompressibility": jpeg_incompressibility}
