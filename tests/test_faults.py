"""Faults: an update that is no number is not applied, counted and named; too many stop the run; the rest is said."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs_helper import STEPS, rows, run_config, train

from gemma_tpu.data import batches
from gemma_tpu.errors import RunError
from gemma_tpu.gemma import sizes
from gemma_tpu.hardware import chips
from gemma_tpu.run import metrics
from gemma_tpu.schema import Config, FaultsConfig
from gemma_tpu.step import step
from gemma_tpu.training import faults, oom

ROWS = ["a.jsonl:1", "a.jsonl:7"]


def row(number: int, loss: float = 1.0, norm: float = 1.0, skipped: int = 0) -> dict:
    return {"step": number, "loss": loss, "grad_norm": norm, "skipped": skipped, "lr": 1e-3, "tokens": 10,
            "target_tokens": 4}  # fmt: skip


def watch(start: int = 0, **section) -> faults.Watch:
    return faults.Watch(FaultsConfig(**section), lambda _: ROWS, start)


# --- on the device ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_unsound_update_leaves_every_bit_but_the_counters(bad):
    old = {"w": jnp.arange(4.0), "mu": jnp.ones(3, jnp.bfloat16), "sum": jnp.float32(2), "codes": jnp.arange(3)}
    new = {"w": jnp.full(4, bad), "mu": jnp.full(3, bad, jnp.bfloat16), "sum": jnp.float32(bad)}
    old, new = old | {"count": jnp.int32(5)}, new | {"count": jnp.int32(6), "codes": old["codes"] + 1}
    kept = jax.jit(step.keep_if_unsound)(jnp.isfinite(jnp.float32(bad)), new, old)
    for name in ("w", "mu", "sum", "codes"):
        assert np.asarray(kept[name]).tobytes() == np.asarray(old[name]).tobytes()
    assert kept["count"] == 6, "the schedule stays that of the step"
    taken = jax.jit(step.keep_if_unsound)(jnp.bool_(True), old, new)
    assert np.asarray(taken["w"]).tobytes() == np.asarray(old["w"]).tobytes()


@pytest.fixture
def poisoned(monkeypatch):
    """poisoned(steps): the weights of these steps' batches are no numbers, as a broken row would make the loss."""
    serve = batches.Loader.__getitem__

    def poison(wanted: set[int]) -> None:
        def spoilt(self, index: int):
            batch = serve(self, index)
            if index + 1 in wanted:
                batch["weights"] = np.full_like(batch["weights"], np.nan)
            return batch

        monkeypatch.setattr(batches.Loader, "__getitem__", spoilt)

    return poison


def test_a_run_goes_on_over_an_update_that_is_no_number(base32, whole_run, tmp_path, poisoned, capsys):
    poisoned({4})
    summary = train(run_config(base32, tmp_path / "run"))
    found = rows(tmp_path / "run")
    assert [one["skipped"] for one in found] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert found[3]["loss"] is None, "JSON has no NaN"
    assert [one["loss"] for one in found[:3]] == [one["loss"] for one in rows(whole_run)[:3]]
    assert all(one["loss"] < found[0]["loss"] for one in found[4:])
    assert [one["lr"] for one in found] == [one["lr"] for one in rows(whole_run)]
    assert summary["skipped"] == 1 and summary["recompiled"] == 0 and summary["steps"] == STEPS
    warning = metrics.read(tmp_path / "run" / "warnings.jsonl")[0]
    assert warning["kind"] == "skipped" and warning["step"] == 4
    assert warning["rows"] and all(name.startswith("train.jsonl:") for name in warning["rows"])
    assert "warning: the loss of step 4 is no number" in capsys.readouterr().err
    assert "the loss of step 4 is no number" in (tmp_path / "run" / "report.html").read_text()


def test_too_many_in_a_row_stop_the_run_with_a_diagnosis_and_the_last_checkpoint(
    base32, tmp_path, poisoned
):
    poisoned({4, 5, 6, 7, 8})
    message = "3 updates in a row gave a loss or gradient that is no number, up to step 6"
    with pytest.raises(RunError, match=message) as at:
        train(run_config(base32, tmp_path / "run", "faults.skips=3"))
    assert "optim.lr too high" in str(at.value) and "the last good checkpoint is step 3" in str(at.value)
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()


# --- what is said -------------------------------------------------------------------------------------------


def test_a_sound_run_says_nothing():
    judge = watch()
    assert not any(judge.see(row(number, loss=3.0 - number / 100)) for number in range(1, 200))
    assert not judge.must_stop


def test_a_skipped_step_names_its_rows_and_only_those_in_a_row_stop():
    judge = watch(skips=2)
    assert "a.jsonl:1, a.jsonl:7" in judge.see(row(1, float("nan"), float("nan"), 1))[0].text
    judge.see(row(2))
    assert "the gradient of step 3" in judge.see(row(3, 1.0, float("inf"), 1))[0].text
    assert not judge.must_stop and judge.skipped == 2
    judge.see(row(4, float("nan"), 1.0, 1))
    assert judge.must_stop


def test_a_spike_of_the_gradient_is_said_with_how_far_it_is_from_the_usual():
    judge = watch(spike=10.0)
    for number in range(1, 31):
        assert not judge.see(row(number, norm=2.0 + number % 3))
    found = judge.see(row(31, norm=90.0))
    assert [one.kind for one in found] == ["spike"] and "30 times the usual 3" in found[0].text
    assert not judge.see(row(32, norm=29.0))


def test_a_loss_that_does_not_fall_is_pointed_out_once_and_not_in_a_continued_run():
    judge, continued = watch(), watch(start=100)
    found = [notice for number in range(1, 200) for notice in judge.see(row(number, loss=2.0))]
    assert [one.kind for one in found] == ["flat"] and found[0].step == faults.LOOK_AT
    assert all(word in found[0].text for word in ("optim.lr", "data.train_on", "chat template", "40%"))
    assert not any(continued.see(row(number, loss=2.0)) for number in range(101, 300))


# --- memory -------------------------------------------------------------------------------------------------


def test_out_of_memory_becomes_advice_and_other_errors_pass():
    class Mesh:
        devices = np.array(jax.devices()[:1])
        size, shape = 1, {"data": 1}

    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    with pytest.raises(RunError, match="out of memory: RESOURCE_EXHAUSTED") as said:
        with oom.explained(Config(), None, Mesh):
            raise error
    assert "train.remat=full" in str(said.value) and "train.accumulation=2" in str(said.value)
    with pytest.raises(ZeroDivisionError), oom.explained(Config(), None, Mesh):
        raise ZeroDivisionError


def test_on_a_known_chip_the_advice_is_the_planners():
    default = Config()
    config = replace(
        default, model=replace(default.model, dtype="bfloat16"), data=replace(default.data, max_seq_len=4096),
        train=replace(default.train, batch_size=16, remat="none"),
    )  # fmt: skip
    mesh = {"fsdp": 4, "data": 1, "tp": 1, "expert": 1}
    lines = oom.changes(config, sizes.architecture("gemma4-31b"), mesh, chips.find("v5p-8"))
    assert any("train.remat=" in line for line in lines) and all("predicted peak" in line for line in lines)
