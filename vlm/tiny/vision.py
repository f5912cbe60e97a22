"""The miniature vision model: a CLIP vision tower trained as CLIP is, by telling apart what belongs to a picture.

Two contrasts share one tower: whole pictures against captions (as CLIP), and single patches against the names of
things (as RegionCLIP, arXiv:2112.09106), which gives every patch token the attributes of the thing that it lies on.
The text side is thrown away afterwards, as LLaVA does.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlm import files
from vlm.tiny import scenes, text
from vlm.tiny.scenes import Scene

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Pixel statistics of OpenAI's CLIP."""
STEPS = 2_800
BATCH = 512
LEARNING_RATE = 1e-3
TEXT_WIDTH = 128
CAPTION_WORDS = 24
WORDS = tuple(
    sorted(
        {*scenes.COLOURS, *scenes.SHAPES, *scenes.SIZES, *scenes.BACKGROUNDS, "background", "on", "a", "and", ","}
        | {part for relation in scenes.RELATIONS for part in relation.split()}
    )
)
WORD_ID = {word: index + 1 for index, word in enumerate(WORDS)}  # 0 is padding
PHRASES = tuple(
    [f"{size} {colour} {shape}" for size in scenes.SIZES for colour in scenes.COLOURS for shape in scenes.SHAPES]
    + [f"{name} background" for name in scenes.BACKGROUNDS]
)
PHRASE_ID = {phrase: index for index, phrase in enumerate(PHRASES)}


def model_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=scenes.CANVAS,
        patch_size=scenes.CELL,
        projection_dim=TEXT_WIDTH,
        hidden_act="quick_gelu",
    )


class TextTower(nn.Module):
    """Captions through a small transformer, names of things as bags of words; both [*, TEXT_WIDTH], unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS) + 1, TEXT_WIDTH, padding_idx=0)
        self.places = nn.Parameter(torch.randn(CAPTION_WORDS, TEXT_WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(TEXT_WIDTH, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.names = nn.Embedding(len(WORDS) + 1, TEXT_WIDTH, padding_idx=0)

    def captions(self, words_BL: Tensor) -> Tensor:
        hidden = self.layers(self.words(words_BL) + self.places, src_key_padding_mask=words_BL == 0)
        real = (words_BL != 0).unsqueeze(-1)
        return F.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)

    def phrases(self, words_KL: Tensor) -> Tensor:
        return F.normalize(self.names(words_KL).sum(1), dim=-1)


class Heads(nn.Module):
    """From the tower to the space of the texts; thrown away with the text tower."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.picture = nn.Linear(width, TEXT_WIDTH, bias=False)
        self.patch = nn.Linear(width, TEXT_WIDTH, bias=False)
        self.scales = nn.Parameter(torch.full((2,), math.log(1 / 0.07)))


class Pairs(IterableDataset[tuple[list[Scene], Tensor, Tensor]]):
    """Endless batches of scenes with the words of a caption [B, L] and the phrase of every cell [B, P]."""

    def __init__(self, seed: int, batch: int = BATCH) -> None:
        self.seed, self.batch = seed, batch

    def __iter__(self) -> Iterator[tuple[list[Scene], Tensor, Tensor]]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed}/{worker.id if worker else 0}")
        while True:
            shown = [scenes.sample(rng) for _ in range(self.batch)]
            words_BL = torch.zeros(self.batch, CAPTION_WORDS, dtype=torch.long)
            phrases_BP = torch.zeros(self.batch, scenes.GRID**2, dtype=torch.long)
            for row, scene in enumerate(shown):
                caption = text.captions(scene)[0].replace(",", " ,").split()
                words_BL[row, : len(caption)] = torch.tensor([WORD_ID[word] for word in caption])
                names = [" ".join(cell) if len(cell) > 1 else f"{cell[0]} background" for cell in text.cells(scene)]
                phrases_BP[row] = torch.tensor([PHRASE_ID[name] for name in names])
            yield shown, words_BL, phrases_BP


def pixels(pictures_BCHW: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to normalised float, as CLIP's image processor does."""
    mean, std = (torch.tensor(v, device=pictures_BCHW.device).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (pictures_BCHW.float() / 255 - mean) / std


def contrast(
    tower: CLIPVisionModel, heads: Heads, texts: TextTower, pictures: Tensor, words_BL: Tensor, phrases_BP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of pictures against captions, of patches against names, and the share of thing patches named rightly."""
    hidden = tower(pixel_values=pixels(pictures)).last_hidden_state.float()
    whole_BD = F.normalize(heads.picture(hidden[:, 0]), dim=-1)
    caption_BD = texts.captions(words_BL)
    logits_BB = whole_BD @ caption_BD.T * heads.scales[0].exp().clamp(max=100)
    same = (words_BL.unsqueeze(0) == words_BL.unsqueeze(1)).all(-1)  # equal captions are not negatives
    target = same / same.sum(1, keepdim=True)
    global_loss = (F.cross_entropy(logits_BB, target) + F.cross_entropy(logits_BB.T, target)) / 2

    bags = torch.zeros(len(PHRASES), 3, dtype=torch.long, device=hidden.device)
    for row, phrase in enumerate(PHRASES):
        bags[row, : len(phrase.split())] = torch.tensor([WORD_ID[word] for word in phrase.split()])
    patch_BPD = F.normalize(heads.patch(hidden[:, 1:]), dim=-1)
    logits_BPK = patch_BPD @ texts.phrases(bags).T * heads.scales[1].exp().clamp(max=100)
    losses = F.cross_entropy(logits_BPK.flatten(0, 1), phrases_BP.flatten(), reduction="none")
    thing = (phrases_BP < len(PHRASES) - len(scenes.BACKGROUNDS)).flatten()
    patch_loss = losses[thing].mean() + losses[~thing].mean()
    right = (logits_BPK.argmax(-1) == phrases_BP).flatten()[thing].float().mean()
    return global_loss, patch_loss, right


def train(out: Path, seed: int = 0, steps: int | None = None, workers: int = 0, device: str | None = None) -> None:
    """Train the tower from nothing and write a Hugging Face folder with its model card.

    What was in `out` is replaced when the new model is complete.
    """
    steps = steps or STEPS
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    started = time.time()
    torch.manual_seed(seed)
    tower = CLIPVisionModel(model_config()).to(device)
    texts, heads = TextTower().to(device), Heads(tower.config.hidden_size).to(device)
    weights = [*tower.parameters(), *texts.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    loader = DataLoader(Pairs(seed), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    bar = tqdm(total=steps, desc="vision model", unit="step")
    shown_loss, shown_right = math.nan, math.nan
    for step, (shown, words_BL, phrases_BP) in enumerate(loader):
        pictures = scenes.render(shown, seed * steps + step, device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            global_loss, patch_loss, right = contrast(
                tower, heads, texts, pictures, words_BL.to(device), phrases_BP.to(device)
            )
        (global_loss + patch_loss).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        bar.update()
        if step % 50 == 0 or step + 1 == steps:
            shown_loss, shown_right = global_loss.item(), right.item()
            bar.set_postfix(caption=f"{shown_loss:.3f}", patch=f"{patch_loss.item():.3f}", named=f"{shown_right:.3f}")
        if step + 1 == steps:
            break
    bar.close()
    with files.writing(out) as folder:
        tower.to("cpu", torch.bfloat16).save_pretrained(folder)
        _write_processor(folder)
        _write_card(folder, seed, steps, shown_loss, shown_right, time.time() - started, device, tower.num_parameters())


def _write_processor(out: Path) -> None:
    """CLIP's preprocessing for this size, as stock `transformers` reads it."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    CLIPImageProcessorPil(
        size={"shortest_edge": scenes.CANVAS},
        crop_size={"height": scenes.CANVAS, "width": scenes.CANVAS},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    ).save_pretrained(out)


def _write_card(
    out: Path, seed: int, steps: int, loss: float, named: float, seconds: float, device: str, parameters: int
) -> None:
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    (out / "README.md").write_text(
        f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-feature-extraction
---
# Miniature vision model

A `CLIPVisionModel` of {parameters:,} parameters (bfloat16): {scenes.CANVAS} px pictures, {scenes.GRID**2} patches,
quick_gelu. It stands in for CLIP ViT-L/14@336px in the miniature recipe.

- Data: {steps * BATCH:,} rendered scenes with their captions and the names of their things, made as they are needed
  (`vlm/tiny/scenes.py`); the held-out pairs of colour and shape never occur.
- Command: `vlm tiny vision --out resources/tiny/vision --seed {seed} --steps {steps}`
- Training: contrastive, AdamW, peak learning rate {LEARNING_RATE:g}, one cycle, batch {BATCH}, {steps:,} steps,
  {seconds / 60:.0f} minutes on {machine}
- Final contrastive loss of pictures against captions: {loss:.4f}; thing patches named rightly: {named:.3f}
- Seed: {seed}
"""
    )
