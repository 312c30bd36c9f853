"""The forward pass of a checkpoint, one layer in memory at a time: logits at real size on a machine that could never
hold the model, by the very modules that train.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_tpu.adapter import lora
from gemma_tpu.adapter.adapters import Trained
from gemma_tpu.gemma import loading, quantise, weights
from gemma_tpu.gemma.model import Context, Decoder, DecoderLayer, restart_positions, softcap
from gemma_tpu.gemma.sites import sites
from gemma_tpu.gemma.variants import Architecture
from gemma_tpu.gemma.weights import Entry
from gemma_tpu.storage.shards import Checkpoint

HEAD_ROWS = 1 << 14  # of the vocabulary at a time
M = TypeVar("M", bound=nnx.Module)
Change = Callable[[str, np.ndarray], np.ndarray]


@dataclass
class Side:
    """One of the models that are compared: a checkpoint, with what a run has trained beside or in it.

    `change(tensor name, values)` may put other values in place of the checkpoint's. `quantised`: the layers' matrices
    are what a run computed with that held them so.
    """

    checkpoint: Checkpoint
    trained: Trained | None = None
    change: Change = lambda name, values: values
    quantised: str | None = None
    values: dict[str, np.ndarray] = field(init=False)
    model: Decoder = field(init=False)
    inputs: dict[str, int] = field(init=False)  # of the quantised weights: how many of their last dims

    def __post_init__(self) -> None:
        where = self.checkpoint.where
        self.model, _ = loading.build(where if "://" in where else Path(where), dtype="float32")
        self.values = {} if self.trained is None else self.trained.numpy()
        if self.trained is not None and self.trained.is_lora:
            lora.inject_like(self.model, self.trained.record["shapes"], self.trained.record["adapter"])
            self.values |= lora.constants(self.model)
        held = sites(self.model) if self.quantised else ()
        self.inputs = {f"{site.path}.w": site.projection.inputs for site in held}
        self.table = weights.by_path(self.model.arch)

    def layers(self, tokens_BT: np.ndarray, segments_BT: np.ndarray) -> Iterator[jax.Array]:
        """What stands on the residual stream after the embedding and after each layer, then after the final norm."""
        arch, seen_BT = self.model.arch, jnp.asarray(segments_BT)
        ctx = (seen_BT, restart_positions(seen_BT))
        ids, places = np.unique(tokens_BT, return_inverse=True)
        compact_BT = jnp.asarray(places.reshape(tokens_BT.shape))
        x_BTD = self._module(self.model.embed, "embed", rows=ids)(compact_BT)
        yield x_BTD
        per_layer_BTLP = None
        if arch.per_layer_input:
            per_layer_BTLP = self._module(self.model.embed_per_layer, "embed_per_layer", rows=ids)(compact_BT, x_BTD)
        shared: dict[str, tuple[jax.Array, jax.Array]] = {}
        for number, layer in enumerate(arch.layers):
            b, slot, repeat = _place(arch, number)
            graph, state = self._filled(self.model.blocks[b][slot], f"blocks.{b}.{slot}", repeat=repeat)
            part = None if per_layer_BTLP is None else per_layer_BTLP[:, :, number]
            x_BTD, kv = _run(graph)(state, x_BTD, ctx, shared.get(layer.kind) if layer.kv_shared else None, part)
            if not layer.kv_shared:
                shared[layer.kind] = kv
            yield x_BTD
        yield self._module(self.model.final_norm, "final_norm")(x_BTD)

    def logits(self, x_ND: jax.Array) -> np.ndarray:
        """[N, V] of N tokens' final hidden states."""
        arch = self.model.arch
        parts = []
        for start in range(0, arch.vocab, HEAD_ROWS):
            rows = np.arange(start, min(start + HEAD_ROWS, arch.vocab))
            w_VD = jnp.asarray(self._rows("embed.w", rows))
            parts.append(np.asarray(softcap(x_ND @ w_VD.T, arch.logit_softcap)))
        return np.concatenate(parts, axis=1)

    def _module(self, module: M, prefix: str, rows: np.ndarray | None = None) -> M:
        filled: M = nnx.merge(*self._filled(module, prefix, rows=rows))
        return filled

    def _filled(
        self, module: M, prefix: str, repeat: int | None = None, rows: np.ndarray | None = None
    ) -> tuple[nnx.GraphDef[M], nnx.State[Any, Any]]:
        """The module's graph, and its state with the values of one repeat, or with those rows of its table alone."""
        graph, state = nnx.split(module)
        flat = []
        for path, leaf in nnx.to_flat_state(state):
            name = ".".join([prefix, *map(str, path)])
            if rows is not None and path == ("w",):
                value = self._rows(name, rows)
            elif name in self.values:
                value = self.values[name] if repeat is None else self.values[name][repeat]
            else:
                value = self._read(name, tuple(leaf.shape if repeat is None else leaf.shape[1:]), repeat)
            flat.append((path, leaf.replace(jnp.asarray(value, jnp.float32))))
        return graph, nnx.from_flat_state(flat)

    def _read(self, name: str, shape: tuple[int, ...], repeat: int | None) -> np.ndarray:
        out = np.empty(shape, np.float32)
        for entry in self.table[name]:
            if repeat is None or entry.index[0] == repeat:
                index = entry.index if repeat is None else entry.index[1:]
                out[index] = self.change(entry.hf, self._tensor(entry)).reshape(entry.shape)
        if self.quantised is not None and (inside := self.inputs.get(name)) is not None:
            out = quantise.decode(quantise.encode(out, self.quantised, inside), self.quantised, inside)
        return out

    def _tensor(self, entry: Entry) -> np.ndarray:
        out = np.empty(entry.hf_shape, np.float32)
        self.checkpoint.read_slices(entry.hf, [((), out)])
        return out

    def _rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        if name in self.values:
            here: np.ndarray = self.values[name][rows]
            return here
        hf, (low, high) = self.table[name][0].hf, (int(rows[0]), int(rows[-1]) + 1)
        if high - low == len(rows):
            read = self.checkpoint.read(hf, slice(low, high))
        else:
            read = np.concatenate([self.checkpoint.read(hf, slice(int(r), int(r) + 1)) for r in rows])
        wide: np.ndarray = read.astype(np.float32)
        return wide


def _place(arch: Architecture, number: int) -> tuple[int, int, int]:
    """(block, slot, repeat) of a layer"""
    for b, block in enumerate(arch.blocks):
        count = len(block.period) * block.repeats
        if number < block.first + count:
            repeat, slot = divmod(number - block.first, len(block.period))
            return b, slot, repeat
    raise IndexError(number)


@functools.lru_cache(maxsize=64)
def _run(graph: nnx.GraphDef[DecoderLayer]) -> jax.stages.Wrapped:
    """One compile for each kind of layer."""
    return jax.jit(lambda state, x, ctx, kv, part: nnx.merge(graph, state)(x, Context(*ctx), None, kv, None, part))
