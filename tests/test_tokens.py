"""Tokenised rows: the same by one process or several, from the cache or not; written whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma_tpu.data import corpus, tokens, workers
from gemma_tpu.data.corpus import prepare
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.schema import DataConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tokenizer(base32) -> Tokenizer:
    return Tokenizer(base32)


@pytest.fixture
def section(tmp_path: Path) -> DataConfig:
    """Some thousand rows, a few of them bad, in two files; a cache of its own."""
    paths = []
    for name in "ab":
        rows = [{"prompt": f"module {name}{i} " * (1 + i % 7), "response": f"assign y = {i};"} for i in range(300)]
        lines = [json.dumps(row) for row in rows]
        lines[5], lines[290] = "{", json.dumps({"prompt": "x", "response": " "})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        paths.append(str(tmp_path / f"{name}.jsonl"))
    return DataConfig(path=tuple(paths), cache=str(tmp_path / "cache"), validation=None, workers=1, max_seq_len=512)


def same(a: corpus.Prepared, b: corpus.Prepared) -> bool:
    arrays = ("ids", "mask", "starts", "lengths", "targets", "file_N", "line_N", "hash_N", "measured")
    return a.to_dict() == b.to_dict() and a.dropped == b.dropped and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)  # fmt: skip


def counted(monkeypatch: pytest.MonkeyPatch) -> list:
    """Grows with every conversation that is tokenised in this process."""
    seen, draft = [], Tokenizer.draft

    def counting(self, messages, *args, **options):
        seen.append(1)
        return draft(self, messages, *args, **options)

    monkeypatch.setattr(Tokenizer, "draft", counting)
    return seen


def test_pairs_are_trained_on_by_a_side_or_not_at_all(section, tokenizer, tmp_path) -> None:
    pair = {"prompt": "a counter", "chosen": "module counter;", "rejected": "no"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 3)
    section = replace(section, path=str(tmp_path / "pairs.jsonl"))
    assert len(prepare(section, tokenizer, side="chosen")) == len(prepare(section, tokenizer, side="rejected")) == 3
    with pytest.raises(UserError, match="pairs.jsonl:1 is a preference pair .* which has no single answer"):
        prepare(section, tokenizer)


def test_several_processes_give_what_one_gives_in_the_same_order(section, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "ALONE", 0)
    monkeypatch.setattr(workers.Pool, "ready", lambda self: bool(self._running()))
    one = prepare(replace(section, cache=None), tokenizer)
    seen = counted(monkeypatch)
    several = prepare(replace(section, cache=None, workers=2), tokenizer)
    assert not seen, "no row was left for this process"
    assert same(one, several)
    assert dict(one.dropped.counts) == {"not_JSON": 2, "empty": 2}
    assert one.dropped.where("empty") == "a.jsonl:291, b.jsonl:291"
    assert [one.where(row) for row in (0, 5, 298)] == ["a.jsonl:1", "a.jsonl:7", "b.jsonl:1"]
    masks = [one.mask[start : start + length] for start, length in zip(one.starts, one.lengths, strict=True)]
    assert [mask.sum() for mask in masks] == list(one.targets) and not any(mask[0] for mask in masks)


def test_a_process_that_dies_is_a_failed_run_and_leaves_no_other_behind(section, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "ALONE", 0)
    pools = []

    def ready(self) -> bool:
        pools.append(self)
        self._running()
        self._processes[0].kill()
        return True

    monkeypatch.setattr(workers.Pool, "ready", ready)
    with pytest.raises(RunError, match="a process that tokenises has ended; .* data.workers"):
        prepare(replace(section, workers=2), tokenizer)
    assert all(process.returncode is not None for process in pools[0]._processes)
    assert not list(Path(section.cache).iterdir()), "no half-written entry"


def test_a_users_transform_runs_in_the_processes_too(section, tokenizer, tmp_path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text(
        "def shout(messages):\n    print('noise on stdout')\n"
        "    return [m | {'content': m['content'].upper()} for m in messages]\n"
        "def fail(messages):\n    return messages[7]\n"
    )
    monkeypatch.setattr(corpus, "ALONE", 0)
    monkeypatch.setattr(workers.Pool, "ready", lambda self: bool(self._running()))
    loud = prepare(replace(section, workers=2, transform=f"{tmp_path}/mine.py:shout"), tokenizer)
    assert "MODULE A0" in tokenizer.decode(loud[0][0].tolist())
    with pytest.raises(UserError, match=r"mine.py:fail failed on a.jsonl:1: IndexError"):
        prepare(replace(section, workers=2, transform=f"{tmp_path}/mine.py:fail"), tokenizer)


def test_the_second_start_tokenises_nothing_and_gives_the_same(section, tokenizer, monkeypatch) -> None:
    first = prepare(section, tokenizer)
    seen = counted(monkeypatch)
    again = prepare(section, tokenizer)
    assert not seen and same(first, again) and first.fingerprint == again.fingerprint
    assert isinstance(again.ids, np.memmap)
    assert same(prepare(replace(section, cache=None), tokenizer), again) and len(seen) == 596
    # What comes after tokenising is no part of the entry.
    shorter = prepare(replace(section, max_seq_len=32, overlong="truncate", validation=0.2), tokenizer)
    assert len(seen) == 596 and shorter.lengths.max() <= 32


def test_whatever_shapes_the_tokens_makes_another_entry(section, tokenizer, base32, tmp_path, monkeypatch) -> None:
    prepare(section, tokenizer)
    (tmp_path / "mine.py").write_text("def same(messages):\n    return messages\n")
    mine = replace(section, transform=f"{tmp_path}/mine.py:same")
    changed = [mine, replace(section, train_on="all"), replace(section, limit=90), replace(section, format="prompt"),
               replace(section, path=section.path[::-1])]  # fmt: skip
    for other in changed:
        seen = counted(monkeypatch)
        prepare(other, tokenizer)
        assert seen, other
    (tmp_path / "mine.py").write_text("def same(messages):\n    return list(messages)\n")
    seen = counted(monkeypatch)
    prepare(mine, tokenizer)
    assert seen, "the transform's source has changed"
    with open(section.path[1], "a") as file:
        file.write(json.dumps({"prompt": "new", "response": "row"}) + "\n")
    assert prepare(section, tokenizer).rows == 601
    folder = tmp_path / "model"
    folder.mkdir()
    for file in base32.iterdir():
        if not file.name.endswith(".safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    before = corpus.tokenizer_identity(folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{# #}")
    assert corpus.tokenizer_identity(folder) != before == corpus.tokenizer_identity(base32)


def test_a_damaged_entry_is_made_anew(section, tokenizer) -> None:
    first = prepare(replace(section, cache=None), tokenizer)  # in memory: what is cut under a map ends the process
    prepare(section, tokenizer)
    (entry,) = Path(section.cache).iterdir()
    for damage in (lambda: (entry / "ids.bin").write_bytes(b"1234"), lambda: (entry / "rows.json").write_text("{"),
                   lambda: (entry / "hashes.bin").unlink()):  # fmt: skip
        damage()
        assert same(prepare(section, tokenizer), first)
        assert len(list(Path(section.cache).iterdir())) == 1


def test_a_killed_start_leaves_no_entry_and_the_next_clears_what_it_left(section, tokenizer, base32, tmp_path) -> None:
    code = (
        "import os, signal; from gemma_tpu.data import tokens; from gemma_tpu.data.corpus import prepare\n"
        "from gemma_tpu.schema import DataConfig; from gemma_tpu.data.tokenizer import Tokenizer\n"
        "tokens._publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"prepare(DataConfig(path={section.path!r}, cache={section.cache!r}, workers=1, validation=None), "
        f"Tokenizer({str(base32)!r}))"
    )
    killed = subprocess.run([sys.executable, "-c", code], timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    (left,) = Path(section.cache).iterdir()
    assert left.name.startswith(tokens._PARTIAL) and (left / "ids.bin").stat().st_size
    prepare(section, tokenizer)
    (entry,) = Path(section.cache).iterdir()
    assert entry != left and len(entry.name) == 32


def test_a_cache_that_cannot_be_written_is_said(section, tokenizer, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="set data.cache to a folder with room, or to null"):
        prepare(replace(section, cache=str(tmp_path / "file" / "x")), tokenizer)


def test_workers_end_when_their_parent_is_gone(section, base32) -> None:
    code = (
        "import os, sys, time; from gemma_tpu.data import workers; from gemma_tpu.data.encoding import Settings\n"
        f"pool = workers.Pool(Settings({{}}, (), 'assistant'), {str(base32)!r}, 1)\n"
        "while not pool.ready(): time.sleep(0.02)\n"  # before that it would end of another cause
        "print(pool._processes[0].pid, flush=True); sys.stdout.close(); os.kill(os.getpid(), 9)"
    )
    dead = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    pid, deadline = int(dead.stdout), time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the worker lives on")
