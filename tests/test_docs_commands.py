"""docs/launching.md and docs/serving.md: every command of ours that can be run dry is run, and the others parse."""

import re
import shlex
from pathlib import Path

import pytest

from gemma_tpu import cli
from gemma_tpu.hardware import clouds
from gemma_tpu.serving import vllm_command

ROOT = Path(__file__).parent.parent
PAGES = ("launching.md", "serving.md")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```(?:bash)?\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.S | re.M)


def commands(page: str) -> list[tuple[dict[str, str], list[str]]]:
    """(variables in front, words) of each line that calls gemma-tpu."""
    found = []
    for line in "".join(blocks(page)).splitlines():
        words = shlex.split(line, comments=True)
        variables = dict(word.split("=", 1) for word in words[:1] if re.match(r"[A-Z_]+=", word))
        words = words[len(variables) :]
        if words[:1] == ["gemma-tpu"]:
            found.append((variables, words[1:]))
    return found


EVERY = [pytest.param(page, variables, words, id=f"{page}-{number}")
         for page in PAGES for number, (variables, words) in enumerate(commands(page))]  # fmt: skip


@pytest.mark.parametrize("page, variables, words", EVERY)
def test_a_command_of_the_docs_does_what_it_says(page, variables, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        for name, text in re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", block, re.S | re.M):
            (tmp_path / name).write_text(text)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    words = words[: words.index(">")] if ">" in words else words
    args = cli.parse(words)  # an option that is not there ends this test
    dry = words[0] == "launch" or (words[0] == "serve" and "--run" not in words)
    if not dry:
        assert args.command is not None
        return
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith(("#!/usr/bin/env bash", "{")) and "printed, not done" in err
    if clouds.VARIABLE in variables:
        assert "ZONES=(europe-west4-a)" in out and "our reservation" in out
    if vllm_command.VARIABLE in variables:
        assert "vllm/vllm-tpu@sha256:000" in out


def test_the_table_of_the_docs_is_what_the_command_counts():
    text = (ROOT / "docs/serving.md").read_text()
    for on in ("v6e-8", "h100x2"):
        memory = vllm_command.settle("google/gemma-4-31B-it", on, vllm_command.Wish()).memory
        told = (f"| {on} | {memory.weights:.1f} GiB | {memory.per_sequence['bfloat16'][16384]:.2f} GiB "
                f"| {memory.sequences('bfloat16', 16384)} | {memory.sequences('fp8', 16384)} |")  # fmt: skip
        assert told in text


def test_both_pages_have_commands_that_run_dry():
    assert [sum(words[0] in ("launch", "serve") for _, words in commands(page)) for page in PAGES] == [9, 8]
