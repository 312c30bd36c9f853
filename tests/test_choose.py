"""Which accelerator for a workload: what suits is ranked, what does not says why, a wrong file says what is wrong."""

import json

import pytest

from gemma_tpu.cli import main
from gemma_tpu.costs import choose, demand
from gemma_tpu.errors import UserError
from gemma_tpu.hardware import prices

SERVE = {"kind": "serving", "model": "gemma-4-31B-it", "prompt_tokens": 1024, "output_tokens": 512, "requests_per_s": 2}
TRAIN = {"kind": "training", "model": "gemma-4-31B-it", "tokens": 9.2e6, "row_tokens": 922}


def serve(**more) -> list[choose.Choice]:
    return choose.choose(demand.of(SERVE | more), prices.load())


def why(found: list[choose.Choice], name: str) -> str:
    return next("; ".join(one.refused) for one in found if one.place.name == name)


def suiting(found: list[choose.Choice]) -> dict[str, choose.Choice]:
    return {one.place.name: one for one in found if not one.refused}


def test_what_suits_is_ranked_by_cost_and_carries_the_load():
    found = serve(most_chips=32, tpot_ms=60)
    suits = list(suiting(found).values())
    assert suits and [one.usd for one in suits] == sorted(one.usd for one in suits)
    for one in suits:
        assert one.slices * one.tokens_per_s * choose.BUSY >= 2 * 512 and one.chips <= 32 and one.latency_ms[1] <= 60
        assert one.usd_per_million == pytest.approx(one.usd / (2 * 512 * 3600 * 730) * 1e6)
    assert "weights take 57.2 GiB" in why(found, "v6e-1")


@pytest.mark.parametrize(("given", "name", "words"), [
    ({"where": "on-premises", "pay": "own"}, "v6e-8", "TPUs run in Google Cloud alone"),
    ({"where": "google-cloud"}, "h200x2", "its price is not of Google Cloud"),
    ({"custom_ops": "cuda"}, "v6e-8", "CUDA kernels do not run on a TPU"),
    ({"custom_ops": "pallas"}, "h100x2", "Pallas kernels for TPUs do not run on a GPU"),
    ({"most_chips": 4}, "v6e-8", "8 chips, and most_chips is 4"),
    ({"most_chips": 4, "requests_per_s": 30}, "h100x2", "would be needed"),
    ({"ttft_ms": 20}, "h100x1", "a lone prompt takes"), ({"tpot_ms": 10}, "v5p-8", "ms between tokens"),
    ({}, "tpu7x-8", "no on-demand price is known"), ({"pay": "spot"}, "h100x2", "no spot price is known"),
])  # fmt: skip
def test_what_cannot_be_met_is_said(given, name, words):
    assert words in why(serve(**given), name)


def test_shapes_that_nobody_knows_cost_tpus_and_not_gpus():
    free, fixed = suiting(serve(shapes="variable")), suiting(serve(shapes="fixed"))
    assert free["v6e-8"].tokens_per_s < fixed["v6e-8"].tokens_per_s
    assert free["h100x2"].tokens_per_s == fixed["h100x2"].tokens_per_s


def test_a_graph_that_changes_often_compiles_again_on_tpus_alone(monkeypatch):
    monkeypatch.setattr(choose, "SLICES", ("v6e-8",))
    monkeypatch.setattr(choose, "MORE", ("h200x1",))
    often, rarely = (suiting(choose.choose(demand.of(TRAIN | {"changes": changes}), prices.load()))
                     for changes in ("often", "rarely"))  # fmt: skip
    assert often["v6e-8"].hours - rarely["v6e-8"].hours == pytest.approx(5.5 / 60)
    assert often["h200x1"].usd == rarely["h200x1"].usd


def test_where_a_latency_is_asked_for_the_split_meets_it():
    """Two copies of the model make more tokens than one on twice the chips, and begin later."""
    free, quick = suiting(serve())["b200x2"], suiting(serve(ttft_ms=30))["b200x2"]
    assert quick.latency_ms[0] <= 30 < suiting(serve())["b200x1"].latency_ms[0]
    assert free.tokens_per_s >= quick.tokens_per_s


def test_porting_is_paid_where_code_for_gpus_is_to_run_on_a_tpu():
    own, ours = suiting(serve(code="pytorch")), suiting(serve())
    assert own["v6e-8"].usd - ours["v6e-8"].usd == pytest.approx(4000)  # 40 h at $100
    assert own["h100x2"].usd == ours["h100x2"].usd


def test_rows_that_cannot_be_packed_cost_tpus_their_padding():
    packed, padded = (demand.of(TRAIN | {"packing": packing}) for packing in (True, False))
    tpu, gpu = (choose.chips.find(name) for name in ("v6e-8", "h100x2"))
    assert choose.laid_out(packed, tpu) == choose.laid_out(packed, gpu) == pytest.approx(1 / 0.98)
    assert choose.laid_out(padded, tpu) == pytest.approx(4096 / 922) and choose.laid_out(padded, gpu) == 1.0


def test_training_is_planned_for_every_slice(monkeypatch):
    monkeypatch.setattr(choose, "SLICES", ("v5p-8", "v6e-1", "v6e-8"))
    monkeypatch.setattr(choose, "MORE", ())
    found = choose.choose(demand.of(TRAIN | {"runs": 10, "deadline_hours": 0.2}), prices.load())
    suits = suiting(found)
    assert set(suits) == {"v6e-8"} and suits["v6e-8"].usd == pytest.approx(10 * suits["v6e-8"].hours * 21.6)
    assert "the deadline is 0.2" in why(found, "v5p-8") and "do not fit" in why(found, "v6e-1")


@pytest.mark.parametrize("path", demand.paths(), ids=lambda path: path.stem)
def test_shipped_workloads_load(path):
    assert demand.load(str(path)).model == "gemma-4-31B-it"


def test_all_that_is_wrong_with_a_file_is_said_at_once(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("kind: serving\nmodel: gemma-4-31B-it\nprompt_token: 5\nshapes: varible\nrequests_per_s: -1\n"
                    "tokens: 5\nwhere: on-premises\npay: spot\nmost_chips: 2.5\nttft_ms: null\n")  # fmt: skip
    with pytest.raises(UserError) as error:
        demand.load(str(file))
    for words in ("did you mean prompt_tokens?", "did you mean variable?", "requests_per_s = -1: must be a number",
                  "tokens: is of training, and this workload is serving", "paid as `own`", "output_tokens: a serving",
                  "most_chips = 2.5: must be a whole number"):  # fmt: skip
        assert words in str(error.value)
    assert "ttft_ms" not in str(error.value)


def test_the_command_answers_the_questions_in_words_and_as_data(capsys, tmp_path):
    file = "configs/workloads/serve_31b_chat.yaml"
    assert main(["choose", file]) == 0
    said = capsys.readouterr().out
    assert "what suits, the cheapest first" in said and "what does not, and why" in said
    assert main(["choose", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"] == found["ranked"][0]["slice"] and len(found["questions"]) == 6
    assert main(["choose", "configs/workloads/serve_31b_chatt.yaml"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_nothing_suits_is_said(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(f"{key}: {value}" for key, value in (SERVE | {"tpot_ms": 0.1}).items()))
    assert main(["choose", str(file)]) == 0
    assert "nothing suits: every slice misses something" in capsys.readouterr().out
