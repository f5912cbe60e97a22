"""VQA accuracy by the rules of the VQA challenge, for VQAv2 and TextVQA.

The rules are those of `vqaEval.py` of GT-Vision-Lab/VQA and, for TextVQA, of the answer processor of Facebook's Pythia
that its challenge runs. Their oddities decide published scores, so they are kept, each with a comment.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from vlm.benchmarks import Question
from vlm.evaluate.judged import Judged

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
PERIODS_REMOVED = 32
"""The script passes `re.UNICODE`, which is 32, where `re.sub` takes the largest number of replacements."""
DIGIT_COMMA = re.compile(r"\d,\d")
DIGIT_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(value) for value, word in enumerate(DIGIT_WORDS.split())} | {"none": "0"}
ARTICLES = frozenset(["a", "an", "the"])

EXPANSIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
"""Contractions that the script completes where one of their apostrophes is missing. It lists more: those of "I" never
meet a word, since words are lower-cased first."""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {written: word for word in EXPANSIONS.split() for written in _without_one_apostrophe(word)} | {
    "somebody'd": "somebodyd"  # the wrong way round in the script
}


@functools.lru_cache(maxsize=100_000)  # answers recur: 12 s instead of 19 s for VQAv2's 214,354 questions
def normalise(answer: str) -> str:
    """An answer as VQAv2 compares it: without punctuation, capitals and articles, numbers to ten as digits."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    return _words(_without_punctuation(text))


def normalise_textvqa(answer: str) -> str:
    """An answer as TextVQA compares it: commas and question marks go and a genitive `'s` is a word before the rest."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise(text.strip())


def _without_punctuation(text: str) -> str:
    """A mark beside a blank goes; one between letters becomes a blank, unless there is a comma between digits."""
    result = text
    close = DIGIT_COMMA.search(text) is not None  # anywhere, and then for all marks
    for mark in PUNCTUATION:
        gone = close or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if gone else " ")
    return PERIOD.sub("", result, count=PERIODS_REMOVED)


def _words(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, accepted: Sequence[str]) -> float:
    """Mean over the people of min(1, matches among the others / 3).

    With ten people of whom m gave this answer: m min(1, (m - 1) / 3) / 10 + (10 - m) min(1, m / 3) / 10, which is 0.3,
    0.6 and 0.9 for m = 1, 2 and 3. The simple form of papers, min(1, m / 3), gives 1/3, 2/3 and 1 there, and the same
    elsewhere.

    Args:
        answer: normalised.
        accepted: one answer a person, normalised.

    Raises:
        ValueError: there is one person alone, so nobody else to agree with.
    """
    if len(accepted) < 2:
        raise ValueError(f"VQA accuracy compares the answers of several people (ten), found {len(accepted)}")
    matches = [one == answer for one in accepted]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def judge_vqav2(question: Question, answer: str) -> Judged:
    """VQAv2 accuracy; `accuracy_raw_if_unanimous` is what the script gives an answer as it was said.

    The script leaves both sides as written where all people gave the same answer, so "Yes" to ten times "yes" counts
    nothing there. Submissions are therefore normalised by those who send them, and so is every answer here.
    """
    said, accepted = normalise(answer), [normalise(one) for one in question.answers]
    points = accuracy(said, accepted)
    strict = points
    if len({one.replace("\n", " ").replace("\t", " ").strip() for one in question.answers}) == 1:
        strict = float(answer.replace("\n", " ").replace("\t", " ").strip() == question.answers[0].strip())
    return Judged({"accuracy": points, "accuracy_raw_if_unanimous": strict})


def judge_textvqa(question: Question, answer: str) -> Judged:
    """TextVQA accuracy: both sides normalised, always."""
    return Judged(
        {"accuracy": accuracy(normalise_textvqa(answer), [normalise_textvqa(one) for one in question.answers])}
    )
