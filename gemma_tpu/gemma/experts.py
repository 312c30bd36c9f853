"""Routed experts: each device keeps its own, and the tokens come to them.

Expert weights are many times the tokens of a step, so on a mesh they never move: tokens are gathered from the devices
that share the experts, each device works on the (token, expert) pairs of its own experts, and what they give is
summed back to the devices of the tokens.

How many pairs a device gets is the router's choice, and shapes are static: they are worked off in turns of somewhat
more than a fair share. Even routing needs one turn; all tokens at one device take more turns, and none is dropped.
The backward pass takes the same turns again, so nothing of a turn's size outlives it.

Letters: B rows, T tokens (of a row; inside a device of all that meet there), D hidden, E experts (inside a device its
own), k experts of a token, F expert mlp, P all (token, expert) pairs, those of own experts first; t those of one turn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import CustomVJPPrimal
from jax.sharding import PartitionSpec
from jax.tree_util import PyTreeDef

from gemma_tpu.gemma.mesh import split_of
from gemma_tpu.gemma.projection import Base, ExpertProjection, shaped
from gemma_tpu.gemma.remat import named
from gemma_tpu.gemma.variants import Architecture, Experts

SLACK = 1.25  # rows of a turn over a fair share of the pairs
ROWS = 128  # they are a multiple of this

Axes = tuple[str, ...]
Entry = str | Axes | None
Params = Sequence[jax.Array]  # of both projections: weights [E, ...], what quantised ones need, adapters
Number = int | jax.Array  # of a turn
Given = tuple[tuple[jax.Array, ...], jax.Array, jax.Array, jax.Array, jax.Array | None]  # what `_experts` was given
Saved = tuple[Given, tuple[tuple[()] | None, ...]]  # and, for each of the params, whether it trains: () or None
T = TypeVar("T")


class Mixture(nnx.Module):
    """Routed experts beside the dense MLP. The router is float32: a rounding there sends a token elsewhere."""

    def __init__(self, arch: Architecture, experts: Experts, repeats: int, dtype: jnp.dtype):
        D, E, F = arch.hidden, experts.count, experts.mlp
        self.top_k, self.eps, self.root = experts.top_k, arch.eps, D**-0.5
        self.router = shaped(Base, (repeats, E, D), dtype, ("layers", None, None))
        self.router_scale = shaped(Base, (repeats, D), dtype, ("layers", None))
        self.expert_scale = shaped(Base, (repeats, E), dtype, ("layers", None))
        self.gate_up_proj = ExpertProjection("experts.gate_up_proj", (E, 2 * F, D), repeats, dtype)
        self.down_proj = ExpertProjection("experts.down_proj", (E, D, F), repeats, dtype)

    def route(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(weights, expert numbers) of the top k experts of each token."""
        x_BTD = x_BTD.astype(jnp.float32)
        rms_BTD = x_BTD * jax.lax.rsqrt(jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True) + self.eps)
        scaled_BTD = rms_BTD * self.router_scale[...].astype(jnp.float32) * self.root
        scores_BTE = scaled_BTD @ self.router[...].astype(jnp.float32).T
        weights_BTk, chosen_BTk = jax.lax.top_k(jax.nn.softmax(scores_BTE, axis=-1), self.top_k)
        weights_BTk /= jnp.sum(weights_BTk, axis=-1, keepdims=True)
        return weights_BTk * self.expert_scale[...].astype(jnp.float32)[chosen_BTk], chosen_BTk

    def __call__(self, routed_BTD: jax.Array, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        """Experts see `x_BTD`; the router sees `routed_BTD`, the residual before any norm."""
        weights_BTk, chosen_BTk = self.route(routed_BTD)
        graph, state = nnx.split((self.gate_up_proj, self.down_proj))
        params, tree = jax.tree.flatten(state)
        plan = _Plan(graph, tree, split_of("experts", self.router.shape[-2]),
                     split_of("batch", x_BTD.shape[0]), split_of("seq", x_BTD.shape[1]))  # fmt: skip
        return named(_experts(plan, tuple(params), x_BTD, weights_BTk, chosen_BTk, key), "down")


class _Pairs(NamedTuple):
    """Pairs sorted by expert, this device's first."""

    rows: int  # of one turn; there are whole turns of them
    order_P: jax.Array  # numbers of pairs; pair p is of token p // k
    weights_P: jax.Array
    ends_E: jax.Array  # where the pairs of each of this device's experts end


@dataclass(frozen=True)
class _Plan:
    """What does not change while the program runs: the projections' structure, and what is split over which axes."""

    graph: nnx.GraphDef[tuple[ExpertProjection, ExpertProjection]]
    tree: PyTreeDef
    experts: Entry
    rows: Entry
    seq: Entry

    @property
    def of_experts(self) -> Axes:
        return _names(self.experts)

    @property
    def of_tokens(self) -> Axes:
        return _names(self.rows) + _names(self.seq)

    @property
    def shared(self) -> Axes:
        """Axes of devices with other experts and other tokens: the tokens travel along them."""
        return tuple(axis for axis in self.of_tokens if axis in self.of_experts)

    def gather(self, x_T: jax.Array) -> jax.Array:
        """All tokens that meet this device's experts."""
        x_T = x_T.reshape(-1, x_T.shape[-1])
        if self.shared:
            x_T = jax.lax.all_gather(x_T, self.shared, tiled=True)
        return x_T

    def sum_back(self, x_T: jax.Array) -> jax.Array:
        """What all experts gave to this device's tokens."""
        if copied := _without(self.of_experts, self.of_tokens):
            x_T = jax.lax.psum(x_T, copied)
        if self.shared:
            x_T = jax.lax.psum_scatter(x_T, self.shared, tiled=True)
        return x_T

    def rows_of_turn(self, pairs: int) -> int:
        share = 1 / jax.lax.axis_size(self.of_experts) if self.of_experts else 1.0
        return pairs if share == 1 else min(-(-int(SLACK * share * pairs) // ROWS) * ROWS, pairs)

    def key(self, key: jax.Array | None, turn: Number) -> jax.Array | None:
        """Of the dropout: devices and turns hold other pairs."""
        if key is None:
            return None
        axes = self.of_experts + _without(self.of_tokens, self.of_experts)
        return jax.random.fold_in(jax.random.fold_in(key, jax.lax.axis_index(axes) if axes else 0), turn)

    def on_mesh(self, run: Callable[..., T], inputs: str, outputs: str) -> Callable[..., T]:
        """`run` on every device; letters say what each input and output is: tokens, weights of experts, keys."""
        if not self.of_tokens and not self.of_experts:
            return run
        specs = {"t": PartitionSpec(self.rows, self.seq), "e": PartitionSpec(self.experts), "k": PartitionSpec()}
        ins, outs = (tuple(specs[letter] for letter in letters) for letters in (inputs, outputs))
        return jax.shard_map(run, in_specs=ins, out_specs=outs if len(outs) > 1 else outs[0], check_vma=False)


def _without(axes: Axes, others: Axes) -> Axes:
    return tuple(axis for axis in axes if axis not in others)


def _names(entry: Entry) -> Axes:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(
    plan: _Plan, params: tuple[jax.Array, ...], x_BTD: jax.Array, weights_BTk: jax.Array, chosen_BTk: jax.Array,
    key: jax.Array | None,
) -> jax.Array:  # fmt: skip
    return plan.on_mesh(partial(_forward, plan), "etttk", "t")(params, x_BTD, weights_BTk, chosen_BTk, key)


def _vjp_forward(
    plan: _Plan, params: tuple[CustomVJPPrimal, ...], x_BTD: CustomVJPPrimal, weights_BTk: CustomVJPPrimal,
    chosen_BTk: CustomVJPPrimal, key: CustomVJPPrimal | None,
) -> tuple[jax.Array, Saved]:  # fmt: skip
    trains = tuple(() if each.perturbed else None for each in params)  # frozen weights need no gradient
    given: Given = jax.tree.map(lambda each: each.value, (params, x_BTD, weights_BTk, chosen_BTk, key))
    return _experts(plan, *given), (given, trains)


def _vjp_backward(
    plan: _Plan, saved: Saved, g_BTD: jax.Array
) -> tuple[tuple[jax.Array | None, ...], jax.Array, jax.Array, None, None]:
    given, trains = saved
    run = partial(_backward, plan, [each is not None for each in trains])
    dtrained, dx_BTD, dweights_BTk = plan.on_mesh(run, "etttkt", "ett")(*given, g_BTD)
    found = iter(dtrained)
    return tuple(None if each is None else next(found) for each in trains), dx_BTD, dweights_BTk, None, None


_experts.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)


def _forward(
    plan: _Plan, params: Params, x_BTD: jax.Array, weights_BTk: jax.Array, chosen_BTk: jax.Array,
    key: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """On one device: what the experts give to its tokens."""
    x_TD, pairs, k = plan.gather(x_BTD), _sort(plan, params, weights_BTk, chosen_BTk), chosen_BTk.shape[-1]

    def turn(number: Number, out_TD: jax.Array) -> jax.Array:
        weights_t, sizes_E, from_t, to_t = _of_turn(pairs, number, k)
        out_tD = _apply(plan, params, _rows(x_TD, from_t), weights_t, sizes_E, plan.key(key, number))
        return out_TD.at[to_t].add(out_tD, mode="drop")

    return plan.sum_back(_turns(pairs, turn, jnp.zeros_like(x_TD))).reshape(x_BTD.shape)


def _backward(
    plan: _Plan, trains: list[bool], params: Params, x_BTD: jax.Array, weights_BTk: jax.Array,
    chosen_BTk: jax.Array, key: jax.Array | None, g_BTD: jax.Array,
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:  # fmt: skip
    """On one device: gradients of the weights that train, of its tokens, and of their routing weights."""
    x_TD, g_TD = plan.gather(x_BTD), plan.gather(g_BTD)
    pairs, k = _sort(plan, params, weights_BTk, chosen_BTk), chosen_BTk.shape[-1]

    def turn(
        number: Number, found: tuple[list[jax.Array], jax.Array, jax.Array]
    ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        dtrained, dx_TD, dweights_P = found
        weights_t, sizes_E, from_t, to_t = _of_turn(pairs, number, k)

        def run(trained: Params, x_tD: jax.Array, weights_t: jax.Array) -> jax.Array:
            new = iter(trained)
            every = [next(new) if trains else w for w, trains in zip(params, trains, strict=True)]
            return _apply(plan, every, x_tD, weights_t, sizes_E, plan.key(key, number))

        trained = [w for w, trains in zip(params, trains, strict=True) if trains]
        _, pull = jax.vjp(run, trained, _rows(x_TD, from_t), weights_t)
        more, dx_tD, dweights_t = pull(_rows(g_TD, from_t))
        dx_TD = dx_TD.at[to_t].add(dx_tD, mode="drop")
        dweights_t = jnp.where(to_t == from_t, dweights_t, 0)
        dweights_P = jax.lax.dynamic_update_slice(dweights_P, dweights_t, (number * pairs.rows,))
        return [a + b for a, b in zip(dtrained, more, strict=True)], dx_TD, dweights_P

    start = [jnp.zeros_like(w) for w, trains in zip(params, trains, strict=True) if trains]
    found = _turns(pairs, turn, (start, jnp.zeros_like(x_TD), jnp.zeros_like(pairs.weights_P)))
    dtrained, dx_TD, dweights_P = found
    if others := _without(plan.of_tokens, plan.of_experts):
        dtrained = jax.lax.psum(dtrained, others)
    _, dweights_P = jax.lax.sort((pairs.order_P, dweights_P), num_keys=1)
    dweights_Tk = plan.sum_back(dweights_P[: len(x_TD) * k].reshape(-1, k))
    return tuple(dtrained), plan.sum_back(dx_TD).reshape(x_BTD.shape), dweights_Tk.reshape(weights_BTk.shape)


def _sort(plan: _Plan, params: Params, weights_BTk: jax.Array, chosen_BTk: jax.Array) -> _Pairs:
    weights_P, chosen_P = (plan.gather(x).reshape(-1) for x in (weights_BTk, chosen_BTk))
    own = params[0].shape[0]
    expert_P = chosen_P - (jax.lax.axis_index(plan.of_experts) * own if plan.of_experts else 0)
    expert_P = jnp.where((expert_P >= 0) & (expert_P < own), expert_P, own)
    rows = plan.rows_of_turn(len(expert_P))
    missing = -len(expert_P) % rows
    expert_P = jnp.pad(expert_P, (0, missing), constant_values=own)
    number_P = jnp.arange(len(expert_P), dtype=jnp.int32)
    _, order_P, weights_P = jax.lax.sort((expert_P, number_P, jnp.pad(weights_P, (0, missing))), num_keys=2)
    return _Pairs(rows, order_P, weights_P, jnp.sum(expert_P[:, None] <= jnp.arange(own), axis=0, dtype=jnp.int32))


def _turns(pairs: _Pairs, turn: Callable[[Number, T], T], start: T) -> T:
    """`turn` as often as there are pairs for: once without a loop where one turn holds them all."""
    if pairs.rows == len(pairs.order_P):
        return turn(0, start)
    count = -(-pairs.ends_E[-1] // pairs.rows)
    return jax.lax.while_loop(
        lambda carry: carry[0] < count, lambda carry: (carry[0] + 1, turn(*carry)), (jnp.int32(0), start)
    )[1]


def _of_turn(pairs: _Pairs, number: Number, k: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(weights of a turn's pairs, how many of each expert, the tokens that the rows are of, and where they go)

    Rows after this device's last pair are of some token, and go nowhere.
    """
    first = number * pairs.rows
    token_t = jax.lax.dynamic_slice(pairs.order_P, (first,), (pairs.rows,)) // k
    weights_t = jax.lax.dynamic_slice(pairs.weights_P, (first,), (pairs.rows,))
    ends_E = jnp.clip(pairs.ends_E - first, 0, pairs.rows)
    to_t = jnp.where(jnp.arange(pairs.rows) < ends_E[-1], token_t, len(pairs.order_P))
    return weights_t, jnp.diff(ends_E, prepend=0), token_t, to_t


def _rows(x_TD: jax.Array, token_t: jax.Array) -> jax.Array:
    return x_TD.at[token_t].get(mode="clip")


def _apply(
    plan: _Plan, params: Params, x_tD: jax.Array, weights_t: jax.Array, sizes_E: jax.Array, key: jax.Array | None
) -> jax.Array:
    """What the experts make of rows sorted by expert; rows after the last group come out as anything.

    The routing weights go in before the last projection: their gradient then needs neither its output nor its width.
    """
    gate_up_proj, down_proj = nnx.merge(plan.graph, jax.tree.unflatten(plan.tree, params))
    gate_tF, up_tF = jnp.split(gate_up_proj(x_tD, sizes_E, key), 2, axis=-1)
    mid_tF = jax.nn.gelu(gate_tF, approximate=True) * up_tF
    return down_proj(mid_tF * weights_t[:, None].astype(mid_tF.dtype), sizes_E, key)
