"""Architectures as data: what a checkpoint's config.json says, in one frozen record that the model is built from.

A family differs from another in the values of these fields and in nothing else. `hf_config` reads them from a
config.json; the table of known sizes at the end is for planning without a checkpoint.
"""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer kind; `partial` is the share of the head's dims that turn at all."""

    theta: float
    partial: float = 1.0
    factor: float = 1.0  # linear scaling: positions are divided by it


@dataclass(frozen=True)
class Experts:
    """A mixture beside the dense MLP: `top_k` of `count` experts for each token."""

    count: int
    top_k: int
    mlp: int


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Layers that compare equal can share one compiled body."""

    head_dim: int
    kv_heads: int
    mlp: int
    rope: Rope
    window: int | None  # None: attends to everything before it
    k_eq_v: bool = False  # V is the raw K projection; there is no v_proj
    kv_shared: bool = False  # no K and V of its own: those of the last layer of its kind that has some
    experts: Experts | None = None

    @property
    def kind(self) -> str:
        return "global" if self.window is None else "local"


@dataclass(frozen=True)
class Block:
    """`period` layers, repeated: stacked along a leading axis and scanned. Covers layers first … first + n - 1."""

    first: int
    period: tuple[Layer, ...]
    repeats: int

    def layer_index(self, slot: int, repeat: int) -> int:
        return self.first + repeat * len(self.period) + slot


@dataclass(frozen=True)
class Architecture:
    vocab: int
    hidden: int
    heads: int
    layers: tuple[Layer, ...]
    eps: float
    logit_softcap: float | None
    context: int
    prefix: str  # of the text tower's tensors in the checkpoint, e.g. "model.language_model."
    norm_offset: float = 0.0  # norms multiply by offset + weight
    query_scale: float = 1.0
    v_norm: bool = True  # scale-free, on V
    layer_scalar: bool = True  # a learned factor on each layer's output
    per_layer_input: int = 0  # width of the per-layer embeddings; 0: none
    per_layer_vocab: int = 0
    blocks: tuple[Block, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", find_blocks(self.layers))

    @property
    def shares_kv(self) -> bool:
        return any(layer.kv_shared for layer in self.layers)

    def with_prefix(self, prefix: str) -> "Architecture":
        return replace(self, prefix=prefix)


def find_blocks(layers: tuple[Layer, ...]) -> tuple[Block, ...]:
    """Cover the layers with repeated periods, so that as few layer bodies as can be are compiled.

    31B is one block (5 local + 1 global) x 10, so that 60 layers compile like 6. A block counts as one body more:
    each is a scan of its own, and a model cut into many blocks of one layer is slower to run than to compile.
    """
    kinds = {layer: number for number, layer in enumerate(dict.fromkeys(layers))}
    row = [kinds[layer] for layer in layers]
    count = len(row)
    cheapest = [(0, 0)] * (count + 1)  # of the layers from here to the end: bodies + blocks, bodies
    choice: list[tuple[int, int]] = [(0, 0)] * count
    for first in reversed(range(count)):
        options = []
        for period in range(1, count - first + 1):
            repeats = 1
            while True:
                end = first + period * repeats
                cost, bodies = cheapest[end]
                options.append((cost + period + 1, bodies + period, -period * repeats, period, repeats))
                if row[end : end + period] != row[first : first + period]:
                    break
                repeats += 1
        cost, bodies, _, period, repeats = min(options)  # of equal ones, the block that covers most
        cheapest[first], choice[first] = (cost, bodies), (period, repeats)
    blocks, first = [], 0
    while first < count:
        period, repeats = choice[first]
        blocks.append(Block(first, layers[first : first + period], repeats))
        first += period * repeats
    return tuple(blocks)


_LOCAL, _GLOBAL = Rope(10_000.0), Rope(1_000_000.0, partial=0.25)


def gemma4_31b() -> Architecture:
    """The published geometry of Gemma 4 31B, for planning and tests without a checkpoint."""
    local = Layer(head_dim=256, kv_heads=16, mlp=21504, rope=_LOCAL, window=1024)
    full = Layer(head_dim=512, kv_heads=4, mlp=21504, rope=_GLOBAL, window=None, k_eq_v=True)
    return Architecture(
        vocab=262144, hidden=5376, heads=32, layers=((local,) * 5 + (full,)) * 10, eps=1e-6,
        logit_softcap=30.0, context=262144, prefix="model.language_model.",
    )  # fmt: skip
