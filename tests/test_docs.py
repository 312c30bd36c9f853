"""The documentation is true as far as a machine can tell: its links lead somewhere, its commands are parsed by the
real parser, its configs, modules, keys and make targets exist."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from gemma_tpu import cli, schema

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md")
WRITTEN = [ROOT / "README.md", *PAGES]
FOREIGN = set("bash pip python hf git cp cd gcloud source export docker curl kubectl sky".split())


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M) if language in languages]


def commands(text: str) -> list[list[str]]:
    """The commands of its shell blocks, one a list of words; a line that ends in a backslash goes on."""
    found = []
    for body in blocks(text, "bash"):
        body = re.sub(r"^cat > \S+ <<'END'\n.*?^END\n", "", body, flags=re.S | re.M)
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


def keys() -> set[str]:
    made = [field for field in fields(schema.Config) if callable(field.default_factory)]
    sections = {field.name: field.default_factory() for field in made}
    return {f"{name}.{key.name}" for name, section in sections.items() for key in fields(section)}


def ids(path: Path) -> str:
    return path.name


def anchors(text: str) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", WRITTEN, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("page", WRITTEN, ids=ids)
def test_commands_are_ones_that_exist(page: Path, capsys) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in commands(page.read_text()):
        if words[0] == "gemma-tpu":
            words = words[: words.index("|")] if "|" in words else words
            try:
                cli.parse(words[1:])
            except SystemExit:
                pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")
            configs = [word for word in words if word.startswith("configs/") and "mine" not in word]
            assert all((ROOT / name).exists() for name in configs), words
        elif words[0] == "make":
            wanted = [word for word in words[1:] if "=" not in word]
            assert set(wanted) <= targets, words
        else:
            known = words[0] in FOREIGN or words[0].startswith(".client-envs/")
            assert known, f"a command that no test knows: {shlex.join(words)}"


@pytest.mark.parametrize("page", WRITTEN, ids=ids)
def test_yaml_blocks_are_parts_of_a_config(page: Path) -> None:
    known = keys()
    sections = {key.partition(".")[0] for key in known}
    for body in blocks(page.read_text(), "yaml"):
        for section, entries in yaml.safe_load(body).items():
            if section in sections and isinstance(entries, dict):
                assert {f"{section}.{key}" for key in entries} <= known, body


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_keys_and_files_in_the_text_exist(page: Path) -> None:
    text = page.read_text()
    sections = "model|data|lora|mesh|train|optim|preference|checkpoint|log|eval|faults|profile|distributed"
    known = keys()
    named = {key for key in re.findall(rf"`((?:{sections})\.[a-z_]+)(?=[`:=\s])", text)}
    files = set(re.findall(r"`((?:tests|recipes|configs|benchmarks|scripts)/[\w./]+\.\w+)`", text))
    modules = set(re.findall(r"`((?:[a-z_]+/)?[a-z_]+\.(?:py|yaml))`", text)) - files
    tests = {name for name in modules if name.startswith("test_")}
    assert not {key for key in named if key.partition(".")[2] not in ("py", "yaml") and key not in known}
    assert not {name for name in files if not (ROOT / name).exists()}
    assert not {name for name in modules - tests if "_v" not in name and not (ROOT / "gemma_tpu" / name).exists()}
    assert not {name for name in tests if not (ROOT / "tests" / name).exists()}


def test_every_page_is_in_the_contents() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def names(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for part in (entry if isinstance(entry, list) else entry.values()) for name in names(part)]

    assert sorted(names(config["nav"])) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
