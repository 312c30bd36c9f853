"""Rows that share a sheet do not see each other: every kind of layer, on sheets as training has them."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import QUICK, load, mesh_of, random_rows, write

from gemma_tpu.data.packing import best_fit, fill
from gemma_tpu.tiny.archs import ARCHS

LENGTHS, T = [20, 9, 23, 7], 64  # a window of 8 reaches from each row into the one before; 5 places of padding
# Two periods of a local and a global layer; of E2B and E4B the upper one uses the keys and values of the lower.
SIZES = dict(layers=4, pattern=1, hidden=32, mlp=40, window=8, vocab=112)
SHARED = ("gemma4-e2b", "gemma4-e4b")
FAST = ("gemma4-e2b", "gemma4-26b-a4b", "gemma3-4b")  # between them every kind of layer: the others when there is time


@pytest.mark.parametrize("arch", [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ARCHS
])  # fmt: skip
def test_to_change_one_row_of_a_sheet_moves_no_logit_of_the_others(arch, tmp_path):
    sizes = SIZES | ({"kv_shared": 2, "per_layer_input": 16} if arch in SHARED else {})
    model = load(write(tmp_path / "m", arch=arch, **sizes))
    run = compiled(model)
    rows = [(ids, np.ones(len(ids), bool)) for ids in random_rows(LENGTHS, SIZES["vocab"])]
    (order,) = best_fit(np.array(LENGTHS), T)

    def sheet(rows):
        return fill([[rows[i] for i in order]], T, pad_id=0)

    batch = sheet(rows)
    before = run(batch)
    for place, touched in enumerate(order.tolist(), start=1):
        ids, mask = rows[touched]
        changed = sheet([*rows[:touched], ((ids + 31) % 70 + 5, mask), *rows[touched + 1 :]])
        inside = batch["segment_ids"] == place
        assert (changed["tokens"] != batch["tokens"])[inside].all() and inside.sum() == len(ids)
        after = run(changed)
        np.testing.assert_array_equal(before[~inside], after[~inside])
        assert np.abs(before[inside] - after[inside]).max() > 0.05, "the model reads the row"

    # That the test can fail: as one segment, the first row of the sheet reaches those behind it.
    first = int(order[0])
    ids, mask = rows[first]
    changed = sheet([*rows[:first], ((ids + 31) % 70 + 5, mask), *rows[first + 1 :]])
    behind = batch["segment_ids"] > 1
    found, leaked = (run(made | {"segment_ids": np.ones_like(behind, np.int32)}) for made in (batch, changed))
    assert (found[behind] != leaked[behind]).any()

    padded = run(batch | {"tokens": np.where(batch["segment_ids"] == 0, 7, batch["tokens"])})
    real = batch["segment_ids"] > 0
    np.testing.assert_array_equal(before[real], padded[real])


def compiled(model):
    """One compile for all sheets."""
    graph, state = nnx.split(model)
    call = jax.jit(lambda state, *args: nnx.merge(graph, state)(*args), compiler_options=QUICK)

    def run(batch):
        with jax.set_mesh(mesh_of()):
            return np.asarray(call(state, batch["tokens"], batch["segment_ids"], batch["positions"]))

    return run
