"""Whole runs by the shipped recipe: what they leave, and that a stop in the middle changes nothing."""

import json
import logging
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from runs_helper import (
    KEYS,
    SLOW_RECIPE,
    STEPS,
    assert_same_run,
    comparable,
    files,
    losses,
    one_device,
    rows,
    run,
    run_and_signal,
    run_config,
    train,
    write_config,
)  # fmt: skip

from gemma_tpu import config
from gemma_tpu.errors import RunError
from gemma_tpu.run import metrics
from gemma_tpu.training.train import Trainer

# --- one run ------------------------------------------------------------------------------------------------


def test_a_short_run_learns_and_leaves_what_the_contract_says(whole_run):
    found = rows(whole_run)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert all(row.keys() >= KEYS for row in found)
    assert np.mean(losses(whole_run)[-2:]) < losses(whole_run)[0] - 0.5
    assert all(0 < row["target_tokens"] < row["tokens"] and row["grad_norm"] > 0 for row in found)
    assert (whole_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert config.load(whole_run / "config.yaml").run_dir == str(whole_run)
    assert sorted(path.name for path in (whole_run / "checkpoints").iterdir()) == ["3", "6", "8"]


def test_the_summary_agrees_with_the_journal_and_the_held_out_loss_falls(held_out_run):
    summary = json.loads((held_out_run / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["tokens"] == sum(row["tokens"] for row in rows(held_out_run))
    assert summary["target_tokens"] == sum(row["target_tokens"] for row in rows(held_out_run))
    held_out = summary["held_out_loss"]
    assert held_out.keys() == {"0", str(STEPS)} and held_out[str(STEPS)] < held_out["0"] - 0.5


def test_the_learning_rate_warms_up_and_falls_as_the_config_says(whole_run):
    rates = [row["lr"] for row in rows(whole_run)]
    assert rates[0] == pytest.approx(0.005) and max(rates) == pytest.approx(0.01)
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 0.002


def test_the_train_step_compiles_once_and_refuses_another_batch_shape(
    base32, tmp_path, monkeypatch, caplog
):
    kept = {}
    compile_step = Trainer.compile

    def keep(self, batch):
        kept["trainer"], kept["batch"] = self, batch
        kept["compiled"] = compile_step(self, batch)
        return kept["compiled"]

    monkeypatch.setattr(Trainer, "compile", keep)
    for name in ("jax", "jax._src.dispatch"):  # the command line keeps them quiet
        caplog.set_level(logging.WARNING, logger=name)
    with jax.log_compiles():
        train(run_config(base32, tmp_path / "run"))
    compiled = [message for message in caplog.messages if "Finished XLA compilation" in message]
    assert sum("train_step" in message for message in compiled) == 1, compiled

    trainer = kept["trainer"]
    shorter = {name: leaf[..., :128] for name, leaf in kept["batch"].items()}
    with jax.set_mesh(trainer.mesh), pytest.raises(TypeError, match="compiled"):
        kept["compiled"](trainer.state, trainer.parts.frozen, trainer.program.place(shorter))


@pytest.mark.slow
def test_a_bucketed_run_compiles_once_for_each_length_before_it_starts(base32, tmp_path, caplog, capsys):
    for name in ("jax", "jax._src.dispatch"):
        caplog.set_level(logging.WARNING, logger=name)
    with jax.log_compiles():
        train(run_config(base32, tmp_path / "run", "data.packing=bucket", "data.max_seq_len=512"))
    compiled = [message for message in caplog.messages if "Finished XLA compilation" in message]
    summary, said = json.loads((tmp_path / "run" / "summary.json").read_text()), capsys.readouterr().err
    lengths = summary["lengths"]
    assert len(lengths) > 1 and lengths[-1] < 512, "and none for rows that are not there"
    assert sum("train_step" in message for message in compiled) == len(lengths), compiled
    told = [rf"compiled the train step once, for batches of 2x4x{length}, in" for length in lengths]
    assert all(len(re.findall(line, said)) == 1 for line in told)
    assert said.rindex("compiled the train step once") < said.index("step     1/")
    assert f"{', '.join(map(str, lengths))} tokens a row, each length compiled once" in said
    assert np.mean(losses(tmp_path / "run")[-2:]) < losses(tmp_path / "run")[0] - 0.3
    assert f"the steps waited for data {summary['data_wait_share']:.2%} of their time" in said


def test_the_time_that_steps_wait_for_data_is_measured(whole_run):
    assert all(0 <= row["data_wait"] <= 1 for row in rows(whole_run))
    assert 0 <= json.loads((whole_run / "summary.json").read_text())["data_wait_share"] < 0.2


# --- resume -------------------------------------------------------------------------------------------------


def test_a_run_whose_last_checkpoint_is_gone_comes_out_bit_for_bit_the_same(whole_run, base32, tmp_path):
    """Dropout, two micro-batches and the packed data are on: all of them must go on where they stood."""
    shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    train(run_config(base32, tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole_run)


def test_sigterm_saves_says_how_to_resume_and_costs_nothing(base32, whole_run, tmp_path, monkeypatch):
    """SIGINT, from outside, is below."""
    write, number = metrics.Journal.write, signal.SIGTERM
    before = signal.getsignal(number)

    def write_and_signal(self, row):
        write(self, row)
        if row["step"] == 4:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(metrics.Journal, "write", write_and_signal)
        with pytest.raises(RunError) as stopped:
            train(run_config(base32, tmp_path / "run"))
    at = int(re.search(rf"stopped by {number.name} after step (\d) of {STEPS}", str(stopped.value))[1])
    assert at == 5, "the row of step 4 is written while step 5 runs, and no further step may start"
    assert "Run the same command again" in str(stopped.value)
    assert f"checkpoints/{at}." in str(stopped.value)
    assert (tmp_path / "run" / "checkpoints" / str(at)).is_dir()
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert signal.getsignal(number) == before, "the handlers are put back"

    train(run_config(base32, tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole_run)


def test_a_second_interrupt_ends_at_once(base32, tmp_path, monkeypatch):
    def interrupt_twice(self, row):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(metrics.Journal, "write", interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        train(run_config(base32, tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]"))


@pytest.fixture(scope="module")
def interrupted(base32, tmp_path_factory):
    """A run on one device in its own process that got SIGINT in the middle: (folder, exit code, stderr)."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "slow.py").write_text(SLOW_RECIPE)
    file = write_config(folder / "run.yaml", base32, folder / "run")
    args = one_device(file, f"recipe={folder / 'slow.py'}")
    code, stderr = run_and_signal(args, signal.SIGINT, folder / "run" / "metrics.jsonl", after=2)
    return folder / "run", code, stderr


def test_ctrl_c_on_the_command_line_exits_with_1_and_a_message(interrupted):
    run_dir, code, stderr = interrupted
    assert code == 1, stderr
    assert "Traceback" not in stderr
    where = rf"{run_dir}/checkpoints/\d"
    assert re.search(rf"error: stopped by SIGINT after step \d of {STEPS}; saved in {where}", stderr)
    assert 2 <= len(rows(run_dir)) < STEPS


def test_the_same_command_goes_on_in_a_new_process_to_the_same_bytes(
    interrupted, one_device_run, base32, tmp_path
):
    shutil.copytree(interrupted[0], tmp_path / "run")
    finished = run(one_device(write_config(tmp_path / "run.yaml", base32, tmp_path / "run")))
    assert finished.returncode == 0, finished.stderr
    assert "resumed at step" in finished.stderr
    assert_same_run(tmp_path / "run", one_device_run)


def test_a_run_goes_on_on_another_mesh_with_the_same_losses(interrupted, whole_run, base32, tmp_path):
    """Started on one device, finished on 2x2; dropout draws the same whatever the mesh."""
    shutil.copytree(interrupted[0], tmp_path / "run")
    before = comparable(tmp_path / "run")
    train(run_config(base32, tmp_path / "run"))
    assert comparable(tmp_path / "run")[: len(before)] == before
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole_run), rtol=1e-5)


def test_a_complete_run_says_so_and_changes_nothing(whole_run, base32, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path / "run")
    before = files(tmp_path / "run")
    summary = train(run_config(base32, tmp_path / "run"))
    assert "is complete (8 updates)" in capsys.readouterr().err
    assert summary["steps"] == STEPS
    after = files(tmp_path / "run")
    assert before.pop("config.yaml") != after.pop("config.yaml"), "which names the folder that the run now lies in"
    assert after == before


def test_a_run_that_was_killed_before_its_summary_gets_one(whole_run, base32, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "loss.png").unlink()
    train(run_config(base32, tmp_path / "run"))
    assert (tmp_path / "run" / "summary.json").exists() and (tmp_path / "run" / "loss.png").exists()
    assert_same_run(tmp_path / "run", whole_run)


def test_a_killed_run_goes_on_from_its_last_checkpoint(whole_run, base32, tmp_path):
    """kill -9: half a line in the journal and a checkpoint that was being written."""
    shutil.copytree(whole_run, tmp_path / "run")
    for name in ("6", "8"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    half = tmp_path / "run" / "checkpoints" / "6.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "leftover").write_text("x")
    journal = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(journal[:5]) + journal[5][:30])
    train(run_config(base32, tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole_run)
    assert not half.exists()
