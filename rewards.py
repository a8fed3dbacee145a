"""Rewards for flow_grpo.py. A reward is a function of the images and of what was asked for:

    reward(images: list[PIL.Image], prompts: list[str], metadata: list[dict]) -> list[float]

`--reward` takes a name of REWARDS, your own "file.py:function", or a sum: "ocr:1,pickscore:0.5".
A function of REWARDS loads the models and returns the reward, so nothing else is ever loaded.
A reward may have an attribute `check`, a function of all prompts and metadata. It is called before
the first epoch and raises RewardError for what the reward cannot judge.
A failure never becomes a score. The reward raises, and the run stops with one line.
ImageReward is missing: its package does not run with the transformers that diffusers needs.
"""
import copy
import functools
import importlib.util
import math
import os
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import huggingface_hub
import numpy as np
import torch
from PIL import Image

DEVICE = torch.accelerator.current_accelerator(check_available=True) or "cpu"
CLIP = "openai/clip-vit-large-patch14"
TOY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "toy")


class RewardError(ValueError):
    """What the user must know, in one line."""


# ----------------------------------------------------------------------------------- text rendering
def ocr():
    """How much of the text in double quotes can be read: max(1 - N_e / N_ref, 0) (section 5.1).

    N_e is the edit distance from what is read to the N_ref letters that were asked for.
    Engine: PaddleOCR's PP-OCRv6 (small) on onnxruntime, inside the `rapidocr` package.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidocr import RapidOCR
    # Many engines of one thread are faster than one engine of many threads. By default rapidocr
    # enlarges small images to 736 pixels and pads each line to a width of 320: slow, for nothing.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # of this process
    options = {"Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": 1,
               "Det.limit_type": "max", "Det.limit_side_len": 960,
               "Rec.rec_img_shape": [3, 48, 160]}
    engines = [RapidOCR(params=options) for _ in range(cores)]

    def rate(image, prompt):
        image = image.convert("RGB")
        engine = engines.pop()  # there are as many as threads: one is free
        lines = engine(image, use_cls=False).txts  # no line is upside down
        engines.append(engine)
        return text_score("".join(lines or ()), quoted(prompt), Levenshtein.distance)

    def reward(images, prompts, metadata):
        with ThreadPoolExecutor(cores) as pool:
            return list(pool.map(rate, images, prompts))
    reward.check = lambda prompts, metadata: [quoted(prompt) for prompt in prompts]
    return reward


def quoted(prompt):
    """The text between the prompt's first two double quotes."""
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].strip():
        raise RewardError(f"the prompt {prompt!r} has no text in double quotes, "
                          'such as: a sign that says "HELLO"')
    return parts[1]


def text_score(text, target, distance):
    """Case and spaces do not count, nor what is beside a target that is whole (official ocr.py)."""
    text, target = (words.replace(" ", "").lower() for words in (text, target))
    if target in text:
        return 1.0
    return max(1 - distance(text, target) / len(target), 0.0)


# ----------------------------------------------------------------------------- composition: GenEval
RELATIONS = ("left of", "right of", "above", "below")


def geneval_score(found, row):
    """The paper's rule-based reward (section 5.1): the mean of all terms, 1 when all is as asked.

    found: [{"class", "color", "box": (left, top, right, bottom)}], row: GenEval metadata.
    A count gives 1 - |N_found - N_asked| / N_asked, below 0 for more than twice as many. A colour
    gives the same fraction, a place 0 or 1, and both give 0 while the count is wrong.
    """
    terms, references = [], []
    for asked in row["include"]:
        objects = [thing for thing in found if thing["class"] == asked["class"]]
        terms.append(1 - abs(asked["count"] - len(objects)) / asked["count"])
        right = len(objects) == asked["count"]
        if "color" in asked:
            colored = sum(thing["color"] == asked["color"] for thing in objects)
            terms.append(1 - abs(asked["count"] - colored) / asked["count"] if right else 0.0)
            right = right and colored == asked["count"]
        if "position" in asked:
            # PAPER/CODE: after a wrong place the official code adds another term of 1, so that a
            # failure scores 0.75. We follow the paper.
            relation, number = asked["position"]
            right = right and bool(references[number]) and all(
                relation in relations(thing["box"], other["box"])
                for thing in objects for other in references[number])
            terms.append(float(right))
        # PAPER/CODE: the paper is silent here. As in the official code, nothing has a place next
        # to objects whose own count, colour or place is wrong.
        references.append(objects if right else [])
    return sum(terms) / len(terms)


def relations(box, reference):
    """Where a box lies from another: a set of RELATIONS (GenEval's rule, arXiv 2310.11513).

    The distance of the centres must exceed a tenth of the boxes' summed sizes, and it must point
    within 60 degrees of the side. Boxes: (left, top, right, bottom) in pixels.
    """
    box, reference = np.reshape(box, (2, 2)), np.reshape(reference, (2, 2))
    offset = box.mean(0) - reference.mean(0)
    sizes = box[1] - box[0] + reference[1] - reference[0]
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * sizes, 0)
    if np.abs(beyond).max() < 1e-3:
        return set()
    x, y = beyond / np.linalg.norm(offset)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {relation for relation, true in zip(RELATIONS, holds) if true}


def check_metadata(prompts, metadata, classes, colors):
    """Raises RewardError for a prompt that a detector of these classes and colours cannot judge."""
    for prompt, row in zip(prompts, metadata):
        who = f"the prompt {prompt!r}"
        if not row.get("include"):
            raise RewardError(f"{who} has no GenEval metadata; use a dataset of *_metadata.jsonl")
        for asked in row["include"]:
            name, color = asked["class"], asked.get("color")
            relation, _ = asked.get("position", ("above", 0))
            if name not in classes or color not in (None, *colors):
                hint = "; geneval_photo knows it" if name in PHOTO_CLASSES else ""
                raise RewardError(f"{who} asks for {color or 'a'} {name}{hint}; "
                                  f"the detector knows {', '.join(classes)}; {', '.join(colors)}")
            if relation not in RELATIONS:
                raise RewardError(f"{who}: place {relation!r} is none of {', '.join(RELATIONS)}")


def scene_reward(judge, classes, colors):
    """judge: a function of one image and its GenEval metadata -> a reward that has a check"""
    def reward(images, prompts, metadata):
        check_metadata(prompts, metadata, classes, colors)
        return [judge(image, row) for image, row in zip(images, metadata)]
    reward.check = functools.partial(check_metadata, classes=classes, colors=colors)
    return reward


PHOTO_COLORS = "red orange yellow green blue purple pink brown black white".split()
# GenEval's names of COCO's 80 classes, in COCO's order. Models differ in words, not in the order.
PHOTO_CLASSES = [name.replace("_", " ") for name in """person bicycle car motorcycle airplane bus
train truck boat traffic_light fire_hydrant stop_sign parking_meter bench bird cat dog horse sheep
cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard
sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass
cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake
chair couch potted_plant bed dining_table toilet tv laptop computer_mouse tv_remote
computer_keyboard cell_phone microwave oven toaster sink refrigerator book clock vase scissors
teddy_bear hair_drier toothbrush""".split()]


def geneval_photo(detector="facebook/mask2former-swin-small-coco-instance", name=CLIP):
    """GenEval's six tasks in photographs, without mmdet or a reward server.

    Models: Mask2Former Swin-S, trained on COCO (0.3 GB), and CLIP ViT-L/14 (1.7 GB) for colours.
    As in the original evaluator (arXiv 2310.11513): confidence above 0.3, or 0.9 when counting; at
    most 16 objects of a class; a colour is told on the object alone, cut out on grey. But images
    are not compressed to JPEG first, and CLIP is OpenAI's, not open_clip's copy of it.
    """
    detect = load_detector(detector)
    _, embed = load_clip(name, name, "1.7 GB")
    def judge(image, row):
        found = detect(image, threshold=0.9 if row.get("tag") == "counting" else 0.3)
        colored = [asked["class"] for asked in row["include"] if "color" in asked]
        for thing in found:
            if thing["class"] in colored:  # only then, as it takes a pass through CLIP
                thing["color"] = name_color(embed, image, thing)
        return geneval_score(found, row)
    return scene_reward(judge, PHOTO_CLASSES, PHOTO_COLORS)


def load_detector(name):
    """-> a function of image and threshold that gives [{"class", "box", "mask"}]"""
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation
    model = from_hub(Mask2FormerForUniversalSegmentation.from_pretrained, name, "0.3 GB").to(DEVICE)
    processor = from_hub(AutoImageProcessor.from_pretrained, name, "0.3 GB")
    if model.config.num_labels != len(PHOTO_CLASSES):
        raise RewardError(f"the detector {name} has {model.config.num_labels} labels; "
                          "it must have COCO's 80, in COCO's order")

    @torch.no_grad()
    def detect(image, threshold):
        inputs = processor(images=image.convert("RGB"), return_tensors="pt").to(model.device)
        result, = processor.post_process_instance_segmentation(
            model(**inputs), threshold=threshold, target_sizes=[image.size[::-1]],
            return_binary_maps=True)
        pairs = list(zip(result["segments_info"], result["segmentation"]))
        found = {label: [] for label in PHOTO_CLASSES}
        for segment, mask in sorted(pairs, key=lambda pair: -pair[0]["score"]):
            label = PHOTO_CLASSES[segment["label_id"]]
            mask = Image.fromarray(mask.cpu().numpy() > 0)
            if mask.getbbox():
                found[label].append({"class": label, "box": mask.getbbox(), "mask": mask})
        return [thing for things in found.values() for thing in things[:16]]
    return detect


def name_color(embed, image, thing):
    """The one of PHOTO_COLORS that CLIP sees in an object."""
    grey = Image.new("RGB", image.size, (153, 153, 153))
    alone = Image.composite(image.convert("RGB"), grey, thing["mask"]).crop(thing["box"])
    phrases = [phrase.format(color, thing["class"]) for color in PHOTO_COLORS for phrase in
               ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")]
    picture, texts = embed([alone], phrases)  # [1, D], [30, D]
    means = torch.nn.functional.normalize(texts.view(len(PHOTO_COLORS), 3, -1).mean(1), dim=-1)
    return PHOTO_COLORS[int((means @ picture[0]).argmax())]


# ------------------------------------------------------------------------- preference and alignment
def pickscore(name="yuvalkirstain/PickScore_v1",
              processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", scale=1 / 26):
    """Human preference: logit_scale x the cosine of image and prompt.

    Model: PickScore_v1, a CLIP ViT-H/14 (arXiv 2305.01569, 3.9 GB). The official training divides
    by 26, the paper's tables do not (SD3.5-Medium: 21.72): that is `pickscore_unscaled`.
    """
    model, embed = load_clip(name, processor, "3.9 GB")
    return cosine_reward(embed, scale * model.logit_scale.exp().item())


def clipscore(name=CLIP):
    """Alignment: 100 x the cosine of image and prompt. Model: CLIP ViT-L/14 (1.7 GB)."""
    return cosine_reward(load_clip(name, name, "1.7 GB")[1], 100)


def aesthetic(name=CLIP, head="trl-lib/ddpo-aesthetic-predictor"):
    """Beauty, about 1 to 10, whatever the prompt: linear layers (4 MB) on CLIP ViT-L/14 (1.7 GB).

    LAION's sac+logos+ava1-l14-linearMSE: github.com/christophschuhmann/improved-aesthetic-predictor
    """
    model, embed = load_clip(name, name, "1.7 GB")
    fetch = functools.partial(huggingface_hub.hf_hub_download, filename="aesthetic-model.pth")
    path = head if os.path.exists(head) else from_hub(fetch, head, "4 MB")
    state = torch.load(path, map_location=model.device, weights_only=True)
    layers = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
    def reward(images, prompts, metadata):
        x, _ = embed(images, prompts)
        for layer in layers:  # between them were only dropouts
            x = torch.nn.functional.linear(x, state[f"{layer}.weight"], state[f"{layer}.bias"])
        return x[:, 0].tolist()
    return reward


def cosine_reward(embed, scale):
    """scale x the cosine of each image with its own prompt"""
    def reward(images, prompts, metadata):
        image, text = embed(images, prompts)
        return [scale * cosine for cosine in (image * text).sum(-1).tolist()]
    return reward


@functools.lru_cache  # rewards that share a model share its memory
def load_clip(name, processor, size):
    """-> the model, and a function of images and texts that gives their embeddings of length 1"""
    from transformers import AutoProcessor, CLIPModel
    model = from_hub(CLIPModel.from_pretrained, name, size).to(DEVICE)
    processor = from_hub(AutoProcessor.from_pretrained, processor, size)

    @torch.no_grad()
    def embed(images, texts):
        parts = []
        for i in range(0, len(texts), 32):  # so many at a time
            inputs = processor(
                images=[image.convert("RGB") for image in images[i:i + 32]],
                text=list(texts[i:i + 32]), return_tensors="pt", padding=True, truncation=True,
                max_length=model.config.text_config.max_position_embeddings)
            out = model(**inputs.to(model.device))
            parts.append((out.image_embeds, out.text_embeds))
        return [torch.cat(part) for part in zip(*parts)]  # [B, D] and [B, D]
    return model, embed


# --------------------------------------------------------------------------------- loading, scoring
def from_hub(load, name, size):
    """load(name): from this machine if the model is here, else from huggingface.co."""
    import transformers
    quiet(transformers)
    with suppress(OSError, ValueError):  # it may not be here, or not whole
        return load(name, local_files_only=True)
    try:
        if not os.path.exists(name):  # ask once: without a network, load would try for a minute
            huggingface_hub.HfApi().model_info(name, timeout=10)
        return load(name)
    except Exception as error:  # each library has its own
        raise RewardError(f"its model {name} ({size}) cannot be loaded: {one_line(error)}; it is "
                          "downloaded from huggingface.co once, then works offline") from error


def quiet(*libraries):
    """No warnings of these libraries, and no progress bars but those of downloads."""
    for library in libraries:
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    huggingface_hub.utils.enable_progress_bars()  # a download may take an hour


toy = lambda: load_file(f"{TOY}/world.py")  # which is imported only when it is asked for
REWARDS = dict(
    ocr=ocr, geneval=lambda: toy().geneval(), geneval_photo=geneval_photo, pickscore=pickscore,
    pickscore_unscaled=functools.partial(pickscore, scale=1), clipscore=clipscore,
    aesthetic=aesthetic, toy_taste=lambda: toy().toy_taste(), toy_sign=lambda: toy().toy_sign(),
    toy_pickscore=functools.partial(pickscore, f"{TOY}/pickscore", f"{TOY}/pickscore"),
    toy_inks=lambda: toy().toy_inks())


def load(spec, option="--reward"):
    """"ocr:1,mine.py:nice:2" -> {name: (reward, weight)}. Raises RewardError, naming the option."""
    rewards = {}
    for term in spec.split(","):
        name, weight = term.strip(), 1.0
        first, _, last = name.rpartition(":")
        with suppress(ValueError):  # the last part may be no number
            if first and math.isfinite(float(last)):
                name, weight = first, float(last)
        if name in rewards:
            raise RewardError(f"{option} {spec}: {name} is there twice")
        factory = REWARDS.get(name, functools.partial(load_function, name))
        rewards[name] = guarded(f"{option} {name}", factory), weight
    return rewards


def load_function(name):
    """file:function, a file in the current folder or else anything that Python can import"""
    file, _, function = name.rpartition(":")
    if not file:
        raise RewardError(f"choose from {', '.join(REWARDS)}, or give your own as file.py:function")
    stem = file.removesuffix(".py")
    paths = [path for path in (f"{stem}.py", f"{TOY}/../{stem}.py") if os.path.exists(path)]
    if not paths and not importlib.util.find_spec(stem):
        raise RewardError(f"there is no {stem}.py here, and Python cannot import {stem}")
    module = load_file(paths[0]) if paths else importlib.import_module(stem)
    if not callable(getattr(module, function, None)):
        raise RewardError(f"{file} has no function {function}")
    return getattr(module, function)


def load_file(path):
    """A Python file as a module, which is made only once"""
    path = os.path.realpath(path)
    if path in sys.modules:
        return sys.modules[path]
    sys.path.append(os.path.dirname(path))  # for its neighbours; last, so that they hide no library
    spec = importlib.util.spec_from_file_location(path, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path] = module  # before it runs: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path]
        raise
    return module


def load_both(config, rows):
    """-> --reward, and the same with --eval_reward, only measured. rows: [(prompt, metadata)]"""
    reward = load(config.reward)
    extra = load(config.eval_reward, "--eval_reward") if config.eval_reward else {}
    both = reward | {name: (extra[name][0], 0) for name in extra if name not in reward}
    # What could fail hours later is tried now: every prompt, and two blank images.
    for name, (function, _) in both.items():
        if hasattr(function, "check"):
            guarded(f"reward {name}", function.check, *zip(*rows))
    score(both, [Image.new("RGB", (64, 64))] * 2, *zip(rows[0], rows[-1]))
    return reward, both


def score(rewards, images, prompts, metadata):
    """-> {name: a reward's scores, ..., "reward": their weighted sum}, lists of a float an image"""
    scores, total = {}, np.zeros(len(images))
    for name, (reward, weight) in rewards.items():
        who = f"reward {name}, scoring {len(images)} images from {prompts[0]!r} on"
        scores[name] = guarded(who, numbers, reward, images, prompts, metadata)
        total += weight * np.array(scores[name])
    return {**scores, "reward": total.tolist()}


def numbers(reward, images, prompts, metadata):
    """The reward's result as one finite float for each image. It gets copies of all."""
    result = reward([image.copy() for image in images], [*prompts], copy.deepcopy([*metadata]))
    if isinstance(result, (str, bytes, dict, set)):
        raise RewardError(f"gave a {type(result).__name__}, not a list of numbers")
    values = [float(value) for value in result]
    if len(values) != len(images):
        raise RewardError(f"gave {len(values)} scores for {len(images)} images")
    for value, prompt in zip(values, prompts):
        if not math.isfinite(value):
            raise RewardError(f"gave {value} for {prompt!r}")
    return values


def guarded(who, function, *args):
    """function(*args). Whatever it raises becomes a RewardError of one line."""
    try:
        return function(*args)
    except RewardError as error:
        raise RewardError(f"{who}: {error}") from error
    except (Exception, SystemExit) as error:  # a user's file may even call sys.exit(0)
        calls = traceback.extract_tb(error.__traceback__)
        theirs = [call for call in calls if not call.filename.startswith(("<frozen", __file__))]
        call = (theirs or calls)[0]  # the first line outside of this file
        hint = "; pip install -r requirements.txt" if isinstance(error, ImportError) else ""
        raise RewardError(f"{who}: {one_line(error)} ({os.path.basename(call.filename)} line "
                          f"{call.lineno}){hint}") from error


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
