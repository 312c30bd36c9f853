"""One optimizer update as a pure function: gradients of what trains, over micro-batches, weighted by real targets.

The frozen base goes in and never comes out, so nothing of it is copied; what trains is donated and updated in place.
What trains is a plain {path: array} dict: the optimizer, the checkpoint and the merge all see the same names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gemma_tpu.gemma.model import Decoder, Objective
from gemma_tpu.gemma.projection import Base
from gemma_tpu.gemma.remat import Remat
from gemma_tpu.step.loss import cross_entropy

Tree = TypeVar("Tree")
Trained = dict[str, jax.Array]
Frozen = nnx.State[Any, Any]
State = dict[str, Any]  # {"trained": Trained, "opt": optax state, "step": int32}
Batch = dict[str, jax.Array]  # [A, B, T] leaves: micro-batches, rows, tokens
Shapes = dict[str, jax.ShapeDtypeStruct]  # of a Batch that is not there
Metrics = dict[str, jax.Array]
Step = Callable[[State, Frozen, Batch], tuple[State, Metrics]]
Grade = Callable[[Trained, Frozen, Batch], tuple[jax.Array, jax.Array]]  # (summed loss, number of targets)


@dataclass(frozen=True)
class Parts:
    """A model taken apart: its graph, the names of what trains, and what is frozen."""

    graph: nnx.GraphDef[Decoder]
    names: tuple[str, ...]
    structure: jax.tree_util.PyTreeDef  # of the nnx.State that holds what trains, leaves in the order of `names`
    frozen: Frozen
    objective: "Objective"

    def merge(self, trained: Trained, frozen: Frozen) -> Decoder:
        state = jax.tree.unflatten(self.structure, [trained[name] for name in self.names])
        return nnx.merge(self.graph, state, frozen)


def take_apart(model: Decoder) -> tuple[Parts, Trained]:
    graph, state, *rest = nnx.split(model, model.trains, ...)
    (frozen,) = rest
    flat = {".".join(map(str, path)): leaf.get_raw_value() for path, leaf in nnx.to_flat_state(state)}
    leaves, structure = jax.tree.flatten(state)
    if len(leaves) != len(flat) or any(a is not b for a, b in zip(leaves, flat.values(), strict=True)):
        raise AssertionError("the flat state lists its leaves in another order than the tree does")
    return Parts(graph, tuple(flat), structure, frozen, model.objective or CrossEntropy()), flat


class CrossEntropy:
    """Of every target token."""

    def __call__(self, model: Decoder, batch: Batch, key: jax.Array | None, remat: Remat) -> jax.Array:
        return summed_loss(model, batch, key, remat)

    def weight(self, batch: Batch) -> jax.Array:
        return jnp.sum(batch["weights"])


def summed_loss(model: Decoder, batch: Batch, key: jax.Array | None, remat: Remat) -> jax.Array:
    """Sum of the weighted token losses of one micro-batch [B, T]."""
    x_BTD = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"], key=key, remat=remat)
    return cross_entropy(
        x_BTD, model.embed.w[...], batch["targets"], batch["weights"], model.arch.logit_softcap, None,
        model.trains is Base,
    )  # fmt: skip


def mean_loss_and_grads(
    parts: Parts, trained: Trained, frozen: Frozen, batch: Batch, key: jax.Array | None = None,
    remat: Remat = "none",
) -> tuple[jax.Array, Trained]:  # fmt: skip
    """Mean loss over all target tokens of all micro-batches, and its gradients.

    Divided by the total weight, not averaged over micro-batches: one with few targets must not count like a full one.
    """
    total = jnp.maximum(parts.objective.weight(batch), 1.0)

    def one(carry: tuple[jax.Array, Trained], piece: tuple[jax.Array, Batch]) -> tuple[tuple[jax.Array, Trained], None]:
        loss, grads = carry
        number, micro = piece
        micro_key = None if key is None else jax.random.fold_in(key, number)

        def objective(trained: Trained) -> jax.Array:
            return parts.objective(parts.merge(trained, frozen), micro, micro_key, remat) / total

        micro_loss, micro_grads = jax.value_and_grad(objective)(trained)
        return (loss + micro_loss, jax.tree.map(jnp.add, grads, micro_grads)), None

    zeros = jax.tree.map(jnp.zeros_like, trained)
    count = batch["tokens"].shape[0]
    (loss, grads), _ = jax.lax.scan(one, (jnp.zeros((), jnp.float32), zeros), (jnp.arange(count), batch))
    return loss, grads


def keep_if_unsound(sound: jax.Array, new: Tree, old: Tree) -> Tree:
    """`new`, or `old` where the update's loss or gradient is no number.

    Counters go on in either case, so the learning rate stays that of the step and not of the updates applied.
    """

    def choose(new_leaf: jax.Array, old_leaf: jax.Array) -> jax.Array:
        counts = jnp.issubdtype(new_leaf.dtype, jnp.integer) and new_leaf.ndim == 0
        return new_leaf if counts else jnp.where(sound, new_leaf, old_leaf)

    chosen: Tree = jax.tree.map(choose, new, old)
    return chosen


def make_train_step(
    parts: Parts, optimizer: optax.GradientTransformation, rate: optax.Schedule, *, remat: Remat, seed: int,
    dropout: bool,
) -> Step:  # fmt: skip
    """The function that `train` jits and a planner can lower: (state, frozen, batch) -> (state, metrics)."""

    def train_step(state: State, frozen: Frozen, batch: Batch) -> tuple[State, Metrics]:
        # The key comes from the step number, so a resumed run draws what the unbroken one would have drawn.
        key = jax.random.fold_in(jax.random.key(seed), state["step"]) if dropout else None
        loss, grads = mean_loss_and_grads(parts, state["trained"], frozen, batch, key, remat)
        norm = optax.tree.norm(grads)
        updates, opt = optimizer.update(grads, state["opt"], state["trained"])
        trained = optax.apply_updates(state["trained"], updates)
        # Chosen on the device, in the same program: the host learns of it a step later and nothing compiles again.
        sound = jnp.isfinite(loss) & jnp.isfinite(norm)
        trained, opt = keep_if_unsound(sound, (trained, opt), (state["trained"], state["opt"]))
        metrics = {
            "loss": loss,
            "lr": jnp.asarray(rate(state["step"]), jnp.float32),
            "grad_norm": norm,
            "skipped": 1 - sound.astype(jnp.int32),
            "tokens": jnp.sum(batch["segment_ids"] > 0),
            "target_tokens": jnp.sum(batch["weights"] > 0),
        }
        return {"trained": trained, "opt": opt, "step": state["step"] + 1}, metrics

    return train_step


def make_eval_step(parts: Parts) -> Grade:
    """Of all micro-batches of a batch."""

    def eval_step(trained: Trained, frozen: Frozen, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = parts.merge(trained, frozen)
        losses = jax.lax.map(lambda micro: parts.objective(model, micro, None, "none"), batch)
        return jnp.sum(losses), parts.objective.weight(batch)

    return eval_step
