"""The model card of a merged folder: what it was made of, with which recipe, from how much data, with what result.

Nothing in it depends on the moment or the place: the same checkpoint gives the same card.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from gemma_tpu import plain
from gemma_tpu.errors import UserError
from gemma_tpu.run import metrics, runs
from gemma_tpu.storage.shards import Checkpoint

CARD, NOTICE = "README.md", "NOTICE"
_OF_THE_MACHINE = ("run_dir", "log", "checkpoint", "mesh", "model", "distributed", "profile")  # sections left out
TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
_LICENCES = {"gemma": "https://ai.google.dev/gemma/terms", "apache-2.0": "https://ai.google.dev/gemma/apache_2"}


def files(base: Checkpoint, about: dict[str, Any], tensors_changed: int) -> dict[str, bytes]:
    """The card, and for a base under the Gemma Terms of Use the notice file that they ask for."""
    licence = licence_of(base)
    found = {CARD: _card(base, licence, about, tensors_changed).encode()}
    if licence == "gemma" and not (base.folder / NOTICE).exists():
        found[NOTICE] = f"{TERMS}\n".encode()
    return found


def of_run(run: Path, step: int, record: dict[str, Any]) -> dict[str, Any]:
    """What a run folder knows of one of its checkpoints."""
    steps = [row for row in metrics.read(run / "metrics.jsonl", metrics.STEPS) if row["step"] <= step]
    summary = runs.read_summary(runs.RunFolder(run))
    figures = {"updates": step}
    if steps:
        if steps[-1]["loss"] is not None:
            figures["last training loss"] = round(steps[-1]["loss"], 4)
        figures |= {"tokens trained on": sum(row["tokens"] for row in steps),
                    "of them in the loss": sum(row["target_tokens"] for row in steps)}  # fmt: skip
    if summary.get("steps") == step:
        figures |= {f"held-out loss after {at} updates": round(loss, 4)
                    for at, loss in summary.get("held_out_loss", {}).items() if plain.number(loss)}  # fmt: skip
    rows = record.get("rows") or {}
    data = {"rows read": rows.get("read"), "rows trained on": rows.get("kept"), **(
        {f"rows dropped: {reason}": count for reason, count in (rows.get("dropped") or {}).items()})}  # fmt: skip
    return {"base": record["base"]["folder"], "method": record["method"], "config": record["config"],
            "data": {name: count for name, count in data.items() if count is not None}, "figures": figures,
            "version": record["version"]}  # fmt: skip


def licence_of(base: Checkpoint) -> str | None:
    """As the base's own card says; without one, that of its family as Google publishes it."""
    readme = base.folder / CARD
    front = re.match(r"---\n(.*?)\n---\n", readme.read_text(errors="replace"), re.S) if readme.is_file() else None
    if front is not None:
        try:
            said = plain.from_yaml(front[1], str(readme))
        except UserError:
            said = None
        licence = said.get("license") if isinstance(said, dict) else None
        if isinstance(licence, str):
            return licence
    family = str(base.config.get("model_type", ""))
    return "apache-2.0" if family.startswith("gemma4") else "gemma" if family.startswith("gemma") else None


def name_of(base: str) -> str:
    """org/name of a hub id, else the folder's own name: where it lay on somebody's disk says nothing."""
    hub = re.fullmatch(r"hf://([^@]+?)(@[^/]*)?/?", base)
    return hub[1] if hub else base.rstrip("/").rpartition("/")[2]


def _card(base: Checkpoint, licence: str | None, about: dict[str, Any], tensors_changed: int) -> str:
    name = name_of(about["base"])
    front = {"base_model": name, "library_name": "transformers", "tags": ["gemma", about["method"], "gemma_tpu"]}
    if licence is not None:
        front = {"license": licence, **({"license_link": _LICENCES[licence]} if licence in _LICENCES else {}), **front}
    made = f"gemma_tpu {about['version']}" if about.get("version") else "gemma_tpu"
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}, fine-tuned",
        f"{name} with what a fine-tuning ({about['method']}) has learned merged into its weights by {made}: "
        f"{tensors_changed} tensors are changed, each rounded once to its own dtype; the other "
        f"{len(base.names()) - tensors_changed}, config, tokenizer and chat template are the base's own bytes.",
        _table("Figures", about.get("figures")),
        _table("Data", about.get("data")),
        _recipe(about.get("config")),
        _licence(name, licence, tensors_changed),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(title: str, rows: dict[str, Any] | None) -> str:
    if not rows:
        return ""
    lines = [f"| {name} | {value:,} |" for name, value in rows.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---:|", *lines])


def _recipe(config: dict[str, Any] | None) -> str:
    if not config:
        return ""
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()
            if key not in _OF_THE_MACHINE}  # fmt: skip
    for section, key in (("data", "cache"), ("train", "compile_cache")):
        kept.get(section, {}).pop(key, None)
    for section, key in (("data", "path"), ("data", "validation"), ("lora", "init_from")):
        if key in kept.get(section, {}):
            kept[section][key] = _base_names(kept[section][key])
    return f"## Recipe\n\n```yaml\n{yaml.safe_dump(kept, sort_keys=False)}```"


def _base_names(path: Any) -> Any:
    """Where a file lay on somebody's disk is nobody's business; bundled and remote ones keep their names."""
    if isinstance(path, str):
        return path if ":" in path else Path(path).name
    return [_base_names(one) for one in path] if isinstance(path, list | tuple) else path


def _licence(name: str, licence: str | None, tensors_changed: int) -> str:
    changed = f"This is a modified version of {name}: {tensors_changed} tensors of its *.safetensors were changed."
    if licence == "gemma":
        text = f"{changed}\n\n{TERMS}. The Gemma Prohibited Use Policy applies to this model as to its base."
    elif licence is not None:
        text = f"{changed} The base's licence ({licence}) applies to it."
    else:
        text = f"{changed} The licence of the base applies to it; no card of the base said which that is."
    return f"## Licence\n\n{text}"
