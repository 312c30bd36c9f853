"""The train step as one program: the function, its shardings and its shapes.

`train` runs this object on devices, and `plan` gives the same object to the compiler of a slice that is not there:
what was planned is what runs.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_tpu.adapter import lora
from gemma_tpu.data.batches import Batch
from gemma_tpu.estimate import advice
from gemma_tpu.gemma import loading
from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.gemma.projection import Base
from gemma_tpu.gemma.sites import Site
from gemma_tpu.hardware import chips, distributed, torus
from gemma_tpu.schema import Config
from gemma_tpu.step import optim, preference, step
from gemma_tpu.step.job import Policy
from gemma_tpu.training import flags

Shardings = dict[str, NamedSharding]
BATCH = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32, "targets": jnp.int32,
         "weights": jnp.float32}  # fmt: skip


def adapt(model: Decoder, config: Config) -> list[Site]:
    """Choose what trains, and for what: adapters beside a frozen base, or the base itself (then there are no sites)."""
    model.objective = preference.objective(config)
    if config.train.method == "full":
        model.trains = Base
        return []
    return lora.inject_config(model, config.lora)


def remat_of(config: Config, model: Decoder, mesh: Mesh) -> tuple[Policy, str | None]:
    """What `train.remat` means on this mesh, and a sentence where it had to be chosen (auto)."""
    if config.train.remat != "auto":
        return config.train.remat, None
    first = mesh.devices.flat[0]
    place = chips.of_devices(first.device_kind, mesh.size, torus.slices(mesh.devices.flat))
    return advice.choose_remat(model.arch, config, place, dict(mesh.shape))


@dataclass(frozen=True)
class Program:
    """One optimizer update on a mesh: (state, frozen, batch) -> (state, metrics), the state updated in place."""

    mesh: Mesh
    parts: step.Parts
    optimizer: optax.GradientTransformation
    function: step.Step
    trained: step.Trained  # the model's own values: arrays, or shapes
    state_shardings: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def first_state(self) -> step.State:
        opt = jax.jit(self.optimizer.init, out_shardings=self.state_shardings["opt"])(self.trained)
        return {"trained": self.trained, "opt": opt, "step": self.at(0)}

    def at(self, number: int) -> jax.Array:
        placed: jax.Array = distributed.place(np.asarray(number, np.int32), self.whole)
        return placed

    def abstract_state(self) -> step.State:
        shapes = {
            "trained": self.trained,
            "opt": jax.eval_shape(self.optimizer.init, self.trained),
            "step": jax.ShapeDtypeStruct((), jnp.int32),
        }
        state: step.State = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes, self.state_shardings,
        )  # fmt: skip
        return state

    def abstract_batch(self, accumulation: int, rows: int, tokens: int) -> step.Shapes:
        """`rows` of one micro-batch."""
        shape = (accumulation, rows, tokens)
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=self.rows) for name, dtype in BATCH.items()}

    @property
    def rows(self) -> NamedSharding:
        return NamedSharding(self.mesh, meshes.spec_for((None, "batch", None), self.mesh))

    def place(self, batch: Batch) -> step.Batch:
        return {name: distributed.place(leaf, self.rows) for name, leaf in batch.items()}

    def lower(self, state: step.State, batch: step.Batch | step.Shapes) -> jax.stages.Lowered:
        with jax.set_mesh(self.mesh):
            return self._jitted(None).lower(state, self.parts.frozen, batch)

    def _jitted(self, options: dict[str, Any] | None) -> jax.stages.Wrapped:
        # The state must come back in the shardings it went in with, or step 2 would compile again.
        shardings = (self.state_shardings, self.whole)
        return jax.jit(self.function, donate_argnums=0, out_shardings=shardings, compiler_options=options)

    def compile(
        self, lowered: jax.stages.Lowered, more: dict[str, Any] | None = None
    ) -> "jax.stages.Compiled | _ByJit":
        options = flags.for_mesh(self.mesh) | (more or {})
        compiled = lowered.compile(compiler_options=options or None)
        four_bits = any(leaf.dtype.name == "uint4" for leaf in jax.tree.leaves(self.parts.frozen))
        return _ByJit(compiled, self._jitted(options or None)) if four_bits else compiled


class _ByJit:
    """A compiled program that is called through jit. JAX 0.10 turns down arrays of four bits where it is called
    itself: it takes them to be laid out otherwise than the program has them. The compile cache gives jit the same."""

    def __init__(self, compiled: jax.stages.Compiled, jitted: jax.stages.Wrapped):
        self._compiled, self._jitted = compiled, jitted

    def __call__(self, *args: Any) -> Any:
        return self._jitted(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)


def build(
    config: Config, model: Decoder, shardings: Shardings, mesh: Mesh, total_steps: int, remat: Policy | None = None
) -> Program:
    """The program of a model whose variables hold arrays, or shapes with shardings (`abstract`).

    `remat`: what a planner tries in place of the config's.
    """
    rate, notes = optim.schedule(config.optim, total_steps)
    if remat is None:
        remat, chosen = remat_of(config, model, mesh)
        notes += [chosen] if chosen else []
    optimizer = optim.optimizer(config.optim, rate, optim.roles(model))
    parts, trained = step.take_apart(model)
    function = step.make_train_step(
        parts, optimizer, rate, remat=remat, seed=config.train.seed,
        dropout=config.train.method == "lora" and config.lora.dropout > 0,
    )  # fmt: skip
    return Program(mesh, parts, optimizer, function, trained, _state_shardings(optimizer, trained, shardings, mesh),
                   tuple(notes))  # fmt: skip


def _state_shardings(
    optimizer: optax.GradientTransformation, trained: step.Trained, shardings: Shardings, mesh: Mesh
) -> dict[str, Any]:
    of_trained = {path: shardings[path] for path in trained}
    of_opt = optim.state_shardings(jax.eval_shape(optimizer.init, trained), trained, of_trained)
    return {"trained": of_trained, "opt": of_opt, "step": NamedSharding(mesh, PartitionSpec())}


def abstract(model: Decoder, shardings: Shardings) -> None:
    """Give every variable its shape and sharding in place of a value."""
    shapes = loading.variables(model).items()
    loading.assign(model, {
        path: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shardings[path]) for path, v in shapes
    })
