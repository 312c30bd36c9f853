"""The evaluations of a model, and that each is measured beside its base."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from runs_helper import first_rows, write_base
from verilog_helper import GATES, answer, needs_simulator, write_clone

import gemma_tpu
from gemma_tpu.data.corpus import prepare
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import UserError
from gemma_tpu.evaluation import answering, evaluate, samples, scorecard, verilog
from gemma_tpu.evaluation.answering import Draw, Model, Question
from gemma_tpu.evaluation.samples import Sample
from gemma_tpu.run import runs
from gemma_tpu.sampling import sampler

# --- pass@1 -------------------------------------------------------------------------------------------------

FEW = Draw(max_new_tokens=8)


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Three of the held-out problems in place of all."""
    file = first_rows(evaluate.PROBLEMS, 3, tmp_path / "problems.jsonl")
    monkeypatch.setattr(evaluate, "PROBLEMS", str(file))
    return verilog.load_problems(file)


def answers(monkeypatch, base, texts: list[str]):
    """A model that says these texts, one for each prompt; returns the prompts that it got."""
    tokenizer, asked = Tokenizer(base), []

    def run(self, prompts, stop_ids, settings, on_done, **more):
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        assert tuple(stop_ids) == tokenizer.stop_ids
        made = [sampler.Completion(ids, "stop", [0.0] * len(ids)) for ids in map(tokenizer.encode, texts)]
        for place, one in enumerate(made):
            on_done(place, one)
        return made

    monkeypatch.setattr(sampler.Sampler, "run", run)
    return asked


@needs_simulator
def test_an_untrained_model_passes_nothing_and_the_json_has_the_contracts_keys(base32, three):
    found = evaluate.tiny(base32, draw=FEW)
    assert found.keys() >= {"passed", "total", "pass_at_k", "per_problem", "failures", "iverilog"}
    assert (found["passed"], found["total"]) == (0, 3)
    assert found["pass_at_k"] == {"1": [0.0, 0.0, pytest.approx(0.7076, abs=1e-4)]}
    assert found["failures"] == {"no_code": 3} and found["cut"] == 3
    assert found["per_problem"].keys() == {problem.id for problem in three}
    assert found["iverilog"].startswith("Icarus Verilog version") and "base" not in found
    assert json.dumps(found)


@needs_simulator
def test_a_model_that_gives_the_references_passes_all(base32, three, monkeypatch, capsys):
    asked = answers(monkeypatch, base32, [f"```verilog\n{problem.reference}```" for problem in three])
    found = evaluate.tiny(base32)
    assert (found["passed"], found["total"], found["failures"]) == (3, 3, {})
    assert found["pass_at_k"]["1"][0] == 1.0
    assert all(entry["verdicts"] == ["passed"] for entry in found["per_problem"].values())
    assert all(problem.prompt in text for problem, text in zip(three, asked, strict=True))
    assert all("<|turn>model" in text for text in asked), "asked by the chat template"
    assert "1.000" in capsys.readouterr().err


@needs_simulator
def test_right_wrong_and_broken_answers_are_told_apart(base32, three, monkeypatch, capsys):
    broken = three[2].reference.replace("endmodule", "")
    answers(monkeypatch, base32, [three[0].reference, three[0].reference, broken])
    found = evaluate.tiny(base32)
    assert found["passed"] == 1 and found["pass_at_k"]["1"][0] == pytest.approx(1 / 3, abs=1e-4)
    low, high = found["pass_at_k"]["1"][1:]
    assert low == 0.0 and high == 1.0, "three problems say next to nothing"
    assert sum(found["failures"].values()) == 2 and found["failures"]["no_code"] == 1
    assert [entry["passed"] for entry in found["per_problem"].values()] == [1, 0, 0]
    assert found["examples"]["no_code"][0]["problem"] == three[2].id
    assert f"no_code: {three[2].id} (0): the completion holds no module" in capsys.readouterr().err


@needs_simulator
def test_several_samples_of_a_problem_give_pass_at_k(base32, three, monkeypatch):
    good, bad = [problem.reference for problem in three], "nothing"
    answers(monkeypatch, base32, [good[0], bad, bad, bad, good[2], good[2]])
    found = evaluate.tiny(base32, draw=Draw(n=2, temperature=0.7))
    assert found["total"] == 6 and found["passed"] == 3 and found["problems"] == 3
    assert found["pass_at_k"]["1"][0] == pytest.approx(0.5)
    assert found["pass_at_k"]["2"][0] == pytest.approx(2 / 3, abs=1e-4)


@needs_simulator
def test_a_run_is_scored_beside_its_base_and_keeps_the_verdicts(whole_run, base32, three, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    found = evaluate.tiny(tmp_path / "run", draw=FEW)
    assert found["base"]["target"] == str(base32) and found["base"]["total"] == 3
    stored = json.loads((tmp_path / "run" / "eval_tiny.json").read_text())
    assert stored == json.loads(json.dumps(found))
    tuned, base = ([entry["completions"] for entry in part["per_problem"].values()]
                   for part in (found, found["base"]))  # fmt: skip
    assert tuned != base, "two models"
    said = capsys.readouterr().err
    assert [line.split()[0] for line in said.splitlines() if "no_code 3" in line] == ["base", "tuned"]
    assert "tuned and base score the same on every one of the problems." in said
    assert "contamination: " in said and found["contamination"]["n"] == 13
    assert "base" not in evaluate.tiny(tmp_path / "run", draw=FEW, base=False)


def test_without_iverilog_it_says_how_to_install_it(base32, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="iverilog is not installed.*apt-get install iverilog"):
        evaluate.tiny(base32)


# --- the seam, and resuming ---

QUESTIONS = [Question(f"q{number}", [{"role": "user", "content": f"count to {number}"}]) for number in range(4)]
WARM = Draw(n=2, temperature=1.0, max_new_tokens=4, seed=3)
WANTED = {(question.problem, number) for question in QUESTIONS for number in range(2)}


def collected(model, draw, wanted):
    found = []
    answering.answer(model, QUESTIONS, draw, wanted, found.append)
    return {one.key: one for one in found}


@pytest.mark.slow
def test_an_interrupted_evaluation_gives_what_an_uninterrupted_one_gives(base32, monkeypatch):
    monkeypatch.setattr(answering, "ROWS", 3)  # and slots are given to others as samples end
    model = Model(base32)
    whole = collected(model, WARM, WANTED)
    assert whole.keys() == WANTED and len({one.completion for one in whole.values()}) > 4
    left = {("q1", 1), ("q3", 0)}
    rest = collected(model, WARM, left)
    assert rest == {key: whole[key] for key in left}
    assert collected(model, dataclasses.replace(WARM, seed=4), WANTED) != whole


def test_greedy_samples_would_all_be_the_same():
    with pytest.raises(UserError, match="2 samples at temperature 0 would all be the same"):
        Draw(n=2)


@pytest.fixture
def oracle(monkeypatch):
    """Models that answer at once: the base is right on one problem, the tuned model on two; it counts what it draws."""
    drawn = []

    def answered(model, questions, draw, wanted, each):
        right = list(GATES)[: 1 if model.base else 2]
        for question in questions:
            for number in range(draw.n):
                if (question.problem, number) in wanted:
                    drawn.append((model.base, question.problem, number))
                    text = answer(question.problem, question.problem in right)
                    each(Sample(question.problem, number, text, "stop", 9))

    monkeypatch.setattr(answering, "answer", answered)
    return drawn


@pytest.mark.slow
@needs_simulator
def test_verilog_eval_of_a_run_has_both_models_both_verdicts_and_goes_on_where_it_stopped(
    whole_run, tmp_path, oracle, monkeypatch, capsys
):
    clone, run = write_clone(tmp_path / "clone"), tmp_path / "run"
    shutil.copytree(whole_run, run)
    draw = Draw(n=2, temperature=0.8, top_p=0.95)
    found = evaluate.verilog_bench(run, clone, draw=draw)
    assert found["passed"] == 4 and found["base"]["passed"] == 2
    assert found["pass_at_k"]["2"][0] == pytest.approx(2 / 3, abs=1e-4)
    assert found["paired"]["wins"] == {"Prob002_or": [0.0, 1.0]} and found["paired"]["losses"] == {}
    assert found["official"]["passed"] == 4 and found["official"]["differ"] == []
    assert "the difference is not significant" in capsys.readouterr().err
    [folder] = (run / "evals").iterdir()
    assert folder.name == "verilog_spec-to-rtl_official0_n2_t0.8_p0.95_s0_step8"
    assert len(oracle) == 12 and len(samples.read(folder / "tuned.jsonl")) == 6

    kept = (folder / "tuned.jsonl").read_text().splitlines(keepends=True)
    (folder / "tuned.jsonl").write_text("".join(kept[:4]) + kept[4][:20])  # as if it had been killed
    oracle.clear()
    again = evaluate.verilog_bench(run, clone, draw=draw)
    assert oracle == [(False, "Prob003_xor", number) for number in range(2)], "stored failures are not drawn anew"
    assert scorecard.brief(again) == scorecard.brief(found)
    said = capsys.readouterr().err
    assert "4 are there, 2 to draw" in said and "one half-written line was cut off" in said

    prompt = clone / "dataset_spec-to-rtl" / "Prob001_and_prompt.txt"
    prompt.write_text("Another problem.")
    with pytest.raises(UserError, match=r"holds samples of another evaluation:\n  prompts: "):
        evaluate.verilog_bench(run, clone, draw=draw)
    with pytest.raises(UserError, match="has no checkpoint of step 5; it has"):
        evaluate.verilog_bench(run, clone, draw=draw, step=5)
    assert evaluate.verilog_bench(run, clone, draw=draw, step=3, base=False)["total"] == 6
    assert len(list((run / "evals").glob("*_step3"))) == 1, "another checkpoint, another folder"


@needs_simulator
def test_a_server_in_the_place_of_a_model(tmp_path, monkeypatch):
    class Server:
        def __init__(self, url, model, concurrency):
            assert (url, model, concurrency) == ("http://localhost:8000/v1", "mine", 3)

        def write(self, asked, settings, on_done):
            for place, one in enumerate(asked):
                gate = next(name for name, gate in GATES.items() if f"give z as {gate}." in one.prompt[1]["content"])
                made = {"text": answer(gate), "tokens": None, "finish_reason": "stop", "logprobs": None}
                on_done(place, made)

    monkeypatch.setattr("gemma_tpu.sampling.endpoint.Endpoint", Server)
    monkeypatch.chdir(tmp_path)
    clone = write_clone(tmp_path / "clone")
    found = evaluate.verilog_bench("http://localhost:8000/v1", clone, draw=Draw(), served="mine", concurrency=3)
    assert (found["passed"], found["target"]) == (3, "http://localhost:8000/v1") and "base" not in found
    [kept] = (tmp_path / "evals" / "localhost_8000_v1").iterdir()
    assert json.loads((kept / "tuned.settings.json").read_text())["url"] == "http://localhost:8000/v1"
    with pytest.raises(UserError, match="--model mine, --concurrency 3: nothing that a folder has"):
        evaluate._models(tmp_path, None, True, "mine", 3)


def test_steps_belong_to_runs(base32):
    with pytest.raises(UserError, match="--step 3: .* is no run folder, and only a run folder has steps"):
        evaluate._models(base32, 3, True, None, None)


def test_prompts_of_ones_own_are_scored_for_base_and_tuned(whole_run, tmp_path, oracle, monkeypatch, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"id": name, "prompt": name}) + "\n" for name in GATES))
    (tmp_path / "judges_of_gates.py").write_text("def right(row, text):\n    return 'z = 1' not in text\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = evaluate.prompts(tmp_path / "run", tmp_path / "mine.jsonl", "judges_of_gates:right", draw=Draw())
    assert found["mean_score"][0] == pytest.approx(2 / 3, abs=1e-4) and found["base"]["passed"] == 1
    assert found["paired"]["wins"] == {"Prob002_or": [0.0, 1.0]}
    assert "tuned is better than base by 33.3 points" in capsys.readouterr().err
    [folder] = (tmp_path / "run" / "evals").iterdir()
    assert json.loads((folder / "results.json").read_text())["scorer"] == "judges_of_gates:right"


# --- held-out loss ------------------------------------------------------------------------------------------


def by_hand(model, config, tokenizer) -> float:
    """Mean of -log p over the assistants' tokens, row by row, unpacked, in float64."""
    rows = prepare(config.data, tokenizer, config.data.validation)
    assert len(rows) == 24
    tokens, segments = np.zeros((2, 24, 256), np.int32)
    for number in range(24):
        ids, _ = rows[number]
        tokens[number, : len(ids)], segments[number, : len(ids)] = ids, 1
    logits = np.asarray(model(tokens, segments), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    total = count = 0
    for number in range(24):
        ids, mask = rows[number]
        for place in range(1, len(ids)):
            if mask[place]:
                total += log_z[number, place - 1] - logits[number, place - 1, ids[place]]
                count += 1
    return total / count


@pytest.fixture(scope="module")
def held_out(held_out_run):
    return evaluate.loss(held_out_run)


def test_the_held_out_loss_is_the_one_worked_out_by_hand(held_out, held_out_run, base32):
    config, tokenizer = runs.read_config(held_out_run), Tokenizer(base32)
    base, tuned = gemma_tpu.load(base32), gemma_tpu.load(base32, adapter=held_out_run)
    assert held_out["base_loss"] == pytest.approx(by_hand(base, config, tokenizer), abs=1e-4)
    assert held_out["tuned_loss"] == pytest.approx(by_hand(tuned, config, tokenizer), abs=1e-4)


def test_the_held_out_loss_is_the_one_that_training_measured(held_out, held_out_run):
    measured = json.loads((held_out_run / "summary.json").read_text())["held_out_loss"]
    assert held_out["base_loss"] == pytest.approx(measured["0"], abs=1e-4)
    assert held_out["tuned_loss"] == pytest.approx(measured["8"], abs=1e-4)
    assert held_out["tuned_loss"] < held_out["base_loss"] - 0.5
    assert held_out["tuned_perplexity"] == pytest.approx(np.exp(held_out["tuned_loss"]), rel=1e-3)
    assert held_out["step"] == 8 and held_out["rows"] == 24 and held_out["target_tokens"] > 1000


def test_a_model_folder_names_no_held_out_rows(base32):
    with pytest.raises(UserError, match="eval loss needs a run folder"):
        evaluate.loss(base32)


def test_a_run_without_held_out_rows_is_told_what_to_name(whole_run):
    with pytest.raises(UserError, match="has no data.validation; name a file of held-out rows"):
        evaluate.loss(whole_run)


def test_a_run_that_has_not_saved_yet_is_refused(held_out_run, tmp_path):
    shutil.copytree(held_out_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="no checkpoints/ here"):
        evaluate.loss(tmp_path / "run")


def test_another_base_in_its_place_is_refused(held_out_run, tmp_path, monkeypatch):
    from gemma_tpu.adapter import adapters

    other = write_base(tmp_path / "other", seed=5)
    read = adapters.read

    def moved(run, step=None):
        trained = read(run, step)
        record = trained.record | {"base": trained.record["base"] | {"folder": str(other)}}
        return dataclasses.replace(trained, record=record)

    monkeypatch.setattr(adapters, "read", moved)
    with pytest.raises(UserError, match="is not the base that .* was trained on"):
        evaluate.loss(held_out_run)
