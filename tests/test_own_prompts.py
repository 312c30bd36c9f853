"""Prompts and scorers of the user's own."""

import json

import pytest

from gemma_tpu.errors import UserError
from gemma_tpu.evaluation import own_prompts
from gemma_tpu.evaluation.samples import Sample


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "mine.jsonl"
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path.write_text("\n".join(map(json.dumps, [{"prompt": "2+2?", "want": "4"}, {"id": "b", "messages": said}])))
    return own_prompts.read(path)


def test_rows_have_their_ids_or_their_lines_as_names(rows):
    assert [row.name for row in rows] == ["1", "b"]
    assert rows[0].messages == [{"role": "user", "content": "2+2?"}] and rows[0].record["want"] == "4"
    assert [turn["role"] for turn in rows[1].messages] == ["system", "user"]


def test_faulty_rows_are_named_all_at_once(tmp_path):
    path = tmp_path / "mine.jsonl"
    wrong = [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}, {}, {"prompt": ""}, {"messages": []}]
    path.write_text("\n".join([*map(json.dumps, wrong), "{"]))
    with pytest.raises(UserError) as said:
        own_prompts.read(path)
    for expected in ("line 2: the id 'x' is there twice", "line 3: needs `prompt` or `messages`",
                     "line 4: `prompt` must be text", "line 5: `messages` must be", "line 6: not JSON"):  # fmt: skip
        assert expected in str(said.value)


def test_a_scorer_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_scorers.py").write_text("def exact(row, text):\n    return text == row['want']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    assert own_prompts.scorer("my_own_scorers:exact")({"want": "4"}, "4") is True
    for spec, words in (("exact", "must be module:function"), ("nix_module:f", "cannot be imported"),
                        ("my_own_scorers:nix", "has no function nix")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            own_prompts.scorer(spec)


def test_scores_become_a_mean_with_an_interval_and_passes(rows):
    made = [Sample("1", 0, "4"), Sample("1", 1, "5"), Sample("b", 0, "4"), Sample("b", 1, "4")]
    card = own_prompts.card(rows, made, lambda row, text: 1.0 if text == "4" else 0.25)
    assert card["mean_score"][0] == pytest.approx((0.625 + 1) / 2, abs=1e-4)
    assert (card["passed"], card["total"], card["failures"]) == (3, 4, {"below_1": 1})
    assert card["pass_at_k"]["1"][0] == 0.75 and card["pass_at_k"]["2"][0] == 1.0
    assert "0.812" in own_prompts.table(card) or "0.813" in own_prompts.table(card)


def test_a_scorer_that_fails_or_returns_nonsense_is_said_with_its_prompt(rows):
    with pytest.raises(UserError, match=r"failed on prompt b, sample 0: KeyError: 'want'"):
        own_prompts.card(rows, [Sample("b", 0, "x")], lambda row, text: row["want"] == text)
    for value in (2, -0.5, float("nan"), "yes", None):
        with pytest.raises(UserError, match="it must be a bool or a number from 0 to 1"):
            own_prompts.card(rows, [Sample("1", 0, "x")], lambda row, text, value=value: value)
