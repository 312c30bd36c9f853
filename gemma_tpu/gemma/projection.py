"""One linear map with named dims, and the low-rank update that may ride on it.

An equation like "BTD,NHD->BTNH" says everything: the letters that x and w share and y lacks are contracted (in),
those that w gives to y are out; "C" in front of a weight stacks K and V in one tensor, each with its own update.
Weights keep the checkpoint's (out, in) order, so that loading and merging are reshapes and never transposes.

Letters: B rows, T tokens, D hidden, N query heads, K KV heads, H head dim, F mlp, C = 2 (K and V), R rank, E experts;
t (token, expert) pairs sorted by expert, I in, O out.
"""

import zlib
from collections.abc import Sequence
from functools import partial
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_tpu.gemma import quantise
from gemma_tpu.gemma.mesh import gathered
from gemma_tpu.gemma.ragged import ragged
from gemma_tpu.gemma.remat import named

STACK = "C"


class Base(nnx.Param[jax.Array]):
    """A weight of the base model. Frozen in LoRA training: its gradient is never asked for."""


class LoRA(nnx.Variable[jax.Array]):
    """An adapter tensor: A [R, in] or B [out, R], with the base weight's own dims."""


class Constant(nnx.Variable[jax.Array]):
    """What belongs to an adapter or to a quantised weight, and never trains."""


Variable = TypeVar("Variable", bound=nnx.Variable[jax.Array])


def shaped(kind: type[Variable], shape: Sequence[int], dtype: jnp.dtype, axes: Sequence[str | None]) -> Variable:
    """A variable as its shape alone: a model is built before anything is read, and `loading.assign` fills it."""
    return kind(cast(jax.Array, jax.ShapeDtypeStruct(tuple(shape), dtype)), axes=tuple(axes))


class Linear(nnx.Module):
    """A weight [out, in], whole or quantised, and the fields of one adapter, each independent of the others.

    Without `lora_a` there is no adapter. A quantised weight's codes are in `w`, and what they need beside it.
    """

    name: str
    w: Base
    inputs: int  # how many of its last dims are contracted

    def __init__(self) -> None:
        self.quantised: str | None = None
        self.w_scale: Constant | None = nnx.data(None)
        self.w_low: Constant | None = nnx.data(None)
        self.w_step: Constant | None = nnx.data(None)
        self.lora_a: LoRA | None = nnx.data(None)
        self.lora_b: LoRA | None = nnx.data(None)
        self.lora_magnitude: LoRA | None = nnx.data(None)  # [out]: DoRA, the norm of each row of the sum
        self.lora_a0: LoRA | None = nnx.data(None)  # where A and B started, taken off again: PiSSA. They never move
        self.lora_b0: LoRA | None = nnx.data(None)
        self.lora_scales: Constant | None = nnx.data(None)  # of each layer of the stack, where those differ
        self.lora_scale: float | tuple[float, ...] = 0.0
        self.lora_ranks: tuple[int, ...] = ()  # of each layer of the stack (of its K and its V); beyond it are zeros
        self.lora_dropout = 0.0

    @property
    def adapter(self) -> tuple[LoRA, LoRA] | None:
        """A and B."""
        return _both(self.lora_a, self.lora_b)

    @property
    def start(self) -> tuple[LoRA, LoRA] | None:
        return _both(self.lora_a0, self.lora_b0)

    def weight(self, dtype: jnp.dtype) -> jax.Array:
        """The weight itself, or what a quantised one stands for."""
        return self.decoded(self.parts(), dtype)

    def parts(self) -> dict[str, jax.Array]:
        return {name: value[...] for name in quantise.PARTS if (value := getattr(self, name)) is not None}

    def decoded(self, parts: dict[str, jax.Array], dtype: jnp.dtype) -> jax.Array:
        if self.quantised is None:
            return parts["w"]
        w: jax.Array = quantise.decode(parts, self.quantised, self.inputs, jnp).astype(dtype)
        return w

    def _dropped(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        if key is None or self.lora_dropout == 0:
            return x
        return _dropout(x, jax.random.fold_in(key, zlib.crc32(self.name.encode())), self.lora_dropout)

    def _scaled(self, b: jax.Array) -> jax.Array:
        """B times the scale, before it is rounded to the type of the activations: the merge rounds neither."""
        if self.lora_scales is None:
            return b * jnp.asarray(self.lora_scale, b.dtype)
        scales = self.lora_scales[...]
        return b * scales.reshape(scales.shape + (1,) * (b.ndim - scales.ndim))


class Projection(Linear):
    def __init__(self, name: str, equation: str, shape: tuple[int, ...], axes: tuple[str | None, ...],
                 repeats: int, dtype: jnp.dtype):  # fmt: skip
        super().__init__()
        self.name = name
        self.equation = equation
        self.inputs = len(weight_letters(equation)[2])
        self.w = shaped(Base, (repeats, *shape), dtype, ("layers", *axes))

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        y = self._base(x)
        if (adapter := self.adapter) is None:
            return y
        down, up = lora_equations(self.equation)
        a, b = self._whole(adapter, x.dtype)
        h = jnp.einsum(down, self._dropped(x, key), a)
        if (start := self.start) is not None:
            a0, b0 = jax.lax.stop_gradient(self._whole(start, x.dtype))
            h = jnp.concatenate([h, jnp.einsum(down, x, a0)], axis=-1)
            rank_dim = 1 if weight_letters(self.equation)[0] else 0
            a, b = jnp.concatenate([a, a0], axis=rank_dim), jnp.concatenate([b, -b0], axis=-1)
        y = y + _widen(up, named(h, "lora_h"), b)
        if self.lora_magnitude is None:
            return y
        return y * self._turned_to_length(self.lora_magnitude, a, b).astype(y.dtype)

    def _base(self, x: jax.Array) -> jax.Array:
        if self.quantised != "int8":
            return jnp.einsum(self.equation, x, self.weight(x.dtype))
        # The codes are exact in bfloat16, the scaled weights are not: rows are scaled after the product.
        parts = self.parts()
        y = jnp.einsum(self.equation, x, parts["w"].astype(x.dtype))
        return (y.astype(jnp.float32) * parts["w_step"]).astype(x.dtype)

    def _whole(self, adapter: tuple[LoRA, LoRA], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """A and B as their matmuls want them. Base weights stay split: their matmuls go round the ring of fsdp."""
        a, b = adapter
        return _gathered(a, a[...].astype(dtype)), _gathered(b, self._scaled(b[...]).astype(dtype))

    def _turned_to_length(self, magnitude: LoRA, a: jax.Array, b: jax.Array) -> jax.Array:
        """Magnitude over norm, for each row of W + B A. The norm takes no gradient, and W + B A is never formed:
        |W + BA|^2 = |W|^2 + 2 <W, BA> + |BA|^2, each of which needs at most A W^T, as narrow as the rank."""
        stack, out, inside = weight_letters(self.equation)
        rows, full = stack + out, stack + out + inside
        w, a, b = jax.lax.stop_gradient((self.weight(a.dtype), a, b))
        einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
        aw = einsum(f"{full},{stack}R{inside}->{rows}R", w, a)
        aa = einsum(f"{stack}R{inside},{stack}Q{inside}->{stack}RQ", a, a)
        b = b.astype(jnp.float32)
        own = jnp.sum(jnp.square(w.astype(jnp.float32)), axis=range(-len(inside), 0))
        both = einsum(f"{rows}R,{rows}R->{rows}", b, 2 * aw + einsum(f"{rows}Q,{stack}RQ->{rows}R", b, aa))
        norm = named(jnp.sqrt(own + both), "lora_h")
        factor = _gathered(magnitude, magnitude[...]) / norm
        if self.lora_scales is None:
            return factor
        scales = self.lora_scales[...]  # a layer of the stack that was not chosen keeps its own length
        return jnp.where(scales.reshape(scales.shape + (1,) * (factor.ndim - scales.ndim)) == 0, 1.0, factor)


class ExpertProjection(Linear):
    """The same linear map once for each expert: rows sorted by expert meet their expert's weight [E, out, in].

    Each expert is whole on its device, so this runs where nothing but the experts is split.
    """

    def __init__(self, name: str, shape: tuple[int, int, int], repeats: int, dtype: jnp.dtype):
        super().__init__()
        self.name = name
        self.inputs = 1
        self.w = shaped(Base, (repeats, *shape), dtype, ("layers", "experts", None, None))

    def __call__(self, x_tI: jax.Array, sizes_E: jax.Array, key: jax.Array | None = None) -> jax.Array:
        y_tO = ragged(x_tI, self.weight(x_tI.dtype), sizes_E)
        if (adapter := self.adapter) is None:
            return y_tO
        a, b = adapter
        y_tO += self._low_rank(self._dropped(x_tI, key), a[...], b[...], sizes_E)
        if (start := self.start) is not None:
            a0, b0 = jax.lax.stop_gradient((start[0][...], start[1][...]))
            y_tO -= self._low_rank(x_tI, a0, b0, sizes_E)
        return y_tO

    def _low_rank(self, x_tI: jax.Array, a_ERI: jax.Array, b_EOR: jax.Array, sizes_E: jax.Array) -> jax.Array:
        h_tR = named(ragged(x_tI, a_ERI.astype(x_tI.dtype), sizes_E), "lora_h")
        return ragged(h_tR, self._scaled(b_EOR).astype(x_tI.dtype), sizes_E)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _widen(up: str, h: jax.Array, b: jax.Array) -> jax.Array:
    """B h. In the gradient of B the narrow h stands first: what stands first is laid out anew for that product, and
    autodiff would put the wide gradient of y there, which took a quarter of a whole step on a CPU."""
    return jnp.einsum(up, h, b)


def _widen_forward(up: str, h: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.einsum(up, h, b), (h, b)


def _widen_backward(up: str, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    (h, b), (inputs, y) = saved, up.split("->")
    h_letters, b_letters = inputs.split(",")
    stack = STACK if b_letters.startswith(STACK) else ""
    made = f"{stack}R{b_letters.removeprefix(stack).removesuffix('R')}"  # as the product gives it, R before out
    db = jnp.einsum(f"{made}->{b_letters}", jnp.einsum(f"{h_letters},{y}->{made}", h, dy))
    return jnp.einsum(f"{y},{b_letters}->{h_letters}", dy, b), db


_widen.defvjp(_widen_forward, _widen_backward)


def _both(a: LoRA | None, b: LoRA | None) -> tuple[LoRA, LoRA] | None:
    """A and B, which come together or not at all."""
    return None if a is None or b is None else (a, b)


def _gathered(adapter: LoRA, value: jax.Array) -> jax.Array:
    """What was made of one layer of an adapter tensor, with the dims of that, whole."""
    return gathered(value, adapter.get_metadata()["axes"][1:])


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
