"""The two programs of sampling: prompts from a packed sheet into a store, and tokens for all rows of a batch.

Shapes never change while a batch runs: a row whose sequence has ended waits for the next one. A prompt is computed
once and stays in the store until all of its samples have begun; `decode` begins them, then takes steps until enough
rows have ended to be worth a stop.

Letters: B rows, E stored prompts, T tokens of a sheet, S slots, V vocabulary, C steps of a call, N stop ids.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from gemma_tpu.gemma import kv_cache
from gemma_tpu.gemma.kv_cache import Rings
from gemma_tpu.gemma.mesh import constrain, spec_for
from gemma_tpu.gemma.model import Decoder
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.sampling import drawing, row_drawing
from gemma_tpu.sampling.drawing import Numbers, Rules
from gemma_tpu.sampling.row_drawing import Given, RowNumbers

STOPS = 8  # stop ids are padded to a multiple of it


class Sheet(NamedTuple):
    """Prompts side by side, segments 1, 2, 3 …; where each begins, its length, and its row of the store."""

    tokens_1T: Given
    segments_1T: Given
    start_E: Given
    length_E: Given
    row_E: Given  # E: this one is no prompt


class Store(NamedTuple):
    """Prompts that were computed: their last keys and values, newest last, and what the next token is drawn from."""

    kv: Rings
    logits_EV: jax.Array
    length_E: jax.Array
    seen_EV: jax.Array | None  # for a repetition penalty


class State(NamedTuple):
    rings: Rings
    clock: jax.Array
    logits_BV: jax.Array
    length_B: jax.Array  # tokens in the cache
    keys_B2: jax.Array
    drawn_B: jax.Array
    limit_B: jax.Array
    active_B: jax.Array
    seen_BV: jax.Array | None


class Starts(NamedTuple):
    """The first `count` entries say which row begins a sample of which stored prompt."""

    count: Given
    row_B: Given
    stored_B: Given
    key_B2: Given
    limit_B: Given


class Call(NamedTuple):
    starts: Starts
    keep_B: Given  # rows that go on; the others were stopped from outside
    stop_ids_N: Given  # of all rows, or [B, N]: each row's own
    numbers: Numbers | RowNumbers
    steps: Given  # at most so many, and at most C
    patience: Given  # return when so many rows have ended


class Report(NamedTuple):
    tokens_CB: jax.Array
    logprobs_CB: jax.Array
    emitted_B: jax.Array  # how many of them are a row's own, from the first
    active_B: jax.Array
    stopped_B: jax.Array  # by a stop id
    steps: jax.Array


@dataclass(frozen=True)
class Plan:
    """Everything that the programs are compiled for."""

    arch: Architecture
    dtype: jnp.dtype
    rows: int
    capacity: int  # tokens of a sequence, prompt and completion
    stored: int
    prompt: int  # tokens of the longest prompt, rounded up
    sheet: int
    steps: int
    rules: Rules
    mesh: Mesh


class Programs:
    """`prefill` and `decode` of one model and one plan, and how often they were compiled."""

    def __init__(self, graph: nnx.GraphDef[Decoder], tree: jax.tree_util.PyTreeDef, plan: Plan):
        self.plan = plan
        self._graph, self._tree = graph, tree
        # Every call gets its arrays as the last one left them: another sharding would be another program.
        store, state = jax.tree.map(self._sharding, jax.eval_shape(self._start))
        self.start = jax.jit(self._start, out_shardings=(store, state))
        self.prefill = jax.jit(self._prefill, donate_argnums=1, out_shardings=store)
        self.decode = jax.jit(self._decode, donate_argnums=1, out_shardings=(state, None))

    def compiled(self) -> dict[str, int]:
        return {"prefill": compilations(self.prefill), "decode": compilations(self.decode)}

    def _sharding(self, x: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = kv_cache.AXES if x.ndim == len(kv_cache.AXES) else (*("batch", None)[: x.ndim],)
        return NamedSharding(self.plan.mesh, spec_for(axes, self.plan.mesh, x.shape))

    def model(self, leaves: list[jax.Array]) -> Decoder:
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, leaves))

    def _start(self) -> tuple[Store, State]:
        plan = self.plan
        arch, dtype, B, E = plan.arch, plan.dtype, plan.rows, plan.stored
        seen_EV = jnp.zeros((E, arch.vocab), bool) if plan.rules.penalty else None
        seen_BV = jnp.zeros((B, arch.vocab), bool) if plan.rules.penalty else None
        store = Store(
            kv_cache.empty(arch, E, plan.prompt, dtype), jnp.zeros((E, arch.vocab), jnp.float32),
            jnp.zeros(E, jnp.int32), seen_EV,
        )  # fmt: skip
        zeros_B = jnp.zeros(B, jnp.int32)
        state = State(
            kv_cache.empty(arch, B, plan.capacity, dtype), jnp.zeros((), jnp.int32),
            jnp.zeros((B, arch.vocab), jnp.float32), zeros_B, jnp.zeros((B, 2), jnp.uint32), zeros_B, zeros_B,
            zeros_B > 0, seen_BV,
        )  # fmt: skip
        return store, state

    def _prefill(self, leaves: list[jax.Array], store: Store, sheet: Sheet) -> Store:
        model = self.model(leaves)
        x_1TD, new = model.prefill(sheet.tokens_1T, sheet.segments_1T)
        last_E = jnp.maximum(sheet.start_E + sheet.length_E - 1, 0)
        logits_EV = model.logits(x_1TD[0, last_E][:, None])[:, 0]
        seen_EV = store.seen_EV
        if seen_EV is not None:
            # Segment 0 is padding: its tokens are put into the row of a segment that is none.
            row_T = jnp.append(sheet.row_E, self.plan.stored)[sheet.segments_1T[0] - 1]
            fresh_EV = seen_EV.at[sheet.row_E].set(False, mode="drop")
            seen_EV = fresh_EV.at[row_T, sheet.tokens_1T[0]].set(True, mode="drop")
        return Store(
            kv_cache.of_sheet(new, sheet.start_E, sheet.length_E, sheet.row_E, store.kv),
            store.logits_EV.at[sheet.row_E].set(logits_EV, mode="drop"),
            store.length_E.at[sheet.row_E].set(sheet.length_E, mode="drop"), seen_EV,
        )  # fmt: skip

    def _decode(self, leaves: list[jax.Array], state: State, store: Store, call: Call) -> tuple[State, Report]:
        model, plan = self.model(leaves), self.plan
        state = state._replace(active_B=state.active_B & call.keep_B)
        state = jax.lax.fori_loop(
            0, call.starts.count, lambda number, state: _begin(state, store, call.starts, number), state
        )
        began = jnp.sum(state.active_B)
        empty_CB = jnp.zeros((plan.steps, plan.rows))
        none_B = jnp.zeros(plan.rows, jnp.int32)
        report = Report(empty_CB.astype(jnp.int32), empty_CB, none_B, state.active_B, none_B > 0, jnp.int32(0))

        def goes_on(loop: tuple[State, Report]) -> jax.Array:
            state, report = loop
            left = jnp.sum(state.active_B)
            room = report.steps < jnp.minimum(call.steps, plan.steps)
            more: jax.Array = room & (left > 0) & (began - left < call.patience)
            return more

        def one(loop: tuple[State, Report]) -> tuple[State, Report]:
            state, report = loop
            state, token_B, logprob_B, stopped_B = _take(state, call, plan.rules)
            active_B = report.active_B  # before this step
            report = Report(
                _row(report.tokens_CB, token_B, report.steps), _row(report.logprobs_CB, logprob_B, report.steps),
                report.emitted_B + (active_B & ~stopped_B), state.active_B, report.stopped_B | stopped_B,
                report.steps + 1,
            )  # fmt: skip
            return _advance(model, state, token_B, plan.capacity), report

        state, report = jax.lax.while_loop(goes_on, one, (state, report))
        return state, report


def compilations(program: jax.stages.Wrapped) -> int:
    """How often JAX has compiled a function."""
    count: int = program._cache_size()  # type: ignore[attr-defined]  # it counts them, and has no public name for it
    return count


def _begin(state: State, store: Store, starts: Starts, number: jax.Array) -> State:
    """A row takes up a stored prompt."""
    row, stored = starts.row_B[number], starts.stored_B[number]
    seen_BV = state.seen_BV
    if seen_BV is not None and store.seen_EV is not None:  # one plan made both
        seen_BV = seen_BV.at[row].set(store.seen_EV[stored])
    return state._replace(
        rings=kv_cache.start_row(state.rings, store.kv, row, stored, state.clock),
        logits_BV=state.logits_BV.at[row].set(store.logits_EV[stored]),
        length_B=state.length_B.at[row].set(store.length_E[stored]),
        keys_B2=state.keys_B2.at[row].set(starts.key_B2[number]),
        drawn_B=state.drawn_B.at[row].set(0), limit_B=state.limit_B.at[row].set(starts.limit_B[number]),
        active_B=state.active_B.at[row].set(True), seen_BV=seen_BV,
    )  # fmt: skip


def _take(state: State, call: Call, rules: Rules) -> tuple[State, jax.Array, jax.Array, jax.Array]:
    """The next token of every row, and which rows it ends."""
    logits_BV = constrain(state.logits_BV, "batch", None)
    keys_B2, drawn_B = state.keys_B2, state.drawn_B
    if isinstance(call.numbers, RowNumbers):
        assert state.seen_BV is not None  # the plan of such a batch has a penalty
        token_B, logprob_B = row_drawing.draw(logits_BV, state.seen_BV, keys_B2, drawn_B, call.numbers)
    else:
        token_B, logprob_B = drawing.draw(logits_BV, state.seen_BV, keys_B2, drawn_B, rules, call.numbers)
    stopped_B = state.active_B & jnp.any(token_B[:, None] == call.stop_ids_N, axis=1)
    drawn_B += 1
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV | (jnp.arange(seen_BV.shape[1]) == token_B[:, None])
    active_B = state.active_B & ~stopped_B & (drawn_B < state.limit_B)
    return state._replace(drawn_B=drawn_B, active_B=active_B, seen_BV=seen_BV), token_B, logprob_B, stopped_B


def _advance(model: Decoder, state: State, token_B: jax.Array, capacity: int) -> State:
    x_BD, rings = model.step(token_B, state.length_B, state.clock, state.rings, capacity)
    logits_BV = model.logits(x_BD[:, None])[:, 0]
    return state._replace(rings=rings, logits_BV=logits_BV, clock=state.clock + 1, length_B=state.length_B + 1)


def _row(table_CB: jax.Array, row_B: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(table_CB, row_B[None].astype(table_CB.dtype), at, axis=0)


@functools.lru_cache(maxsize=16)
def programs(graph: nnx.GraphDef[Decoder], tree: jax.tree_util.PyTreeDef, plan: Plan) -> Programs:
    return Programs(graph, tree, plan)
