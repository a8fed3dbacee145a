"""Rewards for flow_grpo.py: each a function of the images and what was asked for.

    reward(images: list[PIL.Image], prompts: list[str], metadata: list[dict]) -> list[float]

`--reward` takes a name of REWARDS below, your own "file:function", or a weighted sum "ocr:1,jpeg_compressibility:0.1".
The functions in REWARDS are factories: heavy imports and model loads happen when one is chosen. A reward never turns
a failure into a score: it raises, and the run stops with the reward's name and the prompt.

ImageReward is not here: its package does not run with the transformers that diffusers needs, and no maintained
library has its model.
"""
import functools
import importlib
import io
import math
import os
import re
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
        check_metadata(prompts, metadata, SHAPES, COLORS)
        return [geneval_score(detect_shapes(image), row) for image, row in zip(images, metadata)]
    return reward


def check_metadata(prompts, metadata, classes, colors):
    """Raises RewardError for prompts that a detector of these classes and colours cannot judge."""
    for prompt, row in zip(prompts, metadata):
        if "include" not in row:
            raise RewardError(f"the prompt {prompt!r} has no GenEval metadata; use a *_metadata.jsonl dataset")
        for asked in row["include"]:
            if asked["class"] not in classes or asked.get("color", next(iter(colors))) not in colors:
                raise RewardError(f"the prompt {prompt!r} asks for {asked.get('color', '')} {asked['class']}; the detector knows "
                                  f"only {', '.join(sorted(classes))}; {', '.join(colors)}")


def geneval_score(found, row):
    """The paper's rule-based reward: the mean of one or two terms for each object asked for; 1 is all as asked.

    found: [{"class", "color", "box": (left, top, right, bottom)}]; row: GenEval metadata. Counting gives
    1 - |N_found - N_asked| / N_asked, below 0 for more than twice as many. A colour or a place that was asked for is
    worth nothing while the count is wrong; else colour gives the same fraction and place 0 or 1. The official reward
    server adds an extra 1 after a wrong place, so that a failure scores 0.75; the paper does not, and this does not.
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


def toy_taste():
    """A viewer's taste in the toy's scenes, written down, 0 to 1: half of it for what was asked (geneval_score), a tenth each
    for shapes that are large, centred, apart from each other, of saturated colour, and on plain paper.

    `toy_pickscore` is a model that has learned it from examples. Train on that one, and this shows what it is worth:
    --reward toy_pickscore --eval_reward toy_taste. Raises RewardError as `geneval` does.
    """
    def reward(images, prompts, metadata):
        check_metadata(prompts, metadata, SHAPES, COLORS)
        return [taste(image, row) for image, row in zip(images, metadata)]
    return reward


def taste(image, row):
    found = detect_shapes(image)
    if not found:
        return 0.0
    pixels = np.asarray(image.convert("RGB"), float) / 255
    ink = np.abs(pixels - np.median(pixels, (0, 1))).max(-1) > 0.27  # on this paper the median is the paper
    boxes = np.array([o["box"] for o in found]) / image.width
    low, high = boxes[:, :2], boxes[:, 2:]
    gaps = [max(np.maximum(low[i], low[j]) - np.minimum(high[i], high[j])) for i in range(len(found)) for j in range(i)]
    merits = dict(large=(high - low).max(1).mean() / 0.5,
                  centred=1 - np.linalg.norm((low.min(0) + high.max(0)) / 2 - 0.5) / 0.25,
                  apart=min(gaps, default=1) / 0.1,
                  saturated=np.ptp(pixels[ink], -1).mean() / 0.7 if ink.any() else 0,
                  plain=1 - 10 * pixels[~ink].std(0).mean())
    return float(0.5 * geneval_score(found, row) + 0.1 * sum(np.clip(merit, 0, 1) for merit in merits.values()))


# --------------------------------------------------------------------------------- models from the Hugging Face hub


def quiet(*libraries):
    """No warnings of these libraries and no bars for reading files; those of downloads, which may take an hour, stay."""
    import huggingface_hub
    for library in libraries:
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # the line above silences them, too


def from_hub(load, name, size):
    """load(name), or one clear line when the weights are neither on this machine nor to be had."""
    import transformers
    quiet(transformers)
    try:
        return load(name)
    except (OSError, ValueError) as error:
        raise RewardError(f"its model {name} ({size}) cannot be loaded: {str(error).strip().splitlines()[0]}; it is downloaded "
                          "from huggingface.co once, then works offline") from error


def on_device(model):
    import torch
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return model.to(device).eval().requires_grad_(False)


def in_batches(function, *lists, size=32):
    """function on so many items of each list at a time -> its results in one list"""
    results = []
    for i in range(0, len(lists[0]), size):
        results += function(*(items[i:i + size] for items in lists))
    return results


@functools.lru_cache  # rewards that share a model share its memory
def load_clip(name, processor, size):
    from transformers import AutoProcessor, CLIPModel
    return on_device(from_hub(CLIPModel.from_pretrained, name, size)), from_hub(AutoProcessor.from_pretrained, processor, size)


def clip_embeddings(clip, images, texts):
    """Images and texts -> their embeddings of length 1: [B, D] and [B, D]"""
    import torch
    model, processor = clip
    inputs = processor(images=[image.convert("RGB") for image in images], text=list(texts), return_tensors="pt",
                       padding=True, truncation=True, max_length=model.config.text_config.max_position_embeddings)
    with torch.no_grad():
        out = model(**inputs.to(model.device))
    return [e / e.norm(dim=-1, keepdim=True) for e in (out.image_embeds, out.text_embeds)]


def cosines(clip, images, prompts):
    """The cosine of each image with its own prompt."""
    image, text = clip_embeddings(clip, images, prompts)
    return (image * text).sum(-1).tolist()


def pickscore(scale=1 / 26, name="yuvalkirstain/PickScore_v1", processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
    """Human preference: logit_scale x the cosine of image and prompt, / 26 as in the official training.

    Model: PickScore_v1, a CLIP ViT-H/14 (arXiv 2305.01569; huggingface.co/yuvalkirstain/PickScore_v1; 3.9 GB).
    `pickscore_unscaled` is the same without the 26, the number of the paper's tables (SD3.5-Medium: 21.72).
    """
    clip = load_clip(name, processor, "3.9 GB")
    scale = scale * clip[0].logit_scale.exp().item()
    return lambda images, prompts, metadata: [scale * c for c in in_batches(functools.partial(cosines, clip), images, prompts)]


def pickscore_unscaled():
    """PickScore as the paper's tables print it."""
    return pickscore(scale=1)


def toy_pickscore():
    """The same lines with toy/pickscore, a CLIP of 3 MB that toy/make_toy.py taught `toy_taste` by examples."""
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "toy/pickscore")
    return pickscore(name=folder, processor=folder)


CLIP = "openai/clip-vit-large-patch14"


def clipscore(name=CLIP):
    """Alignment: 100 x the cosine of image and prompt in CLIP ViT-L/14 (huggingface.co/openai/clip-vit-large-patch14; 1.7 GB)."""
    clip = load_clip(name, name, "1.7 GB")
    return lambda images, prompts, metadata: [100 * c for c in in_batches(functools.partial(cosines, clip), images, prompts)]


def aesthetic(name=CLIP, head="trl-lib/ddpo-aesthetic-predictor"):
    """Beauty, about 1 to 10, whatever the prompt: LAION's predictor, a stack of linear layers on CLIP ViT-L/14's embedding.

    Models: openai/clip-vit-large-patch14 (1.7 GB) and the head sac+logos+ava1-l14-linearMSE, here from
    huggingface.co/trl-lib/ddpo-aesthetic-predictor (4 MB; after github.com/christophschuhmann/improved-aesthetic-predictor).
    """
    import torch
    from huggingface_hub import hf_hub_download
    clip = load_clip(name, name, "1.7 GB")
    path = head if os.path.exists(head) else from_hub(lambda head: hf_hub_download(head, "aesthetic-model.pth"), head, "4 MB")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    keys = sorted((key for key in weights if key.endswith(".weight")), key=lambda key: int(key.split(".")[-2]))
    layers = []  # between them were only dropouts
    for key in keys:
        layer = torch.nn.Linear(*weights[key].shape[::-1])
        layer.load_state_dict({"weight": weights[key], "bias": weights[key.replace(".weight", ".bias")]})
        layers.append(layer)
    predictor = on_device(torch.nn.Sequential(*layers))

    def rate(images):
        with torch.no_grad():
            return predictor(clip_embeddings(clip, images, [""] * len(images))[0])[:, 0].tolist()
    return lambda images, prompts, metadata: in_batches(rate, images)


# --------------------------------------------------------------------------------------- composition in photographs

COCO_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # COCO's -> GenEval's
PHOTO_COLORS = "red orange yellow green blue purple pink brown black white".split()


def geneval_photo(detector="facebook/mask2former-swin-small-coco-instance", name=CLIP):
    """GenEval's six tasks in photographs, by the scoring of `geneval`; no mmdet and no reward server.

    Models: Mask2Former Swin-S, trained on COCO (huggingface.co/facebook/mask2former-swin-small-coco-instance; 0.3 GB),
    finds the objects; CLIP ViT-L/14 (1.7 GB) names their colours. As in the original evaluator (arXiv 2310.11513):
    confidence above 0.3, or 0.9 when counting, at most 16 objects of a class, and colours told on the object alone,
    cut out on grey, by the mean of three phrases. Where it differs: transformers' weights and post-processing, in which an
    object's mask keeps only the pixels where no other object is likelier; images are not compressed to JPEG first;
    OpenAI's CLIP instead of open_clip's copy of it; and a wrong place scores as in the paper, see geneval_score.
    """
    import torch
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation
    model = on_device(from_hub(Mask2FormerForUniversalSegmentation.from_pretrained, detector, "0.3 GB"))
    processor = from_hub(AutoImageProcessor.from_pretrained, detector, "0.3 GB")
    clip = load_clip(name, name, "1.7 GB")
    classes = {COCO_NAMES.get(label, label) for label in model.config.id2label.values()}

    def detect(image, row):
        """-> [{"class", "color", "box"}], the surest first; colours only of classes whose colour was asked for"""
        inputs = processor(images=image.convert("RGB"), return_tensors="pt").to(model.device)
        with torch.no_grad():
            out = model(**inputs)
        threshold = 0.9 if row.get("tag") == "counting" else 0.3
        result = processor.post_process_instance_segmentation(
            out, threshold=threshold, target_sizes=[image.size[::-1]], return_binary_maps=True)[0]
        colored, found = {asked["class"] for asked in row["include"] if "color" in asked}, []
        for mask, segment in sorted(zip(result["segmentation"], result["segments_info"]), key=lambda pair: -pair[1]["score"]):
            mask, label = mask.cpu().numpy() > 0, model.config.id2label[segment["label_id"]]
            label = COCO_NAMES.get(label, label)
            if not mask.any() or sum(o["class"] == label for o in found) == 16:
                continue
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            box = tuple(int(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
            found.append({"class": label, "box": box, "color": name_color(image, mask, box, label) if label in colored else ""})
        return found

    def name_color(image, mask, box, label):
        grey = Image.new("RGB", image.size, (153, 153, 153))
        alone = Image.composite(image.convert("RGB"), grey, Image.fromarray(mask)).crop(box)
        phrases = [phrase for color in PHOTO_COLORS for phrase in (
            f"a photo of a {color} {label}", f"a photo of a {color}-colored {label}", f"a photo of a {color} object")]
        picture, texts = clip_embeddings(clip, [alone], phrases)
        means = texts.view(len(PHOTO_COLORS), 3, -1).mean(1)
        return PHOTO_COLORS[int((means / means.norm(dim=-1, keepdim=True) @ picture[0]).argmax())]

    def reward(images, prompts, metadata):
        check_metadata(prompts, metadata, classes, PHOTO_COLORS)
        return [geneval_score(detect(image, row), row) for image, row in zip(images, metadata)]
    return reward


# ----------------------------------------------------------------------------------------------- a model's judgement

QUESTION = ("This image was generated for the caption: {prompt}\nHow well does it show what the caption says, and how good does "
            "it look? Answer with one digit from 1 (bad) to 5 (excellent) and nothing else.")


def vlm(name="Qwen/Qwen2.5-VL-3B-Instruct"):
    """A vision-language model's rating of the image for its prompt: 1 to 5, as 0.2 to 1.

    Model: Qwen2.5-VL-3B-Instruct (huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct; 7.5 GB), or another of the Qwen2.5-VL
    family. Raises RewardError when the answer is not one digit.
    """
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    load_model = functools.partial(Qwen2_5_VLForConditionalGeneration.from_pretrained,
                                   dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    model = on_device(from_hub(load_model, name, "7.5 GB"))
    # Not AutoProcessor: that one has a part for videos, which needs torchvision.
    prepare, tokenizer = (from_hub(auto.from_pretrained, name, "7.5 GB") for auto in (AutoImageProcessor, AutoTokenizer))
    tokenizer.padding_side = "left"  # so that all answers of a batch begin at the same place
    place = tokenizer.convert_ids_to_tokens(model.config.image_token_id)

    def ask(images, prompts):
        pictures = prepare([image.convert("RGB") for image in images], return_tensors="pt")
        texts = []
        for prompt, patches in zip(prompts, pictures["image_grid_thw"].prod(1).tolist()):
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION.format(prompt=prompt)}]}]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            texts.append(text.replace(place, place * (patches // prepare.merge_size**2), 1))
        inputs = {**tokenizer(texts, padding=True, return_tensors="pt"), **pictures}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()  # where the image is
        with torch.no_grad():
            inputs = {key: value.to(model.device) for key, value in inputs.items()}
            tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        return [rating(answer, prompt) for answer, prompt in zip(answers, prompts)]
    return lambda images, prompts, metadata: in_batches(ask, images, prompts, size=8)


def rating(answer, prompt):
    """"4" -> 0.8. Nothing is guessed from an answer that says more."""
    match = re.fullmatch(r"\s*([1-5])\.?\s*", answer)
    if not match:
        raise RewardError(f"the model answered {answer!r} for {prompt!r}, not a digit from 1 to 5")
    return int(match[1]) / 5


REWARDS = {f.__name__: f for f in (ocr, geneval, geneval_photo, pickscore, pickscore_unscaled, clipscore, aesthetic, vlm,
                                   toy_pickscore, toy_taste, jpeg_compressibility, jpeg_incompressibility)}
