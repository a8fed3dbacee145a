"""Prompts and rewards for flow_grpo.py. A reward is a function of images and what was asked for:

    reward(images: list[PIL.Image], prompts: list[str], metadata: list[dict]) -> list[float]

metadata are the rows of the dataset, which contain the prompts. `--reward` takes a name from
REWARDS below, your own "file.py:function", or a weighted sum of these, "ocr:1,pickscore:0.5". Each
function in REWARDS loads what its reward needs, such as a model, and returns the reward. So only
what is asked for gets loaded. Your own function is the reward itself. "The paper" is Flow-GRPO
(arXiv 2505.05470), "official" means github.com/yifan123/flow_grpo.

A reward may have an attribute `check` (`ocr` sets one), a function of all prompts and metadata. It
is called before training and raises RewardError for a prompt that the reward cannot judge. If a
reward fails, the run stops: a failure never counts as a score of 0. PAPER/CODE marks where the
paper, the official code and this file differ. (ImageReward is missing: its package needs an old
transformers.)
"""
import importlib.util
import json
import math
import os
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

# The GPU of this process, if there is one
DEVICE = torch.accelerator.current_accelerator(check_available=True) or "cpu"
CLIP = "openai/clip-vit-large-patch14"
TOY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "toy")


class RewardError(ValueError):
    """Something that the user has to change. The run stops with this one line."""


# ----------------------------------------------------------------------------------- text rendering
def ocr():
    """How much of the text in double quotes can be read: max(1 - N_e / N_ref, 0) (section 5.1).

    N_e is the edit distance from what is read to the N_ref characters that were asked for. Case,
    spaces, and more text around a complete target do not count (official ocr.py).
    Engine: PaddleOCR's PP-OCRv6 (small) on onnxruntime, inside the `rapidocr` package.
    """
    import onnxruntime
    from rapidfuzz.distance import Levenshtein
    from rapidocr import RapidOCR
    onnxruntime.disable_telemetry_events()
    # Many engines with one thread each are faster than one engine with many threads.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine
    threads = max(1, cores // processes)
    options = {
        "Global.log_level": "critical",
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        # Small images are not enlarged, and short lines are padded less than usual. Doing more
        # of either would be slow, and would not help.
        "Det.limit_type": "max",
        "Det.limit_side_len": 960,
        "Rec.rec_img_shape": [3, 48, 160],
    }
    engines = [RapidOCR(params=options) for _ in range(threads)]

    def rate(image, prompt):
        image = image.convert("RGB")
        engine = engines.pop()  # there are as many engines as threads, so one is free
        lines = engine(image, use_cls=False).txts  # no line is upside down
        engines.append(engine)
        return text_score("".join(lines or ()), quoted(prompt), Levenshtein.distance)

    def reward(images, prompts, metadata):
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(rate, images, prompts))

    def check(prompts, metadata):
        for prompt in prompts:
            quoted(prompt)
    reward.check = check
    return reward


def quoted(prompt):
    """The text between the prompt's first two double quotes

    A stray quote, as in 12" for inches, would make us score the wrong text. So an odd number of
    quotes, or a backslash before one, is refused. No official prompt has either.
    """
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].strip():
        raise RewardError(f"the prompt {prompt!r} has no text in double quotes, "
                          'such as: a sign that says "HELLO"')
    if prompt.count('"') % 2 == 1 or '\\"' in prompt:
        raise RewardError(f"the prompt {prompt!r} has an odd number of double quotes, or a "
                          "backslash before one, so its text is not clear")
    return parts[1]


def text_score(text, target, distance):
    """The score that `ocr` describes. distance(a, b) is the edit distance of two strings."""
    if not target.isascii():
        # PAPER/CODE: The official code compares all characters as they are. But then a target with
        # a curly apostrophe could never be right, because the engine reads a straight one.
        text = plain(text)
        target = plain(target)
    text = without_spaces(text).lower()
    target = without_spaces(target).lower()
    if target in text:
        return 1.0
    return max(1 - distance(text, target) / len(target), 0.0)


def without_spaces(text):
    return "".join(text.split())


def plain(text):
    """Gives characters that look alike one form: full-width letters, ligatures, combining accents
    (e + \u0301 becomes \u00e9) and curly quotes
    """
    text = unicodedata.normalize("NFKC", text)
    for quote in "\u2018\u2019\u201b":
        text = text.replace(quote, "'")
    for quote in "\u201c\u201d\u201f":
        text = text.replace(quote, '"')
    return text


# ----------------------------------------------------------------------------- composition: GenEval
RELATIONS = ("left of", "right of", "above", "below")


def geneval_score(found, row):
    """The paper's rule-based reward (section 5.1). It is 1 if everything is as asked.

    found: [{"class", "color", "box": (left, top, right, bottom)}], row: GenEval metadata. Each
    entry of its "include" gives up to three terms, and the score is the mean of all:

      count  1 - |N_found - N_asked| / N_asked, negative if more than twice as many are found
      color  the same for the objects of this color, but 0 if the count is wrong
      place  1 if it is right, and 0 if not, or if the count or color is wrong. (No official row
             asks for a color and a place.)

    As an exact count is asked for, the "exclude" of GenEval's counting prompts is not needed.
    """
    terms = []
    # For each entry, the objects found for it, or [] if any of its terms is wrong. Then every place
    # relative to them is wrong, too. (PAPER/CODE: The code does this, the paper does not say.)
    references = []
    for asked in row["include"]:
        objects = [thing for thing in found if thing["class"] == asked["class"]]
        terms.append(count_term(objects, asked["count"]))
        is_right = len(objects) == asked["count"]
        if asked.get("color"):
            if is_right:
                colored = [thing for thing in objects if thing["color"] == asked["color"]]
                terms.append(count_term(colored, asked["count"]))
                is_right = len(colored) == asked["count"]
            else:
                terms.append(0.0)
        if asked.get("position"):
            # PAPER/CODE: after a wrong place the official code adds another term of 1, so two
            # objects in a wrong place score 0.75 instead of 2/3. We do not add it.
            relation, index = asked["position"]  # ["left of", 0]: left of the first entry's objects
            is_right = is_right and all_are(relation, objects, references[index])
            terms.append(float(is_right))
        if is_right:
            references.append(objects)
        else:
            references.append([])
    return sum(terms) / len(terms)


def count_term(objects, count):
    return 1 - abs(count - len(objects)) / count


def all_are(relation, objects, references):
    """Whether every object has this relation to every reference. False without a reference."""
    for thing in objects:
        for reference in references:
            if relation not in relations(thing["box"], reference["box"]):
                return False
    return len(references) > 0


def relations(box, reference):
    """Where a box lies, seen from another: a set of RELATIONS (GenEval's rule, arXiv 2310.11513).

    The offset of the two centers is shortened, in x by a tenth of the sum of both widths, in y by a
    tenth of both heights. A relation holds if the shortened offset in its direction is more than
    half of the distance of the centers. Boxes are (left, top, right, bottom) in pixels.
    """
    left, top, right, bottom = box
    ref_left, ref_top, ref_right, ref_bottom = reference
    x = (left + right) / 2 - (ref_left + ref_right) / 2
    y = (top + bottom) / 2 - (ref_top + ref_bottom) / 2
    half = 0.5 * math.hypot(x, y)
    x = shorten(x, 0.1 * (right - left + ref_right - ref_left))
    y = shorten(y, 0.1 * (bottom - top + ref_bottom - ref_top))
    holds = set()
    if x < -half:
        holds.add("left of")
    if x > half:
        holds.add("right of")
    if y < -half:
        holds.add("above")
    if y > half:
        holds.add("below")
    return holds


def shorten(offset, by):
    """Moves a number towards 0, but not beyond"""
    return math.copysign(max(abs(offset) - by, 0), offset)


def check_metadata(prompts, metadata, classes, colors):
    """Raises RewardError for what geneval_score cannot judge with these classes and colors."""
    for prompt, row in zip(prompts, metadata):
        who = f"the prompt {prompt!r}"
        include = row.get("include")
        if not include or not isinstance(include, list):
            raise RewardError(f"{who} has no GenEval metadata; use a dataset of *_metadata.jsonl")
        for number, asked in enumerate(include):
            name = asked.get("class")
            count = asked.get("count")
            color = asked.get("color")
            if name not in classes or (color and color not in colors):
                hint = ""
                if name in PHOTO_CLASSES and name not in classes:
                    hint = "; geneval_photo knows it"
                raise RewardError(f"{who} asks for {color or 'a'} {name}{hint}; "
                                  f"the detector knows {', '.join(classes)}; {', '.join(colors)}")
            if type(count) is not int or count < 1:
                raise RewardError(f"{who}: the count of {name} is {count!r}, not 1 or more")
            if not asked.get("position"):
                continue
            if not isinstance(asked["position"], list) or len(asked["position"]) != 2:
                raise RewardError(f"{who}: a position is [relation, number of the reference]")
            relation, reference = asked["position"]
            if relation not in RELATIONS:
                raise RewardError(f"{who}: place {relation!r} is none of {', '.join(RELATIONS)}")
            if type(reference) is not int or not 0 <= reference < number:
                raise RewardError(f"{who}: the position of {name} refers to object {reference!r}, "
                                  "which is not one that comes before it (they count from 0)")


def scene_reward(judge, classes, colors):
    """Turns judge(image, row), which scores one image, into a reward with a check."""
    def reward(images, prompts, metadata):
        return [judge(image, row) for image, row in zip(images, metadata)]

    reward.check = partial(check_metadata, classes=classes, colors=colors)
    return reward


PHOTO_COLORS = "red orange yellow green blue purple pink brown black white".split()
# GenEval's names of COCO's 80 classes, in COCO's order. Models may spell them in another way, but
# number them in this order.
PHOTO_CLASSES = [name.replace("_", " ") for name in """person bicycle car motorcycle airplane bus
train truck boat traffic_light fire_hydrant stop_sign parking_meter bench bird cat dog horse sheep
cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard
sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass
cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake
chair couch potted_plant bed dining_table toilet tv laptop computer_mouse tv_remote
computer_keyboard cell_phone microwave oven toaster sink refrigerator book clock vase scissors
teddy_bear hair_drier toothbrush""".split()]


# The size in pixels to which mmdet brings an image before it looks for objects
DETECTOR_SIZE = {"shortest_edge": 800, "longest_edge": 1333}


def geneval_photo(detector="facebook/mask2former-swin-small-coco-instance", clip=CLIP):
    """GenEval's six tasks in photographs, without mmdet or a reward server.

    Models: Mask2Former Swin-S, trained on COCO (0.3 GB), and CLIP ViT-L/14 (1.7 GB) for colors.
    As in the original evaluator (arXiv 2310.11513): confidence above 0.3, or 0.9 when counting; at
    most 16 objects of a class; the shorter side of an image is resized to 800 pixels; CLIP sees
    only the object, cut out on gray, to name its color. But the weights of Mask2Former are the
    hub's, not mmdet's, and transformers makes its masks at 384 pixels.

    PAPER/CODE: The official training sends images as JPEG, and gives mmdet RGB where mmdet
    expects BGR. We do neither.
    """
    detect = load_detector(detector)
    _, embed_images, embed_texts = load_clip(clip, clip)

    def judge(image, row):
        threshold = 0.9 if row.get("tag") == "counting" else 0.3
        found = detect(image, threshold)
        colored = [asked["class"] for asked in row["include"] if asked.get("color")]
        for thing in found:
            if thing["class"] in colored:  # only then, because it takes a pass through CLIP
                thing["color"] = name_color(embed_images, embed_texts, image, thing)
        return geneval_score(found, row)
    return scene_reward(judge, PHOTO_CLASSES, PHOTO_COLORS)


def load_detector(name):
    """-> a function of image and threshold that gives [{"class", "confidence", "box", "mask"}]"""
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation
    model = Mask2FormerForUniversalSegmentation.from_pretrained(name).to(DEVICE)
    processor = AutoImageProcessor.from_pretrained(name)
    if model.config.num_labels != len(PHOTO_CLASSES):
        raise RewardError(f"the detector {name} has {model.config.num_labels} labels; "
                          "it must have COCO's 80, in COCO's order")

    @torch.no_grad()
    def detect(image, threshold):
        inputs = processor(images=image.convert("RGB"), size=DETECTOR_SIZE, return_tensors="pt")
        outputs = model(**inputs.to(DEVICE))
        results = processor.post_process_instance_segmentation(
            outputs, threshold=threshold, target_sizes=[(image.height, image.width)],
            return_binary_maps=True)
        result = results[0]  # of the only image
        things = []
        for segment, mask in zip(result["segments_info"], result["segmentation"]):
            mask = Image.fromarray(mask.cpu().numpy() > 0)
            box = mask.getbbox()
            if box is not None:  # it is None if the mask is empty
                things.append({"class": PHOTO_CLASSES[segment["label_id"]],
                               "confidence": segment["score"], "box": box, "mask": mask})
        things.sort(key=lambda thing: thing["confidence"], reverse=True)
        found = []
        counts = dict.fromkeys(PHOTO_CLASSES, 0)
        for thing in things:
            if counts[thing["class"]] < 16:
                found.append(thing)
                counts[thing["class"]] += 1
        return found
    return detect


def name_color(embed_images, embed_texts, image, thing):
    """The one of PHOTO_COLORS that CLIP sees in an object."""
    gray = Image.new("RGB", image.size, "#999999")  # as in GenEval
    cut_out = Image.composite(image.convert("RGB"), gray, thing["mask"])
    alone = cut_out.crop(thing["box"])
    picture = embed_images([alone])[0]
    cosines = color_directions(embed_texts, thing["class"]) @ picture
    return PHOTO_COLORS[int(cosines.argmax())]


@lru_cache  # once for each class
def color_directions(embed_texts, kind):
    """CLIP's embedding of a class in each of PHOTO_COLORS -> [10, D], each of length 1"""
    phrases = []
    for color in PHOTO_COLORS:
        phrases.append(f"a photo of a {color} {kind}")
        phrases.append(f"a photo of a {color}-colored {kind}")
        phrases.append(f"a photo of a {color} object")
    texts = embed_texts(phrases)  # [30, D]
    means = texts.view(len(PHOTO_COLORS), 3, -1).mean(1)  # over the three phrases of a color
    return unit_length(means)


# ------------------------------------------------------------------------- preference and alignment
def pickscore(name="yuvalkirstain/PickScore_v1",
              processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", scale=1 / 26):
    """Human preference: logit_scale x the cosine of image and prompt, divided by 26.

    Model: PickScore_v1, a CLIP ViT-H/14 (arXiv 2305.01569, 3.9 GB). The official training divides
    by 26, too. The paper's tables do not (SD3.5-Medium: 21.72), nor does `pickscore_unscaled`.
    """
    model, embed_images, embed_texts = load_clip(name, processor)
    return cosine_reward(embed_images, embed_texts, scale * model.logit_scale.exp().item())


def clipscore(name=CLIP):
    """Alignment: 100 x the cosine of image and prompt, divided by 30 as in the official
    clip_scorer.py. Model: CLIP ViT-L/14 (1.7 GB).
    """
    _, embed_images, embed_texts = load_clip(name, name)
    return cosine_reward(embed_images, embed_texts, 100 / 30)


def aesthetic(name=CLIP, head="trl-lib/ddpo-aesthetic-predictor"):
    """Beauty from about 1 to 10. The prompt does not count.

    Model: linear layers (4 MB) on the embedding of CLIP ViT-L/14 (1.7 GB). They are
    LAION's sac+logos+ava1-l14-linearMSE: github.com/christophschuhmann/improved-aesthetic-predictor
    """
    import huggingface_hub
    _, embed_images, _ = load_clip(name, name)
    path = head
    if not os.path.exists(path):
        path = huggingface_hub.hf_hub_download(head, "aesthetic-model.pth")
    state = torch.load(path, map_location=DEVICE, weights_only=True)
    layers = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]

    def reward(images, prompts, metadata):
        x = embed_images(images)
        for layer in layers:  # there are no activations between them
            x = torch.nn.functional.linear(x, state[f"{layer}.weight"], state[f"{layer}.bias"])
        return x[:, 0].tolist()
    return reward


def cosine_reward(embed_images, embed_texts, scale):
    """scale x the cosine of each image with its own prompt"""
    def reward(images, prompts, metadata):
        cosines = (embed_images(images) * embed_texts(prompts)).sum(1)
        return [scale * cosine for cosine in cosines.tolist()]
    return reward


@lru_cache  # rewards that share a model share its memory
def load_clip(name, processor_name):
    """-> the model, embed_images and embed_texts. These give embeddings [B, D] of length 1."""
    from transformers import AutoProcessor, CLIPModel
    model = CLIPModel.from_pretrained(name).to(DEVICE)
    processor = AutoProcessor.from_pretrained(processor_name)
    max_length = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def embed_images(images):
        parts = []
        for start in range(0, len(images), 32):
            batch = [image.convert("RGB") for image in images[start:start + 32]]
            inputs = processor(images=batch, return_tensors="pt").to(DEVICE)
            parts.append(model.get_image_features(**inputs).pooler_output)
        return unit_length(torch.cat(parts))

    @torch.no_grad()
    def embed_texts(texts):
        parts = []
        for start in range(0, len(texts), 32):
            batch = list(texts[start:start + 32])
            inputs = processor(text=batch, return_tensors="pt", padding=True, truncation=True,
                               max_length=max_length).to(DEVICE)
            parts.append(model.get_text_features(**inputs).pooler_output)
        return unit_length(torch.cat(parts))
    return model, embed_images, embed_texts


def unit_length(embeds):
    """[B, D], each row divided by its length"""
    return embeds / embeds.square().sum(1, keepdim=True).sqrt()


# ---------------------------------------------------------------------------------------- diversity
def diversity():
    """The mean distance of an image to the other images of its prompt, 0 if there are none

    The distance of two images is the root mean square difference of their pixels, from 0 to 1. Only
    the images of one process are compared.
    """
    def reward(images, prompts, metadata):
        pixels = [np.asarray(image, float) / 255 for image in images]
        scores = []
        for i, prompt in enumerate(prompts):
            others = [j for j in range(len(images)) if prompts[j] == prompt and j != i]
            distances = [np.sqrt(np.mean((pixels[i] - pixels[j]) ** 2)) for j in others]
            scores.append(np.mean(distances) if distances else 0.0)
        return scores
    return reward


# ------------------------------------------------------------------------ prompts, loading, scoring
def toy(name):
    """A reward of toy/world.py, which is imported only if it is asked for"""
    from toy import world
    return getattr(world, name)()


REWARDS = {
    "ocr": ocr,
    "geneval": partial(toy, "geneval"),
    "geneval_photo": geneval_photo,
    "pickscore": pickscore,
    "pickscore_unscaled": partial(pickscore, scale=1),
    "clipscore": clipscore,
    "aesthetic": aesthetic,
    "toy_pickscore": partial(pickscore, name=f"{TOY}/pickscore", processor=f"{TOY}/pickscore"),
    "toy_taste": partial(toy, "toy_taste"),
    "toy_sign": partial(toy, "toy_sign"),
    "toy_inks": partial(toy, "toy_inks"),
    "diversity": diversity,
}
HAVE_A_RIGHT_ANSWER = ("reward/ocr", "reward/geneval", "reward/geneval_photo")  # see `accuracy`


def load_prompts(config, split):
    """-> a list of dicts, each with a "prompt"

    As in the official repository, a dataset is a folder. It has train.txt and test.txt with a
    prompt on each line, or train_metadata.jsonl and test_metadata.jsonl with such a dict on each
    line. Without --dataset, it is the toy's: words if --reward contains ocr, scenes otherwise.
    """
    toy_task = "ocr" if "ocr" in parse(config.reward, "--reward") else "geneval"
    folder = Path(config.dataset or f"{TOY}/{toy_task}")
    text_path = folder / f"{split}.txt"
    table_path = folder / f"{split}_metadata.jsonl"
    path = text_path if text_path.exists() else table_path
    where = f"--dataset {folder}: "
    try:
        # Not splitlines(), which also splits at characters that may be in a prompt
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise RewardError(f"{where}{path.name} is not UTF-8 (at byte {error.start})") from error
    except OSError as error:
        raise RewardError(
            f"{where}{text_path.name} or {table_path.name} cannot be read there") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path == text_path:
            row = {"prompt": line}
        else:
            row = read_row(line, f"{where}{path.name} line {number}")
        row["prompt"] = row["prompt"].strip()
        rows.append(row)
    if len(rows) < PartialState().num_processes:
        raise RewardError(f"{where}{path.name} must have a prompt for each process")
    return rows


def read_row(line, where):
    """A line of JSON -> a dict without the keys whose value is null, which some exporters write"""
    def without_nulls(pairs):
        return {key: value for key, value in pairs if value is not None}
    try:
        row = json.loads(line, object_pairs_hook=without_nulls)
    except ValueError as error:
        raise RewardError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise RewardError(f'{where} is not a JSON object with a "prompt" that is a string')
    if not isinstance(row.get("tag", ""), str):
        raise RewardError(f"{where}: its tag {row['tag']!r} is not a string")
    try:
        row["prompt"].encode()
    except UnicodeEncodeError as error:
        raise RewardError(f"{where}: its prompt has half of a character in it "
                          f"({ascii(error.object[error.start])})") from error
    return row


def prompt_warnings(tokenizer, max_tokens, prompts):
    """Sentences about prompts that the model does not fully see: too long, or with unknown words"""
    long = []
    unknown = []
    for prompt, ids in zip(prompts, tokenizer(prompts).input_ids):
        if len(ids) > max_tokens:
            long.append(prompt)
        if tokenizer.unk_token_id in ids:
            unknown.append(prompt)
    sentences = []
    if long:
        sentences.append(f"warning: {len(long)} prompts are longer than --max_sequence_length "
                         f"{max_tokens} and get cut off, such as {long[0]!r}")
    if unknown:
        sentences.append(f"warning: {len(unknown)} prompts have words that the model does not "
                         f"know, such as {unknown[0]!r}")
    return sentences


def parse(spec, option):
    """"ocr:1,mine.py:nice:2" -> {"ocr": 1.0, "mine.py:nice": 2.0}, the weight of each reward"""
    weights = {}
    for term in spec.split(","):
        term = term.strip()
        if not term:
            continue
        name = term
        weight = 1.0
        before, _, after = term.rpartition(":")
        if before and is_number(after):
            name = before
            weight = float(after)
        if not math.isfinite(weight):
            raise RewardError(f"{option} {spec}: the weight of {name} must be finite")
        if name in weights:
            raise RewardError(f"{option} {spec}: {name} is there twice")
        if name not in REWARDS and ":" not in name:
            raise RewardError(f"{option} {spec}: there is no reward {name!r}. Choose from "
                              f"{', '.join(REWARDS)}, or give your own as file.py:function")
        weights[name] = weight
    if not weights and option == "--reward":
        raise RewardError(f"--reward is empty: choose from {', '.join(REWARDS)}")
    return weights


def is_number(text):
    try:
        float(text)
        return True
    except ValueError:
        return False


def load(spec, option):
    """A sum of rewards, as `parse` reads it -> {"ocr": (function, 1.0), ...}"""
    loaded = {}
    for name, weight in parse(spec, option).items():
        if name not in REWARDS:
            loaded[name] = (import_function(name, option), weight)
            continue
        try:
            loaded[name] = (REWARDS[name](), weight)
        except OSError as error:  # from transformers, if a model cannot be found or downloaded
            reason = " ".join(str(error).split())[:300]
            raise RewardError(f"{option} {name}: its model, which is downloaded once from "
                              f"huggingface.co, cannot be loaded: {reason}") from error
    return loaded


def import_function(name, option):
    """file.py:function -> the function. The file is run."""
    file, _, function = name.rpartition(":")
    path = os.path.abspath(file)
    if not (os.path.isfile(path) and path.endswith(".py")):
        raise RewardError(f"{option} {name}: there is no Python file {file}")
    if path not in sys.modules:  # a file is run once, even if two of the rewards are in it
        sys.path.append(os.path.dirname(path))  # for what it imports from its own folder
        spec = importlib.util.spec_from_file_location(path, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path] = module
        spec.loader.exec_module(module)
    if not hasattr(sys.modules[path], function):
        raise RewardError(f"{option} {name}: {file} has no function {function}")
    return getattr(sys.modules[path], function)


def check(loaded, rows):
    """Fail now rather than late: check all prompts, and score two black images as a trial (some
    mistakes show only with more than one).
    """
    for name, (reward, _) in loaded.items():
        if hasattr(reward, "check"):
            try:
                reward.check([row["prompt"] for row in rows], rows)
            except RewardError as error:
                raise RewardError(f"reward {name}: {error}") from error
    score(loaded, [Image.new("RGB", (64, 64))] * 2, [rows[0], rows[-1]])


@torch.no_grad()
def score(loaded, images, rows):
    """The scores of the N images of all processes: {"reward/ocr": [N], ..., "reward": weighted sum}

    images and rows are those of this process. The scores come in the order of the processes.
    """
    prompts = [row["prompt"] for row in rows]
    scores = {}
    total = 0
    for name, (reward, weight) in loaded.items():
        values = to_floats(reward(images, prompts, rows), len(images), name)
        values = np.array(gather_object(values))
        scores[f"reward/{name}"] = values
        total = total + weight * values
    scores["reward"] = total
    return scores


def accuracy(scores, rows):
    """The share of images with a score of exactly 1, if the first reward is OCR or GenEval

    There is one share of all, and one for each tag. In GenEval the tag is the task. GenEval's own
    accuracy accepts extra objects except when counting, ours does not. scores and rows are those of
    all processes.
    """
    first = list(scores)[0]  # scores are in the order of --reward
    if first not in HAVE_A_RIGHT_ANSWER:
        return {}
    right = scores[first] == 1
    shares = {"eval_accuracy": right.mean()}
    for tag in sorted({row["tag"] for row in rows if "tag" in row}):
        of_this_tag = [row.get("tag") == tag for row in rows]
        shares[f"eval_accuracy/{tag}"] = right[of_this_tag].mean()
    return shares


def to_floats(result, count, name):
    """What a reward returned -> a list of `count` floats"""
    contract = f"reward {name} must return a list of {count} floats, one for each image, "
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):
        raise RewardError(f"{contract}not (scores, dict), as the official rewards do: return only "
                          "the scores")
    if torch.is_tensor(result):
        result = result.detach().cpu()  # on Apple's GPUs there is no float64
    try:
        values = torch.as_tensor(result, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(f"{contract}not a {type(result).__name__} ({error})") from error
    if values.shape not in ((count,), (count, 1)):
        raise RewardError(f"{contract}not {list(values.shape)} numbers")
    values = values.flatten().tolist()
    for value in values:
        if math.isnan(value) or abs(value) > 1e30:  # flow_grpo.py computes in float32
            raise RewardError(f"reward {name} gave {value}, which is not a number, or too large")
    return values
