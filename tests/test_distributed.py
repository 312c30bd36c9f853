"""Several hosts are one run: the same losses, one writer, and no host that waits for a lost one."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hosts_helper import Hosts
from runs_helper import SLOW_RECIPE, STEPS, environment, losses, one_device, rows, run, saved, write_config

from gemma_tpu.errors import UserError
from gemma_tpu.hardware import distributed
from gemma_tpu.schema import DistributedConfig


class Store:
    """The key-value store of the hosts."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return list(self.values.items())


def watch(timeout: float = 30.0) -> distributed.Watch:
    return distributed.Watch(Store(), 0, 3, timeout, lambda why: None)


def beats(one: str, other: str) -> dict[str, str]:
    return {"gemma_tpu/beat/0": "5", "gemma_tpu/beat/1": one, "gemma_tpu/beat/2": other}


def test_a_host_that_falls_silent_is_lost_after_the_timeout_and_not_before():
    judge = watch()
    assert judge.judge(beats("1", "1"), 0.0) is None
    assert judge.judge(beats("1", "2"), 29.0) is None
    assert judge.judge(beats("1", "3"), 31.0) == "host 1 has given no sign of life for 30 s"


def test_a_host_that_is_done_is_not_missed_and_one_that_failed_is_quoted():
    judge = watch()
    assert judge.judge(beats("done", "1"), 0.0) is None
    assert judge.judge(beats("done", "2"), 1000.0) is None
    assert judge.judge(beats("done", "failed: the disk is full"), 1001.0) == "host 2 stopped: the disk is full"


def test_a_host_that_does_not_come_is_lost_too():
    judge = watch()
    assert judge.judge({}, 0.0) is None
    assert "host 1 has given no sign of life" in judge.judge({}, 31.0)


def test_the_heartbeat_ends_a_host_that_lost_another():
    ended: list[str] = []
    store = Store()
    judge = distributed.Watch(store, 0, 2, 0.5, ended.append)
    store.values["gemma_tpu/beat/1"] = "7"
    judge.begin()
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended == ["host 1 has given no sign of life for 0 s"]
    assert int(store.values["gemma_tpu/beat/0"]) >= 1


@pytest.mark.parametrize("section, environment, message", [
    ({"coordinator": "a:1"}, {}, "distributed.processes, distributed.process missing"),
    ({"coordinator": "a:1", "processes": 2}, {}, "distributed.process missing"),
    ({"coordinator": "a:1", "processes": 2, "process": 2}, {}, r"process \(2\) must be below .*processes \(2\)"),
    ({}, {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two: must be a whole number"),
    ({}, {"JAX_PROCESS_ID": "0"}, "distributed.coordinator, distributed.processes missing"),
])  # fmt: skip
def test_half_a_description_of_the_hosts_is_refused(section, environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.start(DistributedConfig(**section))


def test_on_one_host_nothing_is_asked_of_anybody():
    distributed.start(DistributedConfig())
    assert distributed.count() == 1 and distributed.is_first()
    agreement = distributed.Agreement()
    assert agreement.step([15, 0]) == [15, 0] and agreement.now([1]) == [1]


@pytest.mark.parametrize("word, told", [("", "last words\n"), ("watcher.withdraw(); ", "")])
def test_a_host_that_the_runtime_aborts_has_a_last_word_and_one_that_ends_by_itself_has_none(word, told):
    code = f"""import os
from gemma_tpu.hardware import distributed
distributed.LastWord.WAIT = distributed.LastWord.WAIT.replace("sys.argv[1]", "'last words'")
watcher = distributed.LastWord()
{word}os.abort()"""
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGABRT and ended.stderr == told


# --- real processes -----------------------------------------------------------------------------------------


def finish(hosts: Hosts) -> list[str]:
    said = hosts.wait()
    assert [code for code, _ in said] == [0] * hosts.count, said
    return [text for _, text in said]


@pytest.mark.slow
def test_two_hosts_have_the_losses_of_one_and_one_of_them_writes(base32, whole_run, tmp_path):
    file = write_config(tmp_path / "run.yaml", base32, tmp_path / "run")
    with Hosts(file, count=2, devices=2) as hosts:
        first, second = finish(hosts)
    assert "done: 8 updates" in first and second.strip() == "", "one host speaks"
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    np.testing.assert_allclose(losses(tmp_path / "run")[0], losses(whole_run)[0], rtol=1e-6)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole_run), rtol=1e-5)
    one, other = saved(tmp_path / "run", STEPS), saved(whole_run, STEPS)
    for name in other:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-6)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["hosts"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_twenty_updates_on_several_hosts_are_those_of_one(count, base32, tmp_path):
    found = []
    for name, hosts in (("one", 1), ("many", count)):
        file = write_config(tmp_path / f"{name}.yaml", base32, tmp_path / name)
        with Hosts(file, hosts, 4 // hosts, ["train.steps=20"]) as running:
            finish(running)
        found.append(losses(tmp_path / name))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert len(found[0]) == 20


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_dies_ends_the_other_and_another_number_of_hosts_goes_on(lost, base32, whole_run, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_RECIPE)
    file = write_config(tmp_path / "run.yaml", base32, tmp_path / "run")
    more = [f"recipe={tmp_path / 'slow.py'}", "distributed.timeout=20", "checkpoint.every=1"]
    with Hosts(file, 2, 2, more) as hosts:
        journal, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
        while not (journal.exists() and journal.read_text().count("\n") >= 3) and time.monotonic() < deadline:
            time.sleep(0.02)
        hosts.running[lost].send_signal(signal.SIGKILL)
        begun, other = time.monotonic(), hosts.running[1 - lost]
        said = other.communicate(timeout=120)[1]
        assert time.monotonic() - begun < 120 and other.returncode not in (0, None)
    # Where host 0 is gone, the runtime that it served is faster than the heartbeat; the last line is ours all the same.
    last = said.strip().splitlines()[-1]
    reasons = [["host 0 does not answer", "host 0, which holds the run together, is gone", "another host is gone"],
               ["host 1 has given no sign of life", "another host is gone"]]  # fmt: skip
    assert last.startswith("error: ") and "Run the same command again" in last, said
    assert any(reason in last for reason in reasons[lost]), said
    before = losses(tmp_path / "run")
    assert len(before) < STEPS
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with Hosts(file, 4, 1) as hosts:
        finish(hosts)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole_run), rtol=1e-5)
    # And on one device of one host.
    finished = run(one_device(file, f"run_dir={tmp_path / 'copy'}"))
    assert finished.returncode == 0 and "resumed at step" in finished.stderr, finished.stderr
    np.testing.assert_allclose(losses(tmp_path / "copy"), losses(whole_run), rtol=1e-5)


@pytest.mark.slow
def test_sigterm_to_one_host_stops_all_at_one_step_with_everything_saved(base32, whole_run, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_RECIPE)
    file = write_config(tmp_path / "run.yaml", base32, tmp_path / "run")
    with Hosts(file, 2, 2, [f"recipe={tmp_path / 'slow.py'}"]) as hosts:
        journal, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
        while not (journal.exists() and journal.read_text().count("\n") >= 2) and time.monotonic() < deadline:
            time.sleep(0.02)
        hosts.running[1].send_signal(signal.SIGTERM)  # not the one that writes
        said = hosts.wait()
    assert [code for code, _ in said] == [1, 1], said
    assert all("stopped by SIGTERM after step" in text for _, text in said), said
    with Hosts(file, 2, 2) as hosts:
        finish(hosts)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole_run), rtol=1e-5)
