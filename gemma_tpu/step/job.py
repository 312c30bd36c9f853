"""A train step's shape, and its variables in their shardings: what every estimate starts from.

The variables are the model's own, in the shardings that `loading.place` gives them on a mesh of this shape.
No device is needed, and JAX is imported only when they are asked for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations
from typing import Any, Literal, get_args

from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.schema import Activation, Config, Kept, LoraConfig, Offloaded, OptimConfig

# What is recomputed: "none", "full" (all but each layer's input), or all but the activations of these names.
Policy = Literal["none", "full"] | Kept
# What the model names, in the order of a layer: those activations that a run may keep.
NAMES: tuple[Activation, ...] = get_args(Activation)
# A TPU stores the last two dims in tiles of 8 x 128, and of fewer rows where there are fewer.
LANES, SUBLANES = 128, 8


@dataclass(frozen=True)
class Job:
    """A train step's shape: everything that decides its memory and its work, and nothing else."""

    method: str
    targets: str | tuple[str, ...]
    exclude: tuple[str, ...]
    rank: int
    dtype: str
    rows: int  # of one micro-batch, over all devices
    accumulation: int
    tokens: int  # of a row
    remat: Policy  # "gate@host": kept in the host's memory
    mesh: tuple[tuple[str, int], ...]  # (axis, size)
    replicate_kv: bool
    adapter: LoraConfig = LoraConfig()  # its other fields; those above are in front
    optim: OptimConfig = OptimConfig()
    quantise: Literal["int8", "nf4"] | None = None

    @classmethod
    def of(cls, config: Config, mesh: Mapping[str, int], remat: Policy | None = None) -> "Job":
        """The job of a config on a mesh that `mesh.sizes` gave; `remat` where the config leaves it open."""
        train, lora = config.train, config.lora
        return cls(
            method=train.method, targets=lora.targets, exclude=lora.exclude, rank=lora.rank,
            dtype=config.model.dtype, rows=train.batch_size // train.accumulation,
            accumulation=train.accumulation, tokens=config.data.max_seq_len,
            remat=_settled(train.remat if remat is None else remat), mesh=_axes(mesh),
            replicate_kv=config.mesh.replicate_kv, adapter=lora, optim=config.optim, quantise=config.model.quantise,
        )  # fmt: skip

    def change(self, **changes: Any) -> "Job":
        """The same job with other values; `mesh` may be a mapping."""
        if "mesh" in changes:
            changes["mesh"] = _axes(dict(changes["mesh"]))
        if "remat" in changes:
            changes["remat"] = _settled(changes["remat"])
        return replace(self, **changes)

    def size(self, axis: str) -> int:
        return dict(self.mesh).get(axis, 1)

    @property
    def devices(self) -> int:
        return math.prod(size for _, size in self.mesh)

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def tokens_per_update(self) -> int:
        return self.rows * self.tokens * self.accumulation

    @property
    def tokens_here(self) -> float:
        """Tokens of a micro-batch whose rows lie on one device; tp splits their sequence or their heads."""
        return self.rows * self.tokens / (self.size("data") * self.size("fsdp"))

    def keeps(self, name: str) -> bool:
        """Is this activation kept in the device's memory?"""
        return self.remat == "none" or (self.remat != "full" and name in self.remat)

    def recomputes(self, name: str) -> bool:
        """Is it neither kept nor brought back from the host's memory?"""
        return not self.keeps(name) and (self.remat == "full" or f"{name}@host" not in self.remat)


def _axes(mesh: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((axis, mesh.get(axis, 1)) for axis in ("data", "fsdp", "expert", "tp"))


def _settled(remat: Literal["none", "full", "auto"] | Sequence[Activation | Offloaded]) -> Policy:
    if remat == "auto":
        raise ValueError("remat: auto is a question to the planner; a job has its answer")
    return remat if remat == "none" or remat == "full" else tuple(remat)


@dataclass(frozen=True)
class Variable:
    """One variable of the model: a tensor, or as many as its layer repeats."""

    path: str
    shape: tuple[int, ...]
    local: tuple[int, ...]  # of one device's shard
    itemsize: float  # of codes of four bits: 0.5
    trains: bool
    fsdp_dim: int | None  # the dim that fsdp splits
    parameters: int  # that a model has in it; scales and zeros are none

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of one device's shard."""
        return int(self.itemsize * padded(self.local))


def padded(shape: tuple[int, ...]) -> int:
    """Elements as a TPU stores them: in tiles of two dims, of those two that waste least."""
    if len(shape) < 2:
        return math.prod(shape)
    waste = min(_tiles(a, b) / (a * b) for a, b in permutations(shape, 2))
    return round(math.prod(shape) * waste)


def _tiles(rows: int, columns: int) -> int:
    sublanes = min(SUBLANES, 1 << (rows - 1).bit_length())
    return -(-rows // sublanes) * sublanes * (-(-columns // LANES) * LANES)


def placed(arch: Architecture, job: Job) -> tuple[Variable, ...]:
    """Every variable of the model with its shard, as a run places it; its errors are the run's too."""
    # Rows, tokens and remat do not move weights: a search over them must not place the model again.
    return _placed(arch, job.change(rows=1, tokens=1, accumulation=1, remat="full"))[0]


def moments(arch: Architecture, job: Job) -> int:
    """Bytes of one device that the optimizer holds beside what trains."""
    return _placed(arch, job.change(rows=1, tokens=1, accumulation=1, remat="full"))[1]


@lru_cache(256)
def _placed(arch: Architecture, job: Job) -> tuple[tuple[Variable, ...], int]:
    from jax.sharding import AbstractMesh, AxisType

    from gemma_tpu.adapter import lora
    from gemma_tpu.gemma import loading
    from gemma_tpu.gemma import mesh as meshes
    from gemma_tpu.gemma.model import Decoder
    from gemma_tpu.gemma.projection import Base
    from gemma_tpu.step import optim

    model = Decoder(arch, loading.DTYPES[job.dtype])
    loading.hold_quantised(model, job.quantise)
    if job.method == "full":
        model.trains = Base
    else:
        adapter = replace(job.adapter, targets=job.targets, exclude=job.exclude, rank=job.rank)
        lora.inject_config(model, adapter)
    shape = tuple(job.size(axis) for axis in meshes.AXES)
    mesh = AbstractMesh(shape, meshes.AXES, axis_types=(AxisType.Auto,) * len(shape))
    shardings, _ = loading.place(model, mesh, job.replicate_kv)
    found, shares = [], lora.shares(model)
    for path, variable in loading.variables(model).items():
        shape, sharding = tuple(variable.shape), shardings[path]
        split = [dim for dim, entry in enumerate(sharding.spec) if entry == "fsdp"]
        size = 0.5 if variable.dtype.name == "uint4" else variable.dtype.itemsize
        share = 1.0 if isinstance(variable, Base) else shares.get(path, 0.0)
        found.append(Variable(path, shape, sharding.shard_shape(shape), size, isinstance(variable, model.trains),
                              split[0] if split else None, round(share * math.prod(shape))))  # fmt: skip
    state = optim.state_shapes(job.optim, model, shardings)
    held = sum(padded(shard) * dtype.itemsize for shape, shard, dtype in state if shape)
    return tuple(found), held
