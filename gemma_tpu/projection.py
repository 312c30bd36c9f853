"""One linear map with named dims, and the low-rank update that may ride on it.

An equation like "BTD,NHD->BTNH" says everything: the letters that x and w share and y lacks are contracted (in),
those that w gives to y are out; "C" in front of a weight stacks K and V in one tensor, each with its own update.
Weights keep the checkpoint's (out, in) order, so that loading and merging are reshapes and never transposes.

Letters: B rows, T tokens, D hidden, N query heads, K KV heads, H head dim, F mlp, C = 2 (K and V), R rank, E experts;
t (token, expert) pairs sorted by expert, I in, O out.
"""

import zlib
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gemma_tpu.mesh import gathered

STACK = "C"


class Base(nnx.Param):
    """A weight of the base model. Frozen in LoRA training: its gradient is never asked for."""


class LoRA(nnx.Variable):
    """An adapter tensor: A [R, in] or B [out, R], with the base weight's own dims."""


class Projection(nnx.Module):
    def __init__(self, name: str, equation: str, shape: tuple[int, ...], axes: tuple[str | None, ...],
                 repeats: int, dtype: jnp.dtype):  # fmt: skip
        self.name = name
        self.equation = equation
        self.w = Base(jax.ShapeDtypeStruct((repeats, *shape), dtype), axes=("layers", *axes))
        self.lora_a: LoRA | None = nnx.data(None)
        self.lora_b: LoRA | None = nnx.data(None)
        self.lora_scale = 0.0
        self.lora_dropout = 0.0

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        y = jnp.einsum(self.equation, x, self.w[...])
        if self.lora_a is None:
            return y
        down, up = lora_equations(self.equation)
        if key is not None and self.lora_dropout > 0:
            x = _dropout(x, jax.random.fold_in(key, zlib.crc32(self.name.encode())), self.lora_dropout)
        h = checkpoint_name(jnp.einsum(down, x, _whole(self.lora_a, x.dtype)), "lora_h")
        return y + _widen(up, h * jnp.asarray(self.lora_scale, x.dtype), _whole(self.lora_b, x.dtype))


class ExpertProjection(nnx.Module):
    """The same linear map once for each expert: rows sorted by expert meet their expert's weight [E, out, in].

    Each expert is whole on its device, so this runs where nothing but the experts is split.
    """

    def __init__(self, name: str, shape: tuple[int, int, int], repeats: int, dtype: jnp.dtype):
        self.name = name
        self.w = Base(jax.ShapeDtypeStruct((repeats, *shape), dtype), axes=("layers", "experts", None, None))
        self.lora_a: LoRA | None = nnx.data(None)
        self.lora_b: LoRA | None = nnx.data(None)
        self.lora_scale = 0.0
        self.lora_dropout = 0.0

    def __call__(self, x_tI: jax.Array, sizes_E: jax.Array, key: jax.Array | None = None) -> jax.Array:
        y_tO = _ragged(x_tI, self.w[...], sizes_E)
        if self.lora_a is None:
            return y_tO
        if key is not None and self.lora_dropout > 0:
            x_tI = _dropout(x_tI, jax.random.fold_in(key, zlib.crc32(self.name.encode())), self.lora_dropout)
        h_tR = checkpoint_name(_ragged(x_tI, self.lora_a[...].astype(x_tI.dtype), sizes_E), "lora_h")
        delta_tO = _ragged(h_tR, self.lora_b[...].astype(x_tI.dtype), sizes_E)
        return y_tO + delta_tO * jnp.asarray(self.lora_scale, x_tI.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _widen(up: str, h: jax.Array, b: jax.Array) -> jax.Array:
    """B h. In the gradient of B the narrow h stands first: what stands first is laid out anew for that product, and
    autodiff would put the wide gradient of y there, which took a quarter of a whole step on a CPU."""
    return jnp.einsum(up, h, b)


def _widen_forward(up: str, h: jax.Array, b: jax.Array):
    return jnp.einsum(up, h, b), (h, b)


def _widen_backward(up: str, saved, dy: jax.Array):
    (h, b), (inputs, y) = saved, up.split("->")
    h_letters, b_letters = inputs.split(",")
    stack = STACK if b_letters.startswith(STACK) else ""
    made = f"{stack}R{b_letters.removeprefix(stack).removesuffix('R')}"  # as the product gives it, R before out
    db = jnp.einsum(f"{made}->{b_letters}", jnp.einsum(f"{h_letters},{y}->{made}", h, dy))
    return jnp.einsum(f"{y},{b_letters}->{h_letters}", dy, b), db


_widen.defvjp(_widen_forward, _widen_backward)


def _whole(adapter: LoRA, dtype: jnp.dtype) -> jax.Array:
    """An adapter tensor as its matmul wants it. Base weights stay split: their matmuls go round the ring of fsdp."""
    return gathered(adapter[...].astype(dtype), adapter.get_metadata()["axes"][1:])


# Contracts "in" where the weight has it, last: `ragged_dot` would want a transposed copy of every expert.
_ROWS_BY_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,)
)


def _ragged(x_tI: jax.Array, w_EOI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot_general(x_tI, w_EOI, sizes_E, _ROWS_BY_EXPERT)


def _dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def weight_letters(equation: str) -> tuple[str, str, str]:
    """(stack, out, in) letters of the weight: "BTD,CKHD->BTCKH" gives ("C", "KH", "D")."""
    x, rest = equation.split(",")
    w, y = rest.split("->")
    stack = STACK if w.startswith(STACK) else ""
    inside = "".join(letter for letter in w if letter in x and letter not in y)
    out = "".join(letter for letter in w if letter in y and letter not in stack)
    if stack + out + inside != w:
        raise ValueError(f"{equation}: a weight is stored as (stack, out, in), not {w}")
    return stack, out, inside


def lora_equations(equation: str) -> tuple[str, str]:
    """The two einsums of B(A x): "BTD,NHD->BTNH" gives "BTD,RD->BTR" and "BTR,NHR->BTNH"."""
    x, y = equation.split(",")[0], equation.split("->")[1]
    stack, out, inside = weight_letters(equation)
    hidden = "".join(letter for letter in x if letter not in inside) + stack + "R"
    return f"{x},{stack}R{inside}->{hidden}", f"{hidden},{stack}{out}R->{y}"
