"""Rows that are sorted by expert, each times its own expert's matrix.

A TPU has an instruction for it. Elsewhere JAX multiplies every row by every expert and keeps one product of them: 128
times the work. There, rows lie in blocks of one expert each, and a block is multiplied by that expert's matrix.

Shapes: t rows, E experts, I in, O out, n blocks of b rows.
"""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal

from gemma_tpu.gemma.mesh import platform

MOST = 512  # rows of a block: more would be padding, at the end of each expert's last one
LEAST = 8

# Contracts "in" where the weight has it, last: `ragged_dot` would want a transposed copy of every expert.
_ROWS_BY_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,)
)


def ragged(x_tI: jax.Array, w_EOI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The first sizes[0] rows times w[0]^T, the next sizes[1] times w[1]^T, …; zeros for rows beyond their sum."""
    if platform() == "tpu":
        return jax.lax.ragged_dot_general(x_tI, w_EOI, sizes_E, _ROWS_BY_EXPERT)
    return _by_blocks(x_tI, w_EOI, sizes_E)


def block_rows(rows: int, experts: int) -> int:
    """A power of two, about as many as an expert has."""
    return min(max(1 << (-(-rows // experts) - 1).bit_length(), LEAST), MOST)


class _Blocks:
    """Where each row lies: in which block and at which place, and whose each block is."""

    def __init__(self, rows: int, sizes_E: jax.Array):
        experts = sizes_E.shape[0]
        self.size = block_rows(rows, experts)
        count = min(rows // self.size + experts, rows)  # each expert's last block may be part full, and none is empty
        ends_E, used_E = jnp.cumsum(sizes_E), -(-sizes_E // self.size)
        starts_E, first_E = ends_E - sizes_E, jnp.cumsum(used_E) - used_E
        block_n, row_t = jnp.arange(count), jnp.arange(rows)
        self.expert_n = jnp.minimum(_position(jnp.cumsum(used_E), block_n), experts - 1)
        first_row_n = starts_E[self.expert_n] + (block_n - first_E[self.expert_n]) * self.size
        self.row_nb = first_row_n[:, None] + jnp.arange(self.size)
        self.full_nb = self.row_nb < ends_E[self.expert_n][:, None]
        expert_t = _position(ends_E, row_t)
        self.used_t = expert_t < experts
        expert_t = jnp.minimum(expert_t, experts - 1)
        self.place_t = first_E[expert_t] * self.size + row_t - starts_E[expert_t]

    def spread(self, x_tD: jax.Array) -> jax.Array:
        """[n, b, D], with zeros where a block is not full."""
        return jnp.where(self.full_nb[..., None], jnp.take(x_tD, self.row_nb, axis=0, mode="clip"), 0)

    def collect(self, x_nbD: jax.Array) -> jax.Array:
        x_tD = jnp.take(x_nbD.reshape(-1, x_nbD.shape[-1]), self.place_t, axis=0, mode="clip")
        return jnp.where(self.used_t[:, None], x_tD, 0)


def _position(ends: jax.Array, at: jax.Array) -> jax.Array:
    """In which of consecutive spans that end there each number lies; empty ones are passed over."""
    return jnp.searchsorted(ends, at, side="right", method="compare_all").astype(jnp.int32)


@jax.custom_vjp
def _by_blocks(x_tI: jax.Array, w_EOI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    blocks = _Blocks(x_tI.shape[0], sizes_E)
    w_nOI = w_EOI[blocks.expert_n]
    return blocks.collect(jnp.einsum("nbI,nOI->nbO", blocks.spread(x_tI), w_nOI))


Saved = tuple[jax.Array, jax.Array, jax.Array, tuple[()] | None]


def _vjp_forward(x_tI: CustomVJPPrimal, w_EOI: CustomVJPPrimal, sizes_E: CustomVJPPrimal) -> tuple[jax.Array, Saved]:
    given = x_tI.value, w_EOI.value, sizes_E.value
    return _by_blocks(*given), (*given, () if w_EOI.perturbed else None)  # a frozen weight needs no gradient


def _vjp_backward(saved: Saved, dy_tO: jax.Array) -> tuple[jax.Array, jax.Array | None, None]:
    x_tI, w_EOI, sizes_E, trains = saved
    blocks = _Blocks(x_tI.shape[0], sizes_E)
    dy_nbO = blocks.spread(dy_tO)
    dx_tI = blocks.collect(jnp.einsum("nbO,nOI->nbI", dy_nbO, w_EOI[blocks.expert_n]))
    if trains is None:
        return dx_tI, None, None
    dw_nOI = jnp.einsum("nbO,nbI->nOI", dy_nbO, blocks.spread(x_tI), preferred_element_type=jnp.float32)
    dw_EOI = jax.ops.segment_sum(dw_nOI, blocks.expert_n, num_segments=w_EOI.shape[0], indices_are_sorted=True)
    return dx_tI, dw_EOI.astype(w_EOI.dtype), None


_by_blocks.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
