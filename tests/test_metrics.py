"""The journal, the lines on the console and the picture."""

import io
import json

import matplotlib.image
import numpy as np
import pytest

from gemma_tpu.run import metrics


def row(step: int, **more) -> dict:
    return {"step": step, "loss": 1.0 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 10.0, **more}


def journal(path, steps, tail: str = "") -> None:
    path.write_text("".join(json.dumps(row(step)) + "\n" for step in steps) + tail)


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_new_journal_has_one_line_a_step_at_once(tmp_path):
    journal = metrics.Journal(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2):
        journal.write(row(step))
        assert steps(tmp_path / "metrics.jsonl")[-1] == step, "on disk before the next step"
    journal.close()
    assert metrics.read(tmp_path / "metrics.jsonl") == [row(1), row(2)]


def test_steps_after_the_checkpoint_are_dropped(tmp_path):
    journal(tmp_path / "metrics.jsonl", range(1, 8))
    resumed = metrics.Journal(tmp_path / "metrics.jsonl", 5)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert resumed.last == row(7), "what is run again was paid for all the same"
    resumed.write(row(6))
    resumed.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', "{", '{"step": 4}\x00\x00', '{"step": 3}x'])
def test_half_a_line_of_a_killed_run_is_dropped(tail, tmp_path):
    journal(tmp_path / "metrics.jsonl", [1, 2, 3], tail)
    resumed = metrics.Journal(tmp_path / "metrics.jsonl", 3)
    resumed.write(row(4))
    resumed.close()
    assert metrics.read(tmp_path / "metrics.jsonl") == [row(1), row(2), row(3), row(4)]


def test_a_run_that_starts_again_starts_an_empty_journal(tmp_path):
    journal(tmp_path / "metrics.jsonl", [1, 2])
    metrics.Journal(tmp_path / "metrics.jsonl", 0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_reading_a_run_without_metrics_is_no_error(tmp_path):
    assert metrics.read(tmp_path / "metrics.jsonl") == []


# --- console ------------------------------------------------------------------------------------------------


def test_lines_come_first_last_and_every_so_many_steps(capsys):
    progress = metrics.Progress(total=25, start=2, every=10, bar=False)
    for step in range(3, 26):
        progress.update(row(step))
    progress.close()
    out, err = capsys.readouterr()
    assert out == "", "stdout belongs to --json"
    assert [int(line.split()[1].split("/")[0]) for line in err.splitlines()] == [3, 10, 20, 25]
    assert "loss 0.0400" in err and "10 tokens/s" in err and "lr 1.00e-03" in err


def test_a_bar_on_a_terminal_shows_loss_and_speed_and_gives_the_cursor_back(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(metrics.sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    progress = metrics.Progress(total=4, start=0, every=1, bar=True)
    for step in range(1, 5):
        progress.update(row(step))
    progress.close()
    shown = terminal.getvalue()
    assert "4/4" in shown and "loss 0.2500" in shown and "tokens/s" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3600, "1:00:00"),
                                           (36061, "10:01:01")])  # fmt: skip
def test_times_read_as_on_a_clock(seconds, text):
    assert metrics.clock(seconds) == text


# --- the picture --------------------------------------------------------------------------------------------


def test_the_picture_shows_the_losses_and_the_held_out_loss(tmp_path):
    rows = [row(step) for step in range(1, 40)]
    metrics.draw_loss(rows, tmp_path / "plain.png", "title", {})
    metrics.draw_loss(rows, tmp_path / "held.png", "title", {0: 0.9, 39: 0.3})
    plain, held = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("plain", "held"))
    assert plain.shape == held.shape and plain.shape[0] > 300 and plain.shape[1] > 600
    assert plain[..., :3].std() > 0.02, "not an empty page"
    orange = np.array([200, 80, 30]) / 255
    near = [(np.abs(image[..., :3] - orange).max(-1) < 0.05).sum() for image in (plain, held)]
    assert near[0] == 0 and near[1] > 50, "the held-out loss is drawn in its own colour"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held.png", "plain.png"]


def test_a_run_without_rows_gives_an_empty_picture_and_no_error(tmp_path):
    metrics.draw_loss([], tmp_path / "loss.png", "nothing", {})
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[2] == 4
