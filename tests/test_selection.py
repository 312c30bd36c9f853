"""Which rows are trained on: shares that hold rows out, mixtures by weight, documents and preference pairs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizer_helper import AtOnce, Made

from gemma_tpu.data.corpus import prepare
from gemma_tpu.errors import UserError
from gemma_tpu.schema import DataConfig


class Letters(AtOnce):
    """A letter is a token; the last turn is trained."""

    pad_id, eos_id = 0, 1

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return [2] * bos + [ord(letter) for letter in text]

    def text(self, text: str) -> list[int]:
        return [*self.encode(text, bos=True), self.eos_id]

    def training(self, messages: list[dict], train_on: str) -> tuple[list[int], list[bool]]:
        parts = [self.encode(m["content"]) for m in messages]
        return [2, *sum(parts, [])], [False] * (1 + sum(map(len, parts[:-1]))) + [True] * len(parts[-1])


def write(path: Path, count: int, letter: str = "q", start: int = 0) -> str:
    rows = [{"prompt": f"{letter}{i}", "response": f"answer {letter}{i}"} for i in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def section(path: str | tuple[str, ...], **changes) -> DataConfig:
    return replace(DataConfig(path=path, validation=None, cache=None, workers=1, max_seq_len=64), **changes)


def texts(prepared) -> set[str]:
    return {"".join(map(chr, prepared[row][0][1:].tolist())) for row in range(len(prepared))}


def test_a_share_splits_every_row_to_one_side_and_says_so(tmp_path: Path) -> None:
    one = section(write(tmp_path / "r.jsonl", 1000), validation=0.1)
    train, held_out = prepare(one, Letters()), prepare(one, Letters(), one.validation)
    assert not texts(train) & texts(held_out) and len(texts(train) | texts(held_out)) == 1000
    assert 70 <= len(held_out) <= 130 and held_out.rows == len(held_out)
    assert f"data.validation=0.1 holds out {len(held_out)} of 1,000 rows" in train.notes[0]


def test_a_row_and_its_double_keep_their_side_when_others_are_added(tmp_path: Path) -> None:
    before = section(write(tmp_path / "a.jsonl", 300), validation=0.2)
    more = (write(tmp_path / "b.jsonl", 200, start=200), before.path)  # a hundred of them again, in another order
    after = replace(before, path=more)
    old, new = (texts(prepare(one, Letters(), 0.2)) for one in (before, after))
    assert old <= new
    assert not texts(prepare(after, Letters())) & new


def test_a_share_that_leaves_a_side_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.validation=0.001 of 3 rows holds out 0"):
        prepare(section(write(tmp_path / "r.jsonl", 3), validation=0.001), Letters())


def test_weights_give_the_largest_mixture_in_their_shares_without_repeats(tmp_path: Path) -> None:
    paths = (write(tmp_path / "a.jsonl", 100, "a"), write(tmp_path / "b.jsonl", 300, "b"))
    mixed = prepare(section(paths, weights=(3.0, 1.0)), Letters())
    found = texts(mixed)
    assert sum("answer a" in text for text in found) == 100 and len(found) == 133
    assert mixed.rows == 400 and dict(mixed.dropped.counts) == {"left_out_by_weights": 267}
    assert "data.weights: 33 of 300 rows of" in mixed.notes[1] and "(24.8% of the mixture)" in mixed.notes[1]
    assert texts(prepare(section(paths, weights=(3.0, 1.0)), Letters())) == found
    limited = prepare(section(paths, weights=(1.0, 1.0), limit=20), Letters())
    assert np.bincount(limited.file_N).tolist() == [10, 10]


def test_a_source_without_a_usable_row_cannot_be_mixed(tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "x" * 99, "response": "y"}) + "\n")
    with pytest.raises(UserError, match=r"no row of \S+long.jsonl can be used"):
        prepare(section((write(tmp_path / "a.jsonl", 5), str(long)), weights=(1.0, 1.0)), Letters())


def test_a_document_is_trained_whole_and_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    ids, mask = prepare(section(str(tmp_path / "a.txt")), Letters())[0]
    assert ids.tolist() == [2, 97, 98, 99, 1] and mask.tolist() == [False, True, True, True, True]


def test_preference_pairs_are_read_by_side_and_refused_as_single_answers(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "q", "chosen": "good", "rejected": "bad"}) + "\n")
    sides = [prepare(section(str(path)), Letters(), side=side) for side in ("chosen", "rejected")]
    assert [texts(side) for side in sides] == [{"qgood"}, {"qbad"}]
    with pytest.raises(UserError, match="p.jsonl:1 is a preference pair"):
        prepare(section(str(path)), Letters())


def test_one_file_of_turns_is_one_row_and_rows_of_other_files_stand_beside_it(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(turn) for turn in turns))
    write(tmp_path / "c.jsonl", 3)
    found = prepare(section(str(tmp_path)), Letters())
    assert [found.where(row) for row in range(5)] == ["a.jsonl:1", "b.jsonl:1", "c.jsonl:1", "c.jsonl:2", "c.jsonl:3"]
    assert found.format == "trajectory and prompt (detected)"


def test_declared_tools_reach_the_tokenizer(tmp_path: Path) -> None:
    class Able(Letters):
        def training(self, messages, train_on, *, tools=None):
            return super().training([{"content": json.dumps(tools)}, *messages], train_on)

    row = {"prompt": "q", "response": "a", "tools": [{"name": "f"}]}
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join([json.dumps(row), json.dumps({"prompt": "q", "response": "a"})]))
    able = prepare(section(str(path), max_seq_len=200), Able())
    assert any('"name": "f"' in text for text in texts(able)) and len(able) == 2


def test_thoughts_that_the_template_leaves_out_are_counted_in_the_report(tmp_path: Path) -> None:
    class Forgetful(Letters):
        def draft(self, messages, train_on, *, tools=None):
            return Made(*self.training(messages, train_on), lost=1)

    notes = prepare(section(write(tmp_path / "r.jsonl", 4)), Forgetful()).notes
    assert "messages whose reasoning the chat template leaves out: 4" in notes
