"""The miniature language model: a Mistral of about a million parameters that has learnt to answer from descriptions.

It reads pictures spelt out in words (`vlm.tiny.text.spell`), captions them and answers questions about them, in the
chat format of Mistral. Half of the pictures are given as mixtures of the words that are true of a cell, so that the
model reads a point between several words as all of them; that is what a projector can produce.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from vlm import files
from vlm.tiny import scenes, text

CONTROL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", *(f"[control_{n}]" for n in range(8, 14))),
)
"""The first sixteen entries of the vocabulary of Mistral-7B-Instruct-v0.3."""
VOCABULARY = 640
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('roles are user and assistant') }}{% endif %}{% endfor %}"
)
STEPS = 4_000
BATCH = 512
LEARNING_RATE = 2e-3
MAX_TOKENS = 256
IGNORED = -100


def model_config() -> MistralConfig:
    return MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )


def conversation(rng: random.Random) -> tuple[list[scenes.Scene], list[tuple[str, str]]]:
    """One training conversation: the scenes it is about (none, one or two) and its turns."""
    draw = rng.random()
    if draw < 0.05:
        return [], [text.knowledge(rng) for _ in range(rng.randint(1, 4))]
    scene = scenes.sample(rng, held_out=rng.random() < 0.15)
    if draw < 0.20:
        other = scenes.sample(rng, held_out=rng.random() < 0.15)
        asked = text.question(rng, "Comparison", scene, other)
        assert asked is not None
        return [scene, other], [(asked.prompt(), asked.reply)]
    turns = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.random()
        if kind < 0.4:
            turns.append((rng.choice((*text.INSTRUCTIONS, text.CAPTION_PROMPT)), rng.choice(text.captions(scene))))
        elif kind < 0.55:
            turns.append(text.chat(rng, scene))
        else:
            asked = text.question(rng, rng.choice([s for s in text.SUBJECTS if s != "Comparison"]), scene)
            if asked:
                turns.append((asked.prompt(), asked.reply))
    return ([scene], turns) if turns else conversation(rng)


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte-pair encoding with byte fallback over conversations, behind Mistral's control tokens."""
    rng = random.Random(seed)
    corpus = []
    for _ in range(20_000):
        shown, turns = conversation(rng)
        corpus += ["".join(f" {word}" for word in text.spell(scene, rng)) for scene in shown]
        corpus += [part for turn in turns for part in (turn[0], f" {turn[0]}", f" {turn[1]}")]
    spaces = pre_tokenizers.Metaspace(prepend_scheme="never")
    split = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), spaces])
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = split
    fixed = [*CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    learner.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=fixed, show_progress=False)
    )
    learnt = json.loads(learner.to_str())["model"]
    vocabulary = learnt["vocab"]
    for index in range(len(vocabulary), VOCABULARY):
        vocabulary[f"[unused_{index}]"] = index
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


class Conversations(IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """Endless tokenised batches: ids [B, T, 3] (three words that are true of a place; equal outside pictures),
    labels [B, T] and which sequences give their pictures as mixtures [B]."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, batch: int = BATCH) -> None:
        self.tokenizer, self.seed, self.batch = tokenizer, seed, batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed}/{worker.id if worker else 0}")
        inner = self.tokenizer.backend_tokenizer
        word_id: dict[str, int] = {}
        for word in (*scenes.COLOURS, *scenes.SHAPES, *scenes.SIZES, *scenes.BACKGROUNDS):
            (word_id[word],) = inner.encode(f" {word}", add_special_tokens=False).ids
        newline = inner.encode("\n", add_special_tokens=False).ids
        space = inner.encode(" ", add_special_tokens=False).ids

        def encode(string: str) -> list[int]:
            return list(inner.encode(string, add_special_tokens=False).ids)

        def one() -> tuple[list[list[int]], list[int]]:
            shown, turns = conversation(rng)
            ids: list[list[int]] = [[1] * 3, [3] * 3]
            if shown and rng.random() < 0.5:  # as where a picture's placeholder follows "[INST] "
                ids += [[token] * 3 for token in space]
            for scene in shown:
                for word, names in zip(text.spell(scene, rng), text.cells(scene), strict=True):
                    others = [word_id[name] for name in names if name != word] or [word_id[word]] * 2
                    ids.append([word_id[word], *others])
                ids += [[token] * 3 for token in newline]
            labels = [IGNORED] * len(ids)
            for number, (asked, answer) in enumerate(turns):
                asked_ids = encode(asked if shown and not number else f" {asked}") + [4]
                if number:
                    asked_ids.insert(0, 3)
                answer_ids = [*encode(f" {answer}"), 2]
                ids += [[token] * 3 for token in asked_ids + answer_ids]
                labels += [IGNORED] * len(asked_ids) + answer_ids
            return ids, labels

        while True:
            rows = [one() for _ in range(self.batch)]
            rows = [(ids[:MAX_TOKENS], labels[:MAX_TOKENS]) for ids, labels in rows]
            length = math.ceil(max(len(labels) for _, labels in rows) / 32) * 32
            ids_BT3 = torch.zeros(self.batch, length, 3, dtype=torch.long)
            labels_BT = torch.full((self.batch, length), IGNORED)
            for row, (ids, labels) in enumerate(rows):
                ids_BT3[row, : len(ids)] = torch.tensor(ids)
                labels_BT[row, : len(labels)] = torch.tensor(labels)
            yield ids_BT3, labels_BT, torch.tensor([rng.random() < 0.5 for _ in rows])


def embed(model: MistralForCausalLM, ids_BT3: Tensor, mixed_B: Tensor, generator: torch.Generator) -> Tensor:
    """[B, T, D] embeddings: of the first word of each place, or of a random mixture of its three where `mixed_B`."""
    weights = torch.rand(ids_BT3.shape, generator=generator, device=ids_BT3.device) + 0.1
    weights = weights / weights.sum(-1, keepdim=True)
    first = torch.tensor([1.0, 0.0, 0.0], device=ids_BT3.device)
    weights = torch.where(mixed_B.view(-1, 1, 1), weights, first)
    return (model.get_input_embeddings()(ids_BT3) * weights.unsqueeze(-1)).sum(2)


def train(out: Path, seed: int = 0, steps: int | None = None, workers: int = 0, device: str | None = None) -> None:
    """Train tokenizer and model from nothing and write a Hugging Face folder with its model card.

    What was in `out` is replaced when the new model is complete.
    """
    steps = steps or STEPS
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    started = time.time()
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(seed)
    model = MistralForCausalLM(model_config()).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    loader = DataLoader(
        Conversations(tokenizer, seed), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )
    generator = torch.Generator(device=device).manual_seed(seed)
    smooth = math.nan
    bar = tqdm(total=steps, desc="language model", unit="step")
    for step, (ids_BT3, labels_BT, mixed_B) in enumerate(loader):
        ids_BT3, labels_BT, mixed_B = (t.to(device, non_blocking=True) for t in (ids_BT3, labels_BT, mixed_B))
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            hidden = model.model(inputs_embeds=embed(model, ids_BT3, mixed_B, generator)).last_hidden_state
            trained = labels_BT[:, 1:] != IGNORED
            logits = model.lm_head(hidden[:, :-1][trained])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels_BT[:, 1:][trained])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        bar.update()
        if step % 50 == 0:
            value = loss.item()
            smooth = value if math.isnan(smooth) else 0.8 * smooth + 0.2 * value
            bar.set_postfix(loss=f"{smooth:.4f}")
        if step + 1 == steps:
            break
    bar.close()
    with files.writing(out) as folder:
        model.to("cpu", torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _write_card(folder, seed, steps, smooth, time.time() - started, device, model.num_parameters())


def _write_card(out: Path, seed: int, steps: int, loss: float, seconds: float, device: str, parameters: int) -> None:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    (out / "README.md").write_text(
        f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# Miniature language model

A `MistralForCausalLM` of {parameters:,} parameters (bfloat16) with its own byte-pair tokenizer, Mistral's control
tokens and chat format. It answers from pictures spelt out in words, and stands in for Mistral-7B-Instruct-v0.3 in the
miniature recipe.

- Data: {steps * BATCH:,} conversations about random scenes, made as they are needed (`vlm/tiny/text.py`); text only.
  Unlike the vision model it has met the held-out pairs of colour and shape, as words; it has seen no picture at all.
- Command: `vlm tiny language --out resources/tiny/language --seed {seed} --steps {steps}`
- Training: AdamW, peak learning rate {LEARNING_RATE:g}, one cycle, batch {BATCH}, {steps:,} steps,
  {seconds / 60:.0f} minutes on {name}
- Final loss per answered token: {loss:.4f}
- Seed: {seed}
"""
    )
