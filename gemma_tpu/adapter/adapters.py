"""A model with what a run has trained on it: the adapter applied beside the base, or the trained base itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gemma_tpu.adapter import lora, lowrank
from gemma_tpu.errors import UserError
from gemma_tpu.gemma import loading
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.run import runs
from gemma_tpu.run.checkpoint import open_existing
from gemma_tpu.storage.shards import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Trained:
    """One checkpoint of a run: what was trained, and the record of how."""

    run: Path
    step: int
    record: dict[str, Any]
    values: Mapping[str, jax.Array | np.ndarray]

    @property
    def base_folder(self) -> Path:
        return Path(self.record["base"]["folder"])

    @property
    def is_lora(self) -> bool:
        return bool(self.record["method"] == "lora")

    @property
    def quantised(self) -> str | None:
        """How its base was held in training."""
        kind: str | None = self.record["config"]["model"].get("quantise")
        return kind

    def numpy(self) -> dict[str, np.ndarray]:
        return {path: np.asarray(value) for path, value in self.values.items()}

    def by_tensor(self, arch: Architecture) -> dict[str, lowrank.Adapter]:
        """The adapter by the names of the base's tensors."""
        return lowrank.by_tensor(arch, self.numpy(), self.record["adapter"])

    def check_base(self, checkpoint: Checkpoint) -> None:
        if checkpoint.fingerprint() != self.record["base"]["fingerprint"]:
            raise UserError(
                f"{checkpoint.folder} is not the base that {self.run} was trained on ({self.base_folder}): their "
                "tensors differ; an adapter applied to another base gives garbage"
            )


def read(run: str | Path, step: int | None = None) -> Trained:
    """The latest checkpoint of a run folder, or the one of `step`."""
    run = Path(run)
    runs.read_config(run)
    checkpoints = open_existing(run)
    try:
        if step is not None and step not in checkpoints.steps:
            raise UserError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, checkpoints.steps))}")
        at = checkpoints.latest if step is None else step
        assert at is not None, "a run without checkpoints was refused when they were opened"
        return Trained(run, at, checkpoints.record(at), checkpoints.restore_trained(at))
    finally:
        checkpoints.close()


def load(
    folder: str | Path, adapter: str | Path | Trained | None = None, mesh: Mesh | None = None,
    dtype: str | None = None, quantise: bool = True,
) -> Decoder:  # fmt: skip
    """The model of a checkpoint folder, in its own dtype unless another is asked for, on one device or a mesh.

    `adapter` is a run folder: its latest checkpoint is applied, after a check that it was trained on this base. A
    base that was quantised in training is so here, unless `quantise` is False.
    """
    checkpoint = open_checkpoint(Path(folder))
    device_mesh = loading.one_device_mesh() if mesh is None else mesh
    trained = None if adapter is None else adapter if isinstance(adapter, Trained) else read(adapter)
    model, _ = loading.build(folder, dtype=dtype or own_dtype(checkpoint))
    if trained is not None and quantise:
        loading.hold_quantised(model, trained.quantised)
    if trained is not None:
        trained.check_base(checkpoint)
        if trained.is_lora:
            lora.inject_like(model, trained.record["shapes"], trained.record["adapter"])
    shardings, _ = loading.place(model, device_mesh, replicate_kv=True)
    loading.load_base(model, checkpoint, shardings)
    if trained is not None:
        wanted = {path: value.dtype for path, value in loading.variables(model).items()}
        values = {path: value.astype(wanted[path]) for path, value in trained.numpy().items()}
        loading.assign(model, loading.put(values | lora.constants(model), shardings))
    return model


def base_of(target: str | Path) -> Path:
    """The folder whose config.json says what the target is: its own, or that of the base a run was trained on."""
    return read(target).base_folder if runs.is_run(Path(target)) else Path(target)


def load_target(
    target: str | Path, dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[Decoder, Path]:
    """What the user points at, a run folder (adapter applied) or a model folder; and the folder of its tokenizer."""
    target = Path(target)
    if runs.is_run(target):
        trained = read(target)
        return load(trained.base_folder, trained, mesh, dtype), trained.base_folder
    return load(target, mesh=mesh, dtype=dtype), target


def own_dtype(checkpoint: Checkpoint) -> str:
    """bfloat16 or float32, as the embedding is stored; anything wider or stranger is computed in float32."""
    names = [name for name in checkpoint.names() if name.endswith("embed_tokens.weight")]
    return "bfloat16" if names and checkpoint.info(names[0]).dtype.name == "bfloat16" else "float32"

