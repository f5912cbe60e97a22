"""A page that shows packed sequences as the model gets them: what is trained, where samples end, what is padding.

It reads through the loader itself, so that what is seen is what a run of the same settings trains on, in its order.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import closing
from html import escape
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vlm import checkpoint as checkpoints
from vlm import config as configuration
from vlm import files, loader
from vlm.batch import PackedBatch
from vlm.config import Config
from vlm.prompt import Prompter

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1c232d; --faint: #667180; --line: #dfe4ea;
  --image: #9db8d6; --text: #d3d9e0; --trained: #e0752d; --trained-back: #fde6d4; --rest: #f0f2f5; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2028; --ink: #e4e8ee; --faint: #93a0b0;
  --line: #2b333e; --image: #40618a; --text: #55606e; --trained: #e78a4a; --trained-back: #4a2c18; --rest: #222a34; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { margin: 0 0 6px; font-size: 26px; } h2 { margin: 40px 0 4px; font-size: 19px; }
p, figcaption, .facts { color: var(--faint); margin: 0; } code { font-size: 13px; overflow-wrap: anywhere; }
.strip { display: flex; height: 26px; margin: 12px 0 6px; border-radius: 6px; overflow: hidden; }
.strip a { display: flex; min-width: 2px; border-right: 2px solid var(--page); }
.strip i { height: 100%; min-width: 0; }
.image { background: var(--image); } .text { background: var(--text); } .trained { background: var(--trained); }
.padding { background: repeating-linear-gradient(45deg, var(--rest) 0 6px, var(--line) 6px 9px); }
.legend span { margin-right: 18px; } .legend i { display: inline-block; width: 12px; height: 12px; margin-right: 6px;
  border-radius: 3px; vertical-align: -1px; }
article { display: grid; grid-template-columns: 170px minmax(0, 1fr); gap: 18px; padding: 16px; margin-top: 14px;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
article img { display: block; width: 100%; margin-bottom: 8px; border-radius: 6px; image-rendering: auto; }
.facts { font-size: 13px; margin-bottom: 6px; } .facts b { color: var(--ink); }
.said { white-space: pre-wrap; overflow-wrap: anywhere; }
.said .trained { background: var(--trained-back); border-bottom: 2px solid var(--trained); }
.said .control { color: var(--faint); font-size: 12px; }
.said .image { padding: 1px 7px; border-radius: 9px; font-size: 12px; color: var(--ink); }
@media (max-width: 560px) { article { grid-template-columns: minmax(0, 1fr); } }
"""


def inspect(
    config: Path,
    stage: str,
    data: Path,
    out: Path,
    *,
    checkpoint: Path | None = None,
    language: Path | None = None,
    vision: Path | None = None,
    sequences: int = 1,
    split: str = "train",
) -> None:
    """Write one HTML file, which needs no other, with the first packed sequences of a stage.

    Args:
        config: resolved settings.
        stage: name under `stages`.
        data: folder that holds one indexed folder per data set, as `vlm train` takes it.
        out: the page.
        checkpoint: where tokenizer and picture size come from; or else `language` and `vision`, Hugging Face folders.
        sequences: how many are drawn.
        split: `train` or `val`.

    Raises:
        ValueError: an argument or the data do not fit, or there are fewer sequences.
    """
    settings = configuration.load(config)
    if stage not in settings.stages:
        raise ValueError(f"--stage: {stage!r} is not a stage, allowed are {', '.join(settings.stages)}")
    if checkpoint is not None:
        resolved = checkpoints.resolve(checkpoint)
        language, vision = (checkpoints.huggingface(resolved, part) for part in ("language", "vision"))
    if language is None or vision is None:
        raise ValueError("tokenizer and picture size: give --checkpoint, or both --language and --vision")
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"--out: {out} must end in .html")
    dirs = {name: data / name for name in settings.stages[stage].data}
    batches = _batches(settings, stage, dirs, language, vision, split)
    taken = list(tqdm(islice(batches, sequences), "read sequences", sequences, disable=None))
    if len(taken) < sequences:
        raise ValueError(f"--sequences: {sequences} asked for, the {split} split has {len(taken)}")
    prompter = Prompter(language, settings.models.language.image_token, 1)
    body = "".join(_sequence(number, batch, prompter) for number, batch in enumerate(taken, start=1))
    title = f"{settings.run}: what {stage} is {'trained on' if split == 'train' else 'validated on'}"
    files.write_text(out, _page(title, body))


def _batches(
    settings: Config, stage: str, dirs: dict[str, Path], language: Path, vision: Path, split: str
) -> Iterator[PackedBatch]:
    if split == "val":
        yield from loader.build(settings, stage, dirs, language, vision, split="val")
        return
    with closing(loader.build(settings, stage, dirs, language, vision)) as stream:
        yield from stream


def _page(title: str, body: str) -> str:
    swatches = (("text", "read"), ("trained", "trained: the model learns to say it"), ("image", "picture"))
    legend = "".join(f'<span><i class="{css}"></i>{what}</span>' for css, what in (*swatches, ("padding", "padding")))
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<main>\n<h1>{escape(title)}</h1>\n"
        f'<p class="legend">{legend}</p>\n{body}</main>\n</html>\n'
    )


def _sequence(number: int, batch: PackedBatch, prompter: Prompter) -> str:
    """One packed sequence: a strip to scale, its numbers, and its samples."""
    slots, used = len(batch.tokens_S), batch.num_tokens
    borders = batch.cu_seqlens.tolist()
    spans = list(zip(borders, borders[1:], strict=False))[: len(batch.sample_keys)]
    kinds_S = _kinds(batch)
    strip = "".join(
        f'<a href="#s{number}-{place}" title="{escape(key)}: {end - start} tokens" style="flex:{end - start}">'
        f"{_bars(kinds_S[start:end])}</a>"
        for place, (key, (start, end)) in enumerate(zip(batch.sample_keys, spans, strict=True))
    )
    if used < slots:
        strip += f'<a title="padding: {slots - used} slots" style="flex:{slots - used}">{_bars(kinds_S[used:])}</a>'
    pictures = iter(batch.images.numpy())
    tokens_per_picture = len(batch.image_positions) // max(len(batch.images), 1)
    cards = []
    for place, (key, (start, end)) in enumerate(zip(batch.sample_keys, spans, strict=True)):
        num_pictures = int((kinds_S[start:end] == "image").sum()) // max(tokens_per_picture, 1)
        shown = "".join(_picture(next(pictures)) for _ in range(num_pictures))
        text = _text(batch.tokens_S[start:end].numpy(), kinds_S[start:end], prompter, tokens_per_picture)
        cards.append(
            f'<article id="s{number}-{place}"><div>{shown}</div><div><p class="facts"><b>{escape(key)}</b>, slots '
            f'{start} to {end - 1}: {_counts(kinds_S[start:end])}</p><div class="said">{text}</div></div></article>\n'
        )
    return (
        f"<h2>Sequence {number}</h2>\n<p>{len(batch.sample_keys)} samples and {len(batch.images)} pictures in {slots} "
        f"slots, {used / slots:.1%} of them filled: {_counts(kinds_S)}.</p>\n"
        f'<div class="strip">{strip}</div>\n<p>cu_seqlens <code>{borders}</code>, the longest segment has '
        f"{batch.max_seqlen} slots. No position attends across a border.</p>\n{''.join(cards)}"
    )


def _kinds(batch: PackedBatch) -> np.ndarray:
    """What each slot holds: `text`, `trained`, `image` or `padding`. A trained token is the slot before's label."""
    kinds_S = np.full(len(batch.tokens_S), "text", dtype="<U7")
    kinds_S[batch.image_positions.numpy()] = "image"
    kinds_S[batch.trained_positions.numpy() + 1] = "trained"
    kinds_S[batch.num_tokens :] = "padding"
    return kinds_S


def _runs(kinds: np.ndarray) -> list[tuple[str, int, int]]:
    """Kind, start and end of each stretch of one kind."""
    edges = [0, *(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1).tolist(), len(kinds)]
    return [(str(kinds[start]), start, end) for start, end in zip(edges, edges[1:], strict=False) if end > start]


def _bars(kinds: np.ndarray) -> str:
    return "".join(f'<i class="{kind}" style="flex:{end - start}"></i>' for kind, start, end in _runs(kinds))


def _counts(kinds: np.ndarray) -> str:
    number = {kind: int((kinds == kind).sum()) for kind in ("text", "trained", "image", "padding")}
    words = {"text": "read", "trained": "trained", "image": "of pictures", "padding": "padding"}
    return ", ".join(f"{number[kind]} {word}" for kind, word in words.items() if number[kind])


def _text(ids: np.ndarray, kinds: np.ndarray, prompter: Prompter, tokens_per_picture: int) -> str:
    """The tokens as text, trained ones marked, each picture's tokens as one."""
    pieces = []
    for kind, start, end in _runs(kinds):
        if kind == "image":
            count = (end - start) // max(tokens_per_picture, 1)
            label = f"{tokens_per_picture} image tokens" + (f" x {count}" if count > 1 else "")
            pieces.append(f'<span class="image">{label}</span>')
        else:
            said = "".join(_token(int(id_), prompter) for id_ in ids[start:end])
            pieces.append(f'<span class="trained">{said}</span>' if kind == "trained" else said)
    return "".join(pieces)


def _token(id_: int, prompter: Prompter) -> str:
    """One token; control tokens by name, blanks and line ends as themselves."""
    piece = prompter.tokenizer.convert_ids_to_tokens(id_)
    if id_ in prompter.tokenizer.added_tokens_decoder:
        return f'<span class="control">{escape(piece)}</span>'
    if piece.startswith("<0x") and piece.endswith(">"):  # SentencePiece's bytes
        value = int(piece[3:-1], 16)
        return escape(chr(value)) if value < 128 else f'<span class="control">{escape(piece)}</span>'
    return escape(piece.replace("\u2581", " ").replace("\u0120", " ").replace("\u010a", "\n"))


def _picture(pixels: np.ndarray) -> str:
    """An `<img>` of uint8 [3, H, W], as the vision model sees it."""
    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(stream, "JPEG", quality=88)
    encoded = base64.b64encode(stream.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{encoded}" alt="">'
