"""docs/accelerators.md: what the generator makes now, each picture by itself, stated, computed and measured apart."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("accelerators", ROOT / "scripts" / "accelerators.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(script):
    return script.files(json.loads(script.MEASURED_FILE.read_text()))


def test_the_committed_page_is_what_the_generator_makes_now(made):
    old = [str(path.relative_to(ROOT)) for path, text in made.items() if path.read_text() != text]
    assert not old, "run `python scripts/accelerators.py`"


def test_every_picture_is_shown_and_every_link_leads_somewhere(script, made):
    text = made[script.PAGE]
    shown = re.findall(r"\]\(([^)]+)\)", text)
    assert all((script.PAGE.parent / name).exists() for name in shown)
    assert {name for name in shown if name.endswith(".svg")} == {
        f"accelerators/{path.name}" for path in made if path.suffix == ".svg"
    }


def test_a_picture_stands_alone_and_keeps_its_kinds_apart(script, made):
    kinds = {"measured": set(script.MEASURED), "predicted": {*script.PREDICTED, script.STATED}}
    assert not kinds["measured"] & kinds["predicted"]
    for path, text in made.items():
        if path.suffix == ".svg":
            assert "prefers-color-scheme: dark" in text and "xlink" not in text and "url(" not in text
            for colour, state in re.findall(r'class="c(\d) (predicted|measured)"', text):
                assert int(colour) in kinds[state], path.name


def test_measured_dots_lie_under_their_roofs(script):
    for name, kind in script.PAIR:
        x, y = script.achieved(name, kind)
        chip = script.chips.find(name).chip
        assert y < min(chip.bf16_tflops * 1e12, x * chip.hbm_gbs * 1e9)


@pytest.mark.slow
def test_the_measured_padding_is_what_is_measured_now(script):
    assert script.measure() == json.loads(script.MEASURED_FILE.read_text())
