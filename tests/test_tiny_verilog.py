"""The tiny dataset: what is bundled is what the generator writes, it is learnable, and it does not leak."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gemma_tpu import assets

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import make_tiny_verilog as maker  # noqa: E402


@pytest.fixture(scope="module")
def build():
    return maker.Build()


def rows(name):
    path = assets.resolve(f"bundled:tiny_verilog/{name}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def pairs(name):
    return [(r["messages"][0]["content"], r["messages"][1]["content"]) for r in rows(name)]


def test_bundled_files_are_what_the_generator_writes(build):
    for name, text in maker.contents(build).items():
        assert assets.resolve(f"bundled:tiny_verilog/{name}").read_text() == text, f"{name} is stale"


def test_check_fails_on_a_stale_file(build, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(maker, "Build", lambda: build)
    monkeypatch.setattr(maker, "BUNDLED", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_tiny_verilog.py", "--out", str(tmp_path)])
    assert maker.main() == 0
    monkeypatch.setattr(sys, "argv", ["make_tiny_verilog.py", "--check"])
    assert maker.main() == 0
    (tmp_path / "train.jsonl").write_text("{}\n")
    assert maker.main() == 1
    assert "differ from the bundled files: train.jsonl" in capsys.readouterr().out
    assert (tmp_path / "train.jsonl").read_text() == "{}\n"


def test_no_heldout_answer_stands_elsewhere_once_renamed(build, monkeypatch, tmp_path, capsys):
    assert maker.found_elsewhere(build.files) == {"base": 0, "train": 0, "validation": 0}
    problem = build.files["heldout"][0]
    renamed = re.sub(rf"\b{problem['top']}\b", "renamed", problem["reference"])
    planted = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": renamed}]}
    leaky = dict(build.files, train=[*build.files["train"], planted])
    assert maker.found_elsewhere(leaky)["train"] == 1
    build_with_leak = type("Leak", (), {"files": leaky, "tally": build.tally})
    monkeypatch.setattr(maker, "Build", lambda: build_with_leak)
    monkeypatch.setattr(sys, "argv", ["make_tiny_verilog.py", "--out", str(tmp_path / "out")])
    assert maker.main() == 1
    assert not (tmp_path / "out").exists()


def test_canonical_form_forgets_names_and_keeps_the_rest():
    one = maker.canonical("module m(input [3:0] a, output y); assign y = &a; endmodule")
    assert one == maker.canonical("module top(input [3:0] d,\n output q);\n assign q = & d;\nendmodule")
    assert one != maker.canonical("module m(input [4:0] a, output y); assign y = &a; endmodule")
    assert one != maker.canonical("module m(input [3:0] a, output y); assign y = |a; endmodule")
    assert one != maker.canonical("module m(input [3:0] a, output y); assign y = &y; endmodule")


def test_validation_and_heldout_structures_are_apart_from_training():
    train = {maker.canonical(code) for _, code in pairs("train")}
    assert not train & {maker.canonical(code) for _, code in pairs("validation")}


def test_every_heldout_word_and_symbol_is_common_in_training():
    def words(text):
        return set(re.findall(r"[A-Za-z_]+|[01](?=[01]{2,})|(?<=[01]{2})[01]|\d+|[^\w\s]", text))

    specifications, answers = Counter(), Counter()
    for specification, answer in pairs("train"):
        specifications.update(words(specification))
        answers.update(words(answer))
    for problem in rows("heldout"):
        rare = [w for w in words(problem["prompt"]) if specifications[w] < 8]
        rare += [w for w in words(problem["reference"]) if answers[w] < 8]
        assert not rare, f"{problem['id']}: {rare} seen fewer than 8 times"


def test_families_of_the_problems_are_trained_and_not_in_the_base(build):
    heldout = {problem["family"] for problem in rows("heldout")}
    assert heldout == set(build.tally["train"]) == set(build.tally["validation"])
    assert not heldout & set(build.tally["base"])
    assert {name: len(rows(name)) for name in maker.ROWS} == maker.ROWS


@pytest.mark.parametrize("name", ["base", "train", "validation"])
def test_specifications_name_the_module_and_every_port(name):
    for specification, answer in pairs(name):
        header = answer[: answer.index(";")]
        names = re.findall(r"(\w+)(?=[,()])", re.sub(r"\[\d+:0\]", "", header))
        missing = [n for n in names if not re.search(rf"\b{n}\b", specification)]
        assert not missing, f"{missing} not in: {specification}"


@pytest.mark.skipif(shutil.which("iverilog") is None, reason="iverilog is not installed")
@pytest.mark.parametrize("name", ["base", "train", "validation"])
def test_every_answer_compiles(name, tmp_path):
    answers = [re.sub(r"^module \w+", f"module row{i}", code) for i, (_, code) in enumerate(pairs(name))]
    modules = {re.match(r"module (\w+)", code).group(1) for _, code in pairs(name)}
    source = tmp_path / "all.v"
    source.write_text("\n".join(answers) + "".join(f"\nmodule {module}; endmodule" for module in modules))
    done = subprocess.run(["iverilog", "-g2012", "-tnull", str(source)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
