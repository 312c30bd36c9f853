"""A config for somebody's own data, model and slice: the mesh, micro-batches and remat that the planner finds fastest.

What it does not ask (rank, rate, schedule) starts as in the shipped configs; every choice stands in the file.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tpu import config
from gemma_tpu.errors import UserError
from gemma_tpu.estimate import advice
from gemma_tpu.gemma import sizes
from gemma_tpu.hardware import chips
from gemma_tpu.hardware.chips import Slice
from gemma_tpu.planning import subject
from gemma_tpu.planning.subject import Subject
from gemma_tpu.planning.workload import CHARACTERS_PER_TOKEN, TURN_TOKENS
from gemma_tpu.schema import Config, DataConfig, LoraConfig, ModelConfig, OptimConfig, TrainConfig
from gemma_tpu.step.job import Job

LENGTHS = (1024, 2048, 4096, 8192, 16384)  # of a sheet; the shortest that holds 99 % of the rows, and 2048 at least
MEASURED_ROWS = 2000
ROWS = 8  # of an update, and one a device at least
SMALL = 4e9  # parameters below which rank 16 is the shipped configs' choice


@dataclass(frozen=True)
class Answers:
    data: str
    model: str
    slice: str


def model_path(answer: str) -> str:
    """A size by its short name, its hub name, or a folder of the user's."""
    if answer in sizes.known():
        return f"models/{sizes.hub_id(answer).rpartition('/')[2]}"
    hub = {sizes.hub_id(name): name for name in sizes.known()}
    return f"models/{answer.rpartition('/')[2]}" if answer in hub else answer


def make(answers: Answers) -> tuple[Config, Subject, Slice, list[str]]:
    """The config, what it is of, and what was found on the way."""
    place = chips.find(answers.slice)
    path = model_path(answers.model)
    model = subject.find_model(path)
    length, notes = _length(answers.data)
    name = f"{Path(answers.data.rstrip('/')).stem or 'mine'}-{model.name}"
    draft = Config(
        model=ModelConfig(path=path, dtype="bfloat16"),
        data=DataConfig(path=answers.data, validation=None, max_seq_len=length, packing="pack"),
        lora=LoraConfig(rank=16 if sizes.parameters(model.architecture) < SMALL else 32,
                        alpha=32.0 if sizes.parameters(model.architecture) < SMALL else 64.0),
        train=TrainConfig(steps=None, epochs=1, batch_size=max(ROWS, place.devices)),
        optim=OptimConfig(lr=1e-4, warmup_steps=20), run_dir=f"runs/{name}",
    )  # fmt: skip
    best = advice.best_on(model.architecture, Job.of(draft, {}, "full"), place)
    if best is None:
        others = advice.fixes(model.architecture, Job.of(draft, {}, "full"), place)
        larger = ", ".join(one.place.name for one in others) or "no slice that is known"
        raise UserError(f"{model.name} of {length:,} tokens a row does not fit on {place.name}; it does on {larger}")
    chosen = advice.apply(draft, best.job)
    if best.auto:
        chosen = replace(chosen, train=replace(chosen.train, remat="auto"))
    return chosen, model, place, notes


def _length(path: str) -> tuple[int, list[str]]:
    from gemma_tpu.data.datafiles import is_here
    from gemma_tpu.data.rows import Reader

    if not is_here(path):
        return 4096, [f"{path} is not here: data.max_seq_len is a guess, and `gemma-tpu data` measures it"]
    rows = list(Reader(DataConfig(path=path), limit=MEASURED_ROWS))
    if not rows:
        raise UserError(f"{path}: no row of it can be used; `gemma-tpu data` says why")
    lengths = [math.ceil(row.characters / CHARACTERS_PER_TOKEN) + TURN_TOKENS * len(row.messages) for row in rows]
    most = float(np.percentile(lengths, 99))
    chosen = next((length for length in LENGTHS[1:] if length >= most), LENGTHS[-1])
    told = f"{len(rows):,} rows of {path} read: 99 % have less than about {most:,.0f} tokens, so sheets of {chosen:,}"
    return chosen, [told]


def render(chosen: Config, place: Slice, source: str) -> str:
    """The file: its commands, what is expected, and every key that is not a default."""
    tree, plain = config.to_dict(chosen), config.to_dict(Config())
    kept: dict[str, Any] = {name: _changed(value, plain[name]) for name, value in tree.items() if value != plain[name]}
    kept["mesh"] = {axis: tree["mesh"][axis] for axis in ("data", "fsdp", "tp", "expert") if tree["mesh"][axis] > 1}
    kept["mesh"] = kept["mesh"] or {"fsdp": 1}
    if tree["mesh"]["replicate_kv"]:
        kept["mesh"]["replicate_kv"] = True
    # What every config says, default or not: people look for it.
    kept["model"] = {key: tree["model"][key] for key in ("path", "dtype")}
    kept["lora"] = {key: tree["lora"][key] for key in ("rank", "alpha")}
    kept["data"] |= {key: tree["data"][key] for key in ("path", "format", "validation", "max_seq_len", "packing")}
    kept["train"] = {key: value for key, value in tree["train"].items() if value != plain["train"][key]}
    kept["train"] = {key: value for key, value in kept["train"].items() if value is not None}
    kept["optim"] = {key: tree["optim"][key] for key in ("lr", "schedule", "warmup_steps", "clip")}
    order = ("model", "data", "lora", "mesh", "train", "optim", "run_dir")
    import yaml

    blocks = [yaml.safe_dump({name: kept[name]}, sort_keys=False, allow_unicode=True) for name in order]
    hub = _download(chosen.model.path)
    head = [
        f"# LoRA of {chosen.model.path} on {chosen.data.path}, on {place.name} ({place.chips} chips).", "#",
        *([f"# Command   {hub}"] if hub else []),
        *(f"# {'Command ' if not hub and not at else '        '}  gemma-tpu {one}" for at, one in enumerate((
            f"plan {source} --on {place.name}", f"data {source} --show 3", f"validate {source}", f"train {source}"))),
        "# Every other key is explained in configs/tiny_cpu.yaml, and has the value that stands there.",
    ]  # fmt: skip
    return "\n".join(head) + "\n\n" + "\n".join(blocks)


def _changed(value: Any, default: Any) -> Any:
    return {key: item for key, item in value.items() if item != default[key]} if isinstance(value, dict) else value


def _download(path: str) -> str | None:
    named = {f"models/{sizes.hub_id(name).rpartition('/')[2]}": sizes.hub_id(name) for name in sizes.known()}
    return f"hf download {named[path]} --local-dir {path}" if path in named and not Path(path).exists() else None


def write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise UserError(f"{path} exists: init never overwrites; give another --out") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
