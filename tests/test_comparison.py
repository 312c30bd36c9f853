"""Runs side by side: figures as they were written, and every reason not to compare them, by name."""

import json
import re
from pathlib import Path

import pytest
from test_page import check

from gemma_tpu import cli, config
from gemma_tpu.errors import UserError
from gemma_tpu.pages import comparison, comparison_page

STEPS = 30


def run(folder: Path, *overrides: str, updates: int = STEPS, summary: bool = True, **changed) -> Path:
    """A run folder whose losses fall; `changed`: key -> function of the step, in metrics.jsonl."""
    folder.mkdir()
    chosen = config.load("tiny_cpu.yaml", [f"run_dir={folder}", *overrides])
    (folder / "config.yaml").write_text(config.to_yaml(chosen))
    usual = {"loss": lambda n: 2 / n, "lr": lambda n: 1e-3 * n, "grad_norm": lambda n: 1.0 + 1 / n,
             "tokens": lambda n: 1000 + n, "target_tokens": lambda n: 400 + n, "tokens_per_s": lambda n: 500.0,
             "padding": lambda n: 0.25, "usd": lambda n: n / 100}  # fmt: skip
    rows = [{"step": n, **{key: of(n) for key, of in (usual | changed).items()}} for n in range(1, updates + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary:
        made = {"version": "0.1.0", "devices": 2, "device_kind": "H100", "trainable_params": 10, "plan": "p"}
        (folder / "summary.json").write_text(json.dumps(made))
    return folder


def compared(*paths):
    return comparison.read(list(paths))


def test_equal_runs_have_no_warning_and_no_distance(tmp_path):
    runs = compared(run(tmp_path / "a"), run(tmp_path / "b"))
    found = comparison.to_json(runs)
    assert found["warnings"] == [] and found["settings"] == {}
    [apart] = found["apart"]
    assert (apart["max_loss_difference"], apart["max_grad_norm_difference"], apart["tokens_per_s_ratio"]) == (0, 0, 1)


def test_figures_are_those_of_the_journal_and_nothing_is_rescaled(tmp_path):
    slow = {"tokens_per_s": lambda n: 100.0 if n == 1 else 250.0, "memory_gib": lambda n: 3.0 + n,
            "loss": lambda n: 4 / n, "mfu": lambda n: 0.5}  # fmt: skip
    first, other = compared(run(tmp_path / "a"), run(tmp_path / "b", **slow))
    a, b = comparison.figures(first), comparison.figures(other)
    assert (a["first_loss"], b["first_loss"], b["last_loss"]) == (2, 4, 4 / STEPS)
    assert b["tokens_per_s"] == 250, "the update that warms up does not count"
    assert b["memory_gib"] == 33 and a["memory_gib"] is None and b["mfu"] == 0.5
    assert a["usd_per_million_tokens"] == pytest.approx(0.29 / (a["tokens"] - 1001) * 1e6), "without the start"
    apart = comparison.apart(first, other)
    assert apart["max_loss_difference"] == 2 and apart["tokens_per_s_ratio"] == 0.5
    assert "0.50 x its tokens/s" in comparison.render([first, other])


DIFFERENT = {
    "rows": ({"tokens": lambda n: 1000 + n + (n > 4)}, r"from update 5 on \(tokens 1,005 and 1,006\)"),
    "mask": ({"target_tokens": lambda n: 900}, r"from update 1 on \(target_tokens 401 and 900\)"),
    "schedule": ({"lr": lambda n: 1e-3 * (n - 1)}, r"from update 1 on \(lr 0.001 and 0\)"),
    "schedule of no number": ({"lr": lambda n: 1e-3 * n if n < 9 else None}, r"on \(lr 0.009 and no number\)"),
    "length": ({"updates": 20}, "a has 30 updates, b 20"),
    "cost": ({"usd": lambda n: None}, "price of b's devices"),
    "state": ({"summary": False}, "b has no summary.json"),
    "dropout": ({"overrides": ["lora.dropout=0.1"]}, "draw other numbers"),
    "base": ({"overrides": ["model.path=models/other"]}, "models/other"),
    "precision": ({"overrides": ["model.dtype=bfloat16"]}, "float32 and bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_named(tmp_path, name):
    changed, words = DIFFERENT[name]
    changed = dict(changed)
    runs = compared(run(tmp_path / "a"), run(tmp_path / "b", *changed.pop("overrides", []), **changed))
    [line] = comparison.all_warnings(runs)
    assert line.startswith(f"{name.split()[0]}: ")
    assert re.search(words, line)


def test_equal_counts_of_other_rows_are_found_by_the_plan(tmp_path):
    paths = run(tmp_path / "a"), run(tmp_path / "b")
    summary = json.loads((paths[1] / "summary.json").read_text()) | {"plan": "q"}
    (paths[1] / "summary.json").write_text(json.dumps(summary))
    [line] = comparison.all_warnings(compared(*paths))
    assert line.startswith("plan: ") and line.endswith("p | q")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl: is empty or not there"),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n'), "have no lr, grad_norm"),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1,\n'), "line 1 is not valid JSON"),
        (lambda folder: (folder / "config.yaml").unlink(), "no config.yaml here"),
    ],
)
def test_a_folder_that_cannot_be_compared_is_one_error(tmp_path, capsys, spoil, words):
    good, bad = run(tmp_path / "a"), run(tmp_path / "b")
    spoil(bad)
    assert cli.main(["report", str(good), "--compare", str(bad)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and "Traceback" not in said


def test_a_run_beside_itself_is_refused(tmp_path):
    with pytest.raises(UserError, match="compared with itself"):
        comparison.read([run(tmp_path / "a"), tmp_path / "a"])


def test_the_command_prints_a_table_and_writes_a_page_that_stands_alone(tmp_path, capsys):
    one = run(tmp_path / "a", memory_gib=lambda n: 4.0)
    others = [run(tmp_path / "b", "lora.rank=8", lr=lambda n: 1.0), run(tmp_path / "c", updates=10)]
    page = tmp_path / "pages" / "all.html"
    assert cli.main(["report", str(one), "--compare", *map(str, others), "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "settings that differ" in said and "lora.rank" in said and "warning: schedule: a and b" in said
    found = check(page.read_text())
    assert sum("curve" in attributes.get("class", "") for _, attributes in found.seen) == 3 * 5 + 1
    assert any("schedule: a and b" in word for word in found.words)
    assert cli.main(["report", str(one), "--html", str(page)]) == 2
    assert "belongs to --compare" in capsys.readouterr().err
    assert cli.main(["report", str(one), "--compare", str(others[0]), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"runs", "apart", "warnings", "settings"}


def test_a_curve_of_one_run_alone_is_drawn(tmp_path):
    runs = compared(run(tmp_path / "a", mfu=lambda n: 0.1), run(tmp_path / "b", memory_gib=lambda n: 9.0))
    assert "Peak GiB of a device" in comparison_page.page_of(runs)
