"""Data: every line is used, counted or refused; every batch is a pure function of rows, seed and step."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from tokenizer_helper import AtOnce

from gemma_tpu.data.batches import Loader, make_loader
from gemma_tpu.data.corpus import Prepared, prepare
from gemma_tpu.data.transforms import codev_answer
from gemma_tpu.errors import UserError

BOS, PAD, TURN = 1, 0, 2


class Words(AtOnce):
    """A tokenizer of whitespace words: BOS, then for each turn a role token, the words and an end of turn."""

    pad_id = PAD

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}
        self.seen: list[list[dict[str, str]]] = []

    def training(self, messages: list[dict[str, str]], train_on: str) -> tuple[list[int], list[bool]]:
        self.seen.append(messages)
        ids, mask = [BOS], [train_on == "all"]
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
        for i, message in enumerate(messages):
            ids += [3, *(self.word(w) for w in message["content"].split()), TURN]
            words = len(ids) - len(mask) - 2
            trained = message["role"] == "assistant" and (train_on != "last_assistant" or i == last)
            mask += [train_on == "all"] + [trained or train_on == "all"] * (words + 1)
        return ids, mask

    def word(self, text: str) -> int:
        return self.vocabulary.setdefault(text, len(self.vocabulary) + 10)


@dataclass
class Section:
    path: str | list[str]
    format: str = "auto"
    max_seq_len: int = 64
    packing: str = "pack"
    train_on: str = "assistant"
    overlong: str = "drop"
    limit: int | None = None
    validation: str | None = None
    transform: str | None = None
    weights: list[float] | None = None
    columns: dict[str, str] = field(default_factory=dict)
    strict: bool = False
    cache: str | None = None
    workers: int | None = 1


def write(path: Path, rows: list) -> str:
    """Rows as JSONL; a str or bytes row is written as it is."""
    texts = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    path.write_bytes(b"".join((t if isinstance(t, bytes) else t.encode()) + b"\n" for t in texts))
    return str(path)


def pair(prompt: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def refusal(section: Section) -> str:
    with pytest.raises(UserError) as caught:
        prepare(section, Words())
    return str(caught.value)


@pytest.fixture
def corpus(tmp_path: Path) -> Prepared:
    """Sixty rows of 8 to 37 tokens, each with its own words."""
    rng = np.random.default_rng(0)
    rows = [
        pair(f"q{i} " * int(rng.integers(1, 10)), " ".join(f"a{i}.{j}" for j in range(rng.integers(2, 20))))
        for i in range(60)
    ]
    return prepare(Section(write(tmp_path / "rows.jsonl", rows)), Words())


def loader_of(corpus: Prepared, **changes) -> Loader:
    options = dict(max_seq_len=64, packing="pack", batch_size=4, accumulation=2, seed=3, epochs=3)
    return make_loader(corpus, **{**options, **changes})


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# Reading


def test_messages_and_prompt_columns_give_the_same_rows_and_the_report_says_which(tmp_path: Path) -> None:
    pairs = [("one two", "three"), ("four", "five six")]
    files = {
        "messages": [pair(q, a) for q, a in pairs],
        "prompt": [{"prompt": q, "response": a} for q, a in pairs],
        "completions": [{"prompt": q, "completion": a} for q, a in pairs],
    }
    found = {n: prepare(Section(write(tmp_path / f"{n}.jsonl", rows)), Words()) for n, rows in files.items()}
    first = found["messages"]
    for prepared in found.values():
        assert (prepared.ids == first.ids).all() and (prepared.mask == first.mask).all()
    assert "format messages (detected)" in first.report()
    assert "format prompt (detected)" in found["completions"].report()


def test_the_aliases_of_roles_and_text_parts_are_read(tmp_path: Path) -> None:
    rows = [
        {"messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "model", "content": "c"},
        ]},
        {"prompt": "a", "response": "b", "system": "be kind"},
    ]  # fmt: skip
    words = Words()
    for i, row in enumerate(rows):
        prepare(Section(write(tmp_path / f"{i}.jsonl", [row])), words)
    assert [[(m["role"], m["content"]) for m in messages] for messages in words.seen] == [
        [("system", "be brief"), ("user", "ab"), ("assistant", "c")],
        [("system", "be kind"), ("user", "a"), ("assistant", "b")],
    ]


def test_several_files_are_one_dataset_and_every_row_knows_its_line(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [pair("a", "b"), "", pair("c", "d")])
    b = write(tmp_path / "b.jsonl", [{"prompt": "e", "response": "f"}])
    prepared = prepare(Section([a, b]), Words())
    assert [prepared.where(i) for i in range(len(prepared))] == ["a.jsonl:1", "a.jsonl:3", "b.jsonl:1"]
    assert prepared.format == "messages and prompt (detected)"
    assert "blank lines skipped: 1" in prepared.notes


def test_limit_takes_the_first_rows_and_does_not_limit_held_out_rows(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", [pair(f"q{i}", "a") for i in range(9)])
    held_out = write(tmp_path / "v.jsonl", [pair(f"v{i}", "a") for i in range(7)])
    section = Section(train, limit=4)
    assert prepare(section, Words()).rows == 4
    assert prepare(section, Words(), path=held_out).rows == 7
    assert "data.limit is 0" in refusal(Section(train, limit=0))


def test_what_is_read_and_not_used_is_said(tmp_path: Path) -> None:
    row = pair("a", "b") | {"id": 7}
    row["messages"][1]["name"] = "x"
    row["messages"].insert(0, {"role": "system", "content": " "})
    notes = prepare(Section(write(tmp_path / "r.jsonl", [row, row])), Words()).notes
    assert "column 'id' not used, rows: 2" in notes
    assert "message key 'name' not used, messages: 2" in notes
    assert "blank system turns left out: 2" in notes


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    message = refusal(Section([str(tmp_path / "no.jsonl"), str(tmp_path)]))
    assert "no.jsonl: no such file" in message and f"{tmp_path}: a folder" in message
    assert "data.path is an empty list" in refusal(Section([]))


def test_malformed_lines_are_all_named_by_line_in_one_error_that_is_capped(tmp_path: Path) -> None:
    rows = [pair("a", "b"), '{"messages": [', b'{"prompt": "\xff"}', "[1]", {"prompt": "a", "response": "b"}]
    rows += [{"messages": [{"role": "owner", "content": "x"}]}] * 30
    rows += [{"text": "x"}, {"messages": [{"role": "user", "content": {"image": 1}}]}]
    path = write(tmp_path / "bad.jsonl", rows)
    prepared = prepare(Section(path, format="messages"), Words())
    assert len(prepared) == 1 and prepared.rows == 37
    assert dict(prepared.dropped.counts) == {"not_JSON": 2, "not_UTF-8": 1, "wrong_format": 3, "wrong_role": 30}
    assert re.search(r"wrong_role +30 \(bad.jsonl:6, bad.jsonl:7", prepared.report())
    message = refusal(Section(path, format="messages", strict=True))
    assert "36 of 37 rows cannot be used" in message
    assert re.search(r"not JSON \(2\):\n  bad.jsonl:2: column 15", message)
    assert "bad.jsonl:4: it is a JSON list, not an object" in message
    assert re.search(r"not UTF-8 \(1\):\n  bad.jsonl:3: byte 12 of the line is 0xff", message)
    assert "wrong role (30):" in message and "… and 25 more" in message
    assert "bad.jsonl:6: message 0 has role 'owner', not one of system, user, assistant" in message
    assert "bad.jsonl:36: 'messages' is missing" in message
    assert "bad.jsonl:37: the content of message 0 is not text (dict)" in message
    assert len(message.splitlines()) < 25


def test_half_a_surrogate_pair_is_named_as_undecodable(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", ['{"prompt": "\\ud800", "response": "a"}'])
    assert "r.jsonl:1: the content of 'prompt' holds half a surrogate pair" in refusal(Section(path))


@pytest.mark.parametrize(
    "row, rule",
    [
        ({"question": "x"}, "needs messages, conversations, prompt with response or completion"),
        ({"question": "x"}, "Name the columns in data.columns, like {prompt: question, response: answer}"),
        ({"prompt": "x"}, "needs 'prompt' and one of 'response', 'completion'; has prompt"),
        ({"messages": ["x"]}, 'message 0 is not {"role": …, "content": …}'),
        ('[{"prompt": "a"},', "a .jsonl file holds one JSON object a line, an array is a .json file"),
    ],
)
def test_a_row_of_another_shape_is_refused_with_the_shape_needed(tmp_path: Path, row, rule: str) -> None:
    assert rule in refusal(Section(write(tmp_path / "r.jsonl", [row])))


def test_a_row_that_the_chat_template_refuses_is_named(tmp_path: Path) -> None:
    class Strict(Words):
        def training(self, messages, train_on):
            if len(messages) > 2:
                raise UserError("roles must alternate")
            return super().training(messages, train_on)

    three = {"messages": [{"role": "user", "content": "x"}] * 3}
    path = write(tmp_path / "r.jsonl", [pair("a", "b"), three])
    with pytest.raises(UserError, match=r"r.jsonl:2: roles must alternate"):
        prepare(Section(path, strict=True), Strict())
    assert dict(prepare(Section(path), Strict()).dropped.counts) == {"template": 1}


# CodeV-R1

FENCE = "```verilog\nmodule m; endmodule\n```"


@pytest.mark.parametrize(
    "response",
    [
        f"<think>```verilog\nwrong\n``` <answer>no</answer></think>\n<answer>\n{FENCE}\n</answer>",
        f"<think>reasons</think>Here it is:\n{FENCE}\nDone.",
        f"the opening tag went with the prompt</think><answer>{FENCE}</answer>",
        f"<think>x</think>```python\nprint()\n```\ntext\n{FENCE}",
        f"<think>x</think><answer>draft</answer> better: <answer>{FENCE}</answer>",
    ],
)
def test_codev_keeps_the_answer_without_its_reasoning(response: str) -> None:
    assert codev_answer(response) == FENCE


def test_codev_rows_lose_the_system_turn_and_rows_without_answer_are_counted(tmp_path: Path) -> None:
    rows = [
        {"system": "think", "prompt": "make m", "response": f"<think>x</think><answer>{FENCE}</answer>"},
        {"prompt": "make n", "response": "<think>x</think><answer>\n</answer>"},
        {"prompt": "make o", "response": "<think>never ends <answer>no</answer>"},
        {"prompt": "make p", "response": "<think>x</think><answer>```verilog\nmodule cut off"},
    ]
    words = Words()
    prepared = prepare(Section(write(tmp_path / "r.jsonl", rows), transform="codev_r1"), words)
    assert words.seen == [[{"role": "user", "content": "make m"}, {"role": "assistant", "content": FENCE}]]
    assert dict(prepared.dropped.counts) == {"empty": 1, "no_answer": 2}
    assert prepared.dropped.where("no_answer") == "r.jsonl:3, r.jsonl:4"
    assert "system turns left out by data.transform=codev_r1: 1" in prepared.notes


# What is kept


def test_rows_are_counted_by_reason_with_their_first_lines(tmp_path: Path) -> None:
    rows = [pair("a", "b"), pair("a", " "), {"messages": []}]
    rows += [{"messages": [{"role": "user", "content": "x"}]}]
    rows += [pair("long " * 80, "b")] * 7
    prepared = prepare(Section(write(tmp_path / "r.jsonl", rows)), Words())
    summary = prepared.to_dict()
    assert summary["rows"] == 11 and summary["kept"] == 1
    assert summary["dropped"] == {"empty": 2, "no_target": 1, "too_long": 7}
    report = prepared.report()
    assert re.search(r"empty +2 \(r.jsonl:2, r.jsonl:3\)", report)
    assert re.search(r"too_long +7 \(r.jsonl:5, .*r.jsonl:9 and 2 more\)", report)
    assert json.loads(json.dumps(summary)) == summary


def test_the_summary_has_every_figure_of_the_data_command(corpus: Prepared) -> None:
    summary = corpus.to_dict()
    assert summary["tokens"] == corpus.lengths.sum() == len(corpus.ids)
    assert summary["target_tokens"] == corpus.mask.sum()
    assert list(summary["percentiles"]) == ["p50", "p90", "p99", "max"]
    assert summary["percentiles"]["max"] == corpus.lengths.max()
    assert summary["packing_efficiency"] == 1 - summary["padding_waste"]["pack"]
    assert summary["recommended_max_seq_len"] == 128
    lines = corpus.report().splitlines()
    column = lines[0].index("rows.jsonl")
    assert all(line[column - 1] == " " != line[column] for line in lines)


def test_percentiles_measure_the_rows_before_the_long_ones_are_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [pair("a", "b")] * 9 + [pair("a " * 200, "b")])
    prepared = prepare(Section(path), Words())
    assert prepared.percentiles == {"p50": 7, "p90": 206, "p99": 206, "max": 206}
    assert prepared.recommended_max_seq_len == 256


def test_truncation_cuts_counts_and_drops_what_has_no_target_left(tmp_path: Path) -> None:
    rows = [pair("a", "b"), pair("a", "b " * 100), pair("a " * 100, "b")]
    prepared = prepare(Section(write(tmp_path / "r.jsonl", rows), overlong="truncate"), Words())
    assert prepared.lengths.tolist() == [7, 64]
    assert dict(prepared.dropped.counts) == {"no_target_left_after_truncation": 1}
    assert "data.overlong=truncate cut 1 rows to 64 tokens" in prepared.notes


def test_overlong_error_names_the_lines_and_the_longest(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [pair("a", "b"), pair("a", "b " * 100), pair("a", "b " * 70)])
    message = refusal(Section(path, overlong="error"))
    assert "2 of 3 rows are longer than data.max_seq_len (64), the longest has 106 tokens" in message
    assert "r.jsonl:2, r.jsonl:3" in message


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    assert "the dataset is empty" in refusal(Section(write(tmp_path / "r.jsonl", ["", "  "])))


def test_a_dataset_without_an_assistant_turn_is_refused_by_the_rule(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"messages": [{"role": "user", "content": "x"}]}] * 3)
    message = refusal(Section(path))
    assert "none of the 3 rows has an assistant turn" in message
    assert "data.train_on=assistant trains the assistant turns" in message and "train_on: all" in message
    assert prepare(Section(path, train_on="all"), Words()).target_tokens == 3 * 3


def test_masks_that_miss_the_assistant_turns_are_refused_as_a_matter_of_the_template(tmp_path: Path) -> None:
    class Blind(Words):
        def training(self, messages, train_on):
            ids, mask = super().training(messages, train_on)
            return ids, [False] * len(mask)

    path = write(tmp_path / "r.jsonl", [pair("a", "b")] * 3)
    with pytest.raises(UserError, match="masks of all 3 rows are empty, though 3 have an assistant turn"):
        prepare(Section(path), Blind())


def test_a_dataset_whose_rows_are_all_too_long_is_refused_with_their_lengths(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [pair("a", "b " * 70), pair("a", "b " * 100)])
    message = refusal(Section(path))
    assert "all 2 rows are longer than data.max_seq_len (64)" in message
    assert "shortest has 76 tokens, the longest 106" in message


def test_a_dataset_emptied_for_several_reasons_is_refused_with_all_of_them(tmp_path: Path) -> None:
    message = refusal(Section(write(tmp_path / "r.jsonl", [pair("a", ""), pair("a", "b " * 100)])))
    assert "none of the 2 rows is left" in message and "empty (1)" in message and "too long (1)" in message


def test_train_on_last_assistant_targets_only_the_last_turn(tmp_path: Path) -> None:
    turns = pair("a", "b c")["messages"] + pair("d", "e")["messages"]
    path = write(tmp_path / "r.jsonl", [{"messages": turns}])
    assert prepare(Section(path), Words()).target_tokens == 3 + 2
    assert prepare(Section(path, train_on="last_assistant"), Words()).target_tokens == 2


# Batches


@pytest.mark.parametrize("packing", ["off", "bucket", "pack"])
def test_an_epoch_serves_every_row_once_and_weighs_every_target(corpus: Prepared, packing: str) -> None:
    loader = loader_of(corpus, packing=packing, keep_partial=True)
    steps = range(loader.steps_per_epoch)
    assert sorted(row for step in steps for row in loader.rows_of(step)) == list(range(len(corpus)))
    assert sum(loader[step]["weights"].sum() for step in steps) == corpus.target_tokens
    assert sum((loader[step]["segment_ids"] > 0).sum() for step in steps) == corpus.tokens
    filled = sum(loader[step]["segment_ids"].size for step in steps)
    assert loader.padding_share == pytest.approx(1 - corpus.tokens / filled)


def test_leaves_have_accumulation_in_front_and_segments_hold_their_rows(corpus: Prepared) -> None:
    loader = loader_of(corpus)
    batch = loader[1]
    assert {leaf.shape for leaf in batch.values()} == {(2, 2, 64)}
    flat = {name: leaf.reshape(4, 64) for name, leaf in batch.items()}
    found = []
    for b in range(4):
        for segment in range(1, flat["segment_ids"][b].max() + 1):
            at = flat["segment_ids"][b] == segment
            assert (flat["positions"][b][at] == np.arange(at.sum())).all()
            found.append(flat["tokens"][b][at].tolist())
    assert found == [corpus[row][0].tolist() for row in loader.rows_of(1)]


def test_epochs_differ_in_order_and_no_batch_crosses_their_border(corpus: Prepared) -> None:
    loader = loader_of(corpus, packing="off", batch_size=15, accumulation=1)
    assert loader.steps_per_epoch == 4 and loader.total_steps == 12
    epochs = [[row for s in range(4) for row in loader.rows_of(4 * e + s)] for e in range(3)]
    assert all(sorted(rows) == list(range(60)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [loader.epoch_of(s) for s in (0, 3, 4, 11)] == [0, 0, 1, 2]


def test_the_seed_alone_decides_the_order(corpus: Prepared) -> None:
    a, b, other = loader_of(corpus), loader_of(corpus), loader_of(corpus, seed=4)
    assert all(same(a[s], b[s]) for s in range(a.total_steps))
    assert not same(a[0], other[0])


def test_a_leftover_batch_is_dropped_and_said(corpus: Prepared) -> None:
    loader = loader_of(corpus, packing="off", batch_size=16, accumulation=1)
    assert loader.steps_per_epoch == 3
    assert "each epoch leaves out 12 of 60 sheets (20.0%)" in loader.notes[0]
    assert loader_of(corpus, packing="off", batch_size=15, accumulation=1).notes == []


def test_the_only_batch_is_filled_with_padding_and_said(corpus: Prepared) -> None:
    loader = loader_of(corpus, packing="off", batch_size=64)
    assert loader.steps_per_epoch == 1 and len(loader.rows_of(0)) == 60
    assert "the only batch of an epoch holds 60 of 64 sheets" in loader.notes[0]
    batch = loader[0]
    assert (batch["segment_ids"].reshape(64, 64)[60:] == 0).all()
    assert (batch["weights"].reshape(64, 64)[60:] == 0).all()


def test_steps_or_epochs_set_the_length_of_the_run(corpus: Prepared) -> None:
    per_epoch = loader_of(corpus).steps_per_epoch
    assert loader_of(corpus, epochs=None).total_steps == per_epoch
    assert loader_of(corpus, epochs=5).total_steps == 5 * per_epoch
    assert sum(1 for _ in loader_of(corpus, epochs=None, steps=2 * per_epoch + 1)) == 2 * per_epoch + 1
    assert "train.steps (7) sets the run's length" in loader_of(corpus, steps=7).notes[-1]


def test_the_iterator_stops_and_resumes_exactly_at_twenty_random_points(corpus: Prepared) -> None:
    loader = loader_of(corpus)
    whole = list(loader)
    assert len(whole) == loader.total_steps
    for stop in np.random.default_rng(0).integers(0, loader.total_steps + 1, 20).tolist():
        first = iter(loader)
        for step in range(stop):
            assert same(next(first), whole[step])
        state = json.loads(json.dumps(first.get_state()))
        first.close()
        second = iter(loader_of(corpus))
        second.set_state(state)
        assert second.get_state() == state
        rest = list(second)
        assert len(rest) == len(whole) - stop
        assert all(same(a, b) for a, b in zip(rest, whole[stop:], strict=True))


def test_a_state_of_other_data_or_another_plan_is_refused(corpus: Prepared, tmp_path: Path) -> None:
    state = iter(loader_of(corpus)).get_state()
    changed = prepare(Section(write(tmp_path / "other.jsonl", [pair("a", "b")] * 60)), Words())
    others = [loader_of(changed), loader_of(corpus, seed=9), loader_of(corpus, batch_size=2)]
    for other in [*others, loader_of(corpus, accumulation=1), loader_of(corpus, packing="off")]:
        with pytest.raises(UserError, match="the saved position counts batches of 60 rows"):
            iter(other).set_state(state)
    iter(loader_of(corpus, epochs=7)).set_state(state)  # a longer run of the same plan goes on


# Buckets of length


class Rows:
    """Rows with these lengths, half of each a target: what the loader needs of a corpus."""

    pad_id, fingerprint = PAD, 7

    def __init__(self, lengths: list[int]):
        rng = np.random.default_rng(0)
        self.lengths, self.tokens = np.array(lengths), sum(lengths)
        self.rows = [(rng.integers(10, 900, n).astype(np.int32), np.arange(n) >= n // 2) for n in lengths]
        self.target_tokens = sum(int(mask[1:].sum()) for _, mask in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rows[row]

    def pieces(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self.rows[row]]


@pytest.fixture(scope="module")
def lognormal() -> Rows:
    rng = np.random.default_rng(5)
    return Rows(np.clip(rng.lognormal(5.3, 0.7, 400).astype(int), 20, 1000).tolist())


def bucketed(corpus: Rows, **changes) -> Loader:
    return loader_of(corpus, **{"max_seq_len": 1024, "packing": "bucket", "batch_size": 8, **changes})


def test_a_batch_has_one_length_and_holds_its_rows_whole(lognormal: Rows) -> None:
    loader = bucketed(lognormal)
    assert 2 <= len(loader.widths) <= 4 and all(width % 128 == 0 for width in loader.widths)
    seen = set()
    for step in range(loader.total_steps):
        batch, rows = loader[step], loader.rows_of(step)
        width = batch["tokens"].shape[-1]
        assert {leaf.shape for leaf in batch.values()} == {(2, 4, width)} and width == loader.width_of(step)
        flat = batch["segment_ids"].reshape(8, width)
        assert flat.sum(1).tolist() == lognormal.lengths[rows].tolist()
        seen.add(width)
    assert sorted(seen) == loader.widths.tolist() == sorted(loader.first_steps())
    assert f"{', '.join(f'{w:,}' for w in sorted(seen))} tokens a row, each length compiled once" in loader.notes[-1]


def test_buckets_leave_less_padding_than_one_length_and_count_it(lognormal: Rows) -> None:
    loader, plain = bucketed(lognormal), bucketed(lognormal, packing="off")
    assert loader.padding_share < plain.padding_share / 2
    laid_out = sum(loader[step]["tokens"].size for step in range(loader.steps_per_epoch))
    assert laid_out == loader.positions_per_step * loader.steps_per_epoch
    assert loader.padding_share == pytest.approx(1 - lognormal.tokens / laid_out, abs=0.01)


def test_every_row_of_a_bucketed_epoch_comes_once_and_other_rows_are_left_out_each_time() -> None:
    corpus = Rows(np.random.default_rng(1).integers(20, 900, 203).tolist())
    loader = bucketed(corpus)
    per_epoch = loader.steps_per_epoch
    epochs = [[row for s in range(per_epoch) for row in loader.rows_of(e * per_epoch + s)] for e in range(3)]
    assert all(len(set(rows)) == len(rows) == 200 for rows in epochs)
    left_out = [frozenset(range(203)) - set(rows) for rows in epochs]
    assert len(set(left_out)) == 3
    assert [loader.width_of(s) for s in range(per_epoch)] != [loader.width_of(per_epoch + s) for s in range(per_epoch)]


def test_a_length_that_fills_no_batch_is_not_compiled() -> None:
    loader = bucketed(Rows([100] * 40 + [500] * 3 + [1000] * 5), batch_size=8)
    assert loader.widths.tolist() == [128, 1024]
    assert bucketed(Rows([100] * 40 + [1000] * 5), batch_size=8).widths.tolist() == [1024]
    assert bucketed(Rows([100, 900]), batch_size=8).widths.tolist() == [1024]


def test_a_bucketed_run_resumes_exactly_and_compiles_what_is_left(lognormal: Rows) -> None:
    whole = list(bucketed(lognormal))
    for stop in np.random.default_rng(1).integers(0, len(whole), 5).tolist():
        batches = iter(bucketed(lognormal))
        batches.set_state({"next_index": stop, "plan": bucketed(lognormal).plan})
        assert all(same(a, b) for a, b in zip(batches, whole[stop:], strict=True))
    last = bucketed(lognormal).first_steps(len(whole) - 1)
    assert last == {whole[-1]["tokens"].shape[-1]: len(whole) - 1}


# Hosts

HOST = """
import hashlib, json, sys
import numpy as np
sys.path.insert(0, "tests")
from test_data import Rows, loader_of
process, count, start = map(int, sys.argv[1:4])
lengths = np.clip(np.random.default_rng(5).lognormal(5.3, 0.7, 200).astype(int), 20, 1000).tolist()
found = []
for packing in ("pack", "bucket"):
    loader = loader_of(Rows(lengths), packing=packing, batch_size=8, max_seq_len=1024, epochs=2)
    for step in range(start, loader.total_steps):
        for name, leaf in sorted(loader[step].items()):
            mine = np.split(leaf, count, axis=1)[process]  # of every micro-batch, this host's rows
            found.append([hashlib.sha256(row.tobytes()).hexdigest()[:12] for row in mine.reshape(-1, mine.shape[-1])])
print(json.dumps(found))
"""


def test_one_two_and_four_hosts_see_the_same_rows_also_after_their_number_changes() -> None:
    """Real processes; the state that travels between them is the index of the batch alone."""

    def run(count: int, start: int) -> list[list[str]]:
        hosts = [
            subprocess.Popen(
                [sys.executable, "-c", HOST, str(process), str(count), str(start)],
                cwd=Path(__file__).parents[1], env=os.environ | {"PYTHONHASHSEED": str(process)},
                stdout=subprocess.PIPE, text=True,
            )
            for process in range(count)
        ]  # fmt: skip
        seen = [json.loads(host.communicate(timeout=120)[0]) for host in hosts]
        assert all(host.returncode == 0 for host in hosts)
        # Host h holds rows h * n … of each micro-batch: put together, they are the global batch.
        return [sorted(row for part in parts for row in part) for parts in zip(*seen, strict=True)]

    whole = run(1, 0)
    assert len(whole) > 100 and run(2, 0) == whole
    leaves, per_packing = 5, [loader.total_steps for loader in _loaders_of_host()]
    cut = [row for n, steps in enumerate(per_packing) for row in whole[sum(per_packing[:n]) * leaves :][
        3 * leaves : steps * leaves]]  # fmt: skip
    assert run(4, 3) == cut


def _loaders_of_host() -> list[Loader]:
    lengths = np.clip(np.random.default_rng(5).lognormal(5.3, 0.7, 200).astype(int), 20, 1000).tolist()
    return [loader_of(Rows(lengths), packing=packing, batch_size=8, max_seq_len=1024, epochs=2)
            for packing in ("pack", "bucket")]  # fmt: skip


# Ahead of the step


def test_batches_are_placed_ahead_of_the_step_and_the_state_counts_those_taken(corpus: Prepared) -> None:
    placed = []

    def place(batch):
        placed.append(batch)
        return {name: leaf.copy() for name, leaf in batch.items()}

    loader = loader_of(corpus)
    batches = loader.iterate(place)
    assert same(next(batches), loader[0])
    deadline = time.monotonic() + 10
    while len(placed) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(placed) >= 3, "the next batches lie on the devices while the first is trained on"
    assert batches.get_state()["next_index"] == 1
    batches.set_state(batches.get_state() | {"next_index": 5})
    assert same(next(batches), loader[5]) and batches.get_state()["next_index"] == 6
    batches.close()


def test_closing_the_iterator_ends_its_thread(corpus: Prepared) -> None:
    batches = iter(loader_of(corpus))
    next(batches)
    assert any(t.name.startswith("grain-prefetch") for t in threading.enumerate())
    batches.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(timeout=5)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    "changes, rule",
    [
        ({"accumulation": 3}, r"train.accumulation \(3\) must divide train.batch_size \(4\)"),
        ({"packing": "sorted"}, "data.packing is 'sorted': it must be off, bucket or pack"),
        ({"steps": 0}, "train.steps is 0"),
        ({"epochs": 0}, "train.epochs is 0"),
        ({"max_seq_len": 16}, r"the longest row has \d+ tokens and data.max_seq_len is 16"),
    ],
)
def test_impossible_plans_are_refused(corpus: Prepared, changes: dict, rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        loader_of(corpus, **changes)


def test_preparing_data_does_not_import_jax() -> None:
    code = "import sys, gemma_tpu.data.batches; sys.exit(bool({'jax', 'grain'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
