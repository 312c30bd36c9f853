"""The run folder: one config, one run, and nobody else's files."""

import dataclasses
import json
import shutil

import pytest
from runs_helper import STEPS, files, run_config, train, write_base

from gemma_tpu import config
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.run import runs


def changed(run: config.Config, section: str, **values) -> config.Config:
    return dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **values)})


def begin(run: config.Config) -> runs.RunFolder:
    folder = runs.open_run(run)
    folder.write_config(run)
    return folder


@pytest.fixture
def base(tmp_path):
    return tmp_path / "base"  # the folder itself is never read here


def test_a_new_folder_holds_the_resolved_config(base, tmp_path):
    run = run_config(base, tmp_path / "run")
    folder = begin(run)
    assert runs.read_config(folder.path) == run
    assert runs.is_run(folder.path)
    assert not list(folder.path.glob(".*")), "no temporary file stays"


def test_another_runs_config_is_refused_with_every_difference(base, tmp_path):
    run = run_config(base, tmp_path / "run")
    begin(run)
    before = files(tmp_path / "run")
    other = changed(changed(run, "lora", rank=8), "optim", lr=0.5)
    with pytest.raises(UserError) as refused:
        runs.open_run(other)
    message = str(refused.value)
    assert f"{tmp_path / 'run'} holds a run with another config" in message
    assert "lora.rank: 4 -> 8" in message and "optim.lr: 0.01 -> 0.5" in message
    assert message.count("->") == 2 and "give another run_dir" in message
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("section, values", [
    ("train", {"seed": 1}), ("train", {"steps": 9}), ("data", {"limit": 9}), ("data", {"max_seq_len": 64}),
    ("train", {"accumulation": 4}), ("lora", {"dropout": 0.2}), ("model", {"dtype": "bfloat16"}),
])  # fmt: skip
def test_whatever_changes_the_arithmetic_is_another_run(section, values, base, tmp_path):
    run = run_config(base, tmp_path / "run")
    begin(run)
    with pytest.raises(UserError, match=rf"{section}\.{next(iter(values))}: "):
        runs.open_run(changed(run, section, **values))


def test_logging_saving_and_the_mesh_may_change(base, tmp_path):
    run = run_config(base, tmp_path / "run")
    begin(run)
    run = changed(changed(run, "checkpoint", every=99, keep=1), "log", every=1)
    runs.open_run(changed(run, "mesh", fsdp=4, tp=1))


def test_a_folder_of_something_else_is_refused_and_left_alone(base, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run; give another run_dir"):
        runs.open_run(run_config(base, tmp_path / "run"))
    assert files(tmp_path / "run") == {"thesis.txt": b"mine"}


def test_opening_writes_nothing_and_an_empty_folder_is_taken(base, tmp_path):
    """Much can still be refused between opening and training."""
    runs.open_run(run_config(base, tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "run").mkdir()
    assert begin(run_config(base, tmp_path / "run")).config.exists()


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_file_in_the_way_is_a_message(place, base, tmp_path):
    (tmp_path / "file").write_text("x")
    run = dataclasses.replace(run_config(base, tmp_path / "run"), run_dir=str(tmp_path / place))
    with pytest.raises(UserError, match="cannot be written|holds no run"):
        begin(run)


def test_a_full_disk_is_a_failed_run_and_no_mistake_of_the_user(base, tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_text", full)
    with pytest.raises(RunError, match="No space left on device"):
        begin(run_config(base, tmp_path / "run"))


def test_a_folder_without_a_config_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no config.yaml here; is it a run folder"):
        runs.read_config(tmp_path)
    assert not runs.is_run(tmp_path)


def test_a_model_folder_is_no_run_even_with_a_config_yaml_in_it(tmp_path):
    for name in ("config.yaml", "config.json"):
        (tmp_path / name).write_text("{}")
    assert not runs.is_run(tmp_path)


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    runs.write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(runs.os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError):
        runs.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"


# --- the base of a run --------------------------------------------------------------------------------------


def test_another_base_is_refused_and_the_run_stays_as_it_was(whole_run, base32, tmp_path):
    """Same architecture, other weights: the folder's name proves nothing, the fingerprint does."""
    shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    before = files(tmp_path / "run")
    other = write_base(tmp_path / "other", seed=7)
    with pytest.raises(UserError, match="was trained on another base") as refused:
        train(run_config(other, tmp_path / "run"))
    assert str(base32) in str(refused.value) and str(other) in str(refused.value)
    assert files(tmp_path / "run") == before, "config.yaml must not name the refused base"


def test_the_same_base_in_another_folder_is_accepted(whole_run, base32, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    shutil.copytree(base32, tmp_path / "moved")
    summary = train(run_config(tmp_path / "moved", tmp_path / "run"))
    assert summary == json.loads((whole_run / "summary.json").read_text())
    assert runs.read_config(tmp_path / "run").model.path == str(tmp_path / "moved")
