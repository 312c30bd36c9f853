"""docs/tiny.ipynb: kept without outputs, its commands are real, and it runs from top to bottom."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from gemma_tpu import cli

NOTEBOOK = Path(__file__).parent.parent / "docs" / "tiny.ipynb"


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_it_is_kept_without_outputs() -> None:
    assert cells("code") and not any(cell["outputs"] or cell["execution_count"] for cell in cells("code"))


def test_its_commands_are_parsed_by_the_real_parser() -> None:
    bodies = ["".join(cell["source"]) for cell in cells("code")]
    lines = [body.removeprefix("%%bash\n").replace("\\\n", " ") for body in bodies if body.startswith("%%bash\n")]
    names = [shlex.split(line)[1] for line in lines]
    for line in lines:
        assert cli.parse(shlex.split(line)[1:])
    assert names == ["tiny", "plan", "data", "train", "merge", "verify", "sample"]


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the notebook makes its folder
    monkeypatch.setenv("PYTHONPATH", f"{NOTEBOOK.parent.parent}:{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", printed).groups())
    assert last < first - 1, "sixty updates learn something"
    assert any("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", []))
    work = next(tmp_path.glob("gemma_tpu-*"))
    assert (work / "models" / "tuned" / "config.json").is_file()
