"""The miniature vision model: a CLIP vision tower trained as CLIP is, by telling apart what belongs to a picture.

Two contrasts share one tower: whole pictures against captions (as CLIP), and single patches against the names of
things (as RegionCLIP, arXiv:2112.09106), which gives every patch token the attributes of the thing that it lies on.
The text side is thrown away afterwards, as LLaVA does. Shapes: B pictures, P patches, L words, K phrases, D width.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlm import config as configuration
from vlm import files
from vlm.config import VisionTraining
from vlm.tiny import scenes, text, world
from vlm.tiny.scenes import Scene
from vlm.tiny.world import World

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Pixel statistics of OpenAI's CLIP."""
COMMITTED = VisionTraining(
    num_layers=6, hidden_size=128, num_heads=4, steps=2_800, batch=512, lr=1e-3, save_interval=2_800
)
"""The model of resources/tiny/vision."""
TEXT_WIDTH = 128
CAPTION_WORDS = 24
Batch = tuple[list[Scene[Any]], Tensor, Tensor]


def model_config(sizes: VisionTraining, shown: World) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=4 * sizes.hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        image_size=shown.canvas,
        patch_size=shown.cell,
        projection_dim=TEXT_WIDTH,
        hidden_act="quick_gelu",
    )


class Words:
    """The words of a world's captions as numbers; 0 is padding."""

    def __init__(self, shown: World) -> None:
        glue = ("background", "on", "a", "and", ",", *(relation for relation in scenes.RELATIONS))
        said = sorted({word for phrase in (*shown.phrases, *glue) for word in phrase.split()})
        self.ids = {word: index + 1 for index, word in enumerate(said)}
        self.phrase_ids = {phrase: index for index, phrase in enumerate(shown.phrases)}
        self.bags_KL = self.encode(shown.phrases, max(len(phrase.split()) for phrase in shown.phrases))

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """[len(texts), length], padded."""
        ids_NL = torch.zeros(len(texts), length, dtype=torch.long)
        for row, one in enumerate(texts):
            split = one.replace(",", " ,").split()
            ids_NL[row, : len(split)] = torch.tensor([self.ids[word] for word in split])
        return ids_NL


class TextTower(nn.Module):
    """Captions through a small transformer, names of things as bags of words; both [*, TEXT_WIDTH], unit length."""

    def __init__(self, num_words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(num_words + 1, TEXT_WIDTH, padding_idx=0)
        self.places = nn.Parameter(torch.randn(CAPTION_WORDS, TEXT_WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(TEXT_WIDTH, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.names = nn.Embedding(num_words + 1, TEXT_WIDTH, padding_idx=0)

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


class Pairs(Dataset[Batch]):
    """The batch of each step: scenes with the words of a caption [B, L] and the phrase of every cell [B, P].

    A step's batch depends on the seed and its number alone, so that a training goes on as if it had not stopped.
    """

    def __init__(self, shown: World, words: Words, seed: int, batch: int) -> None:
        self.shown, self.words, self.seed, self.batch = shown, words, seed, batch

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed}/{step}")
        drawn = [self.shown.sample(rng) for _ in range(self.batch)]
        words_BL = self.words.encode([text.captions(scene)[0] for scene in drawn], CAPTION_WORDS)
        phrase_ids = self.words.phrase_ids
        phrases_BP = torch.tensor([[phrase_ids[cell] for cell in self.shown.cells(scene)] for scene in drawn])
        return drawn, words_BL, phrases_BP


def pixels(pictures_BCHW: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to normalised float, as CLIP's image processor does."""
    mean, std = (torch.tensor(v, device=pictures_BCHW.device).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (pictures_BCHW.float() / 255 - mean) / std


def contrast(
    tower: CLIPVisionModel,
    heads: Heads,
    texts: TextTower,
    pictures: Tensor,
    bags_KL: Tensor,
    words_BL: Tensor,
    phrases_BP: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of pictures against captions, of patches against names, and the share of thing patches named rightly."""
    hidden = tower(pixel_values=pixels(pictures)).last_hidden_state.float()
    whole_BD = F.normalize(heads.picture(hidden[:, 0]), dim=-1)
    caption_BD = texts.captions(words_BL)
    logits_BB = whole_BD @ caption_BD.T * heads.scales[0].exp().clamp(max=100)
    same = (words_BL.unsqueeze(0) == words_BL.unsqueeze(1)).all(-1)  # equal captions are not negatives
    target = same / same.sum(1, keepdim=True)
    global_loss = (F.cross_entropy(logits_BB, target) + F.cross_entropy(logits_BB.T, target)) / 2

    patch_BPD = F.normalize(heads.patch(hidden[:, 1:]), dim=-1)
    logits_BPK = patch_BPD @ texts.phrases(bags_KL).T * heads.scales[1].exp().clamp(max=100)
    losses = F.cross_entropy(logits_BPK.flatten(0, 1), phrases_BP.flatten(), reduction="none")
    thing = (phrases_BP < len(bags_KL) - len(scenes.BACKGROUNDS)).flatten()
    patch_loss = losses[thing].mean() + losses[~thing].mean()
    right = (logits_BPK.argmax(-1) == phrases_BP).flatten()[thing].float().mean()
    return global_loss, patch_loss, right


class Training:
    """All that learns, and where it stands."""

    def __init__(self, sizes: VisionTraining, shown: World, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.sizes, self.shown, self.seed, self.device = sizes, shown, seed, device
        self.words = words = Words(shown)
        self.identity = {"sizes": sizes.model_dump(exclude={"save_interval"}), "names": list(shown.names), "seed": seed}
        self.tower = CLIPVisionModel(model_config(sizes, shown)).to(device)
        self.texts, self.heads = TextTower(len(words.ids)).to(device), Heads(sizes.hidden_size).to(device)
        self.weights = [*self.tower.parameters(), *self.texts.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(self.weights, lr=sizes.lr, betas=(0.9, 0.98), weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, sizes.lr, total_steps=sizes.steps, pct_start=0.05
        )
        self.step = 0
        self.last = math.nan, math.nan
        """Loss of pictures against captions, and share of thing patches named rightly, when last looked at."""
        self._parts = (self.tower, self.texts, self.heads, self.optimizer, self.schedule)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.writing")
        parts = [part.state_dict() for part in self._parts]
        torch.save({"identity": self.identity, "step": self.step, "last": self.last, "parts": parts}, beside)
        beside.replace(path)

    def resume(self, path: Path) -> None:
        """Go on from a state; one of another training is left aside, and replaced by the next that is saved."""
        if not path.is_file():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["identity"] != self.identity:
            print(f"{path}: is of a training with other settings, this one begins anew")
            return
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self.step, self.last = state["step"], state["last"]
        print(f"{path}: going on after step {self.step}")

    def learn(self, state: Path | None, workers: int) -> None:
        """All steps that are left, saved every so often."""
        sizes = self.sizes
        loader = DataLoader(
            Pairs(self.shown, self.words, self.seed, sizes.batch),
            batch_size=None,
            sampler=range(self.step, sizes.steps),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )
        bar = tqdm(total=sizes.steps, initial=self.step, desc="vision model", unit="step", mininterval=1.0)
        for batch in loader:
            global_loss, patch_loss, right = self._losses(batch)
            (global_loss + patch_loss).backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            bar.update()
            if self.step % 50 == 0 or self.step == sizes.steps:
                self.last = global_loss.item(), right.item()
                shown = (*self.last, patch_loss.item())
                bar.set_postfix(dict(zip(("caption", "named", "patch"), (f"{one:.3f}" for one in shown), strict=True)))
            if state is not None and (self.step % sizes.save_interval == 0 or self.step == sizes.steps):
                self.save(state)
        bar.close()

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        drawn, words_BL, phrases_BP = batch
        pictures = self.shown.render(drawn, self.seed * self.sizes.steps + self.step, self.device)
        texts = (one.to(self.device) for one in (self.words.bags_KL, words_BL, phrases_BP))
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            return contrast(self.tower, self.heads, self.texts, pictures, *texts)


def train(
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    config: Path | None = None,
    state: Path | None = None,
    workers: int = 0,
    device: str | None = None,
) -> None:
    """Train the tower from nothing and write a Hugging Face folder with its model card.

    What was in `out` is replaced when the new model is complete.

    Args:
        config: settings of a run, which say what to train on which pictures; None for the committed miniature's model.
        state: file that the training is saved to and goes on from; removed when the model is complete.

    Raises:
        ValueError: `config` has no vision model to train.
    """
    sizes: VisionTraining = COMMITTED
    shown: World = world.SHAPES
    command = f"vlm tiny vision --out resources/tiny/vision --seed {seed} --steps {steps or sizes.steps}"
    if config is not None:
        settings = configuration.load(config)
        if settings.miniature is None or settings.miniature.vision is None:
            raise ValueError(f"{config}: miniature.vision is not set; it says what vision model to train")
        sizes, shown, seed = settings.miniature.vision, world.of(settings.miniature), settings.seed
        command = f"vlm tiny vision --config {config}"
    sizes = sizes.model_copy(update={"steps": steps or sizes.steps})
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    started = time.time()
    training = Training(sizes, shown, seed, device)
    if state is not None:
        training.resume(state)
    training.learn(state, workers)
    with files.writing(out) as folder:
        training.tower.to("cpu", torch.bfloat16).save_pretrained(folder)
        _write_processor(folder, shown)
        _write_card(folder, training, command, time.time() - started)
    if state is not None:
        state.unlink(missing_ok=True)


def _write_processor(out: Path, shown: World) -> None:
    """CLIP's preprocessing for this size, as stock `transformers` reads it."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    CLIPImageProcessorPil(
        size={"shortest_edge": shown.canvas},
        crop_size={"height": shown.canvas, "width": shown.canvas},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    ).save_pretrained(out)


def _write_card(out: Path, made: Training, command: str, seconds: float) -> None:
    machine = torch.cuda.get_device_name() if made.device == "cuda" else "CPU"
    sizes, shown, (loss, named) = made.sizes, made.shown, made.last
    (out / "README.md").write_text(
        f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-feature-extraction
---
# Miniature vision model

A `CLIPVisionModel` of {made.tower.num_parameters():,} parameters (bfloat16): {shown.canvas} px pictures,
{(shown.canvas // shown.cell) ** 2} patches, quick_gelu. It stands in for CLIP ViT-L/14@336px.

- Data: {sizes.steps * sizes.batch:,} {shown.about};
  captions and names of things, made as they are needed
- Command: `{command}`
- Training: contrastive, AdamW, peak learning rate {sizes.lr:g}, one cycle, batch {sizes.batch}, {sizes.steps:,} steps;
  {seconds / 60:.0f} minutes since it last went on, on {machine}
- Final contrastive loss of pictures against captions: {loss:.4f}; thing patches named rightly: {named:.3f}
- Seed: {made.seed}
"""
    )
