"""What scripts/mutate.py breaks: every kind of change once, nothing that tests could not see, the same for one seed."""

import ast
import importlib.util
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPECIFICATION = importlib.util.spec_from_file_location("mutations", ROOT / "scripts" / "mutations.py")
mutations = importlib.util.module_from_spec(SPECIFICATION)
sys.modules["mutations"] = mutations  # dataclasses look their module up
SPECIFICATION.loader.exec_module(mutations)

SOURCE = '''"""Words: größer."""

Alias = int | str

@cache(3)
def f(a: int | None, b=1.5) -> int | None:
    if not a and a < len(b):
        raise ValueError(f"{a + 1} of {b}", a + 1)
    c = g(a, b)[1:a] + x.sum(axis=-1)
    assert c > 2
    c -= isinstance(a, int | str)
    for _ in zip(a, c, strict=True):
        c.append(True)
    return a if b else c
'''
WANTED = {
    ("constant", "1.5", "(3.0)"), ("dropped not", "not a", "(a)"), ("comparison", "a < len(b)", "(a <= len(b))"),
    ("and/or", "not a and a < len(b)", "(not a or a < len(b))"),
    ("dropped statement", 'raise ValueError(f"{a + 1} of {b}", a + 1)', "pass"),
    ("swapped arguments", "g(a, b)", "(g(b, a))"), ("off by one", "1", "(2)"), ("off by one", "1", "(0)"),
    ("off by one", "a", "(a + 1)"), ("axis", "-1", "(0)"),
    ("operator", "g(a, b)[1:a] + x.sum(axis=-1)", "(g(a, b)[1:a] - x.sum(axis=-1))"),
    ("dropped statement", "c -= isinstance(a, int | str)", "pass"),
    ("operator", "c -= isinstance(a, int | str)", "c += isinstance(a, int | str)"),
    ("swapped arguments", "zip(a, c, strict=True)", "(zip(c, a, strict=True))"),
    ("dropped statement", "c.append(True)", "pass"), ("constant", "True", "(False)"),
    ("negated condition", "b", "(not b)"),
}  # fmt: skip


@pytest.fixture
def found(tmp_path):
    (tmp_path / "one.py").write_text(SOURCE)
    return mutations.mutations(tmp_path / "one.py")


def test_every_kind_of_change_is_offered_and_no_other(found):
    assert {(one.kind, one.before, one.after) for one in found} == WANTED and len(found) == len(WANTED)


def test_a_change_replaces_what_it_says_and_nothing_else(found):
    source = SOURCE.encode()
    for one in found:
        broken = one.of(source)
        ast.parse(broken)
        assert broken != source and source[one.start : one.stop].decode() == one.before
        assert len(broken) - len(source) == len(one.after.encode()) - len(one.before.encode())
        assert SOURCE.splitlines()[one.line - 1].count(one.before)


def test_a_seed_draws_the_same_and_no_file_or_kind_fills_a_sample(found):
    offered = {"a": found, "b": found[:3]}

    def drawn(seed):
        return list(islice(mutations.spread(offered, random.Random(seed)), 8))

    assert drawn(1) == drawn(1) != drawn(2)
    assert [name for name, _ in drawn(1)].count("b") == 3
    kinds = [one.kind for name, one in drawn(1) if name == "a"]
    assert len(set(kinds)) == len(kinds) == 5
    everything = list(mutations.spread(offered, random.Random(0)))
    assert len(everything) == len(set(everything)) == len(found) + 3


def test_the_command_refuses_what_it_cannot_do():
    for arguments, said in ((["--count", "0"], "--count 0: must be"), (["--module", "cli.py"], "the core is data/")):
        command = [sys.executable, "scripts/mutate.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr
