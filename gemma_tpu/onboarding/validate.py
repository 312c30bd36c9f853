"""Everything about a config that can be held against its files without reading a weight or taking a device.

All that is wrong is collected, and so is what could not be looked at: a check that silently did not run is
worse than none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from jax.sharding import AbstractMesh, AxisType

from gemma_tpu import assets
from gemma_tpu.adapter import lora, start
from gemma_tpu.data.corpus import prepare
from gemma_tpu.data.pairs import PairRows
from gemma_tpu.data.rows import Reader
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import UserError
from gemma_tpu.gemma import loading, mesh, weights
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.gemma.projection import Base
from gemma_tpu.schema import Config, DataConfig
from gemma_tpu.storage.shards import open_checkpoint

T = TypeVar("T")
FIRST_ROWS = 100


@dataclass
class Findings:
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, check: Callable[[], T], key: str = "") -> T | None:
        """The check's result, or None where the user's input is wrong, which is noted once."""
        try:
            return check()
        except UserError as error:
            problem = f"{key}: {error}" if key else str(error)
            if problem not in self.problems:
                self.problems.append(problem)
            return None


def validate(config: Config) -> Findings:
    found = Findings()
    recipe = found.attempt(lambda: assets.find("recipes", config.recipe))
    if recipe is not None:
        found.checked.append(f"recipe: {recipe}")
    folder = Path(config.model.path)
    model = tokenizer = None
    there = "://" in config.model.path or folder.exists()
    if there:
        model = found.attempt(lambda: _model(found, config), "model.path")
        tokenizer = found.attempt(lambda: Tokenizer(config.model.path), "model.path")
    if model is None:
        why = "cannot be used" if there else "is not there"
        found.not_checked.append(f"heads over mesh.tp, LoRA targets, shardings: model.path {folder} {why}")
    if tokenizer is None:
        found.not_checked.append(f"how the rows render: no tokenizer in model.path {folder}")
    _check_mesh(found, config, model)
    if model is not None:
        found.attempt(lambda: _inject(found, config, model))
        _check_split(found, config, model)
    check = _check_rows if config.preference.loss is None else _check_pairs
    check(found, config.data, tokenizer, "data.path")
    if config.data.validation is not None and not isinstance(config.data.validation, float):
        check(found, replace(config.data, path=config.data.validation), tokenizer, "data.validation")
    return found


def _model(found: Findings, config: Config) -> Decoder:
    """The model as shapes, once the headers of its checkpoint promise every tensor."""
    model, checkpoint = loading.build(
        config.model.path, dtype=config.model.dtype, quantise=config.model.quantise
    )
    weights.check(checkpoint, model.arch)
    found.checked.append(
        f"checkpoint: {config.model.path}, {len(model.arch.layers)} layers, {len(checkpoint.names())} "
        f"tensors, {checkpoint.total_bytes / 2**30:.2f} GiB"
    )
    return model


def _check_mesh(found: Findings, config: Config, model: Decoder | None) -> None:
    """Product, heads and rows, each by itself: three mistakes are three lines."""
    section, rows = config.mesh, config.train.batch_size // config.train.accumulation
    if section.auto and not section.cpu_devices:
        found.not_checked.append("mesh: auto is fitted to the devices of the machine that trains")
        return
    before = len(found.problems)
    sizes = {axis: getattr(section, axis) for axis in mesh.AXES}
    product = section.cpu_devices or math.prod(sizes.values())
    if not section.auto:
        found.attempt(lambda: mesh.check_product(sizes, product))
        found.attempt(lambda: mesh.check_rows(rows, sizes))
    if model is not None:
        if not section.auto:
            found.attempt(lambda: mesh.check_heads(model.arch, section.tp, section.replicate_kv))
        found.attempt(lambda: mesh.sizes(section, model.arch, product, rows))
    if len(found.problems) == before:
        found.checked.append(f"mesh: needs {product} device{'s' * (product > 1)}")


def _inject(found: Findings, config: Config, model: Decoder) -> None:
    if config.train.method == "full":
        model.trains = Base
        found.checked.append("train.method: full, every weight of the text tower")
        return
    chosen = lora.inject_config(model, config.lora)
    found.checked.append(f"lora: {len(chosen)} projection kinds, {lora.count(model):,} parameters")
    if (folder := config.lora.init_from) is not None:
        _, notes = start.taken_up(model, folder, config.lora.dora, 0, open_checkpoint(config.model.path))
        found.checked.append(f"lora.init_from: {'; '.join(notes)}")


def _check_split(found: Findings, config: Config, model: Decoder) -> None:
    """Every tensor over the mesh that is asked for, on no device at all."""
    section = config.mesh
    if section.auto or found.problems:  # without a mesh that holds, what divides says nothing
        found.not_checked.append("shardings: they need an explicit mesh and a config that is right otherwise")
        return
    shape = tuple(getattr(section, axis) for axis in mesh.AXES)
    abstract = AbstractMesh(shape, mesh.AXES, axis_types=(AxisType.Auto,) * len(shape))
    fixes = found.attempt(lambda: loading.place(model, abstract, section.replicate_kv)[1])
    if fixes is not None:
        found.checked.append(f"shardings: every tensor fits the mesh, {len(fixes)} kept whole")


def _check_pairs(found: Findings, section: DataConfig, tokenizer: Tokenizer | None, key: str) -> None:
    """The first pairs; without a tokenizer they are not looked at, which is said above."""
    if tokenizer is not None:
        section = replace(section, limit=min(section.limit or FIRST_ROWS, FIRST_ROWS))
        told = found.attempt(lambda: PairRows(section, tokenizer).report(), key)
        if told is not None:
            found.checked.append(f"{key}: of the first lines, {told}")


def _check_rows(found: Findings, section: DataConfig, tokenizer: Tokenizer | None, key: str) -> None:
    """The first rows, rendered as training will render them; without a tokenizer only read."""
    # Without the rules on the whole: a share of few rows may be none of them.
    section = replace(section, limit=min(section.limit or FIRST_ROWS, FIRST_ROWS), validation=None,
                      weights=None, cache=None)  # fmt: skip

    def check() -> str:
        if tokenizer is not None:
            rows = prepare(section, tokenizer)
            why = [f"{reason} {n:,} ({rows.dropped.where(reason)})" for reason, n in rows.dropped.counts.items()]
            dropped = f", left out: {'; '.join(why)}" if why else ""
            return f"{key}: {rows.rows} first rows render{dropped}, {rows.target_tokens:,} target tokens"
        reader = Reader(section)
        count = sum(1 for _ in reader)
        refused = reader.account.refused.total()
        return f"{key}: {count} first rows read" + (f", {refused} cannot be used" if refused else "")

    told = found.attempt(check, key)
    if told is not None:
        found.checked.append(told)
