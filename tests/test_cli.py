"""The command line: one clear message, the right exit code, and nothing but one object on stdout under --json."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_tpu import cli, config
from gemma_tpu.errors import UserError
from gemma_tpu.tiny.checkpoint import write_tiny

ROOT = Path(__file__).parent.parent
SMALL = ["data.limit=4", "data.validation=null", "train.batch_size=4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny", dtype="float32")


@pytest.fixture
def run(capsys):
    """Runs a command in this process: exit code, stdout, stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(word) for word in argv])
        except SystemExit as stop:  # argparse
            code = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


def shell(*argv: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, argv)]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}  # none of the flags that this process has
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=120)


def recipe(folder: Path, body: str) -> str:
    path = folder / "own_recipe.py"
    path.write_text(f"def main(config):\n    {body}\n")
    return f"recipe={path}"


# --- help ---


def test_help_answers_without_jax_and_shows_every_command():
    seen = shell("-c", """
import sys
from gemma_tpu import cli
try:
    cli.main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
assert not {"jax", "flax", "orbax", "transformers"} & set(sys.modules), "heavy imports"
""")
    assert seen.returncode == 0, seen.stderr
    for command in ("train", "validate", "tiny", "merge", "verify", "sample", "eval", "examples:"):
        assert command in seen.stdout


def test_help_takes_half_a_second_at_most():
    """Of the processor, in a process of its own: on an idle machine that is the time that passes."""
    taken = []
    for _ in range(5):
        before = os.times()
        assert shell("-m", "gemma_tpu", "--help").returncode == 0
        after = os.times()
        taken.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert sorted(taken)[2] <= 0.5, taken


@pytest.mark.parametrize(
    "command", ["train", "validate", "tiny", "merge", "verify", "sample", "eval tiny", "eval verilog", "eval loss",
                "eval prompts", "compare"],
)
def test_each_command_has_help_with_an_example(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0 and f"example: gemma-tpu {command} " in out


def test_python_m_is_the_command():
    seen = shell("-m", "gemma_tpu", "--version")
    assert (seen.returncode, seen.stdout) == (0, "gemma-tpu 0.1.0\n")


@pytest.mark.parametrize(
    "argv",
    [["frobnicate"], [], ["train"], ["merge", "r", "extra"], ["train", "c", "--jso"], ["eval", "verilog", "x"],
     ["tiny", "x", "--seed", "-1"], ["sample", "x", "--n", "0"], ["tiny", "x", "--dtype", "int8"]],
)  # fmt: skip
def test_arguments_that_make_no_sense_exit_2_with_usage(run, argv):
    code, out, err = run(*argv)
    assert code == 2 and out == "" and "usage: gemma-tpu" in err


# --- exit codes and --json ---


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("from gemma_tpu.errors import RunError; raise RunError('disk full')", 1, "error: disk full"),
        ("from gemma_tpu.errors import UserError; raise UserError('no such thing')", 2, "error: no such thing"),
        ("raise KeyboardInterrupt", 1, "error: interrupted"),
    ],
)
def test_each_way_to_stop_has_its_exit_code_and_json_says_why(run, tmp_path, body, code, message):
    found, out, err = run("train", "tiny_cpu.yaml", recipe(tmp_path, body), "--json")
    assert found == code and message in err
    assert json.loads(out) == {"error": message.removeprefix("error: ")}


def test_a_bug_is_not_dressed_up_as_a_message(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "tiny_cpu.yaml", recipe(tmp_path, "1 / 0")])


@pytest.mark.parametrize("command", [["cp", "lora_sft"], ["validate"], ["data"], ["report"], ["plan"]], ids=" ".join)
def test_a_path_that_is_too_long_is_one_message(command, capsys):
    assert cli.main([*command, f"/tmp/{'x' * 300}.py"]) == 2
    said = capsys.readouterr().err
    assert "File name too long" in said and said.count("\n") == 1


@pytest.mark.parametrize("line", ["validate tiny_cpu.yaml data.path=", "train tiny_cpu.yaml run_dir="])
def test_the_home_of_nobody_is_one_message(line, capsys):
    assert cli.main(f"{line}~no-such-user/x".split()) == 2
    assert "error: a path begins with ~NAME" in capsys.readouterr().err


def test_under_json_stdout_holds_one_object_whatever_is_printed(run, tmp_path):
    chatty = recipe(tmp_path, "print('hello'); return {'loss': float('nan'), 'all': [float('inf'), 1.5]}")
    code, out, err = run("train", "tiny_cpu.yaml", chatty, "--json")
    assert code == 0 and "hello" in err
    assert json.loads(out) == {"loss": None, "all": [None, 1.5]}


def test_overrides_may_stand_after_an_option(run, tmp_path):
    own = recipe(tmp_path, "return {'lr': config.optim.lr, 'steps': config.train.steps}")
    code, out, _ = run("train", "tiny_cpu.yaml", own, "--json", "optim.lr=1e-5", "train.steps=7")
    assert code == 0 and json.loads(out) == {"lr": 1e-5, "steps": 7}


def test_cpu_devices_are_made_before_the_recipe_runs(tmp_path):
    own = recipe(tmp_path, "import jax; return {'devices': jax.device_count()}")
    seen = shell("-m", "gemma_tpu", "train", "tiny_cpu.yaml", own, "mesh.cpu_devices=3", "--json")
    assert seen.returncode == 0 and json.loads(seen.stdout) == {"devices": 3}


def test_cpu_devices_and_xla_flags_do_not_silently_fight(run, tmp_path):
    code, _, err = run("train", "tiny_cpu.yaml", recipe(tmp_path, "return {}"), "mesh.cpu_devices=2")
    assert code == 2 and "XLA_FLAGS" in err and "mesh.cpu_devices=2" in err


def test_a_recipe_needs_a_main(run, tmp_path):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "notes.txt").write_text("")
    for name, word in (("empty.py", "no function main"), ("notes.txt", "must be a Python file"),
                       ("nix.py", "no such file")):  # fmt: skip
        code, _, err = run("train", "tiny_cpu.yaml", f"recipe={tmp_path / name}")
        assert code == 2 and word in err


# --- configs ---


def test_every_wrong_key_is_named_at_once(run):
    code, out, err = run("train", "tiny_cpu.yaml", "optim.lrr=1", "lora.rank=none", "nonsense")
    assert code == 2 and out == ""
    for words in ("3 problems", "did you mean optim.lr?", "lora.rank", "must be key=value"):
        assert words in err


def test_a_config_in_another_folder_is_never_the_shipped_one_of_that_name(run, tmp_path):
    code, _, err = run("validate", tmp_path / "tiny_cpu.yaml")
    assert code == 2 and "no such file; shipped configs: " in err and "tiny_cpu.yaml" in err


def test_a_missing_checkpoint_stops_training_before_a_run_folder_is_made(run, tmp_path):
    code, _, err = run("train", "tiny_cpu.yaml", f"model.path={tmp_path / 'nix'}", f"run_dir={tmp_path / 'run'}")
    assert code == 2 and str(tmp_path / "nix") in err
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_does_not_fit_stops_training(run, model, tmp_path):
    code, _, err = run("train", "tiny_cpu.yaml", f"model.path={model}", "mesh.tp=3", f"run_dir={tmp_path / 'run'}")
    assert code == 2 and "tp=3 = 3, but there are 4 devices" in err
    assert not (tmp_path / "run").exists()


def test_the_folder_of_another_run_is_refused_and_left_alone(run, model, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    theirs = config.to_yaml(config.load("tiny_cpu.yaml", [f"run_dir={folder}", *SMALL, "optim.lr=1e-5"]))
    (folder / "config.yaml").write_text(theirs)
    code, _, err = run("train", "tiny_cpu.yaml", f"model.path={model}", f"run_dir={folder}", *SMALL)
    assert code == 2 and "optim.lr: 1e-05 -> 0.003" in err
    assert (folder / "config.yaml").read_text() == theirs and len(list(folder.iterdir())) == 1


# --- validate ---


def test_validate_says_what_is_right(run, model):
    code, out, err = run("validate", "tiny_cpu.yaml", f"model.path={model}", "mesh.fsdp=2", "mesh.tp=2", "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"] and not found["problems"] and not found["not_checked"]
    for words in ("6 layers", "needs 4 devices", "495,616 parameters", "100 first rows render", "every tensor fits"):
        assert words in err


def test_validate_finds_all_that_is_wrong_at_once(run, model, tmp_path):
    code, out, err = run(
        "validate", "tiny_cpu.yaml", f"model.path={model}", "mesh.tp=8", "mesh.cpu_devices=4", "train.batch_size=3",
        "lora.targets=[q_proj]", f"data.validation={tmp_path / 'nix.jsonl'}", "recipe=nix.py", "--json",
    )  # fmt: skip
    problems = json.loads(out)["problems"]
    assert code == 2 and len(problems) == 5
    for words in ("nix.py: no such file", "tp=8 = 8, but there are 4 devices", "does not divide the 4 query heads",
                  "lora.targets leaves out projections", "data.validation: "):  # fmt: skip
        assert sum(words in problem for problem in problems) == 1, words


def test_validate_says_what_it_could_not_look_at(run, tmp_path):
    code, out, _ = run("validate", "tiny_cpu.yaml", f"model.path={tmp_path / 'nix'}", "mesh.tp=2", "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"]
    assert any("LoRA targets" in line and "is not there" in line for line in found["not_checked"])
    assert any("how the rows render" in line for line in found["not_checked"])


def test_validate_refuses_an_architecture_that_this_version_does_not_know(run, model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    told = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(told | {"model_type": "gemma9"}))
    code, _, err = run("validate", "tiny_cpu.yaml", f"model.path={other}")
    assert code == 2 and "model_type is 'gemma9'; this version implements: gemma4" in err


def test_validate_names_the_row_that_cannot_be_read(run, model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{oops\n')
    given = ("validate", "tiny_cpu.yaml", f"model.path={model}", f"data.path={rows}")
    code, out, err = run(*given)
    assert code == 0 and "left out: not_JSON 1 (rows.jsonl:2)" in out + err
    code, _, err = run(*given, "data.strict=true")
    assert code == 2 and "rows.jsonl:2: column 2" in err


# --- what the user points at ---


@pytest.mark.parametrize("command", ["merge", "verify", "eval loss"])
def test_a_run_folder_that_is_none_is_said(run, tmp_path, command):
    code, _, err = run(*command.split(), tmp_path / "nix")
    assert code == 2 and "no such folder" in err
    code, _, err = run(*command.split(), tmp_path)
    assert code == 2 and "is it a run folder?" in err


def test_a_run_without_a_checkpoint_cannot_be_merged(run, tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: here\n")
    code, _, err = run("merge", tmp_path)
    assert code == 2 and "no checkpoints/" in err


@pytest.mark.parametrize("command", [["sample", "--prompt", "hi"], ["eval", "tiny"]])
def test_a_wrong_target_is_said(run, tmp_path, command):
    for target, words in ((tmp_path / "nix", "no such folder"), (tmp_path, "neither a run folder")):
        code, _, err = run(*command, target)
        assert code == 2 and words in err


def test_sample_refuses_what_it_could_only_ignore(run, model, tmp_path):
    for argv, words in (
        (["--json"], "nothing to continue"),
        (["--prompt", "a", "--n", "2"], "would all be the same"),
        (["--prompt", "a", "--raw", "--system", "b"], "takes no system text"),
        (["--prompt-file", tmp_path / "nix"], "cannot be read"),
        (["--prompt", "a", "--top-p", "2"], "top_p is 2.0"),
    ):
        code, _, err = run("sample", model, *argv)
        assert code == 2 and words in err
    code, _, err = run("eval", "tiny", model, "--samples", "2")
    assert code == 2 and "would all be the same" in err


@pytest.mark.slow
def test_sample_completes_every_prompt(run, model, tmp_path):
    (tmp_path / "p.txt").write_text("line one\nline two\n")
    code, out, err = run("sample", model, "--prompt", "a counter", "--prompt-file", tmp_path / "p.txt", "--n", "2",
                         "--temperature", "1", "--max-new-tokens", "2", "--json")  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert [one["prompt"] for one in found["samples"]] == ["a counter"] * 2 + ["line one\nline two\n"] * 2
    assert {key: found[key] for key in found["samples"][0]} == found["samples"][0]
    for one in found["samples"]:
        assert len(one["tokens"]) == len(one["logprobs"]) <= 2
        assert one["finish_reason"] == ("length" if len(one["tokens"]) == 2 else "stop")
    if any(one["finish_reason"] == "length" for one in found["samples"]):
        assert "were cut at --max-new-tokens 2" in err


def test_recipes_and_scripts_run_by_themselves_have_the_same_messages(tmp_path):
    for script in ("recipes/merge.py", "recipes/evaluate.py", "scripts/orbax_to_hf.py"):
        seen = shell(ROOT / script, tmp_path / "nix")
        assert seen.returncode == 2, seen.stderr
        assert seen.stderr.startswith("error: ") and "Traceback" not in seen.stderr


def test_tiny_says_where_and_never_overwrites(run, tmp_path):
    code, out, _ = run("tiny", tmp_path / "m", "--seed", 3, "--json")
    assert code == 0 and json.loads(out)["seed"] == 3 and (tmp_path / "m" / "config.json").is_file()
    code, _, err = run("tiny", tmp_path / "m")
    assert code == 2 and "is not an empty folder" in err


def test_a_shipped_file_is_found_by_its_name_alone():
    from gemma_tpu.assets import find

    assert find("configs", "tiny_cpu.yaml").is_file() and find("recipes", "recipes/merge.py").is_file()
    for name in ("elsewhere/tiny_cpu.yaml", "/tiny_cpu.yaml", "../tiny_cpu.yaml", "configs/../tiny_cpu.yaml"):
        with pytest.raises(UserError, match="no such file"):
            find("configs", name)
