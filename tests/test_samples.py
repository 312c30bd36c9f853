"""Stored completions: written as they come, never drawn twice, never mixed."""

import json

import pytest

from gemma_tpu.errors import UserError
from gemma_tpu.evaluation import samples
from gemma_tpu.evaluation.samples import Sample, Store

SETTINGS = {"draw": {"n": 2, "seed": 0}, "model": "m"}


def test_what_is_written_is_there_for_the_next_one(tmp_path):
    path = tmp_path / "evals" / "tuned.jsonl"
    store = Store(path, SETTINGS)
    store.add(Sample("p", 0, "one\nline", "stop", 7))
    assert path.read_text().count("\n") == 1, "written as it comes"
    store.add(Sample("p", 1, "zwei ü", "length", 9))
    again = Store(path, SETTINGS)
    assert again.found == store.found and again.dropped == 0
    assert again.missing([("p", 0), ("p", 1), ("q", 0)]) == {("q", 0)}


def test_a_half_written_line_is_cut_off_and_missing(tmp_path):
    path = tmp_path / "tuned.jsonl"
    store = Store(path, SETTINGS)
    store.add(Sample("p", 0, "one"))
    with path.open("a") as stream:
        stream.write('{"problem": "p", "sample": 1, "compl')
    again = Store(path, SETTINGS)
    assert again.dropped == 1 and again.missing([("p", 0), ("p", 1)]) == {("p", 1)}
    again.add(Sample("p", 1, "two"))
    assert [one.completion for one in samples.read(path)] == ["one", "two"]


def test_other_settings_are_refused_with_the_differences(tmp_path):
    Store(tmp_path / "tuned.jsonl", SETTINGS).add(Sample("p", 0, "one"))
    with pytest.raises(UserError, match=r"samples of another evaluation:\n  draw: .*'seed': 0.*'seed': 1") as said:
        Store(tmp_path / "tuned.jsonl", {"draw": {"n": 2, "seed": 1}, "model": "m"})
    assert "model:" not in str(said.value), "only what differs"
    assert Store(tmp_path / "base.jsonl", {"other": 1}).found == {}, "one model's settings are not another's"


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store(None, SETTINGS)
    store.add(Sample("p", 0, "one"))
    assert store.missing([("p", 0)]) == set() and list(tmp_path.iterdir()) == []


def test_faulty_lines_are_named_all_at_once(tmp_path):
    path = tmp_path / "anyones.jsonl"
    good = {"problem": "p", "sample": 0, "completion": "text"}
    rows = [good, good, {**good, "sample": "1"}, {"problem": "p"}, {**good, "problem": "other"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    with pytest.raises(UserError) as said:
        samples.read(path, ["p"])
    for expected in ("line 2: sample 0 of p is there twice", "line 3: not {problem, sample, completion}: sample must",
                     "line 4:", "line 5: no problem is called 'other'", "line 6: not JSON"):  # fmt: skip
        assert expected in str(said.value)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no sample"):
        samples.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        samples.read(tmp_path / "nix")
