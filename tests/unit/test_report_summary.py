"""The summary fails a run whose last model does not look at its pictures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vlm.evaluate.table import CONTROLS
from vlm.report import summary

HEAD = 'name,label,CIDEr,BLEU-4,METEOR,ROUGE-L,"CIDEr, pictures shuffled",MMMU accuracy,images,questions\n'


@pytest.mark.parametrize(
    ("own", "shuffled", "doubt"),
    [
        (3.1, 0.7, None),
        (1.9, 0.7, r"CIDEr 1\.900 is no better than that of a control, caption of the nearest training picture"),
        (0.6, 0.2, r"CIDEr 0\.600 is no better than that of a control, random training caption"),
        (3.1, 3.0, r"CIDEr 3\.100 falls only to 3\.000 when the pictures are shuffled"),
    ],
    ids=["sees", "retrieval-would-do", "guessing-would-do", "ignores-the-pictures"],
)
def test_a_model_that_does_not_see_fails_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own: float, shuffled: float, doubt: str | None
) -> None:
    lines = [f"pretrain,after pretrain,9,1,1,1,0,1,3,3\nsft,after sft,{own},1,1,1,{shuffled},1,3,3\n"]
    lines += [f"{name},{CONTROLS[name]},{score},1,1,1,,,3,\n" for name, score in (("random", 0.7), ("nearest", 2.0))]
    lines += [f"reference,{CONTROLS['reference']},6.6,1,1,1,,,3,\n"]  # a human's caption need not be beaten
    table, page = tmp_path / "table.csv", tmp_path / "page.html"
    table.write_text(HEAD + "".join(lines))
    page.write_text("")
    assert summary.show(table, page, page) == (doubt is not None)
    said = capsys.readouterr().err
    assert re.search(f"after sft: {doubt}", said) if doubt else not said
