"""Transforms: shipped by name, the user's own by its place, and what they do is counted or named."""

import time
from collections import Counter
from pathlib import Path

import pytest

from gemma_tpu.data import transforms
from gemma_tpu.data.formats import RowDropped
from gemma_tpu.data.rows import Account, Chunk, Converter, Place
from gemma_tpu.errors import UserError

MINE = """\
from gemma_tpu.data.transforms import Drop

def shorten(messages):
    if len(messages) > 2:
        return None
    if messages[0]["content"] == "no":
        raise Drop("unwanted", "it says no")
    return [m | {"content": m["content"][:3]} for m in messages]

def broken(messages):
    return messages[0]["nothing"]

def wrong(messages):
    return [m["content"] for m in messages]
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_transforms.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "my_transforms.py")


def converted(record: dict, *names: str) -> tuple[list, Account]:
    account = Account()
    rows = Converter({}, names).rows(Chunk("prompt", [(Place(0, 7, "r.jsonl:7"), record)]), account)
    return [row.messages for row in rows], account


def test_a_function_is_found_by_module_and_by_file(mine: str) -> None:
    for name in ("my_transforms:shorten", f"{mine}:shorten", "my_transforms.py:shorten"):
        (found,), _ = converted({"prompt": "question", "response": "answer"}, name)
        assert [m["content"] for m in found] == ["que", "ans"]


def test_several_are_applied_in_order(mine: str) -> None:
    record = {"system": "s", "prompt": "q", "response": "<think>x</think><answer>abcdef</answer>"}
    (found,), account = converted(record, "codev_r1", f"{mine}:shorten")
    assert [m["content"] for m in found] == ["q", "abc"]
    assert account.said == {"system turns left out by data.transform=codev_r1": 1}


def test_what_a_transform_leaves_out_is_counted_and_not_called_a_fault(mine: str) -> None:
    none, account = converted({"system": "s", "prompt": "q", "response": "a"}, f"{mine}:shorten")
    assert none == [] and account.dropped.counts == Counter({f"dropped_by_{mine}:shorten": 1})
    none, account = converted({"prompt": "no", "response": "a"}, f"{mine}:shorten")
    assert none == [] and account.dropped.places == {"unwanted": [("r.jsonl:7", "it says no")]}
    assert not account.refused.counts


@pytest.mark.parametrize(
    "function, words",
    [("broken", r"broken failed on r.jsonl:7: KeyError: 'nothing'"), ("wrong", "must give a list of messages"),
     ("absent", "has no function absent")],
)  # fmt: skip
def test_a_transform_that_fails_is_named_with_its_row(mine: str, function: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        converted({"prompt": "q", "response": "a"}, f"{mine}:{function}")


@pytest.mark.parametrize(
    "name, words",
    [("codev", "must be one of codev_r1, or a function"), ("no_such_module:f", "ModuleNotFoundError"),
     ("no_such.py:f", "there is no file"), ("sys:no_such", "sys has no function no_such")],
)  # fmt: skip
def test_a_transform_that_is_not_there_is_refused(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        transforms.load(name)


def test_the_identity_follows_the_source(mine: str) -> None:
    before = transforms.identity(f"{mine}:shorten")
    assert before == transforms.identity(f"{mine}:shorten") != transforms.identity("codev_r1")
    Path(mine).write_text(MINE + "\nOTHER = 1\n")
    assert transforms.identity(f"{mine}:shorten") != before


def test_what_is_made_of_a_function_has_the_identity_of_the_file_that_names_it(mine: str) -> None:
    Path(mine).write_text(MINE + "\nimport functools\nshortest = functools.partial(shorten)\n")
    before = transforms.identity(f"{mine}:shortest")
    Path(mine).write_text(Path(mine).read_text() + "\nOTHER = 1\n")
    assert transforms.identity(f"{mine}:shortest") != before
    assert transforms.identity("sys:intern") == "sys:intern"  # built into Python: no file to follow


def test_a_row_that_a_rule_leaves_out_is_no_fault() -> None:
    with pytest.raises(RowDropped):
        transforms.codev_answer("<think>only thoughts</think>")


def test_a_text_that_repeats_an_opening_tag_takes_no_longer_than_it_is_long():
    text = "<answer>good</answer>" + "<answer>" * 60_000
    start = time.process_time()
    assert transforms.codev_answer(text) == "good"
    assert time.process_time() - start < 1.0  # each tag followed to the end: 10 s and more
