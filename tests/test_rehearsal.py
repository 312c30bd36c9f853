"""`train --rehearse`: every part of a run is tried, what would fail later is found, and the run itself is untouched."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hosts_helper import Hosts
from runs_helper import files, run_config, write_config

from gemma_tpu import cli
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.hardware import chips
from gemma_tpu.planning import rehearsal
from gemma_tpu.run import metrics

PARTS = ["load, compile, 10 updates, save", "restore", "merge of one shard", "sample", "room for the checkpoints"]


@pytest.fixture(scope="module")
def rehearsed(base32, tmp_path_factory):
    """A rehearsal by the command line, as on four chips that the planner knows."""
    folder = tmp_path_factory.mktemp("rehearsed")
    file = write_config(folder / "run.yaml", base32, folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chips, "of_devices", lambda kind, count, slices=1: chips.find("v5e-4"))
        code = cli.main(["train", str(file), "--rehearse"])
    return SimpleNamespace(code=code, config=run_config(base32, folder / "run"), folder=folder / "run-rehearsal")


@pytest.fixture
def again(rehearsed, tmp_path):
    """again(**changes) -> what is found when the run itself is a copy of the one that was rehearsed."""

    def rehearse(recipe=None, **sections):
        config = replace(rehearsed.config, run_dir=str(tmp_path / "run"), **sections)

        def copy(short):
            shutil.copytree(rehearsed.folder, short.run_dir)
            return json.loads((rehearsed.folder / "summary.json").read_text())

        result = rehearsal.rehearse(config, recipe or copy)
        return result, {one["name"]: one for one in result["checks"]}

    return rehearse


def test_every_part_of_a_run_is_tried_in_a_folder_of_its_own(rehearsed):
    assert rehearsed.code == 0
    found = json.loads((rehearsed.folder / "rehearsal.json").read_text())
    assert found["ok"] and found["seconds"] < rehearsal.LIMIT_S
    assert [one["name"] for one in found["checks"]] == PARTS and all(one["ok"] for one in found["checks"])
    told = {one["name"]: one["told"] for one in found["checks"]}
    assert told[PARTS[0]].startswith("10 updates, loss ") and told["restore"] == "step 10"
    assert "tensors of it changed" in told["merge of one shard"] and "GiB free" in told["room for the checkpoints"]
    assert [row["step"] for row in metrics.read(rehearsed.folder / "metrics.jsonl")] == list(range(1, 11))
    assert not list(rehearsed.folder.glob("*.safetensors")), "the tried shard is gone"
    assert not Path(rehearsed.config.run_dir).exists(), "the run itself has not begun"


def test_the_planners_prediction_stands_beside_what_was_measured(rehearsed):
    found = json.loads((rehearsed.folder / "rehearsal.json").read_text())
    steps = [row["step_s"] for row in metrics.read(rehearsed.folder / "metrics.jsonl")][2:]
    assert min(steps) <= found["measured"]["step_s"] <= max(steps)
    assert found["predicted"].keys() == {"step_s", "memory_gib"} and found["predicted"]["step_s"] > 0


def test_it_can_be_repeated_and_says_each_part_with_its_time(again, capsys):
    for _ in range(2):
        result, _ = again()
        assert result["ok"]
    said = capsys.readouterr().err
    assert "rehearsal: everything went well" in said and all(f"ok    {part}" in said for part in PARTS)
    assert "step_s " in said and "measured" in said


def test_a_bucket_that_cannot_be_written_is_found_before_the_first_update(rehearsed, tmp_path, capsys):
    (tmp_path / "file-rehearsal").write_text("in the way")
    file = write_config(tmp_path / "run.yaml", Path(rehearsed.config.model.path), tmp_path / "run")
    code = cli.main(["train", str(file), "--rehearse", f"checkpoint.folder={tmp_path / 'file'}"])
    said = capsys.readouterr().err
    assert code == 1 and "cannot be" in said and "Traceback" not in said, said
    assert "compiled the train step" not in said
    assert (tmp_path / "file-rehearsal").read_text() == "in the way"


def test_a_base_without_a_tokenizer_is_found(rehearsed, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(rehearsed.config.model.path, base)
    for file in base.glob("tokenizer*"):
        file.unlink()
    code = cli.main(["train", str(write_config(tmp_path / "run.yaml", base, tmp_path / "run")), "--rehearse"])
    said = capsys.readouterr().err
    assert code == 1 and "rehearsal: something would fail" in said and "tokenizer" in said, said


def test_a_disk_too_small_for_the_checkpoints_or_the_merge_is_found(again, monkeypatch):
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: SimpleNamespace(free=50_000))
    result, found = again()
    assert not result["ok"] and not found["room for the checkpoints"]["ok"]
    assert "5 checkpoints of" in found["room for the checkpoints"]["told"]
    assert "too little, give --out another disk" in found["merge of one shard"]["told"]


def test_what_fails_is_said_and_what_comes_after_it_is_tried_all_the_same(again, monkeypatch):
    def refuse(*_):
        raise RunError("the shard cannot be written")

    monkeypatch.setattr(rehearsal.patch, "try_shard", refuse)
    monkeypatch.setattr(rehearsal.completions, "complete", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        again()  # a fault of the program is not dressed up as a finding

    def full(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nand a long table")

    monkeypatch.setattr(rehearsal.completions, "complete", full)
    result, found = again()
    assert not result["ok"] and [name for name, one in found.items() if not one["ok"]] == PARTS[2:4]
    assert found["merge of one shard"]["told"] == "the shard cannot be written"
    assert found["sample"]["told"] == "out of memory: RESOURCE_EXHAUSTED: 9 GiB"


def test_updates_that_were_not_applied_are_a_finding(again):
    result, found = again(lambda short: {"steps": 10, "skipped": 3})
    assert not result["ok"] and list(found) == PARTS[:1]
    assert "3 of 10 updates had a loss or gradient that is no number" in found[PARTS[0]]["told"]


def test_another_runs_folder_or_checkpoints_are_never_cleared(again, rehearsed, tmp_path):
    foreign = tmp_path / "run-rehearsal"
    foreign.mkdir()
    text = (rehearsed.folder / "config.yaml").read_text().replace("run-rehearsal", "other")
    (foreign / "config.yaml").write_text(text)
    before = files(foreign)
    with pytest.raises(UserError, match="holds a run that is no rehearsal"):
        again()
    assert files(foreign) == before


def test_checkpoints_of_another_run_are_never_cleared(again, rehearsed, whole_run, tmp_path):
    shutil.copytree(whole_run / "checkpoints", tmp_path / "bucket-rehearsal")
    before = files(tmp_path / "bucket-rehearsal")
    section = replace(rehearsed.config.checkpoint, folder=str(tmp_path / "bucket"))
    with pytest.raises(UserError, match=r"holds checkpoints of another run \(steps 3, 6, 8\)"):
        again(checkpoint=section)
    assert files(tmp_path / "bucket-rehearsal") == before
    shutil.rmtree(tmp_path / "bucket-rehearsal")
    shutil.copytree(rehearsed.folder / "checkpoints", tmp_path / "bucket-rehearsal")
    (tmp_path / "bucket-rehearsal" / "notes.txt").write_text("mine")
    again(lambda short: {"steps": 10, "skipped": 10}, checkpoint=section)
    left = [path.name for path in (tmp_path / "bucket-rehearsal").iterdir()]
    assert left == ["notes.txt"], "an earlier rehearsal's checkpoints go, and they alone"


@pytest.mark.slow
def test_two_hosts_rehearse_together(base32, tmp_path):
    file = write_config(tmp_path / "run.yaml", base32, tmp_path / "run")
    for _ in range(2):  # the second one clears what the first has left
        with Hosts(file, 2, 2, [f"checkpoint.folder={tmp_path / 'bucket'}", "--rehearse"]) as hosts:
            said = hosts.wait()
        assert [code for code, _ in said] == [0, 0], said
        assert "rehearsal: everything went well" in said[0][1] and not said[1][1].strip(), said
