"""What one sees of a run: TensorBoard's files, the meter, early stopping, the best checkpoint, samples, the report."""

import json
import math
import shutil
import struct
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from runs_helper import STEPS, first_rows, rows, run_config, saved, train

from gemma_tpu import cli
from gemma_tpu.commands import train_cli
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.run import metrics
from gemma_tpu.run.checkpoint import Checkpoints, checksum
from gemma_tpu.run.runs import RunFolder
from gemma_tpu.training import tracing, trackers
from gemma_tpu.training.logbook import Logbook
from gemma_tpu.training.meter import Compilations, Meter, Rates
from gemma_tpu.training.tracing import Profile

# --- TensorBoard --------------------------------------------------------------------------------------------


def fields(data: bytes) -> list[tuple[int, object]]:
    """A protobuf message, read by the rules of its wire format."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            found.append((number, varint()))
        elif kind == 1:
            found.append((number, struct.unpack_from("<d", data, at)[0]))
            at += 8
        elif kind == 5:
            found.append((number, struct.unpack_from("<f", data, at)[0]))
            at += 4
        else:
            size = varint()
            found.append((number, data[at : at + size]))
            at += size
    return found


def events(folder: Path) -> list[dict]:
    found = []
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = data[at + 12 : at + 12 + length]
            assert data[at + 8 : at + 12] == trackers._masked(data[at : at + 8])
            assert data[at + 12 + length : at + 16 + length] == trackers._masked(event)
            found.append(dict(fields(event)))
            at += 16 + length
    return found


def test_the_checksum_is_crc32c():
    """RFC 3720, B.4, unmasked: 32 bytes of zeros, of ones, and 0 to 31."""
    for data, wanted in ((bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E)):
        (masked,) = struct.unpack("<I", trackers._masked(data))
        rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
        assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == wanted


def test_tensorboards_file_holds_every_figure_of_every_step(whole_run):
    found = events(whole_run / "tensorboard")
    assert found[0][3] == b"brain.Event:2"
    scalars = {(event[2], dict(fields(value))[1].decode()): dict(fields(value))[2]
               for event in found[1:] for _, value in fields(event[5])}  # fmt: skip
    for row in rows(whole_run):
        assert scalars[row["step"], "train/loss"] == pytest.approx(row["loss"], rel=1e-6)
        assert scalars[row["step"], "train/tokens_per_s"] == pytest.approx(row["tokens_per_s"], rel=1e-6)


def test_tensorboard_itself_reads_the_file(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    writer = trackers.TensorBoard(tmp_path)
    writer.scalars(7, {"train/loss": 1.5})
    writer.text(7, "sample", "ü text")
    writer.close()
    found = list(loader.EventFileLoader(str(next(tmp_path.iterdir()))).Load())
    assert found[1].step == 7 and found[1].summary.value[0].tag == "train/loss"
    assert found[2].summary.value[0].tensor.string_val[0].decode() == "ü text"


def test_a_tracker_that_is_not_installed_is_said(tmp_path):
    with pytest.raises(UserError, match=r"names trackio, which is not installed: pip install 'gemma_tpu\[trackio\]'"):
        trackers.open_trackers(tmp_path, False, ["trackio"], "p", {}, False)


def test_an_absent_tracker_is_said_before_anything_is_loaded(base32, tmp_path):
    run = run_config(base32, tmp_path / "run", "log.trackers=[trackio, wandb]")
    with pytest.raises(UserError, match=r"trackio and wandb, which are not installed: .*\[trackio,wandb\]"):
        train_cli.run(run, lambda config: pytest.fail("it has begun"), rehearse=True)


class Service:
    """W&B's four calls, which Trackio shares."""

    __spec__ = ModuleSpec("service", None)  # it is installed

    def __init__(self):
        self.begun, self.logged, self.finished, self.broken = {}, [], 0, False

    def init(self, **about):
        self.begun = about

    def log(self, values, step):
        if self.broken:
            raise ConnectionError("the service is\naway")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_a_tracker_has_the_figures_and_one_that_fails_costs_its_own_curve_alone(tmp_path, monkeypatch, capsys):
    service = Service()
    monkeypatch.setitem(sys.modules, "trackio", service)
    one, = trackers.open_trackers(tmp_path / "run", False, ["trackio"], "project", {"seed": 1}, True)
    assert service.begun == {"project": "project", "name": "run", "config": {"seed": 1}, "resume": "allow"}
    one.scalars(1, {"train/loss": 2.0})
    one.text(1, "sample/x", "text")
    assert service.logged == [(1, {"train/loss": 2.0}), (1, {"sample/x": "text"})]
    service.broken = True
    one.scalars(2, {"train/loss": 1.0})
    one.scalars(3, {"train/loss": 1.0})
    one.close()
    assert capsys.readouterr().err == "warning: trackio is left out from here on: the service is away\n"
    assert len(service.logged) == 2 and service.finished == 0


def test_a_continued_run_goes_on_in_its_curve_and_a_new_one_never_in_an_old_one(tmp_path, monkeypatch):
    begun = {}
    for name in ("trackio", "wandb"):
        monkeypatch.setitem(sys.modules, name, Service())
        begun[name] = []
        for continued in (False, True, False):
            trackers.open_trackers(tmp_path, False, [name], "project", {}, continued)
            begun[name].append(sys.modules[name].begun)
    assert [one["resume"] for one in begun["trackio"]] == ["never", "allow", "never"]
    first, second, third = (one["id"] for one in begun["wandb"])
    assert first == second != third


def test_lines_that_find_no_room_are_kept_and_written_when_there_is_some(tmp_path, capsys):
    class Disk:
        full = False

        def __init__(self, file):
            self._file = file

        def write(self, data):
            if self.full:
                raise OSError(28, "No space left on device")
            return self._file.write(data[:5])  # as much as there is room for

        def close(self):
            self._file.close()

    path = tmp_path / "metrics.jsonl"
    journal = metrics.Journal(path, 0)
    disk = journal._file._file = Disk(journal._file._file)
    journal.write({"step": 1})
    disk.full = True
    journal.write({"step": 2})
    journal.write({"step": 3})
    assert [row["step"] for row in metrics.read(path)] == [1]
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "metrics.jsonl cannot be written (No space left on device)" in said
    disk.full = False
    journal.write({"step": 4})
    assert [row["step"] for row in metrics.read(path)] == [1, 2, 3, 4]
    disk.full = True
    journal.write({"step": 5})
    journal.close()
    assert "the last 12 bytes could not be written" in capsys.readouterr().err


# --- the meter ----------------------------------------------------------------------------------------------


def test_the_meter_knows_mfu_padding_and_cost(monkeypatch):
    clock = iter([0.0, 10.0, 12.0, 20.0])
    monkeypatch.setattr("gemma_tpu.training.meter.time.monotonic", lambda: next(clock))
    meter = Meter(Rates(flops_per_token=1e6, peak_flops=1e9, usd_per_hour=3600.0), spent=5.0, paid_since=-30.0)
    meter.restart()
    found = meter.measure(tokens=1000, positions=1250, waited=0.5)  # 2 s
    assert found["tokens_per_s"] == 500.0 and found["mfu"] == 0.5
    assert found["padding"] == 0.2 and found["data_wait"] == 0.25
    assert found["usd"] == 5.0 + 30.0 + 12.0, "loading and compiling are paid for"
    meter.pause(6.0)  # a held-out loss
    assert meter.measure(1000, 1250, 0.0)["step_s"] == 2.0


def test_what_is_not_known_of_these_devices_is_left_out():
    found = Meter(Rates()).measure(10, 20, 0.0)
    assert not {"mfu", "usd", "memory_gib"} & found.keys() and found["host_gib"] > 0.01
    assert metrics.measured({"padding": 0.25, "usd": 1.5}) == "  padding 25%  $1.50"


def test_what_compiles_while_a_run_goes_on_is_counted_and_explained(capsys):
    import jax
    import jax.numpy as jnp

    @jax.jit
    def train_step(x):
        return x * 3 + 1

    log = Logbook.__new__(Logbook)  # its sense for compilations alone
    log._compilations, log._journals, log.recompiled = Compilations(), {}, 0
    try:
        train_step(jnp.ones(3))
        log._compilations.start()
        log._explain_compilations(6)
        assert log.recompiled == 0, "before the first step everything may compile"
        x = np.ones(4, np.float32)
        train_step(x)
        log._explain_compilations(7)
        train_step(x)
        log._explain_compilations(8)
    finally:
        log._compilations.stop()
    said = capsys.readouterr().err
    assert log.recompiled == 1 and said.count("warning") == 1
    assert "train_step) was compiled at step 7 in" in said and "a batch of another shape" in said


# --- checkpoints --------------------------------------------------------------------------------------------


def arrays():
    import jax.numpy as jnp

    return {"a": jnp.arange(6.0).reshape(2, 3)}, {"mu": jnp.ones(3), "count": jnp.int32(4)}


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path):
    writer = Checkpoints(tmp_path, keep=2, keep_best=1)
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)):
        writer.save(step, *arrays(), {"at": step}, loss)
    writer.close()
    reader = Checkpoints(tmp_path)
    assert reader.steps == [2, 4, 5]
    reader.close()


def test_a_checksum_sees_one_bit_and_two_that_change_places():
    trained, _ = arrays()
    whole = checksum(trained)
    other = {"a": trained["a"].at[0, 1].set(trained["a"][0, 1] * (1 + 2**-23))}
    swapped = {"a": trained["a"].at[0, 1].set(2.0).at[0, 2].set(1.0)}
    assert len({whole, checksum(other), checksum(swapped)}) == 3 and whole == checksum(arrays()[0])


def test_bits_that_are_not_those_that_were_saved_are_refused(tmp_path, monkeypatch):
    writer = Checkpoints(tmp_path, keep=2)
    writer.save(1, *arrays(), {"at": 1})
    writer.wait()
    load = writer._load
    spoil = {"trained": lambda tree: {"a": tree["a"] + 1}}
    monkeypatch.setattr(writer, "_load", lambda step, what: {
        name: spoil.get(name, lambda x: x)(value) for name, value in load(step, what).items()
    })
    with pytest.raises(RunError, match="the bits of trained are not those that were saved"):
        writer.restore(1, *arrays())
    writer.close()


def test_a_save_that_fails_is_tried_again_and_then_the_run_ends(tmp_path, monkeypatch, capsys):
    pauses: list[float] = []
    monkeypatch.setattr("gemma_tpu.run.checkpoint.time.sleep", pauses.append)
    writer, failures = Checkpoints(tmp_path, keep=2), [OSError(28, "No space left on device")] * 2
    save = Checkpoints.save

    def failing(self, step, *rest):
        if failures:
            raise self._failed_to_save(step, failures.pop())
        save(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", failing)
    writer.save_now(3, *arrays(), {"at": 3})
    assert writer.steps == [3] and pauses == [1.0, 2.0]
    assert "No space left on device; trying again in 1 s, attempt 2 of 3" in capsys.readouterr().err
    failures += [OSError(28, "No space left on device")] * 3
    with pytest.raises(RunError, match="the last good checkpoint is step 3"):
        writer.save_now(4, *arrays(), {"at": 4})
    writer.close()


def test_the_probe_leaves_nothing_and_says_what_is_wrong(tmp_path):
    writer = Checkpoints(tmp_path / "good", keep=2)
    record = {"shapes": {"a": [[2, 3], "float32"]}}
    (tmp_path / "good" / "probe").mkdir()  # of a run that was killed there
    writer.probe(*arrays(), record)
    assert writer.steps == [] and not (tmp_path / "good" / "probe").exists()
    shutil.rmtree(tmp_path / "good")
    (tmp_path / "good").write_text("in the way")
    with pytest.raises(RunError, match=r"checkpoints cannot be saved in [^\n]*\nnothing is trained yet"):
        writer.probe(*arrays(), record)


# --- a run with everything on -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(base32, tmp_path_factory):
    """Held-out rows every 2 steps at a rate so high that they get worse; a sample each time."""
    folder = tmp_path_factory.mktemp("watched")
    held = first_rows("bundled:tiny_verilog/validation.jsonl", 8, folder / "rows.jsonl")
    config = run_config(
        base32, folder / "run", f"data.validation={held}", "eval.every=2", "eval.patience=1", "optim.lr=3.0",
        "optim.clip=null", "eval.prompts=[Write a counter.]", "eval.max_new_tokens=4", "log.usd_per_hour=3600",
    )  # fmt: skip
    return config, train(config)


def test_training_stops_early_and_the_best_checkpoint_is_there(watched, capsys):
    config, summary = watched
    folder = Path(config.run_dir)
    losses = {int(at): loss for at, loss in summary["held_out_loss"].items()}
    best = min(losses, key=losses.get)
    assert summary["steps"] < STEPS and summary["best_step"] == best and max(losses) == summary["steps"]
    found = metrics.read(folder / "held_out.jsonl")
    assert [row["step"] for row in found] == sorted(losses)
    assert all(row["perplexity"] == pytest.approx(math.exp(min(row["loss"], 700))) for row in found)
    assert saved(folder, summary["steps"])
    assert best == 0 or (folder / "checkpoints" / str(best)).is_dir()
    assert summary["recompiled"] == 0, metrics.read(folder / "warnings.jsonl")
    assert train(config) == summary
    assert "is complete" in capsys.readouterr().err, "the same command does not train on"


def test_samples_are_made_before_and_on_the_way(watched):
    config, summary = watched
    found = metrics.read(Path(config.run_dir) / "samples.jsonl")
    assert [row["step"] for row in found] == list(range(0, summary["steps"] + 1, 2))
    assert {row["prompt"] for row in found} == {"Write a counter."} and all(row["text"] for row in found)


def test_the_report_shows_what_the_run_folder_knows(watched, capsys):
    config, summary = watched
    page = Path(config.run_dir) / "report.html"
    text = page.read_text()
    for wanted in ("Held-out loss", "Write a counter.", "tokens/s", "lora.rank", "$", "best held-out loss",
                   "rows dropped"):  # fmt: skip
        assert wanted in text, wanted
    assert text.count("<svg") >= 4 and "<script" not in text and "http" not in text.replace("http://www.w3.org", "")
    page.unlink()
    assert cli.main(["report", config.run_dir, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(page)} and page.read_text() == text


@pytest.mark.parametrize("start, said", [
    (0, "profile.start is 30, and this run ends at update 20"), (40, "profile.start is 30, and this run ends at"),
    (35, "profile.start is 30, and this run goes on after update 35"),
])  # fmt: skip
def test_a_profile_that_will_not_be_taken_is_said(start, said, tmp_path, base32, capsys):
    total = 20 if start != 35 else 50
    Profile(run_config(base32, tmp_path / "run", "profile.start=30"), RunFolder(tmp_path), start, total)
    assert said in capsys.readouterr().err


def test_a_profile_by_another_libtpu_is_refused_before_it_ends_the_process(tmp_path, base32, monkeypatch):
    def asked():
        Profile(run_config(base32, tmp_path / "run", "profile.start=3"), RunFolder(tmp_path), 0, 20)

    monkeypatch.setattr(tracing, "version", lambda name: {"libtpu": "0.0.1", "jax": "0.10"}[name])
    asked()  # on a CPU that is asked for libtpu is not loaded
    monkeypatch.setattr(tracing.jax, "config", SimpleNamespace(values={"jax_platforms": None}))
    with pytest.raises(UserError, match=r"libtpu 0.0.1 ends the process under JAX 0.10, which wants libtpu==0"):
        asked()
    wanted = next(one for one in requires("jax") if one.startswith("libtpu")).split("==")[1].split(".*")[0]
    monkeypatch.setattr(tracing, "version", lambda name: f"{wanted}.1")
    asked()


@pytest.mark.slow
def test_saving_by_time_and_a_profile(base32, tmp_path):
    train(run_config(
        base32, tmp_path / "run", "checkpoint.every=1000", "checkpoint.seconds=0.000001", "checkpoint.keep=9",
        "profile.start=3", "profile.steps=2",
    ))  # fmt: skip
    assert sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == list(range(1, STEPS + 1))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
