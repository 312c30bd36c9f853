"""Contamination: copies are found whatever their layout, and a form of words that all problems share is none."""

import json

import pytest

from gemma_tpu.errors import UserError
from gemma_tpu.evaluation import contamination
from gemma_tpu.schema import DataConfig

FORM = "I would like you to implement a module named TopModule with the following interface of one bit ports"
WORDS = [f"word{number}" for number in range(200)]
TEXTS = {(f"p{at}", "prompt"): f"{FORM} {' '.join(WORDS[at * 40 : at * 40 + 40])}" for at in range(4)}


def test_a_copy_is_found_whatever_its_case_and_layout():
    copy = ",\n  ".join(TEXTS["p2", "prompt"].upper().split())
    report = contamination.check(TEXTS, [("a.jsonl:1", "something else entirely"), ("a.jsonl:2", f"see: {copy}!")])
    [found] = report.overlaps
    assert (found.problem, found.part, found.share, found.place) == ("p2", "prompt", 1.0, "a.jsonl:2")
    assert report.contaminated == [found] and report.rows == 2
    assert "1 problems with at least 50% of a text in the data" in report.lines()[0]
    assert "p2 prompt: 100%" in report.lines()[1] and json.dumps(report.json())


def test_the_form_of_words_that_the_problems_share_is_no_overlap():
    assert contamination.check(TEXTS, [("a:1", f"{FORM} and then another task")]).overlaps == []


def test_a_part_is_an_overlap_and_no_contamination():
    part = " ".join(TEXTS["p1", "prompt"].split()[-20:])
    report = contamination.check(TEXTS, [("a:1", part)])
    [found] = report.overlaps
    assert 0 < found.share < contamination.SHARE and report.contaminated == []


def test_texts_too_short_for_an_n_gram_are_counted():
    report = contamination.check({("p", "prompt"): "far too short", **TEXTS}, [("a:1", "far too short")])
    assert (report.short, report.texts, report.overlaps) == (1, 4, [])
    assert "1 texts are too short to say" in report.lines()[0]


def test_the_rows_are_those_that_the_config_trains_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a b", "response": "c"}, {"prompt": "d", "response": "e"}, {"prompt": "f", "response": "g"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataConfig(path=str(path), limit=2, strict=True)
    assert list(contamination.training_rows(section)) == [("rows.jsonl:1", "a b\nc"), ("rows.jsonl:2", "d\ne")]
    path.write_text('{"prompt": "a b", "response": "c"}\n{oops\n')
    with pytest.raises(UserError, match="cannot be used"):
        list(contamination.training_rows(section))
