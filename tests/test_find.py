"""Find and start: what ships is listed with true figures, copied without loss, described to editors, and begun anew."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest

from gemma_tpu import assets, cli, config, schema
from gemma_tpu.config import KEYS
from gemma_tpu.errors import UserError
from gemma_tpu.onboarding import catalogue, completion, doctor, json_schema

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ON_TPU = [path for path in CONFIGS if not path.stem.startswith("tiny_")]


# --- ls, cp ---


def test_ls_answers_at_once_with_every_config_and_recipe(capsys):
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "gemma_tpu", "ls"], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert time.monotonic() - begun < 5, "no planning, no JAX"
    for path in [*CONFIGS, *ROOT.glob("recipes/*.py")]:
        assert path.name in done.stdout
    assert "gpu_baseline" in done.stdout and max(map(len, done.stdout.splitlines())) <= 130
    assert cli.main(["ls", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["name"] for one in found["configs"]} == {path.name for path in CONFIGS}
    assert all(one["about"] and one["model"] for one in found["configs"])


def test_the_figures_of_ls_are_of_what_ships_and_fit():
    figures = catalogue.figures()
    assert set(figures) == {path.name for path in CONFIGS}
    for path in ON_TPU:
        one = figures[path.name]
        assert one.fits and one.peak_gib < one.limit_gib and one.tokens_per_s > 0
        assert one.slice.replace("-", "") in path.stem
        assert one.usd_per_million_tokens == pytest.approx(
            catalogue.slice_of(path).usd / one.tokens_per_s / 3600 * 1e6, abs=1e-4)  # fmt: skip


def test_a_figure_of_ls_is_what_the_planner_says(monkeypatch):
    monkeypatch.chdir(ROOT)  # where no models lie that tests have made
    path = ROOT / "configs" / "gemma3_1b_v5e1.yaml"
    assert catalogue.plan(path) == catalogue.figures()[path.name], "run scripts/make_catalogue.py"


@pytest.mark.slow
def test_all_figures_of_ls_are_what_the_planner_says():
    assert {path.name: catalogue.plan(path) for path in CONFIGS} == catalogue.figures()


def test_cp_copies_by_any_name_and_never_overwrites(tmp_path, capsys):
    assert cli.main(["cp", "configs/gemma4_12b_v5e4.yaml", str(tmp_path / "mine.yaml")]) == 0
    assert (tmp_path / "mine.yaml").read_bytes() == (ROOT / "configs/gemma4_12b_v5e4.yaml").read_bytes()
    assert cli.main(["cp", "lora_sft", str(tmp_path)]) == 0 and (tmp_path / "lora_sft.py").exists()
    assert cli.main(["cp", "gpu_baseline", str(tmp_path)]) == 0
    assert {path.name for path in (tmp_path / "gpu_baseline").iterdir()} >= {"train.py", "README.md", "h100x2.yaml"}
    (tmp_path / "mine.yaml").write_text("mine")
    capsys.readouterr()
    for name, dest, words in (
        ("gemma4_12b_v5e4.yaml", "mine.yaml", "cp never overwrites"),
        ("gemma4_12b_v5e4", "gone/mine.yaml", "no such folder"), ("lora_sft", "a.yaml", "is a .py"),
        ("gemma4_12b_v5e", "a.yaml", "did you mean gemma4_12b_v5e4.yaml?"), ("../x", "a.yaml", "nothing that ships"),
    ):  # fmt: skip
        assert cli.main(["cp", name, str(tmp_path / dest)]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
    assert (tmp_path / "mine.yaml").read_text() == "mine"


# --- schema ---


def as_editors_read(text: str):
    """YAML 1.2, as editors have it: this package's own reading of scalars."""
    return config._Draft("test")._value(config._compose(text), "", 0)


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema")
    made = json_schema.make()
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_by_the_schema(validator, file):
    assert [error.message for error in validator.iter_errors(as_editors_read(file.read_text()))] == []
    whole = json.loads(json.dumps(config.to_dict(config.load(file))))
    assert list(validator.iter_errors(whole)) == [], "and so is the resolved config of its run"


WRONG = [
    "modle: {path: a}", "model: {pth: a}", "train: {steps: 0}", "train: {steps: 1.5}", "optim: {lr: -1}",
    "optim: {lr: fast}", "data: {packing: packed}", "mesh: automatic", "lora: {dropout: 1}", "lora: 3",
    "data: {max_seq_len: 1}", "train: {seed: 4294967296}", "lora: {rank: '8'}", "data: {path: ' a'}",
    "train: {remat: []}", "train: {remat: [q, q]}", "train: {remat: [quick]}", "log: {progress: 1}",
    "eval: {prompts: text}", "lora: {rank_pattern: {a: 0}}", "run_dir: ''",
]  # fmt: skip
RIGHT = [
    "optim: {lr: 1e-4}", "mesh: auto", "mesh: {fsdp: 2, tp: 2}", "train: {remat: [q, gate@host]}", "data:",
    "data: {path: [a, b], weights: [1, 2.5]}", "lora: {targets: [q_proj]}", "lora: {rank_pattern: {mlp: 8}}",
    "data: {validation: 0.05}", "optim: {clip: null}",
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_what_a_run_would_refuse_the_schema_refuses(validator, text, tmp_path):
    assert list(validator.iter_errors(as_editors_read(text))), text
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError):
        config.load(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", RIGHT)
def test_what_a_run_takes_the_schema_takes(validator, text, tmp_path):
    assert list(validator.iter_errors(as_editors_read(text))) == []
    (tmp_path / "a.yaml").write_text(text)
    config.load(tmp_path / "a.yaml")


def ruled(kind):
    if get_origin(kind) is Annotated:
        yield kind
    for inner in get_args(kind):
        if not isinstance(inner, schema.Rule):
            yield from ruled(inner)


def test_every_key_is_there_with_words_and_every_rule_has_its_form():
    made = json_schema.make()["properties"]
    told = json_schema.descriptions()
    for key, kind in KEYS.items():
        section, _, name = key.rpartition(".")
        if section == "mesh":
            continue  # configs/tiny_cpu.yaml has it as auto
        node = made[section]["properties"][name] if section else made[name]
        assert "default" in node and kind is not None
        missing = [one for one in ruled(kind) if one not in json_schema.RULES]
        assert not missing, f"{key}: json_schema.RULES does not know {missing}"
    assert len(told) > 0.8 * len(KEYS)
    assert told["optim.lr"] == "the peak, after warm-up" and "JSONL, JSON, CSV" in told["data.path"]


# --- init ---


def rows(file: Path, count: int = 50, length: int = 400) -> Path:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * (length // 5)}]}
    file.write_text((json.dumps(row) + "\n") * count)
    return file


@pytest.mark.parametrize("model, place", [("gemma4-12b", "v5e-4"), ("google/gemma-4-E4B-it", "v6e-1")])
def test_init_writes_a_config_that_loads_and_plans(tmp_path, capsys, model, place, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = rows(tmp_path / "rows.jsonl")
    asked = ["init", "--data", str(data), "--model", model, "--slice", place, "--out", "mine.yaml"]
    assert cli.main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["tokens_per_s"] > 0
    made = config.load("mine.yaml")
    assert made.data.path == str(data) and made.data.max_seq_len == 2048 and made.model.path.startswith("models/")
    assert cli.main(["plan", "mine.yaml", "--on", place, "--fast", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["fits"] and planned["tokens_per_s"] == pytest.approx(found["tokens_per_s"], rel=0.01)
    before = Path("mine.yaml").read_text()
    assert "gemma-tpu plan mine.yaml" in before and "hf download google/gemma-4" in before
    assert cli.main(asked) == 2 and "never overwrites" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == before


def test_init_says_what_it_needs_and_what_would_hold_the_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert cli.main(["init", "--model", "gemma4-31b"]) == 2
    assert "give --data, --slice" in capsys.readouterr().err
    assert cli.main(["init", "--data", "gs://b/x", "--model", "gemma4-31b", "--slice", "v6e-1"]) == 2
    said = capsys.readouterr().err
    assert "does not fit on v6e-1; it does on" in said and "v6e-4" in said and not Path("mine.yaml").exists()
    assert cli.main(["init", "--data", "x", "--model", "gemma9", "--slice", "v6e-1"]) == 2
    assert "gemma9" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text('{"nothing": 1}\n')
    assert cli.main(["init", "--data", "empty.jsonl", "--model", "gemma4-e2b", "--slice", "v6e-1"]) == 2


def test_init_asks_on_a_terminal(tmp_path, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", Terminal(f"{rows(tmp_path / 'rows.jsonl')}\ngemma4-e2b\nv6e-1\n"))
    assert cli.main(["init"]) == 0
    asked = capsys.readouterr().err
    assert all(word in asked for word in ("your rows", "gemma4-31b", "v6e-4"))
    assert config.load("mine.yaml").lora.rank == 32


# --- doctor ---


def checks(found):
    return {one.name: one for one in found}


def test_doctor_names_each_thing_with_its_fix_and_never_prints_the_token(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretverysecret")
    monkeypatch.setattr(doctor, "_devices", lambda: doctor.Check("devices", "ok", "1 x test"))
    code = cli.main(["doctor", "--bucket", "memory://doctor/runs"])
    out = capsys.readouterr()
    assert "verysecret" not in out.out + out.err and re.search(r"hub token +from HF_TOKEN", out.out)
    assert re.search(r"ok +bucket +memory://doctor/runs: written, read back and removed", out.out)
    assert code == ("WRONG" in out.out), "exit code 1 where something is there and wrong"
    import fsspec

    assert fsspec.filesystem("memory").find("/doctor") == [], "the bucket is left as it was"


def test_doctor_tells_what_is_missing_from_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(doctor, "_devices", lambda: doctor.Check("devices", "ok", "1 x test"))
    found = checks(doctor.examine(tmp_path, "gs-not-a-scheme://b"))
    assert {found[name].state for name in ("iverilog", "bwrap", "hub token")} == {"missing"}
    assert found["bwrap"].fix == "apt-get install bubblewrap" and "HF_TOKEN" in found["hub token"].fix
    assert found["bucket"].state == "wrong" and found["memory"].state == "ok"
    monkeypatch.setattr(doctor, "_version", lambda name: "0.0.1")
    assert checks(doctor._packages())["packages"].state == "wrong"
    assert "to repair: bucket" in doctor.verdict(list(found.values()))
    assert cli.main(["doctor", "--bucket", "not-a-url"]) == 2


def test_doctor_asks_jax_in_a_process_that_may_fail(monkeypatch):
    found = doctor._devices()
    assert found.state == "missing" and "cpu" in found.found
    assert found.fix

    def fails(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "Traceback ...\nRuntimeError: TPU is in use")

    monkeypatch.setattr(doctor.subprocess, "run", fails)
    failed = doctor._devices()
    assert (failed.state, failed.found) == ("wrong", "JAX failed: RuntimeError: TPU is in use") and failed.fix


# --- completion, help ---


def completed(script: str, *words: str) -> list[str]:
    line = " ".join(f"'{word}'" for word in ("gemma-tpu", *words))
    ask = f'{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; _gemma_tpu; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "--norc", "-c", ask], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_options_names_and_config_keys(capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed(script, "tr") == ["train"] and completed(script, "sch") == ["schema"]
    assert "--rehearse" in completed(script, "train", "--")
    assert completed(script, "train", "configs/tiny_cpu.yaml", "optim.l") == ["optim.lr=", "optim.loraplus_ratio="]
    assert "gemma4_12b_v5e4.yaml" in completed(script, "cp", "gemma4_12b")
    assert "tiny" in completed(script, "eval", "ti") and "--problems" in completed(script, "eval", "verilog", "--p")
    assert "README.md" in completed(script, "validate", "READ"), "anything else may be a file"
    assert set(completed(script, "")) >= {"train", "plan", "ls", "doctor", "completion"}


def test_zsh_gets_the_same_by_its_bashcompinit(capsys):
    assert cli.main(["completion", "zsh"]) == 0
    assert "bashcompinit && bashcompinit" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["completion", "fish"])


def leaves(parser):
    inner = [action for action in parser._actions if hasattr(action, "choices") and isinstance(action.choices, dict)]
    if not inner:
        yield parser
    for action in inner:
        for one in action.choices.values():
            yield from leaves(one)


def test_every_command_has_help_with_an_example_of_itself():
    for one in leaves(cli.build_parser()):
        text = one.format_help()
        assert re.search(rf"example: .*{re.escape(one.prog)}", text), one.prog
        assert max(map(len, text.splitlines())) < 160


def test_a_word_of_the_schema_is_quoted_for_the_shell():
    parsers = {"a": cli.Parser(prog="x")}
    assert "'" in completion.script(parsers, "bash") and assets.folder("configs").is_dir()
