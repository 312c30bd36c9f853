"""Rows with rules of their own: each gets the token that it would get alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_tpu.sampling import drawing, row_drawing
from gemma_tpu.sampling.drawing import Settings
from gemma_tpu.sampling.row_drawing import RowNumbers

VOCAB = 300
RULES = [
    Settings(), Settings(temperature=1.3), Settings(repetition_penalty=3.0), Settings(temperature=0.7),
    Settings(temperature=1.5, top_k=40, top_p=0.8, min_p=0.01, repetition_penalty=1.3),
]  # fmt: skip
rng = np.random.default_rng(0)
LOGITS = rng.normal(0, 3, (len(RULES), VOCAB)).astype(np.float32)
SEEN = rng.random((len(RULES), VOCAB)) < 0.3
KEYS = rng.integers(0, 2**32, (len(RULES), 2), dtype=np.uint32)


def numbers(rules) -> RowNumbers:
    columns = zip(*((one.temperature, one.top_k, one.top_p, one.min_p, one.repetition_penalty) for one in rules),
                  strict=True)  # fmt: skip
    kinds = (np.float32, np.int32, np.float32, np.float32, np.float32)
    return RowNumbers(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))


def test_each_row_gets_what_its_rules_give_alone():
    together, by_itself = jax.jit(row_drawing.draw), jax.jit(drawing.draw, static_argnums=4)
    for step in range(40):
        drawn_B = np.full(len(RULES), step, np.int32)
        token_B, logprob_B = together(LOGITS, SEEN, KEYS, drawn_B, numbers(RULES))
        for row, one in enumerate(RULES):
            at = slice(row, row + 1)
            alone = by_itself(LOGITS[at], SEEN[at], KEYS[at], drawn_B[at], one.rules, one.numbers)
            assert int(alone[0][0]) == int(token_B[row]), f"{one}, step {step}"
            assert float(alone[1][0]) == pytest.approx(float(logprob_B[row]), abs=1e-5)


def test_the_cut_keeps_the_k_largest_and_what_equals_the_last_of_them():
    x_BV = np.array([[-1.0, -5.0, 0.0, 3.0, -1.0], [2.0, 2.0, -7.0, -8.0, -9.0], [1.0, 2.0, 3.0, 4.0, 5.0]], np.float32)
    kept = np.isfinite(row_drawing._cut(jnp.asarray(x_BV), jnp.array([3, 1, 0])))
    assert kept.tolist() == [[True, False, True, True, True], [True, True, False, False, False], [True] * 5]
