"""Caption scores equal those of pycocoevalcap's own path, and an incomplete file does not score."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluation_fixtures import write_coco, write_json, write_lines

from vlm.evaluate import captions

REFERENCES = {
    7: ["A small red square left of a blue circle.", "Red square, blue circle", "there's a circle on the right"],
    3: ["A green star inside a yellow ring", "the star is in the ring", "a star - green - and a ring"],
    9: ["Two white boxes above a café sign", "white boxes", "boxes above something (a sign)"],
}
CAPTIONS = {
    7: "A red square left of a blue circle.",
    3: "the green star is in a ring",
    9: "Two boxes\rabove a café sign!",
}


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "captions.json", REFERENCES)


def results(said: dict[int, str]) -> list[dict[str, object]]:
    return [{"image_id": image, "caption": caption} for image, caption in said.items()]


def test_scores_equal_those_of_pycocoevalcap_without_java_and_without_torch(tmp_path: Path, annotations: Path) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    clean = {image: text.replace("\r", " ") for image, text in CAPTIONS.items()}
    with captions.java():
        truth = PTBTokenizer().tokenize({i: [{"caption": text} for text in REFERENCES[i]] for i in REFERENCES})
        guess = PTBTokenizer().tokenize({i: [{"caption": clean[i]}] for i in REFERENCES})
        meteor, _ = Meteor().compute_score(truth, guess)
    bleu, _ = Bleu(4).compute_score(truth, guess, verbose=0)
    expected = {
        "CIDEr": Cider().compute_score(truth, guess)[0],
        **{f"Bleu_{n}": value for n, value in enumerate(bleu, 1)},
        "METEOR": meteor,
        "ROUGE_L": Rouge().compute_score(truth, guess)[0],
    }
    program = (
        "import shutil, sys; from pathlib import Path; from vlm.evaluate import captions\n"
        "assert shutil.which('java') is None\n"
        "captions.score(*map(Path, sys.argv[1:]))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "assert shutil.which('java') is None, 'PATH was left changed'\n"
    )
    predictions = write_json(tmp_path / "p.json", results(CAPTIONS))
    command = [sys.executable, "-c", program, annotations, predictions, tmp_path / "s.json"]
    root = Path(__file__).resolve().parents[2]
    subprocess.run(command, check=True, cwd=root, env={"PATH": str(tmp_path), "PYTHONPATH": str(root)})
    score = json.loads((tmp_path / "s.json").read_text())
    assert set(score) == {"metrics", "standard_errors", "num_images"}
    assert score["num_images"] == 3
    assert score["metrics"] == pytest.approx(expected, rel=1e-12)
    assert 0.1 < score["metrics"]["METEOR"] < 1 < score["metrics"]["CIDEr"]


def test_standard_errors_are_those_of_leaving_one_image_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLEU by scoring anew without each image; CIDEr, whose document frequencies are given, from the images' own."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    monkeypatch.setattr(captions, "_meteor", lambda truth, guess: (0.5, [0.25, 0.5, 0.75, 0.5]))
    references = REFERENCES | {11: ["a red dog", "a dog"]}
    said = CAPTIONS | {3: "a green star", 11: "a green dog"}  # shorter than the references together
    metrics, errors = captions.measure(references, said)
    with captions.java():
        texts = captions.tokenise([text for image in references for text in [said[image], *references[image]]])
    tokens = iter(texts)
    guess, truth = {}, {}
    for image in references:
        guess[image] = [next(tokens)]
        truth[image] = [next(tokens) for _ in references[image]]

    def bleu(left_out: int) -> list[float]:
        kept = [image for image in references if image != left_out]
        kept_truth, kept_guess = ({image: part[image] for image in kept} for part in (truth, guess))
        return list(Bleu(4).compute_score(kept_truth, kept_guess, verbose=0)[0])

    left_out = np.array([bleu(image) for image in references])
    jackknife = np.sqrt(3 / 4 * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0))
    assert [errors[f"Bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(list(jackknife), rel=1e-9)
    value, values = Cider().compute_score(truth, guess)
    assert metrics["CIDEr"] == value
    assert errors["CIDEr"] == pytest.approx(np.std(values) / 2, rel=1e-12)
    assert errors["METEOR"] == pytest.approx(np.std([0.25, 0.5, 0.75, 0.5]) / 2)
    assert list(errors) == list(metrics)


def test_generated_lines_read_as_a_results_list(tmp_path: Path) -> None:
    lines = [{"id": i, "image": "x.jpg", "prompt": "p", "image_id": i, "response": t} for i, t in CAPTIONS.items()]
    generated = write_lines(tmp_path / "captions.jsonl", lines)
    listed = write_json(tmp_path / "p.json", results(CAPTIONS))
    assert captions.read_predictions(generated) == captions.read_predictions(listed) == CAPTIONS


def test_tokens_are_those_of_the_wrapper_even_where_captions_hold_line_ends() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = ["", 'It\'s a "small" box (red)!', "naïve café — ü", "U.S.A., 10% of $5.00", "one; two: three... four", ""]
    with captions.java():
        official = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate([*texts, "last"])})
        ours = captions.tokenise([*texts, "last"])
        broken = captions.tokenise(["a\rb", "c\u2028d\ne", "f"])
    assert ours == [official[n][0] for n in range(len(texts) + 1)]
    assert broken == ["a b", "c d e", "f"]


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({7: "a", 3: "b"}, r"1 of the 3 images in .* have no prediction, first 9"),
        ({**CAPTIONS, 5: "a"}, r"1 images are not in .*, first 5"),
        ([*results(CAPTIONS), {"image_id": 3, "caption": "again"}], "image_id 3 is predicted more than once"),
        ([{"image_id": 3, "caption": None}], "entry 0: expected a string under `caption` or `response`"),
        ([{"image": 3, "caption": "a"}], "entry 0: expected a whole number or a string under `image_id`"),
        (["a"], "entry 1 of the list is str, expected an object"),
    ],
    ids=["missing", "unknown", "twice", "no-text", "no-id", "not-objects"],
)
def test_predictions_that_do_not_cover_the_images_are_refused(
    tmp_path: Path, annotations: Path, predictions: object, message: str
) -> None:
    content = results(predictions) if isinstance(predictions, dict) else predictions
    with pytest.raises(ValueError, match=message):
        captions.score(annotations, write_json(tmp_path / "p.json", content), tmp_path / "s.json")
    assert not (tmp_path / "s.json").exists()


def test_broken_files_are_refused_by_name(tmp_path: Path, annotations: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<html>proxy error</html>\n")
    good = write_json(tmp_path / "p.json", results(CAPTIONS))
    for first, second in ((annotations, page), (page, good), (tmp_path / "none.json", good), (good, good)):
        with pytest.raises(ValueError, match=f"{(first if first != annotations else second).name}"):
            captions.score(first, second, tmp_path / "s.json")
