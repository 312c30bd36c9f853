"""The planner: what it promises as JSON, what it advises, and that it compiles the very step that train runs."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import hlo_helper
import jax
import pytest
from runs_helper import ROOT, run_config, train
from test_page import check, drawn

from gemma_tpu import cli, config
from gemma_tpu.data.batches import make_loader
from gemma_tpu.data.corpus import prepare
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.estimate import advice, budget
from gemma_tpu.gemma import sizes
from gemma_tpu.hardware import chips
from gemma_tpu.planning import calibration as calibrations
from gemma_tpu.planning import compilation, plan, plan_page, plan_text, subject, sweep
from gemma_tpu.planning.workload import Workload, workload
from gemma_tpu.step.job import Job
from gemma_tpu.training import compiling, program
from gemma_tpu.training.train import Trainer

FAST = str(ROOT / "configs" / "gemma4_31b_v5p8_fast.yaml")
NO_ROWS = Workload(572, 9_182_198, 0.02, "by a test", counted=False)
PROMISED = {
    "slice", "chips", "mesh", "fits", "peak_gib_per_chip", "limit_gib", "flops_per_token", "step_s", "tokens_per_s",
    "mfu", "basis", "calibration", "compile_s", "hours", "usd", "trainable_params", "heads", "longest_sequence",
    "advice",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_calibrations(tmp_path, monkeypatch):
    """Nobody's own measurements correct these predictions, nor do these tests touch them or what compilers said."""
    monkeypatch.setenv(compilation.VARIABLE, str(tmp_path / "plans"))
    monkeypatch.setenv(calibrations.VARIABLE, str(tmp_path / "calibration.json"))
    return tmp_path / "calibration.json"


@pytest.fixture
def run(capsys):
    def call(*argv: object) -> tuple[int, str, str]:
        code = cli.main(["plan", *map(str, argv)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


def analytic(*overrides: str, on: str = "v5p-8", load: Workload = NO_ROWS) -> plan.Plan:
    chosen = config.load(FAST, overrides)
    model = subject.find_model(chosen.model.path)
    return plan.make(chosen, FAST, chips.find(on), model, load, compiled=False)


# --- the fast plan ---


def test_json_is_one_object_with_every_promised_key(run):
    code, out, err = run(FAST, "--fast", "--json")
    found = json.loads(out)
    assert code == 0 and found.keys() >= PROMISED
    assert (found["slice"], found["chips"], found["basis"], found["compile_s"]) == ("v5p-8", 4, "analytic", None)
    assert found["mesh"] == {"data": 1, "fsdp": 4, "expert": 1, "tp": 1}
    assert found["trainable_params"] == 489_717_760
    assert found["flops_per_token"] == pytest.approx(134e9, rel=0.01)
    assert found["tokens_per_s"] == pytest.approx(4 * 4096 / found["step_s"])
    assert found["mfu"] == pytest.approx(found["tokens_per_s"] * found["flops_per_token"] / (4 * 459e12))
    assert found["hours"] == pytest.approx(found["steps"] * found["step_s"] / 3600)
    assert found["usd"] == pytest.approx(found["hours"] * chips.find("v5p-8").usd)
    assert 570 <= found["steps"] <= 574  # 9,959 rows of 922 tokens on sheets that are 98 % full
    assert sum(found["memory_gib_per_device"].values()) == pytest.approx(found["peak_gib_per_chip"], abs=0.01)
    assert "published geometry of google/gemma-4-31B-it" in err


def test_the_text_says_what_fits_what_limits_and_what_was_assumed(run):
    code, out, _ = run(FAST, "--fast")
    assert code == 0
    expected = (
        "fits: peak", "local KV heads", "also valid: fsdp=2, tp=2; tp=4", "What limits it: compute", "763", "spot",
        "489,717,760 parameters", "is not here", "4N + 6L + 3A + 4VD", "assumptions",
    )  # fmt: skip
    assert not [words for words in expected if words not in out]


@pytest.mark.parametrize("words, told", [
    (["--on", "v5p-6"], "v5p-8 is 4 chips"),
    (["--on", "v6e-8"], "mesh: fsdp=4 x tp=1 = 4, but there are 8 devices"),
    (["mesh.fsdp=1", "mesh.tp=8", "--on", "v6e-8"], "valid tp: 1, 2, 4"),
    (["model.path=models/nobody"], "no published size"),
    (["data.max_seq_len=300000"], "262144 positions"),
    (["--full"], "--fast and --full"),
    (["--compile"], "--fast and --compile"),
])  # fmt: skip
def test_a_wrong_plan_is_one_message_and_exit_code_2(run, words, told):
    code, out, err = run(FAST, "--fast", *words)
    assert (code, out) == (2, "") and told in err


def test_a_config_that_names_no_slice_is_asked_for_one(run, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(Path(FAST).read_text())
    code, _, err = run(file, "--fast")
    assert code == 2 and "--on SLICE" in err and "v5p-8" in err and "v6e-4" in err


def test_a_checkpoint_that_is_here_is_read_and_not_guessed(tiny):
    folder = tiny()
    found = subject.find_model(str(folder))
    assert found.config == json.loads((folder / "config.json").read_text())
    assert found.architecture.hidden == found.config["text_config"]["hidden_size"]


def test_the_slice_is_the_one_asked_for_before_the_one_that_is_here_before_the_one_in_the_name(monkeypatch):
    assert subject.find_slice(None, FAST)[0].name == "v5p-8"
    monkeypatch.setattr(subject, "_attached", lambda: chips.find("v6e-4"))
    assert subject.find_slice(None, FAST)[0].name == "v6e-4"
    assert subject.find_slice("v5e-8", FAST)[0].name == "v5e-8"


# --- which activations to keep ---


@pytest.mark.parametrize("rows, on", [(4, "v5p-8"), (8, "v5p-8"), (12, "v5p-8"), (4, "v5e-16"), (4, "v6e-16")])
def test_auto_remat_leaves_a_tenth_free_and_has_no_room_for_more(rows, on):
    place = chips.find(on)
    chosen = config.load(FAST, [f"train.batch_size={rows}"])
    arch = subject.find_model(chosen.model.path).architecture
    mesh = {"fsdp": 4, "tp": place.devices // 4}
    policy, said = advice.choose_remat(arch, chosen, place, mesh)
    job = Job.of(chosen, mesh, remat=policy)
    room = 0.9 * place.chip.device_hbm_gib
    assert budget.memory(arch, job, place).total <= room
    kept = () if policy == "full" else policy
    for name in set(advice.names(job)) - set(kept):
        assert budget.memory(arch, job.change(remat=(*kept, name)), place).total > room, name
    assert said.startswith("remat auto: ") and on in said


def test_auto_remat_keeps_everything_where_memory_is_ample_or_not_known():
    chosen = config.load(FAST)
    arch = subject.find_model(chosen.model.path).architecture
    every = advice.NAMES
    assert advice.choose_remat(arch, chosen, chips.find("v5p-8"), {"fsdp": 4})[0] == every
    assert advice.choose_remat(arch, chosen, None, {"fsdp": 4})[0] == every
    full = config.load(FAST, ["train.method=full"])
    assert advice.choose_remat(arch, full, None, {"fsdp": 4})[0] == tuple(name for name in every if name != "lora_h")


@pytest.mark.parametrize("size, on, rows, rank, micro_batches, copied", [
    ("gemma4-e2b", "v6e-1", 8, 16, 8, False),  # fewer tokens at once: more of what they make stays on the chip
    ("gemma4-e2b", "h100x1", 8, 16, 2, False),  # no such thing on a GPU, and each micro-batch reads the weights anew
    ("gemma4-12b", "v5e-4", 8, 32, 8, True),  # tp=4 is faster though its one global KV head is held four times
    ("gemma4-31b", "v5p-8", 4, 64, 1, False),
])  # fmt: skip
def test_the_fastest_way_on_a_slice_is_that_of_the_compilers_schedules(size, on, rows, rank, micro_batches, copied):
    asked = config.load(FAST, [f"lora.rank={rank}", "train.accumulation=1", f"train.batch_size={rows}"])
    job = Job.of(asked, {}, "full")
    best = advice.best_on(sizes.architecture(size), job, chips.find(on))
    assert (best.job.accumulation, best.job.replicate_kv) == (micro_batches, copied)


def test_auto_remat_keeps_nothing_where_even_that_is_tight_and_says_so():
    chosen = config.load(FAST)
    arch = subject.find_model(chosen.model.path).architecture
    policy, said = advice.choose_remat(arch, chosen, chips.find("v5e-4"), {"fsdp": 4})
    assert policy == "full" and "does not fit" in said


def test_a_plan_takes_auto_as_train_does():
    made = analytic("train.remat=auto")
    assert made.job.remat == advice.NAMES and made.remat.startswith("remat auto: keeps q")


# --- advice ---


@pytest.mark.parametrize("on, overrides", [
    ("v5p-8", ["train.batch_size=16", "train.remat=[q,k,v,attention,o,gate,up,down,lora_h]"]),
    ("v5e-8", ["mesh.fsdp=8", "train.batch_size=8"]),
    pytest.param("v5p-8", ["train.batch_size=1024"], marks=pytest.mark.slow),
])  # fmt: skip
def test_what_is_advised_fits_when_it_is_done(on, overrides):
    made = analytic(*overrides, on=on)
    assert not made.fits and made.options
    for one in made.options:
        again = analytic(*overrides, *one.overrides(made.config, made.job), on=one.place.name)
        assert again.fits
        assert again.job == one.job
        assert again.job.rows * again.job.accumulation == made.job.rows * made.job.accumulation  # the same updates


def test_the_cheapest_change_comes_first_and_a_larger_slice_last():
    made = analytic("train.batch_size=16", "train.remat=[q,k,v,attention,o,gate,up,down,lora_h]")
    kinds = [one.kind for one in made.options]
    assert kinds[0] == "remat" and "accumulation" in kinds and "slice" not in kinds
    too_small = analytic(on="v5e-4")
    assert [one.kind for one in too_small.options] == ["int8", "slice", "slice"]
    assert "model.quantise=int8" in plan_text.render(too_small)
    assert {one.place.name for one in too_small.options} >= {"v5e-8"}
    assert "--on v5e-8" in plan_text.render(too_small)


@pytest.mark.parametrize("changes", [{"quantise": "nf4"}, {"method": "full"}], ids=str)
def test_an_int8_base_is_no_advice_for_a_base_that_trains_or_is_quantised(changes):
    model = subject.find_model("models/gemma-4-31B-it")
    job = Job.of(config.load(FAST), {"fsdp": 4}, "full").change(**changes)
    assert advice._with_int8(model.architecture, job, chips.find("v5e-4"), 1.0) == []


def test_a_plan_that_fits_is_told_what_is_faster_and_nothing_else():
    slow = analytic("train.remat=full")
    assert slow.fits and slow.options[0].overrides(slow.config, slow.job) == ["train.remat=auto"]
    assert slow.options[0].estimate.tokens_per_s > slow.estimate.tokens_per_s
    assert not analytic("train.remat=auto").options


def test_the_longest_row_and_the_largest_batch_are_the_last_that_fit():
    made = analytic("train.remat=auto")
    arch, place, job = made.subject.architecture, made.place, made.job
    assert budget.memory(arch, job.change(tokens=made.longest_sequence), place).fits
    assert not budget.memory(arch, job.change(tokens=made.longest_sequence + 128), place).fits
    assert budget.memory(arch, job.change(rows=made.largest_batch), place).fits
    assert not budget.memory(arch, job.change(rows=made.largest_batch + 4), place).fits


# --- how long the run is ---


def test_rows_that_are_here_are_counted_as_train_counts_them(base32, tmp_path):
    chosen = run_config(base32, tmp_path / "run", "train.epochs=2")
    rows = prepare(chosen.data, Tokenizer(base32))
    loader = make_loader(rows, max_seq_len=256, packing="pack", batch_size=8, accumulation=2, seed=0, epochs=2)
    found = workload(chosen)
    assert found.counted and found.steps == len(loader) and found.padding == loader.padding_share
    positions = found.steps * 8 * 256
    assert found.tokens == pytest.approx(positions * (1 - loader.padding_share), abs=1)


def test_rows_without_a_tokenizer_are_estimated_and_it_says_so(base32, tmp_path):
    counted = workload(run_config(base32, tmp_path / "a", "train.epochs=1", "data.limit=400"))
    guessed = workload(run_config("models/nobody", tmp_path / "b", "train.epochs=1", "data.limit=400"))
    assert not guessed.counted and "no tokenizer" in guessed.told
    assert 0.2 < guessed.steps / counted.steps < 5


def test_rows_that_are_not_here_leave_the_length_to_steps_or_open(tmp_path):
    far = ["data.path=data/nobody.jsonl", "data.transform=null"]
    assert workload(config.load(FAST, [*far, "train.steps=50"])).steps == 50
    made = analytic(load=workload(config.load(FAST, far)))
    assert made.hours is None and made.usd(made.place.usd) is None and made.usd_per_million > 0
    assert "data/nobody.jsonl is not here" in plan_text.render(made)


# --- calibration ---


def write_run(folder: Path, step_s: float, steps: int = 20, **recorded: object) -> Path:
    """A run of the shipped 31B config that took `step_s` an update, and much more for the first ones."""
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml(config.load(FAST)))
    rows = [{"step": n, "tokens": 16_000 + n, "tokens_per_s": (16_000 + n) / (step_s * (30 if n < 3 else 1))}
            for n in range(steps)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(recorded))
    return folder


def test_a_run_corrects_the_time_from_then_on_and_is_named(run, tmp_path, own_calibrations):
    before = analytic()
    folder = write_run(tmp_path / "run", 2 * before.step_s, device_kind="TPU v5", devices=4)
    code, out, err = run("--calibrate", folder, "--fast", "--json")
    assert code == 0 and json.loads(out)["calibrated_by"][0]["ratio"] == pytest.approx(0.5, abs=1e-3)
    after = analytic()
    assert after.step_s == pytest.approx(2 * before.step_s, rel=1e-3)
    assert after.mfu == pytest.approx(before.mfu / 2, rel=1e-3)
    assert f"calibrated by {folder} x0.50" in plan_text.render(after) and "763" not in plan_text.render(after)
    assert analytic("mesh.fsdp=4", on="v6e-4").calibration is None  # another chip
    assert own_calibrations.exists()


def test_calibrations_are_kept_where_the_variables_say(monkeypatch, tmp_path):
    assert calibrations.file() == tmp_path / "calibration.json"
    monkeypatch.delenv(calibrations.VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert calibrations.file() == tmp_path / "xdg" / "gemma_tpu" / "calibration.json"


@pytest.mark.parametrize("recorded, more, told", [
    ({}, [], "give --on SLICE"),
    ({"device_kind": "cpu", "devices": 4}, [], "no known slice"),
    ({"device_kind": "TPU v5", "devices": 4}, ["--on", "v6e-4"], "calibrates that alone"),
])  # fmt: skip
def test_a_run_that_does_not_tell_its_slice_calibrates_nothing(run, tmp_path, own_calibrations, recorded, more, told):
    folder = write_run(tmp_path / "run", 2.0, **recorded)
    code, _, err = run("--calibrate", folder, "--fast", *more)
    assert code == 2 and told in err and not own_calibrations.exists()


def test_a_run_too_short_for_a_median_is_refused(run, tmp_path):
    folder = write_run(tmp_path / "run", 2.0, steps=6, device_kind="TPU v5", devices=4)
    code, _, err = run("--calibrate", folder, "--fast")
    assert code == 2 and "3 updates after the first 3" in err


@pytest.mark.parametrize("text", ["{", "[{}]", '[{"chip": "v5p"}]'])
def test_a_broken_calibration_file_is_named_and_not_ignored(run, own_calibrations, text):
    own_calibrations.write_text(text)
    code, _, err = run(FAST, "--fast")
    assert code == 2 and str(own_calibrations) in err


# --- the compiler ---


def test_train_and_plan_lower_the_same_program(base32, tmp_path, monkeypatch):
    """Both in one process, on the same four devices, from the same config: the text of the modules is the same."""
    held = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer: held.append(trainer) or {"steps": 0})
    chosen = run_config(base32, tmp_path / "run")
    train(chosen)
    trainer = held.pop()
    trained = trainer.program.lower(trainer.state, trainer.program.place(trainer.loader[0]))

    monkeypatch.setattr(compiling, "devices", lambda topology, slices: jax.devices())
    monkeypatch.setattr(program.Program, "compile", lambda self, lowered, more=None: held.append(lowered))
    compiling.main({
        "config": config.to_dict(chosen), "topology": "", "slices": 1, "mesh": {"fsdp": 2, "tp": 2},
        "folder": str(tmp_path),
        "architecture": json.loads((base32 / "config.json").read_text()), "remat": chosen.train.remat,
        "total_steps": trainer.loader.total_steps,
    })  # fmt: skip
    (planned,) = held
    assert len(trained.as_text()) > 10_000
    assert planned.as_text() == trained.as_text()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_the_tpu_compiler_says_memory_and_time_of_a_tiny_step(run, base16, tmp_path):
    file = tmp_path / "tiny_v5e1.yaml"
    run_config(base16, tmp_path / "run")
    file.write_text((tmp_path / "run.yaml").read_text())
    words = [file, "mesh.fsdp=1", "mesh.tp=1", "model.dtype=bfloat16", "train.remat=full"]
    dump, html = tmp_path / "dump", tmp_path / "plan.html"
    code, out, _ = run(*words, "--json", "--dump", dump, "--html", html)
    found = json.loads(out)
    assert code == 0 and (found["slice"], found["basis"], found["fits"]) == ("v5e-1", "schedule", True)
    assert 0 < found["peak_gib_per_chip"] < 1 and found["compile_s"] > 0
    assert 0 < found["step_s"] == pytest.approx(sum(found["time_s"].values()))
    assert found["costs"] and found["costs"][0]["seconds"] > 0
    assert list(dump.glob("*after_optimizations*"))
    assert "by the compiler" in " ".join(check(html.read_text()).words)
    code, _, err = run(*words, "--dump", dump)
    assert code == 2 and "new or empty" in err


def compiled(made: plan.Plan, peak_gib: float) -> plan.Plan:
    return replace(made, compilation=plan.Compilation(1.0, peak_gib, made.limit_gib, None, None))


def test_the_compilers_word_on_memory_goes_over_the_arithmetic():
    made = analytic("train.remat=auto")
    refused = compiled(made, 97.74)
    assert made.fits and not refused.fits
    assert "DOES NOT FIT: peak 97.7 of 95.73 GiB a chip, by the compiler's word" in plan_text.render(refused)
    options = list(plan._options(refused))
    # What is advised then takes the arithmetic for as wrong as it has proved to be.
    assert options and all(one.memory.total * refused.memory_bias <= made.limit_gib for one in options)


def test_an_out_of_memory_of_the_compiler_is_a_plan_and_not_a_failure(monkeypatch):
    answer = compiling.Compiled(Path("nowhere"), 20.0, needs_gib=97.74, limit_gib=95.73)
    monkeypatch.setattr(compiling, "compile_for", lambda *args, **more: answer)
    chosen = config.load(FAST, ["train.remat=auto"])
    model = subject.find_model(chosen.model.path)
    made = plan.make(chosen, FAST, chips.find("v5p-8"), model, NO_ROWS, say=lambda text: None)
    found = plan.to_json(made)
    assert (found["fits"], found["peak_gib_per_chip"], found["basis"]) == (False, 97.74, "analytic")
    assert found["advice"] and found["compile_s"] == 20.0


def fake_dump(folder: Path) -> None:
    """A schedule and a buffer assignment of one small copy, as the compiler leaves them."""
    stem = "module_0001.jit_train_step.cl_1"
    (folder / f"{stem}.after_optimizations_after_buffer_assignment.txt").write_text(hlo_helper.text(
        "%main (x: f32[1000,1000]) -> f32[1000,1000] {\n  %x = f32[1000,1000]{1,0:T(8,128)} parameter(0)\n"
        "  ROOT %c = f32[1000,1000]{1,0:T(8,128)} copy(%x)\n}", partitions=4))  # fmt: skip
    (folder / f"{stem}.after_optimizations-buffer-assignment.txt").write_text(
        "allocation 0: size 4194304, page 0, parameter 0, shape |f32[1000,1000]| at ShapeIndex {}:\n"
        " value: <0 x @0> (size=4194304,offset=0): f32[1000,1000]{1,0:T(8,128)}\n"
    )


@pytest.fixture
def compilers(monkeypatch):
    """What the compiler was asked for, in place of asking it."""
    asked = []

    def compile_for(config, topology, mesh, folder, **more):
        asked.append((topology, mesh))
        folder.mkdir(parents=True, exist_ok=True)
        fake_dump(folder)
        return compiling.Compiled(folder, 12.0)

    monkeypatch.setattr(compiling, "compile_for", compile_for)
    return asked


def planned(say: list[str], *overrides: str, **more: object) -> plan.Plan:
    chosen = config.load(FAST, overrides)
    model = subject.find_model(chosen.model.path)
    return plan.make(chosen, FAST, chips.find("v5p-8"), model, NO_ROWS, say=say.append, suggest=False, **more)


def test_what_the_compiler_said_is_kept_and_it_is_not_asked_again(compilers, tmp_path):
    said: list[str] = []
    first, second = planned(said), planned(said)
    assert len(compilers) == 1 and said[0].startswith("compiling") and "as the compiler had it on 20" in said[1]
    assert second.compilation.kept and not first.compilation.kept
    assert replace(second.compilation, kept=None) == first.compilation and first.walk.costs and first.step_s > 0
    assert json.loads(json.dumps(plan.to_json(second))) == json.loads(json.dumps(plan.to_json(first)))
    assert ", on 20" in plan_text.render(second)
    planned(said, "lora.rank=32")  # another program
    planned(said, full=True)  # another question
    planned(said, dump=tmp_path / "dump")  # who wants the compiler's files gets them
    assert len(compilers) == 4 and list((tmp_path / "dump").glob("*buffer_assignment.txt"))


@pytest.mark.parametrize("thing", ["_versions", "_code"])
def test_another_compiler_or_another_code_is_asked_anew(compilers, monkeypatch, thing):
    said: list[str] = []
    planned(said)
    monkeypatch.setattr(compilation, thing, lambda *_: "other")
    planned(said)
    assert len(compilers) == 2


def test_where_it_cannot_be_kept_the_answer_is_given_all_the_same(compilers, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compilation.VARIABLE, str(tmp_path / "file" / "plans"))
    said: list[str] = []
    made = planned(said)
    assert made.walk and any("is not kept" in line and compilation.VARIABLE in line for line in said)


@pytest.mark.parametrize("text", ["{", "{}", '{"date": "x", "compilation": {"memory": {"largest": []}, "walk": null}}'])
def test_a_kept_answer_that_is_broken_is_named(compilers, text):
    planned([])
    (file,) = compilation.folder().iterdir()
    file.write_text(text)
    with pytest.raises(UserError, match=f"{file.name}.*remove it"):
        planned([])


@pytest.mark.parametrize("ends, told", [
    ("kill -9 $$", "ended by SIGKILL: most often because this machine's memory was full"),
    ("echo Traceback; echo 'ValueError: no'; exit 1", "the compiler stopped: ValueError: no; --dump DIR"),
    ("exit 1", "the compiler stopped: no output"), ("sleep 30", "needed more than 1 s"),
])  # fmt: skip
def test_a_compiler_that_ends_without_an_answer_is_one_message(monkeypatch, tmp_path, ends, told):
    child = tmp_path / "python"
    child.write_text(f"#!/bin/sh\n{ends}\n")
    child.chmod(0o755)
    monkeypatch.setattr(compiling.sys, "executable", str(child))
    with pytest.raises(RunError, match=told):
        compiling.compile_for({}, "v5p:2x2x1", {}, tmp_path / "dump", architecture={}, remat="full", total_steps=1,
                              timeout=1.0 if "sleep" in ends else 60.0)  # fmt: skip


# --- many slices, and pages ---


def test_an_interrupted_sweep_goes_on_and_a_slice_that_fails_is_a_row_that_says_why(compilers, monkeypatch):
    def sweep_all(say: list[str]) -> list[sweep.Row]:
        chosen = config.load(FAST)
        model = subject.find_model(chosen.model.path)
        return sweep.sweep(chosen, FAST, model, NO_ROWS, compiled=True, dump=None, say=say.append)

    monkeypatch.setattr(sweep, "SLICES", ("v5p-8", "v5p-16", "v6e-4", "h100x8"))
    real = compiling.compile_for

    def stop(config, topology, *rest, **more):
        if topology == "v5p:2x2x2":
            raise KeyboardInterrupt
        return real(config, topology, *rest, **more)

    monkeypatch.setattr(compiling, "compile_for", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep_all([])

    def fail(config, topology, *rest, **more):
        if topology == "v6e:2x2":
            raise RunError("the compiler was ended by SIGKILL")
        return real(config, topology, *rest, **more)

    monkeypatch.setattr(compiling, "compile_for", fail)
    said: list[str] = []
    rows = {row.place.name: row for row in sweep_all(said)}
    assert [topology for topology, _ in compilers] == ["v5p:2x2x1", "v5p:2x2x2"]
    assert "as the compiler had it" in said[0] and any(line.startswith("2 of 4: compiling") for line in said)
    assert [row.basis for row in rows.values()] == ["schedule", "schedule", "analytic", "roofline"]
    assert "note: v6e-4: not compiled: the compiler was ended by SIGKILL" in sweep.render(list(rows.values()), NO_ROWS)


@pytest.fixture(scope="module")
def swept():
    chosen = config.load(FAST)
    model = subject.find_model(chosen.model.path)
    return sweep.sweep(chosen, FAST, model, NO_ROWS, compiled=False, dump=None, say=print)


def test_a_sweep_has_every_slice_and_marks_gpus_as_roofline(swept):
    rows = {row.place.name: row for row in swept}
    assert set(rows) == set(sweep.SLICES)
    marked = {name for name, row in rows.items() if row.basis == "roofline"}
    assert marked == {"h100x1", "h100x8", "h200x1", "h200x8", "b200x1", "b200x8"}
    assert rows["v5p-8"].fits and not rows["v6e-1"].fits  # 31B in bfloat16 is 57 GiB
    text = sweep.render(swept, NO_ROWS)
    assert all(name in text for name in sweep.SLICES) and "predicted" in text


def test_each_row_of_a_sweep_does_the_same_updates_and_costs_what_its_hours_cost(swept):
    for row in filter(lambda one: one.fits, swept):
        found = sweep.row_json(row)
        assert row.plan.job.rows * row.plan.job.accumulation == 4
        assert found["hours"] == pytest.approx(572 * found["step_s"] / 3600)
        if row.place.usd:
            assert found["usd"] == pytest.approx(found["hours"] * row.place.usd)


def test_the_page_of_a_plan_draws_nothing_as_measured_unless_a_run_was(swept, run, tmp_path):
    made = analytic()
    text = plan_page.page_of(made, swept)
    words = " ".join(check(text).words)
    for heading in ("Memory of a chip", "Roofline", "Throughput against the batch", "Cost", "What limits it"):
        assert heading in words
    marks = [one["class"] for tag in ("rect", "circle") for one in drawn(text, tag)]
    assert marks and not [mark for mark in marks if "measured" in mark]
    run("--calibrate", write_run(tmp_path / "run", 3.0, device_kind="TPU v5", devices=4), "--fast")
    after = plan_page.page_of(analytic(), swept)
    assert sum("measured" in one["class"] for one in drawn(after, "rect")) == 1


def test_the_page_of_a_sweep_names_what_does_not_fit(swept):
    words = " ".join(check(plan_page.sweep_page("mine.yaml", swept, NO_ROWS)).words)
    assert "does not fit" in words and "(roofline)" in words


def test_a_page_that_cannot_be_written_is_the_users_error(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run(FAST, "--fast", "--html", tmp_path / "file" / "plan.html")
    assert code == 2 and "cannot be written" in err


def test_unknown_slices_are_user_errors_everywhere():
    with pytest.raises(UserError, match="nearest"):
        analytic(on="v5p-9")
