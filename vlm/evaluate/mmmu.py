"""MMMU accuracy from the forms in which people keep predictions, scored as MMMU's own scripts do.

`main_eval_only.py` of MMMU scores final answers, `main_parse_and_eval.py` raw responses; both skip what is missing.
`mmmu-pro/evaluate.py` scores MMMU-Pro's result files. Here every question must be answered and every answer must have
its question.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from vlm import files, mmmu
from vlm.evaluate.answers import same_ids
from vlm.evaluate.judged import standard_error

Fallback = Literal["first", "random", "wrong"]

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
"""MMMU's six domains and their thirty subjects (`mmmu/utils/data_utils.py`)."""

OTHER = "Other"
"""Domain of a subject that is not MMMU's."""


@dataclass(frozen=True)
class Question:
    multiple_choice: bool
    gold: str | list[str]


@dataclass(frozen=True)
class Prediction:
    text: str
    parsed: bool
    """Whether `text` is already a letter, and not a response to find one in."""
    choices: tuple[str, ...] = ()
    options: Mapping[str, str] | None = None
    pro: bool = False
    """Whether the rules of MMMU-Pro read the response: its result files hold `options`, MMMU's `index2ans`."""


def score(
    answers: Path,
    predictions: Path,
    output: Path,
    fallback: Fallback = "random",
    seed: int = 0,
    split: str = "validation",
) -> None:
    """Score predictions and write accuracies as fractions, overall, per subject and per domain.

    Args:
        answers: MMMU's `answer_dict_val.json`, or whatever else `vlm.mmmu.read_gold` reads, such as a copy of the
            Hub's repository or one setting's folder of MMMU-Pro's.
        predictions: `{id: answer}`, or raw responses as a JSON list, JSON lines or a folder of `<Subject>/output.json`;
            or MMMU-Pro's result file, JSON lines with `options` and `response`, for either of its settings.
        output: JSON with `accuracy, num_correct, num_questions, per_subject, per_domain, num_fallback` and
            `standard_errors` of the accuracies.
        fallback: what a multiple-choice response without a letter becomes: the first option, one drawn by `seed` in the
            order of the predictions (as MMMU does), or a wrong answer.
        split: which parquet files of a folder hold the answers.

    Raises:
        ValueError: a broken file, an id twice, or ids on one side only.
    """
    questions = read_answers(answers, split)
    predicted = read_predictions(predictions)
    same_ids(predicted, questions, str(predictions), str(answers))
    draw = _drawer(fallback, seed)
    num_fallback = 0
    correct: dict[str, bool] = {}
    for name, prediction in predicted.items():
        question = questions[name]
        if not question.multiple_choice:
            correct[name] = mmmu.open_is_correct(question.gold, mmmu.parse_open(prediction.text))
            continue
        choice: str | None = prediction.text
        if not prediction.parsed:
            if not prediction.choices or prediction.options is None:
                raise ValueError(f"{predictions}: {name} is multiple-choice and lacks `all_choices` or `index2ans`")
            parse = mmmu.parse_choice_pro if prediction.pro else mmmu.parse_choice
            choice = parse(prediction.text, prediction.choices, prediction.options)
            if choice is None:
                num_fallback += 1
                choice = draw(prediction.choices)
        correct[name] = mmmu.choice_is_correct(question.gold, choice)
    files.write_json(output, summary(correct) | {"num_fallback": num_fallback})


def _drawer(fallback: Fallback, seed: int) -> Callable[[tuple[str, ...]], str | None]:
    if fallback == "random":
        return random.Random(seed).choice
    if fallback == "first":
        return lambda choices: choices[0]
    if fallback == "wrong":
        return lambda choices: None
    raise ValueError(f"--fallback: {fallback!r} does not exist, allowed are first, random, wrong")


def summary(correct: Mapping[str, bool]) -> dict[str, Any]:
    """Accuracies as fractions of the questions with their binomial standard errors, overall, per subject and domain.

    Args:
        correct: whether each question, by its id, was answered right.
    """
    by_subject: dict[str, list[bool]] = defaultdict(list)
    for name, right in correct.items():
        by_subject[subject(name)].append(right)
    domain_of = {one: domain for domain, subjects in DOMAINS.items() for one in subjects}
    by_domain: dict[str, list[bool]] = {domain: [] for domain in (*DOMAINS, OTHER)}
    for one, rights in by_subject.items():
        by_domain[domain_of.get(one, OTHER)] += rights
    num_correct = sum(correct.values())
    return {
        "accuracy": num_correct / len(correct),
        "num_correct": num_correct,
        "num_questions": len(correct),
        "per_subject": {one: _share(by_subject[one]) for one in sorted(by_subject)},
        "per_domain": {domain: _share(rights) for domain, rights in by_domain.items() if rights},
        "standard_errors": {
            "accuracy": standard_error(list(correct.values())),
            "per_subject": {one: standard_error(by_subject[one]) for one in sorted(by_subject)},
            "per_domain": {domain: standard_error(rights) for domain, rights in by_domain.items() if rights},
        },
    }


def _share(rights: list[bool]) -> float:
    return sum(rights) / len(rights)


def subject(name: str) -> str:
    """Subject in a question's id: `validation_Art_Theory_12` is of Art_Theory.

    Raises:
        ValueError: the id is not `<split>_<Subject>_<number>`.
    """
    parts = name.split("_")
    if len(parts) < 3:
        raise ValueError(f"question id {name!r}: expected <split>_<Subject>_<number>")
    return "_".join(parts[1:-1])


def read_answers(path: Path, split: str = "validation") -> dict[str, Question]:
    """Questions of MMMU's `answer_dict_val.json`, `{id: {"question_type", "ground_truth"}}`, or of what replaces it.

    Raises:
        ValueError: the file is not of that form.
    """
    content = mmmu.read_gold(path, split)
    if not content:
        raise ValueError(f"{path}: expected an object of questions by id, found none")
    questions = {}
    for name, entry in content.items():
        subject(name)
        if not isinstance(entry, dict) or not isinstance(entry.get("question_type"), str):
            raise ValueError(f"{path}: {name} has no `question_type`")
        gold = entry.get("ground_truth")
        where = f"{path}: {name}.ground_truth"
        accepted = [_answer(one, where) for one in gold] if isinstance(gold, list) else _answer(gold, where)
        questions[name] = Question(entry["question_type"] == mmmu.MULTIPLE_CHOICE, accepted)
    return questions


def read_predictions(path: Path) -> dict[str, Prediction]:
    """Predictions by question id, in the order of the file, or of the sorted subjects of a folder.

    Raises:
        ValueError: not one of the three forms, or an id twice.
    """
    if path.is_dir():
        outputs = sorted(path.glob("*/output.json"))
        if not outputs:
            raise ValueError(f"{path}: the folder holds no <Subject>/output.json")
        return _raw((output, record) for output in outputs for record in files.read_records(output))
    records = files.read_records(path)
    if len(records) == 1 and "response" not in records[0]:
        final = records[0]
        return {name: Prediction(_answer(value, f"{path}: {name}"), parsed=True) for name, value in final.items()}
    return _raw((path, record) for record in records)


def _raw(records: Iterable[tuple[Path, dict[str, Any]]]) -> dict[str, Prediction]:
    predictions: dict[str, Prediction] = {}
    for path, record in records:
        name, response = record.get("id"), record.get("response")
        if not isinstance(name, str) or not isinstance(response, str):
            raise ValueError(f"{path}: expected strings under `id` and `response`, found {name!r} and {response!r}")
        if name in predictions:
            raise ValueError(f"{path}: {name} is answered more than once")
        choices, options = record.get("all_choices") or [], record.get("index2ans") or {}
        pro = "options" in record and not choices
        if pro:
            listed = mmmu.parse_options(record["options"], f"{path}: {name}")
            options = dict(zip(ascii_uppercase, listed, strict=False))
            choices = list(options)
        if not isinstance(choices, list) or not isinstance(options, dict):
            raise ValueError(f"{path}: {name} needs a list under `all_choices` and an object under `index2ans`")
        texts = {letter: str(text) for letter, text in options.items()}
        predictions[name] = Prediction(response, False, tuple(map(str, choices)), texts or None, pro)
    return predictions


def _answer(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise ValueError(f"{where}: expected a string or a number, found {value!r}")
