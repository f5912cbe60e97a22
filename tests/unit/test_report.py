"""What the report shows is what the files of the run say, and a missing or broken file is named."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_fixtures import _merge
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vlm import config as settings
from vlm.generate import items
from vlm.report import curves, drawing, gallery, page, rows, scores, summary
from vlm.tiny import datasets

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("combined", "pretrain", "sft")
TABLE = """name,label,CIDEr,BLEU-4,METEOR,ROUGE-L,"CIDEr, pictures shuffled",MMMU accuracy,images,questions
combined,before training,0.012,0.001,0.05,0.1,0.011,0.21,300,350
pretrain,after pretrain,1.9123,0.4,0.31,0.6,0.61,0.41,300,350
sft,after sft,3.1,0.7,0.4,0.8,0.72,0.81,300,350
random,control: random training caption,0.709,0.2,0.2,0.4,,,300,
nearest,control: caption of the nearest training picture,2.003,0.4,0.3,0.6,,,300,
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(TABLE)
    return path


def _metrics(folder: Path, stage: str, losses: list[float]) -> Path:
    path = folder / stage / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    lines = [
        {"iteration": 5 * n, "loss": loss, "learning_rate": 1e-3 / n, "tokens": 9} for n, loss in enumerate(losses, 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they are saved."""
    figures: list[Figure] = []
    save = drawing.save
    monkeypatch.setattr(drawing, "save", lambda figure, path: (figures.append(figure), save(figure, path))[1])
    return figures


def _titled(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


@pytest.mark.parametrize("suffix", drawing.FORMATS)
def test_curves_show_every_stage_as_it_was_logged(tmp_path: Path, drawn: list[Figure], suffix: str) -> None:
    paths = [_metrics(tmp_path, "pretrain", [3.0, 2.0, 1.25]), _metrics(tmp_path, "sft", [1.0, 0.5])]
    curves.draw(paths, tmp_path / f"loss{suffix}")
    for stage, losses in (("pretrain", [3.0, 2.0, 1.25]), ("sft", [1.0, 0.5])):
        axes = _titled(drawn[0], stage)
        assert list(axes.lines[0].get_ydata()) == losses
        assert list(axes.lines[0].get_xdata()) == [5 * n for n in range(1, len(losses) + 1)]
        assert axes.texts[0].get_text() == f"{losses[-1]:.3f}"
    if suffix == ".png":
        with Image.open(tmp_path / "loss.png") as picture:
            assert picture.width > 1000
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_curves_of_validation_and_of_each_data_set(tmp_path: Path, drawn: list[Figure]) -> None:
    """Only some lines have them, and an older file has no speed."""
    path = _metrics(tmp_path, "sft", [2.0, 1.0])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0] |= {"loss/a": 4.0, "loss/b": 0.5, "tokens_per_second": 1234.5}
    lines[1] |= {"loss/b": 0.25}
    lines.insert(1, {"iteration": 5, "validation_loss": 1.75, "validation_loss/a": 3.5})
    lines.append({"iteration": 10, "validation_loss": 1.25})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves.draw([path, _metrics(tmp_path, "other", [1.0])], tmp_path / "loss.png")
    axes = _titled(drawn[0], "sft")
    shown = {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    assert {name: (list(line.get_xdata()), list(line.get_ydata())) for name, line in shown.items()} == {
        "training": ([5, 10], [2.0, 1.0]),
        "training, a": ([5], [4.0]),
        "training, b": ([5, 10], [0.5, 0.25]),
        "validation": ([5, 10], [1.75, 1.25]),
        "validation, a": ([5], [3.5]),
    }
    assert shown["validation"].get_color() == drawing.HELD_OUT != shown["training"].get_color()
    assert {text.get_text() for text in axes.texts} == {"1.000", "1.250"}
    assert axes.get_ylim()[1] > 4.0, "the highest curve is cut off"
    assert axes.get_legend() is not None and _titled(drawn[0], "other").get_legend() is None
    speeds = [list(line.get_ydata()) for one in drawn[0].axes for line in one.lines]
    assert [1234.5] in speeds


def test_one_logged_line_is_a_point(tmp_path: Path) -> None:
    curves.draw([_metrics(tmp_path, "pretrain", [3.0])], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "pretrain/metrics.jsonl: there is no such file"),
        ("", "pretrain/metrics.jsonl: holds no line"),
        (
            '{"iteration": 5, "loss": 1.0}\n{"iteration": 6}\n',
            "metrics.jsonl: line 1 has no number under learning_rate",
        ),
        ('{"iteration": 5, "validation_loss": 1.0}\n', "metrics.jsonl: holds no line of training"),
        (
            '{"iteration": 5, "loss": 1.0, "learning_rate": 1}\n{"validation_loss": 1.0}\n',
            "metrics.jsonl: line 2 has no number under iteration",
        ),
    ],
    ids=["missing", "empty", "field-missing", "validation-alone", "validation-of-nothing"],
)
def test_broken_metrics_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "pretrain/metrics.jsonl"
    if text is not None:
        path.parent.mkdir()
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        curves.draw([path], tmp_path / "loss.png")


def test_a_chart_in_another_format_is_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--out: .*scores.gif ends in .gif, allowed are .png"):
        scores.draw(table, tmp_path / "scores.gif")


def test_scores_show_models_shuffled_pictures_and_controls(table: Path, tmp_path: Path, drawn: list[Figure]) -> None:
    scores.draw(table, tmp_path / "scores.png")
    captions, questions = _titled(drawn[0], "Captions: CIDEr"), _titled(drawn[0], "Questions: MMMU accuracy")
    by_ink = {
        ink: [bar.get_width() for bar in captions.patches if bar.get_facecolor() == _rgba(ink) and bar.get_width()]
        for ink in (drawing.MODEL, drawing.SHUFFLED, drawing.CONTROL)
    }
    assert by_ink == {
        drawing.MODEL: [0.012, 1.9123, 3.1],
        drawing.SHUFFLED: [0.011, 0.61, 0.72],
        drawing.CONTROL: [0.709, 2.003],
    }
    names = [label.get_text().replace("\n", " ") for label in captions.get_yticklabels()]
    assert names == [row.label for row in rows.read(table)]
    assert "3.10" in [text.get_text() for text in captions.texts]
    assert [bar.get_width() for bar in questions.patches] == [0.21, 0.41, 0.81]
    assert list(questions.lines[0].get_xdata()) == [scores.CHANCE] * 2


def _rgba(ink: str) -> tuple[float, ...]:
    return (*(int(ink[place : place + 2], 16) / 255 for place in (1, 3, 5)), 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "table.csv: there is no such file"),
        ("name,label\n", "table.csv: has no rows"),
        ("name,label\na,b\n", "table.csv: columns CIDEr, .* are missing"),
        (TABLE.replace("1.9123", "much"), "table.csv: line 3, CIDEr: 'much' is not a number"),
    ],
    ids=["missing", "empty", "column-missing", "not-a-number"],
)
def test_a_broken_table_is_named(table: Path, tmp_path: Path, text: str | None, message: str) -> None:
    table.unlink() if text is None else table.write_text(text)
    with pytest.raises(ValueError, match=message):
        scores.draw(table, tmp_path / "scores.png")
    with pytest.raises(ValueError, match=message):
        summary.show(table, tmp_path, tmp_path)


def test_the_table_is_the_one_that_scoring_writes() -> None:
    from vlm.evaluate import table as written

    assert set(rows.COLUMNS) <= set(written.COLUMNS)
    assert (rows.SHUFFLED, rows.ACCURACY) == (written.SHUFFLED, written.ACCURACY)
    assert all(label.startswith(rows.CONTROL_PREFIX) for label in written.CONTROLS.values())


def test_the_summary_says_scores_and_what_to_open(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = [tmp_path / name for name in ("report.html", "gallery.html")]
    pages[0].write_text("")
    with pytest.raises(ValueError, match=r"gallery.html: there is no such file"):
        summary.show(table, *pages)
    pages[1].write_text("")
    capsys.readouterr()
    summary.show(table, *pages)
    said = capsys.readouterr().out
    assert re.search(r"after pretrain +1\.912 +0\.610 +0\.400 +0\.310 +0\.600 +0\.410\n", said)
    assert re.search(r"random training caption +0\.709 +0\.200", said)
    assert said.index("after sft") < said.index("without a model") < said.index("random training caption")
    assert all(str(path) in said for path in pages)


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`config.yaml`, `sources` and `generate` of a run: before training nothing is right, after SFT everything."""
    folder = tmp_path_factory.mktemp("answered")
    tree = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    _merge(tree, yaml.safe_load((ROOT / "config/tiny.yaml").read_text()))
    tree["miniature"] = {"pretrain_samples": 1, "sft_samples": 1, "test_images": 30, "questions_per_subject": 6}
    config = settings.validate(tree)
    (folder / "config.yaml").write_text(settings.dump(config))
    datasets.write(folder / "config.yaml", folder / "sources")
    for model in MODELS:
        for task, source in (("captions", "coco"), ("mmmu", "MMMU")):
            lines = [
                {"id": item.id, "response": _response(model, task, item.record)}
                for item in items.TASKS[task].read(config, folder / "sources" / source)
            ]
            path = folder / f"generate/{model}/{task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dialogues = [
        {"id": item.id, "conversation": _dialogue(item)}
        for item in items.TASKS["dialogue"].read(config, folder / "sources/coco")
    ]
    (folder / "generate/sft/dialogue.jsonl").write_text("".join(json.dumps(line) + "\n" for line in dialogues))
    return folder


def _dialogue(item: items.Item) -> list[dict[str, str]]:
    answers = [f"{item.id} things", "<b>in</b> front", ""]
    pairs = zip([item.prompt, *item.follow_ups], answers, strict=True)
    return [{"from": role, "value": text} for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)]


def _response(model: str, task: str, record: dict[str, Any]) -> str:
    if task == "captions":
        return {"combined": "", "pretrain": "<b>bold</b> & a background", "sft": "a background"}[model]
    return record["answer"] if model == "sft" else "no idea"


def _write(folder: Path, out: Path) -> str:
    gallery.write(folder / "config.yaml", folder / "sources", folder / "generate", out)
    return out.read_text()


def test_the_gallery_needs_no_other_file(answered: Path, tmp_path: Path) -> None:
    html = _write(answered, tmp_path / "gallery.html")
    found = re.findall(r'(?:src|href)="([^"]{0,40})', html)
    assert found and all(link.startswith("data:image/") for link in found)
    assert not re.search(r"https?://|@import|<script|url\(", html)
    assert "prefers-color-scheme: dark" in html


def test_the_gallery_shows_what_each_model_said(answered: Path, tmp_path: Path) -> None:
    html = _write(answered, tmp_path / "gallery.html")
    captions, questions = html.split("<h2>Questions</h2>")
    cards = captions.split('<article class="card">')[1:]
    dialogue = settings.load(answered / "config.yaml").evaluation.dialogue
    assert len(cards) == dialogue.num_images
    references = json.loads((answered / "sources/coco/annotations/captions_val2014.json").read_text())["annotations"]
    for number, card in enumerate(cards, start=1):
        said = re.search(r'<dl class="dialogue".*?>(.*?)</dl>', card, flags=re.DOTALL)[1]
        lines = [unescape(line) for line in re.findall(r"<d[td]>(.*?)</d[td]>", said, flags=re.DOTALL)]
        assert lines[::2] == list(dialogue.questions)
        assert lines[1::2] == [f"{number} things", "<b>in</b> front", '<span class="nothing">nothing</span>']
        assert "<b>" not in said
        assert unescape(re.search(r"<dt>reference</dt><dd>(.*?)</dd>", card)[1]) in {r["caption"] for r in references}
        assert card.count("<li>") == 4
        assert '<dt>before training</dt><dd><span class="nothing">nothing</span></dd>' in card
        assert "&lt;<mark>b</mark>&gt;<mark>bold</mark>&lt;/<mark>b</mark>&gt; &amp; a background" in card
        assert '<dt class="last">after sft</dt><dd class="last">a background</dd>' in card
    cards = questions.split('<article class="card">')[1:]
    assert len(cards) == gallery.NUM_QUESTIONS
    for card in cards:
        assert card.count('class="verdict wrong"') == 2 and card.count('class="verdict right"') == 1
        assert card.count("class=answer") + card.count('class="answer"') == 1
        assert "<image" not in unescape(card) and card.count("<img") == 1 + ("Which picture" in card)


def test_the_gallery_has_every_subject(answered: Path, tmp_path: Path) -> None:
    html = _write(answered, tmp_path / "gallery.html")
    asked = ("What colour", "What shape", "What is the background", "How many", "Where is", "Which thing")
    for start in (*asked, "Which picture"):
        assert f'<div class="asked">{start}' in html


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("generate/sft/mmmu.jsonl", None, "generate/sft/mmmu.jsonl: there is no such file"),
        (
            "generate/pretrain/captions.jsonl",
            '{"id": 1, "response": "a"}\n',
            "the model pretrain has no line with id 2",
        ),
        ("generate/pretrain/captions.jsonl", '{"id": 1}\n', "captions.jsonl: line 1 has no `id` and `response`"),
        ("generate/sft/dialogue.jsonl", None, "generate/sft/dialogue.jsonl: there is no such file"),
        (
            "generate/sft/dialogue.jsonl",
            '{"id": 1, "conversation": [{"from": "human", "value": "Why?"}]}\n',
            "dialogue.jsonl: line 1 has no `id` and `conversation` of questions and answers",
        ),
        (
            "generate/sft/dialogue.jsonl",
            '{"id": 99, "conversation": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n',
            "has no picture 99",
        ),
        ("sources/coco/val2014/COCO_val2014_000000000001.jpg", "no picture", "000000000001.jpg: not a picture"),
        ("sources/coco/val2014/COCO_val2014_000000000001.jpg", None, "000000000001.jpg: not a picture"),
        ("sources/MMMU/answer_dict_val.json", "{}", "answer_dict_val.json: has no answer to validation_Background_1"),
    ],
    ids=[
        "answers-missing",
        "item-missing",
        "response-missing",
        "dialogue-missing",
        "dialogue-unanswered",
        "dialogue-of-no-picture",
        "picture-broken",
        "picture-missing",
        "answer-missing",
    ],
)
def test_a_broken_file_of_the_gallery_is_named(
    answered: Path, tmp_path: Path, path: str, change: str | None, message: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(answered, folder)
    (folder / path).unlink() if change is None else (folder / path).write_text(change)
    with pytest.raises(ValueError, match=message):
        _write(folder, tmp_path / "gallery.html")
    assert not (tmp_path / "gallery.html").exists()


def test_a_large_picture_is_made_smaller(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.effect_noise((1200, 800), 50).convert("RGB").save(path)
    html = page.picture(path, "large.png")
    assert len(html) < path.stat().st_size / 10 and 'class="small"' not in html and "image/jpeg" in html


def test_items_are_spread_over_all() -> None:
    assert gallery._spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert gallery._spread([1, 2], 4) == [1, 2]
