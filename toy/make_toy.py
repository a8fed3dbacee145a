"""Make the embedded toy: a tiny StableDiffusion3Pipeline that draws signs and simple shapes.

    python toy/make_toy.py             # about 3 hours on 2 CPU cores; run it again to resume
    python toy/make_toy.py pickscore   # afterwards: toy/pickscore, a CLIP that imitates a taste

The world (world.py) is calm: few layouts, one font, six colors. So a model of 2.5 M parameters
draws it crisply. Its captions are noisy, as captions on the web are: a careless painter made part
of the images. He paints signs so tiny or so pale that nobody can read them, and scenes small and
with one mistake against their caption. Trained on both painters the model knows how to do it
right, and does so about 60 % of the time. That leaves reinforcement learning the job it has on a
large model: choosing, not learning to draw.

Everything is drawn from SEED. Written: the pipeline (fp16 safetensors) and the prompt files beside
this script. `build/` keeps the training state for resuming and can be deleted afterwards.
"""
import json
import multiprocessing
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig,
                          CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config,
                          T5EncoderModel)

TOY = Path(__file__).resolve().parent
sys.path.insert(0, str(TOY.parent))
from rewards import geneval_score, ocr  # noqa: E402
from world import (COLORS, SHAPES, SIZE, detect_shapes, paint_scene, paint_sign,  # noqa: E402
                   plural, scenes, taste)

SEED = 0
IMAGES = 80_000             # rendered once, seen about 22 times
VAE_STEPS, VAE_BATCH, CROP = 2500, 48, 32
FLOW_STEPS, FLOW_BATCH = 13500, 128
PICK_PAIRS, PICK_STEPS, PICK_BATCH = 20_000, 3000, 64
TOKENS = 14                 # the longest caption has 12

# The share of signs among the images: as painted, then so much until each step of the training.
SIGNS = 0.5
SIGNS_UNTIL = {2750: 0.5, 10000: 0.3, FLOW_STEPS: 0.4}
# The scenes' tasks in proportion, and how often the careless painter made each. The order of the
# six is roughly that in which SD3.5-Medium finds them hard (Table 1 of the paper: position 0.24,
# counting 0.50, attribution 0.52, ...).
SCENES = {"single_object": 0.5, "two_object": 2, "counting": 2.5, "colors": 1.25, "position": 2.5,
          "color_attr": 2.5}
CARELESS = {"text": 0.42, "single_object": 0.02, "two_object": 0.2, "counting": 0.46,
            "colors": 0.24, "position": 0.6, "color_attr": 0.5}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORDS = """
ACE ACID AGE AIR ALSO ANT APE ARCH ARM ARMY ART ASH ATOM AUNT AWAY AXE BABY BACK BAG BAKE BALL BAND
BANK BAR BARK BARN BASE BAT BATH BEAD BEAM BEAN BEAR BEE BEEF BELL BELT BEND BEST BIG BIKE BIRD
BLUE BOAT BODY BOLD BONE BOOK BOOT BOSS BOWL BOX BOY BUS BUSH BUSY CAFE CAKE CALF CALM CAMP CAP CAR
CARD CARE CART CASE CASH CAT CAVE CHEF CHIN CITY CLAY CLUB COAL COAT CODE COIN COLD COOK COOL COPY
CORD CORN COST COW CREW CROP CROW CUBE CUP CURE DAD DARK DATA DAWN DAY DEEP DEER DESK DIAL DICE
DIET DIRT DISH DIVE DOG DOLL DOOR DOT DOVE DOWN DRUM DUCK DUST DUTY EACH EAR EAST EASY ECHO EDGE
EGG ELF ELM END EPIC EVEN EXIT EYE FACE FACT FAIR FALL FAN FARM FAST FEET FERN FIG FILM FIRE FISH
FIVE FLAG FLAT FLEA FLY FOG FOLK FOOD FOOT FORK FORT FOUR FOX FREE FROG FROM FUEL FULL FUN GAME
GEAR GATE GAS GIFT GIRL GLAD GLUE GOAL GOAT GOLD GOLF GOOD GRAY GRID GULL GUM HALL HAM HAND HARD
HARP HAT HAWK HAY HEAD HEAT HEEL HELP HEN HERO HIGH HILL HINT HIP HIVE HOME HOOD HOOK HOPE HORN HOT
HOUR HUB HUT ICE IDEA INCH INK INN IRON ITEM JAM JAR JAZZ JET JOB JOKE JOY JUG JUMP JUNE JURY KEEN
KEY KID KIND KING KITE KIWI KNEE KNOT LACE LADY LAKE LAMB LAMP LAND LANE LAST LAVA LAW LEAF LEG
LENS LIFE LIFT LIME LINE LION LIP LIST LOCK LOG LONG LOOP LOUD LOVE LUCK LUNG MAIL MAIN MALL MAN
MANY MAP MASK MAST MATE MAZE MEAL MEAT MELT MENU MICE MILD MILE MILK MIND MINT MIST MIX MOLE MOON
MOSS MOTH MOVE MUD MUG MUSE NAIL NAME NAVY NEAR NECK NEST NET NEW NEWS NEXT NINE NODE NOON NOSE
NOTE NUT OAK OAR OAT OIL OLD ONE OPEN OVEN OVER OWL OX PACK PAGE PAIR PALM PAN PARK PAST PATH PEA
PEAK PEAR PEN PET PIE PIG PILL PIN PINE PINK PIPE PLAN PLAY PLUM POEM POET POLE POND PONY POOL PORT
POST POT PUB PUMA PURE QUAY QUIZ RACE RAFT RAIL RAIN RAM RARE RAT REAL RED REED RENT REST RIB RICE
RICH RIDE RING RIPE ROAD ROCK ROLE ROOF ROOM ROOT ROPE ROSE RUBY RUG RULE RUN SAFE SAIL SALT SAND
SAVE SEA SEAL SEAT SEED SELF SHED SHIP SHOE SHOP SHOW SIDE SIGN SILK SING SINK SIX SIZE SKI SKIN
SKY SLED SLOW SNOW SOAP SOCK SODA SOFA SOFT SOIL SONG SOUP SPY STAR STEM STEP STOP SUM SUN SURF
SWAN TAIL TALL TAPE TAXI TEA TEAM TEN TENT TEXT TIDE TIE TILE TIME TIN TIRE TOE TON TOOL TOP TOUR
TOWN TOY TRAM TRAY TREE TRIP TRUE TUB TUBE TUNA TUNE TWIN UNIT URN USER VAN VASE VEIL VERB VEST VET
VIEW VINE VOTE WALK WALL WAR WARM WASH WASP WAVE WAX WEB WEEK WELL WEST WET WHEY WIDE WIFE WILD WIN
WIND WINE WING WIRE WISE WOLF WOOD WOOL WORD WORK WORM YARD YARN YEAR YES YOGA ZERO ZEST ZINC ZONE
""".split()


# ----------------------------------------------------------------------------------------- captions


def split_words():
    """(train, test) words. Test words are in no caption of this script, in no training prompt."""
    words = [w for w in dict.fromkeys(WORDS) if len(w) in (3, 4)]
    random.Random(SEED).shuffle(words)
    # The first 120 were the test words while the toy was being designed: not fit for it any more.
    return words[:120] + words[240:], words[120:240]


# Each number and each shape of the tests is in the training, too, but not together.
COUNTING_TESTS = "two crosses", "three squares", "three triangles", "four circles"


def split_scenes():
    """(train, test) GenEval rows. A part of each task's prompts is held out.

    The training has more of what the base model finds hard, and each prompt equally often.
    """
    ratio = {"position": (7, 7), "counting": (4, 5), "color_attr": (5, 3), "colors": (3, 1),
             "two_object": (2, 1), "single_object": (0, 0)}
    rng, train, tests = random.Random(SEED), [], []
    for tag, (weight, used_before) in ratio.items():
        rows = scenes(tag)
        rng.shuffle(rows)
        if tag == "counting":
            rows.sort(key=lambda row: not row["prompt"].endswith(COUNTING_TESTS))
        held_out = min(24, max(4, len(rows) // 3))
        tests.append((rows[:held_out] * 24)[:24])
        train += (rows[held_out:] * 60 * weight)[:60 * weight]
        rng.choices(rows, k=60 * used_before)  # an earlier split drew here: its other tests stay
    rng.shuffle(train)
    # The tests take the tasks in turn, so that any first part of them is balanced.
    return train, [row for six in zip(*tests) for row in six]


def write_prompts():
    """The prompt files, in the layout of the official repository's dataset folders."""
    for name in ("ocr", "geneval"):
        (TOY / name).mkdir(exist_ok=True)
    for split, words, rows in zip(("train", "test"), split_words(), split_scenes()):
        signs = "".join(f'a sign that says "{word}"\n' for word in words)
        (TOY / f"ocr/{split}.txt").write_text(signs, "utf-8")
        table = "".join(json.dumps(row) + "\n" for row in rows)
        (TOY / f"geneval/{split}_metadata.jsonl").write_text(table, "utf-8")


# ----------------------------------------------------------------------------------------- painting


def paint_many(job):
    """(seed, number) -> images uint8 [number, 48, 48, 3], captions, the task of each"""
    seed, number = job
    rng, captions, tags = random.Random(seed), [], []
    images = np.empty((number, SIZE, SIZE, 3), np.uint8)
    train_words, test_words = map(sorted, split_words())
    rows = {tag: scenes(tag) for tag in SCENES}
    for i in range(number):
        tag = "text" if rng.random() < SIGNS else rng.choices(list(SCENES), SCENES.values())[0]
        careless = rng.random() < CARELESS[tag]
        tags.append(tag)
        if tag == "text":
            word = rng.choice(train_words)
            # Half of the words are random strings, so that the model must spell.
            while rng.random() < 0.5 or word in test_words:
                word = "".join(rng.choices(LETTERS, k=rng.randint(3, 4)))
                if word not in test_words:
                    break
            captions.append(f'a sign that says "{word}"')
            images[i] = np.asarray(paint_sign(word, rng, careless))
        else:
            row = rng.choice(rows[tag])
            captions.append(row["prompt"])
            images[i] = np.asarray(paint_scene(row, rng, careless))
    return images, captions, tags


def paint_all():
    jobs = [(f"{SEED}/{i}", 1000) for i in range(IMAGES // 1000)]
    with multiprocessing.Pool() as pool:
        done = list(tqdm(pool.imap(paint_many, jobs), total=len(jobs), desc="painting (thousands)"))
    images, captions, tags = zip(*done)
    return torch.from_numpy(np.concatenate(images)), sum(captions, []), sum(tags, [])


# --------------------------------------------------------------------------------------- the models


def make_tokenizer():
    """Each upper-case letter or digit is a token, and so is each lower-case word: it must spell."""
    words = ["<pad>", "<s>", "<unk>", "</s>", '"', *LETTERS, *"0123456789"]
    words += "a photo of and sign that says left right above below two three four".split()
    words += [*COLORS, *SHAPES, *map(plural, SHAPES)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokens = Regex(r'[A-Z0-9]|[a-z]+|"')
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokens, "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                                   unk_token="<unk>", eos_token="</s>", model_max_length=TOKENS)


def make_pipeline():
    tokenizer = make_tokenizer()
    # eos_token_id must not be 2: transformers reads that as an old CLIP and pools another token.
    clip = lambda: CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, projection_dim=64,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=TOKENS, pad_token_id=0,
        bos_token_id=1, eos_token_id=3))
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=128, num_layers=1, num_heads=2,
        pad_token_id=0, eos_token_id=3, decoder_start_token_id=0))
    vae = AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32), decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), latent_channels=8,
        upsampling_scaling_factor=2)
    transformer = SD3Transformer2DModel(
        sample_size=12, patch_size=2, in_channels=8, out_channels=8, num_layers=4,
        attention_head_dim=32, num_attention_heads=4, joint_attention_dim=128,
        caption_projection_dim=128, pooled_projection_dim=128, pos_embed_max_size=12,
        qk_norm="rms_norm")
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder=clip(), text_encoder_2=clip(), text_encoder_3=t5,
        tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=tokenizer)


def encode(pipe, ids):
    """Token ids [B, 14] -> (embeds [B, 28, 128], pooled [B, 128]), as encode_prompt does it"""
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    clips = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    embeds = torch.cat([c.hidden_states[-2] for c in clips], -1)  # [B, 14, 64 + 64]
    embeds = torch.cat([embeds, pipe.text_encoder_3(ids)[0]], 1)  # [B, 14 + 14, 128]
    return embeds, torch.cat([c.text_embeds for c in clips], -1)


def tokenize(pipe, texts):
    return pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids


def pixels(images):
    """uint8 [B, 48, 48, 3] -> float [B, 3, 48, 48] in -1..1"""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def train(name, steps, loss_of, modules, optimizers, schedule):
    """Train to `steps`, saving the state to build/. loss_of, schedule: functions of the step"""
    path = TOY / "build" / f"{name}.pt"
    path.parent.mkdir(exist_ok=True)
    params = [p for m in modules for p in m.parameters()]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, schedule) for o in optimizers]
    parts, start, recent = [*modules, *optimizers, *schedules], 0, None
    if path.exists():
        saved = torch.load(path)
        start = saved["step"]
        for part, state in zip(parts, saved["parts"]):
            part.load_state_dict(state)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name)
    for step in bar:
        torch.manual_seed(step)  # so that a resumed run draws what an unbroken one would
        loss = loss_of(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        recent = loss.item() if recent is None else 0.99 * recent + 0.01 * loss.item()
        bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            print(f"\n{name} step {step + 1} loss {recent:.4f}", flush=True)
            state = {"step": step + 1, "parts": [part.state_dict() for part in parts]}
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)


def train_vae(pipe, images):
    vae = pipe.vae.train().to(memory_format=torch.channels_last)

    def loss_of(step):
        x = pixels(images[torch.randint(len(images), (VAE_BATCH,))])
        # It is fully convolutional, so that crops train it faster.
        row, column = torch.randint(0, SIZE - CROP + 1, (2,)).tolist()
        x = x[..., row:row + CROP, column:column + CROP]
        x = x.contiguous(memory_format=torch.channels_last)
        z = vae.encode(x).latents
        z_noisy = z + 0.02 * torch.randn_like(z)  # the flow will not be exact either
        y = vae.decode(z_noisy).sample
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-3 * z.square().mean()

    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=0)
    train("vae", VAE_STEPS, loss_of, [vae], [optimizer],
          lambda s: min((s + 1) / 250, max(0.01, (VAE_STEPS - s) / VAE_STEPS)))
    vae.eval().requires_grad_(False)
    path = TOY / "build" / "latents.pt"
    if not path.exists():
        batches = tqdm(images.split(500), desc="encoding")
        torch.save(torch.cat([vae.encode(pixels(batch)).latents for batch in batches]), path)
    latents = torch.load(path)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    x = pixels(images[:1000])
    error = F.mse_loss(vae.decode(vae.encode(x).latents).sample, x) / 4  # /4: the range is -1..1
    print(f"VAE: PSNR {-10 * error.log10():.1f} dB, latent mean {shift:.3f}, "
          f"std {1 / scale:.3f}", flush=True)
    return (latents - shift) * scale


def train_flow(pipe, latents, captions, tags):
    """Flow matching (equations 1 and 2 of the paper): v(x_t, t, caption) -> noise - data."""
    ids, empty = tokenize(pipe, captions), tokenize(pipe, [""])
    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    matrices = [p for p in pipe.transformer.transformer_blocks.parameters() if p.ndim == 2]
    chosen = set(map(id, matrices))
    rest = [p for m in modules for p in m.parameters() if id(p) not in chosen]

    # Nearly twice as fast on a CPU; needs a C++ compiler.
    transformer = torch.compile(pipe.transformer) if shutil.which("g++") else pipe.transformer

    is_sign = torch.tensor([tag == "text" for tag in tags])
    weights = {until: torch.where(is_sign, signs / is_sign.sum(), (1 - signs) / (~is_sign).sum())
               for until, signs in SIGNS_UNTIL.items()}

    def loss_of(step):
        stage = min(until for until in weights if step < until)
        pick = torch.multinomial(weights[stage], FLOW_BATCH)
        x0, tokens = latents[pick], ids[pick].clone()
        tokens[torch.rand(FLOW_BATCH) < 0.1] = empty  # makes classifier-free guidance possible
        # Which object goes where is decided nearer to t = 1 than how a letter looks.
        t = torch.sigmoid(torch.randn(FLOW_BATCH) + 0.5 * ~is_sign[pick])
        noise = torch.randn_like(x0)
        x_t = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        embeds, pooled = encode(pipe, tokens)
        v = transformer(hidden_states=x_t, timestep=1000 * t, encoder_hidden_states=embeds,
                        pooled_projections=pooled, return_dict=False)[0]
        return F.mse_loss(v, noise - x0)

    optimizers = [torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
                  torch.optim.AdamW(rest, 2e-3, betas=(0.9, 0.99), weight_decay=0)]
    train("flow", FLOW_STEPS, loss_of, modules, optimizers,
          lambda s: float(np.interp(s, (0, 100, 1500, FLOW_STEPS), (0.01, 1, 1, 0.01))))


def draw(pipe, prompts):
    """One image a prompt, of the seeds 0, 1, 2, ..."""
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipe(prompts, generator=seeds, num_inference_steps=40, guidance_scale=1.0,
                max_sequence_length=TOKENS, height=SIZE, width=SIZE).images


def large_and_dark(image):
    """Is a sign neither tiny nor pale?"""
    gray = np.asarray(image.convert("L"), float)
    ink = gray < np.median(gray) - 60
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return len(rows) > 0 and np.ptp(rows) >= 9 and np.ptp(columns) >= 20


def report(number=200):
    """How well it draws when it is not careless. Prompts of the training files.

    That is the share without a mistake, of the signs that are neither tiny nor pale, and of the
    scenes that are not small.
    """
    pipe = StableDiffusion3Pipeline.from_pretrained(TOY)
    pipe.set_progress_bar_config(disable=True)
    prompts = [f'a sign that says "{word}"' for word in split_words()[0][:number]]
    images = draw(pipe, prompts)
    scores = np.array(ocr()(images, prompts, None))
    careful = np.array([large_and_dark(image) for image in images])
    print(f"text: {(scores >= 1).mean():.3f} of {number} signs are read; {careful.mean():.3f} are "
          f"neither tiny nor pale, and of these {(scores[careful] >= 1).mean():.3f} are read "
          f"(mean reward {scores[careful].mean():.3f})", flush=True)
    for tag in SCENES:
        rows = [row for row in split_scenes()[0] if row["tag"] == tag] or scenes(tag)
        rows = random.Random(SEED).choices(rows, k=number // 2)
        found = [detect_shapes(image) for image in draw(pipe, [row["prompt"] for row in rows])]
        right = np.array([geneval_score(f, row) >= 1 for f, row in zip(found, rows)])
        widths = [np.mean([o["box"][2] - o["box"][0] for o in f] or [0]) for f in found]
        careful = np.array(widths) > (18 if tag in ("single_object", "colors") else 13.5)
        print(f"{tag}: {right.mean():.2f} of {len(rows)} are right; {careful.mean():.2f} are not "
              f"small, and of these {right[careful].mean():.2f} are right", flush=True)


# --------------------------------------------------------------------------------- a viewer's taste


def judge(image, row):
    found = detect_shapes(image)
    return taste(image, found, geneval_score(found, row))


def paint_pairs(job):
    """(seed, number, split) -> two paintings for each of so many captions

    Images uint8 [number, 2, 48, 48, 3], their tastes [number, 2], the captions
    """
    seed, number, split = job
    rng, rows = random.Random(seed), {}
    for row in split_scenes()[split]:
        rows.setdefault(row["tag"], []).append(row)
    rows.setdefault("single_object", scenes("single_object"))  # has no training prompts
    chosen = [rng.choice(rows[rng.choice(list(rows))]) for _ in range(number)]
    pairs = [[paint_scene(row, rng, careless=rng.random() < 0.3, restless=True) for _ in range(2)]
             for row in chosen]
    tastes = [[judge(image, row) for image in pair] for pair, row in zip(pairs, chosen)]
    images = np.array([[np.asarray(image) for image in pair] for pair in pairs])
    return images, tastes, [row["prompt"] for row in chosen]


def train_pickscore(pipe):
    """A CLIP in PickScore's format: which of two images does a viewer prefer for a caption?

    As PickScore was (arXiv 2305.01569), it is trained on choices: the softmax of the two images'
    logit_scale * cosine must give the better one (Bradley-Terry). With a fifth of CLIP's own loss,
    that images find their captions.
    """
    def paint(seed, number, split):
        with multiprocessing.Pool() as pool:
            jobs = [(f"{seed}/{i}", 250, split) for i in range(number // 250)]
            parts = pool.map(paint_pairs, jobs)
        images, tastes, captions = zip(*parts)
        images = torch.from_numpy(np.concatenate(images)).flatten(0, 1)  # [2 number, 48, 48, 3]
        with torch.no_grad():  # through the VAE, for what the model draws has been there, too
            latents = [pipe.vae.encode(pixels(batch)).latents for batch in images.split(500)]
            seen = [pipe.vae.decode(z).sample.clamp(-1, 1) for z in latents]
        ids = tokenize(pipe, sum(captions, []))
        return torch.cat(seen).unflatten(0, (-1, 2)), torch.tensor(sum(tastes, [])), ids

    images, tastes, ids = paint("taste", PICK_PAIRS, 0)  # [N, 2, 3, 48, 48], [N, 2], [N, 14]
    torch.manual_seed(SEED)
    text = dict(vocab_size=len(pipe.tokenizer), hidden_size=64, intermediate_size=128,
                num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=TOKENS,
                pad_token_id=0, bos_token_id=1, eos_token_id=3)
    vision = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                  num_attention_heads=4, image_size=SIZE, patch_size=6)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))

    def logits(images, ids):
        """[B, 2, 3, 48, 48], [B, 14] -> of each caption with all images [B, 2 B]"""
        return clip(pixel_values=images.flatten(0, 1), input_ids=ids).logits_per_text

    def loss_of(step):
        pick = torch.randint(len(images), (PICK_BATCH,))
        every, best = logits(images[pick], ids[pick]), tastes[pick].argmax(1)
        own = every.view(PICK_BATCH, PICK_BATCH, 2).diagonal().T  # [B, 2]
        # Other images may have the same caption.
        same = (ids[pick][:, None] == ids[pick][None]).all(-1).float()
        chosen = every.view(PICK_BATCH, PICK_BATCH, 2)[:, torch.arange(PICK_BATCH), best]
        find = F.cross_entropy(chosen, same / same.sum(1, keepdim=True))
        return F.cross_entropy(own, best) + 0.2 * find

    optimizer = torch.optim.AdamW(clip.parameters(), 1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    train("pickscore", PICK_STEPS, loss_of, [clip], [optimizer],
          lambda s: float(np.interp(s, (0, 200, PICK_STEPS), (0.01, 1, 0.01))))
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = CLIPProcessor(pictures, pipe.tokenizer)
    clip.eval().save_pretrained(TOY / "pickscore")
    processor.save_pretrained(TOY / "pickscore")

    images, tastes, ids = paint("held out", 2000, 1)
    with torch.no_grad():
        batches = zip(images.split(100), ids.split(100))
        own = torch.cat([logits(a, b).view(len(b), len(b), 2).diagonal().T for a, b in batches])
    right = (own.argmax(1) == tastes.argmax(1)).float()
    clear = (tastes[:, 0] - tastes[:, 1]).abs() > 0.1
    print(f"pickscore: agrees with the taste on {right.mean():.3f} of {len(right)} held-out pairs; "
          f"on {right[clear].mean():.3f} of the {clear.sum()} that differ by more than 0.1",
          flush=True)


def main():
    write_prompts()
    torch.manual_seed(SEED)
    pipe = make_pipeline()
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        print(f"{name}: {sum(p.numel() for p in getattr(pipe, name).parameters()):,} parameters")
    images, captions, tags = paint_all()
    latents = train_vae(pipe, images)
    train_flow(pipe, latents, captions, tags)
    pipe.to(dtype=torch.float16).save_pretrained(TOY)
    # Stored as float16, computed in float32: transformers goes by this entry, as diffusers does.
    for path in TOY.glob("text_encoder*/config.json"):
        path.write_text(path.read_text("utf-8").replace('"float16"', '"float32"'), "utf-8")
    report()


if __name__ == "__main__":
    if sys.argv[1:] == ["pickscore"]:
        train_pickscore(StableDiffusion3Pipeline.from_pretrained(TOY))
    elif sys.argv[1:]:
        sys.exit(f"make_toy.py {' '.join(sys.argv[1:])}: give nothing, or pickscore")
    else:
        main()
