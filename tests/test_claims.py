"""What is claimed is measured: the claims file is sound, its commands parse, README has its figures, and `make bench`
fails loudly where a claim is broken, or where its figure is missing."""

import argparse
import copy
import dataclasses
import json
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from gemma_tpu import cli

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
OURS = ("claims", "growth", "packing", "peers", "pictures", "run")


@pytest.fixture(scope="module")
def bench():
    """The modules of benchmarks/, as its scripts see them."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import claims
        import growth
        import pictures
        import run

        yield argparse.Namespace(claims=claims, growth=growth, pictures=pictures, run=run)
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def found(bench):
    return bench.claims.load()


def tree() -> dict:
    return yaml.safe_load((BENCHMARKS / "claims.yaml").read_text())


# --- the file ---


@pytest.mark.parametrize("change, message", [
    (lambda t: t["claims"][0].pop("at_most"), "base-pass: has no bound"),
    (lambda t: t["claims"][0].update(at_most="1e-4"), "at_most = '1e-4' is no number"),
    (lambda t: t["claims"][0].update(at_mots=1), "unknown: ['at_mots']"),
    (lambda t: t["claims"][0].update(run="demos"), "its run demos is not among runs"),
    (lambda t: t["claims"][1].update(id="base-pass"), "base-pass: stands twice"),
    (lambda t: t["claims"][0]["measured"].update(figure=0.9), "0.9, is outside its own bound"),
    (lambda t: t["claims"][0]["measured"].update(machine="three"), "measured on three"),
    (lambda t: t["claims"][0].update(measured=None), "base-pass: README names it, and it was never measured"),
    (lambda t: t["runs"]["demo"].update(command="make demo"), "must begin with benchmarks/….py or gemma-tpu"),
    (lambda t: t["runs"]["demo"].update(needs=["trl"]), "needs trl; known are module:…"),
    (lambda t: t["runs"].update(more=t["runs"]["demo"]), "runs.more: no claim is measured by it"),
    (lambda t: t["readme"][0]["rows"].append(["x", "{base-pas}"]), "{base-pas} is no claim"),
])  # fmt: skip
def test_a_claims_file_with_a_fault_is_refused_by_name(bench, tmp_path, change, message):
    broken = copy.deepcopy(tree())
    change(broken)
    file = tmp_path / "claims.yaml"
    file.write_text(yaml.safe_dump(broken))
    with pytest.raises(bench.claims.Wrong, match=re.escape(message)):
        bench.claims.load(file)


def test_a_claims_file_that_is_no_yaml_is_refused(bench, tmp_path):
    (tmp_path / "claims.yaml").write_text("runs: a: b")
    with pytest.raises(bench.claims.Wrong, match="is no YAML"):
        bench.claims.load(tmp_path / "claims.yaml")


class Parsed(Exception):
    pass


def test_every_command_parses_by_the_scripts_own_parser(bench, found, monkeypatch, capsys):
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(self, *args, **kwargs):
        raise Parsed(parse(self, *args, **kwargs))

    def parsed(script: str, words: list[str]) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(Parsed) as caught:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return caught.value.args[0]

    monkeypatch.setattr(os, "environ", dict(os.environ))  # some scripts choose their devices when they are imported
    monkeypatch.setattr(sys, "path", list(sys.path))
    for run in found.runs.values():
        program, *words = shlex.split(run.command)
        file = Path("figures.json")
        if program == "gemma-tpu":
            assert cli.parse([*words, "--json"]).json, run.command
            continue
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
        try:
            asked = parsed(program, bench.run.words(run, file, Path("envs"))[2:])
        except SystemExit:
            pytest.fail(f"{run.command}: {capsys.readouterr().err}")
        finally:
            monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        assert asked.json == file, f"{program} writes its figures where it is told"


def test_every_script_of_benchmarks_is_behind_a_claim(found):
    helpers = {"claims.py", "run.py", "pictures.py", "plans.py", "gpu_plans.py", "peers_gpu.py"}
    scripts = {path.name for path in BENCHMARKS.glob("*.py")} - helpers
    assert scripts <= {Path(run.command.split()[0]).name for run in found.runs.values()}


def test_the_commands_that_readme_gives_for_one_figure_exist(found):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for claim in found.claims.values():
        program, *words = claim.by.split()
        if program == "make":
            assert words[0] in targets and set(words[1:]) <= {f"ONLY={claim.run}"}, claim.by
        else:
            assert program == "gemma-tpu" and cli.parse(words), claim.by


# --- what is said ---


def test_readmes_tables_are_those_of_the_claims(bench, found):
    readme = (ROOT / "README.md").read_text()
    assert bench.claims.with_tables(readme, found) == readme, "make bench ARGS=--readme"


def test_every_figure_of_readmes_tables_is_a_claims(bench, found):
    for table in found.tables:
        for row in table["rows"]:
            for cell in row[1:]:
                typed = re.sub(r"\{.*?\}", "", cell)
                assert not re.findall(r"(?<![\w.-])[\d.,]*\d", typed), f"a figure that no claim has: {cell}"
    before, _, rest = (ROOT / "README.md").read_text().partition("## Measured\n")
    section = rest.partition("\n## ")[0]
    outside = section.partition(bench.claims.BEGIN)[0] + section.partition(bench.claims.END)[2]
    assert "|" not in outside, "a table beside those of the claims"


def test_a_figure_that_changes_changes_readme_and_the_test_above_sees_it(bench, found, tmp_path):
    text = (BENCHMARKS / "claims.yaml").read_text()
    changed = bench.claims.with_figures(text, {"logits": (3.1234e-5, "2027-01-02", "two")})
    assert [line for line in changed.splitlines() if line not in text.splitlines()] == [
        "    measured: {figure: 3.123e-05, date: 2027-01-02, machine: two}"
    ]
    file = tmp_path / "claims.yaml"
    file.write_text(changed)
    made = bench.claims.load(file)
    assert made.claims["logits"].figure == pytest.approx(3.123e-5)
    readme = (ROOT / "README.md").read_text()
    assert "| 3.1e-5 | 1e-4 |" in bench.claims.with_tables(readme, made) != readme


@pytest.mark.parametrize("value", [1e-5, 0, 1, 2e-3, 10303.4, 51289, 0.65, -0.3, 123456.0, 1.5e-11])
def test_a_figure_written_into_the_file_is_read_again_as_a_number(bench, value):
    assert yaml.safe_load(bench.claims._yaml(value)) == pytest.approx(value, rel=1e-3)


def test_what_a_claim_says_stands_where_it_is_said(found):
    for claim in found.claims.values():
        for name in claim.said:
            figure = claim.told(claim.figure).removesuffix(claim.unit)
            assert figure in (ROOT / name).read_text(), f"{claim.id}: {name} does not say {figure}"


def test_a_claim_that_was_never_measured_has_a_bound_and_takes_its_first_figure(bench, found, tmp_path):
    new = tree()
    (loop,) = [claim for claim in new["claims"] if claim["id"] == "loop"]
    loop.update(measured=None, said=[])
    file = tmp_path / "claims.yaml"
    file.write_text(yaml.safe_dump(new))
    claim = bench.claims.load(file).claims["loop"]
    assert (claim.told(claim.figure), claim.keeps(2.9), claim.keeps(3.1)) == ("-", True, False)
    filled = bench.claims.with_figures("  - id: loop\n    measured: null\n", {"loop": (1.5, "2027-01-02", "two")})
    assert filled.splitlines()[1] == "    measured: {figure: 1.5, date: 2027-01-02, machine: two}"


def test_a_goal_that_is_missed_is_said(bench, found):
    claim = found.claims["trl-packed"]
    assert claim.figure < claim.wanted and claim.goal == "1.6 x (missed)"
    assert "1.6 x (missed)" in (ROOT / "README.md").read_text()


# --- make bench ---


def result(run, figures, **more) -> dict:
    return {"run": run.name, "command": run.command, "began": "2026-11-21T10:00:00+00:00", "machine": "x",
            "seconds": 2.0, "cpu_seconds": 1.0, "exit": 0, "figures": figures} | more  # fmt: skip


GOOD = {"logits": 2e-5, "peft_gradient": 1e-5, "mesh_logits": 1e-6, "mesh_gradients": 1e-7, "packed_loss": 0.0}


@pytest.mark.parametrize("change, more, why", [
    ({}, {}, None),
    ({"logits": 2e-4}, {}, "outside its bound, <= 1e-4"),
    ({"logits": float("nan")}, {}, "outside its bound"),
    ({"logits": None}, {}, "no figure at logits"),
    ({"logits": {"max": 1e-5}}, {}, "no figure at logits: its end"),
    ({"logits": "missing"}, {}, "no figure at logits"),
    ({}, {"exit": 1, "figures": None}, "the run ended with 1"),
    ({}, {"figures": None}, "no figure at logits"),
])  # fmt: skip
def test_a_claim_holds_or_is_broken_by_name(bench, found, change, more, why):
    run = found.runs["parity"]
    (verdict,) = bench.run.check([found.claims["logits"]], run, result(run, GOOD | change) | more)
    assert verdict.state == ("BROKEN" if why else "holds") and (why or "") in verdict.why


def test_a_key_that_the_command_no_longer_writes_breaks_its_claim(bench, found):
    run = found.runs["parity"]
    verdicts = bench.run.check(found.of("parity"), run, result(run, {"logits": 2e-5, "packed": 1.0}))
    assert {one.claim.id: one.state for one in verdicts} == {
        "logits": "holds", "gradients": "BROKEN", "mesh-logits": "BROKEN", "mesh-gradients": "BROKEN",
        "packed-loss": "BROKEN"}  # fmt: skip
    assert "no figure at packed_loss: packed_loss is not a number or not in logits, packed" in verdicts[-1].why


def test_keys_lead_through_lists_and_names_with_dots(bench, found):
    at = bench.claims._at
    assert at({"31b on v6e-4": {"tokens_per_s": 5}}, "31b on v6e-4.tokens_per_s", "") == 5
    assert at({"a.b": {"c": [1, {"d": 2.5}]}}, "a.b.c.1.d", "") == 2.5
    assert at({"many": [{"s": 1.5}]}, "many.0.s", "") == 1.5
    with pytest.raises(KeyError, match="no figure at many.1.s"):
        at({"many": [{"s": 1.5}]}, "many.1.s", "many.1.s")


def test_a_share_is_claimed_in_percent_and_the_runs_own_time_can_be_claimed(bench, found):
    run, padding = found.runs["packing"], found.claims["packing-padding"]
    made = result(run, {"padding": [{"pack": 0.006}, {"pack": 0.0051}]})
    (verdict,) = bench.run.check([padding], run, made)
    assert (verdict.state, padding.told(verdict.figure)) == ("holds", "0.51 %")
    timed = dataclasses.replace(padding, key="cpu_seconds", times=1.0)
    assert bench.run.check([timed], run, made)[0].figure == made["cpu_seconds"]


@pytest.fixture
def parity_alone(bench, tmp_path, monkeypatch):
    """`make bench` with results of its own; gives a function that writes one and runs the check."""
    monkeypatch.setattr(bench.run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(bench.run, "PICTURES", tmp_path / "pictures")

    def call(*results: dict, only: tuple[str, ...] = ("parity",)) -> int:
        for one in results:
            bench.run.keep(one, tmp_path / "results")
        return bench.run.main(["--from-results", "--only", *only])

    return call


def test_bench_names_what_is_broken_and_ends_with_1(bench, found, parity_alone, capsys):
    run = found.runs["parity"]
    assert parity_alone(result(run, GOOD)) == 0
    assert "5 holds, 0 BROKEN, 0 not measured" in capsys.readouterr().out
    assert parity_alone(result(run, GOOD | {"logits": 1.0}, began="2026-11-22T10:00:00+00:00")) == 1
    out = capsys.readouterr().out
    assert "BROKEN: logits: outside its bound, <= 1e-4" in out and "4 holds, 1 BROKEN" in out
    lines = [line for line in out.splitlines() if re.match(r"(claim|logits|packed-loss|mesh-logits) ", line)]
    assert len({line.index(what) for line, what in zip(lines, ("bound", "<=", "<=", "<="), strict=True)}) == 1


def test_what_was_not_measured_is_no_pass(bench, found, parity_alone, capsys):
    assert parity_alone(only=("parity", "peers")) == 1
    assert "not measured: logits, gradients" in capsys.readouterr().out
    old = result(found.runs["parity"], GOOD, command="benchmarks/parity.py --quick")
    assert parity_alone(old) == 1
    assert "its last result is of another command" in capsys.readouterr().out
    assert parity_alone(only=("parityy",)) == 2
    assert "no run and no claim: parityy" in capsys.readouterr().err


def test_a_missing_peer_is_left_out_by_name(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(bench.run, "PICTURES", tmp_path / "pictures")
    monkeypatch.setattr(bench.run, "measure", lambda *_: pytest.fail("it ran without its peer"))
    assert bench.run.main(["--only", "peers", "--envs", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"not measured: trl-padded, trl-packed: no environment trl in {tmp_path}: make bench ARGS=--install" in out
    assert bench.run.missing("program:no-such-program", tmp_path) == "no program no-such-program"
    assert bench.run.missing("module:json", tmp_path) is None
    assert "GiB of memory are free, and it needs 100000" in bench.run.missing("memory:100000", tmp_path)


def test_a_result_has_what_ran_where_and_is_never_overwritten(bench, found, tmp_path, monkeypatch):
    run = bench.claims.Run("plan", "gemma-tpu plan configs/tiny_cpu.yaml", 1)
    writes = [sys.executable, "-c", "print('{\"tokens_per_s\": 5.0}')"]
    monkeypatch.setattr(bench.run, "words", lambda *_: writes)
    made = bench.run.measure(run, tmp_path)
    assert made["figures"] == {"tokens_per_s": 5.0} and made["exit"] == 0 and made["cpu_seconds"] > 0
    assert made["versions"]["jax"] and made["versions"]["commit"] and "CPU cores" in made["machine"]
    first, second = bench.run.keep(made, tmp_path / "r"), bench.run.keep(made | {"exit": 3}, tmp_path / "r")
    assert first != second and json.loads(first.read_text())["exit"] == 0
    monkeypatch.setattr(bench.run, "words", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    assert bench.run.measure(run, tmp_path)["exit"] == 3


def test_figures_that_hold_are_taken_over_and_broken_ones_are_not(bench, found, tmp_path, monkeypatch):
    file, readme = tmp_path / "claims.yaml", tmp_path / "README.md"
    file.write_text((BENCHMARKS / "claims.yaml").read_text())
    readme.write_text((ROOT / "README.md").read_text())
    monkeypatch.setattr(bench.run, "FILE", file)
    monkeypatch.setattr(bench.run, "README", readme)
    monkeypatch.setattr(bench.run, "load", lambda: bench.claims.load(file))
    run = found.runs["parity"]
    made = result(run, GOOD | {"mesh_logits": 1.0, "logits": 5.678e-5}, machine=found.machines["two"])
    verdicts = bench.run.check(found.of("parity"), run, made)
    bench.run.take_over(verdicts, {"parity": made}, found)
    after = bench.claims.load(file).claims
    assert after["logits"].figure == pytest.approx(5.678e-5) and after["mesh-logits"] == found.claims["mesh-logits"]
    assert "| logits against transformers, 12 layers | 5.7e-5 |" in readme.read_text()
    with pytest.raises(bench.claims.Wrong, match="no name for this machine"):
        bench.run.take_over(verdicts, {"parity": made | {"machine": "a laptop"}}, found)


# --- growth ---


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0, 2.0, -1.0])
def test_the_exponent_of_a_power_is_found_exactly(bench, exponent):
    found = bench.growth.fit([(n, 3.7 * n**exponent) for n in (10, 20, 40, 80, 160)])
    assert found["exponent"] == pytest.approx(exponent, abs=1e-12) and found["error"] < 1e-9


def test_the_error_of_an_exponent_is_how_far_it_usually_is_off(bench):
    """Over many noisy drawings the fits spread by as much as they say; the known formula of a straight line."""
    rng = np.random.default_rng(0)
    sizes = np.array([1, 2, 4, 8, 16, 32])
    fits = [bench.growth.fit(list(zip(sizes, sizes**1.5 * np.exp(rng.normal(0, 0.1, 6)), strict=True)))
            for _ in range(400)]  # fmt: skip
    slopes = [one["exponent"] for one in fits]
    assert np.mean(slopes) == pytest.approx(1.5, abs=0.01)
    assert np.std(slopes) == pytest.approx(np.sqrt(np.mean([one["error"] ** 2 for one in fits])), rel=0.15)


def test_too_few_sizes_or_a_cost_of_nothing_have_no_exponent(bench):
    for points in ([(1, 1), (2, 2)], [(1, 1), (2, 0), (4, 4)]):
        with pytest.raises(ValueError, match="three sizes or more, and costs above zero"):
            bench.growth.fit(points)


def test_pictures_are_drawn_of_what_was_measured_and_say_what_was_not(bench, found, tmp_path):
    sizes = [{"size": float(n), "seconds": n * 1e-3, "memory": n * 10.0, "step_s": n * 1e-2, "trace_s": 1.0,
              "compile_s": 2.0 + n / 100} for n in (1, 2, 4, 8)]  # fmt: skip
    parts = {part for _, costs in bench.pictures.GROWTH.values() for part, _ in costs}
    figures = {part: bench.growth.exponents(sizes) for part in parts}
    ratios = {"ours_over": {"trl-padded": 1.58, "trl-packed": 1.5}}
    results = {"growth": result(found.runs["growth"], figures), "peers": result(found.runs["peers"], ratios)}
    drawn = bench.pictures.draw(results, found, tmp_path)
    assert {path.name for path in drawn} == {"peers.svg", *(f"growth-{name}.svg" for name in bench.pictures.GROWTH)}
    layers, peers = ((tmp_path / name).read_text() for name in ("growth-layers.svg", "peers.svg"))
    assert "a step: exponent 1.00 ± 0.00" in layers and "http" not in layers.replace("http://www.w3.org", "")
    assert "1.58 x" in peers and peers.count("not measured") == len(bench.pictures.PEERS) - 2
    assert bench.pictures.draw({}, found, tmp_path) == []
