"""`eval` and `compare` on the command line: what they refuse, what they print, and the pages they write."""

import json
import re

import pytest
from verilog_helper import GATES, answer, needs_simulator, write_clone

from gemma_tpu import cli
from gemma_tpu.evaluation import sandbox


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return write_clone(tmp_path_factory.mktemp("clone") / "verilog-eval")


@pytest.fixture
def run(capsys):
    def call(*argv: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(word) for word in argv])
        except SystemExit as stop:  # argparse
            code = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


def write_samples(path, passing: list[str], n: int = 2):
    rows = [{"problem": name, "sample": number, "completion": answer(name, name in passing)}
            for name in GATES for number in range(n)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@needs_simulator
def test_self_check_names_what_cannot_pass(run, clone):
    code, out, err = run("eval", "verilog", "--problems", clone, "--self-check", "--json")
    found = json.loads(out)
    assert code == 0 and (found["passed"], found["total"], found["unscorable"]) == (3, 3, {})
    assert found["iverilog"].startswith("Icarus Verilog version") and "3 of 3 references pass; Icarus" in err


@needs_simulator
def test_stored_samples_are_scored_compared_and_shown(run, clone, tmp_path):
    places = []
    for name, passing in (("a", ["Prob001_and"]), ("b", list(GATES))):
        file = write_samples(tmp_path / f"{name}.jsonl", passing)
        code, out, _ = run("eval", "verilog", "--problems", clone, "--samples", file, "--out", tmp_path / name,
                           "--html", tmp_path / f"{name}.html", "--k", "1,2", "--json")  # fmt: skip
        found = json.loads(out)
        assert code == 0 and found["passed"] == 2 * len(passing) and found["total"] == 6
        assert found["pass_at_k"].keys() == {"1", "2"} and "completions" not in found["per_problem"]["Prob001_and"]
        places.append(tmp_path / name)
    page = (tmp_path / "a.html").read_text()
    assert page.count("assign z = 1;") == 4 and page.count("assign z = x &amp; y;") == 2, "every sample"
    assert page.count("comparisons differ") >= 4 and "model: 2 of 2" in page and "Prob003_xor: 0 of 2" in page
    assert not re.search(r"(?:src|href)=", page), "nothing is fetched"

    code, out, err = run("compare", *places, "--html", tmp_path / "both.html")
    assert code == 0 and "Prob002_or: 0.00 -> 1.00" in out and "losses of" in out
    assert out.endswith("the difference is not significant (p = 0.5000, exact paired permutation test).\n")
    assert "Prob003_xor" in (tmp_path / "both.html").read_text()
    code, out, _ = run("compare", *places, "--json")
    found = json.loads(out)
    assert found["wins"].keys() == {"Prob002_or", "Prob003_xor"} and found["significant"] is False
    code, _, err = run("compare", places[0], tmp_path / "a.jsonl")
    assert code == 2 and "is no results file of `gemma-tpu eval`" in err


@needs_simulator
def test_without_a_sandbox_nothing_is_run_but_on_the_users_word(run, clone, tmp_path, monkeypatch):
    file = write_samples(tmp_path / "s.jsonl", ["Prob001_and"], n=1)
    monkeypatch.setattr(sandbox, "available", lambda: None)
    for argv in (["--samples", file], ["--self-check"]):
        code, _, err = run("eval", "verilog", "--problems", clone, *argv)
        assert code == 2 and "generated code is not run without one" in err and "--unsafe-no-sandbox" in err
    code, out, _ = run("eval", "verilog", "--problems", clone, "--samples", file, "--unsafe-no-sandbox", "--json")
    assert code == 0 and json.loads(out)["passed"] == 1


@needs_simulator
def test_samples_of_some_problems_are_not_taken_for_all(run, clone, tmp_path):
    file = tmp_path / "few.jsonl"
    file.write_text(json.dumps({"problem": "Prob002_or", "sample": 0, "completion": answer("Prob002_or")}) + "\n")
    code, out, err = run("eval", "verilog", "--problems", clone, "--samples", file, "--json")
    found = json.loads(out)
    assert code == 0 and (found["passed"], found["problems"]) == (1, 1)
    assert found["without_samples"] == ["Prob001_and", "Prob003_xor"]
    assert "2 problems have no sample and are not in these numbers" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "scores a TARGET, --samples FILE or --self-check, one of the three"),
        (["--self-check", "--samples", "x.jsonl"], "given: --samples, --self-check"),
        (["--self-check", "--n", "5", "--style", "paper"], "--n, --style: nothing is sampled with --self-check"),
        (["--self-check", "--concurrency", "2"], "--concurrency: nothing is sampled with --self-check"),
        (["--samples", "nix.jsonl", "--no-base"], "--no-base: nothing is sampled with --samples"),
        (["--samples", "nix.jsonl"], "nix.jsonl: cannot be read"),
        (["nix"], "nix: no such folder"),
        (["--self-check", "--task", "other"], "invalid choice: 'other'"),
        (["--self-check", "--only", "Prob9"], "no problem begins with Prob9"),
    ],
)
def test_what_eval_verilog_refuses(run, clone, argv, words):
    code, _, err = run("eval", "verilog", "--problems", clone, *argv)
    assert code == 2 and words in err


def test_a_clone_that_is_none_is_said_with_the_command_that_fetches_it(run, tmp_path):
    code, _, err = run("eval", "verilog", "--problems", tmp_path, "--self-check")
    assert code == 2 and "git clone https://github.com/NVlabs/verilog-eval" in err
    code, _, err = run("eval", "verilog", "--self-check")
    assert code == 2 and "--problems" in err


def test_there_is_no_mode_that_draws_failures_anew(run):
    code, out, _ = run("eval", "verilog", "--help")
    assert code == 0 and not re.search(r"--(?:re|only-)?(?:run|sample|draw)?-?failed|--rerun|--resample", out)


def test_results_of_other_problems_or_other_evals_are_not_compared(run, tmp_path):
    for name, kind, problems in (("a", "verilog", "xy"), ("b", "verilog", "xz"), ("c", "tiny", "xy")):
        rows = {one: {"passed": 1, "samples": 1} for one in problems}
        (tmp_path / f"{name}.json").write_text(json.dumps({"eval": kind, "pass_at_k": {}, "per_problem": rows}))
    code, _, err = run("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 2 and "not of the same problems: 2 are in one alone, e.g. y, z" in err
    code, _, err = run("compare", tmp_path / "a.json", tmp_path / "c.json")
    assert code == 2 and "is of eval verilog" in err
    code, _, err = run("compare", tmp_path, tmp_path / "a.json")
    assert code == 2 and "holds 0 results of evaluations" in err
