"""Every key of a run's config: its type, its default and its rule; and how a value is cast to that type.

One frozen dataclass per section. A rule is part of the type (`Annotated`), so a key is declared in one line,
and is checked and its error worded without anybody knowing the key. The defaults are configs/tiny_cpu.yaml.
"""

import difflib
import math
import re
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

# The names that the model gives to its activations: those that `train.remat` can keep for the backward pass.
Activation = Literal["q", "k", "v", "attention", "o", "gate", "up", "down", "lora_h"]
# The same, kept in the host's memory in place of the chip's.
Offloaded = Literal["q@host", "k@host", "v@host", "attention@host", "o@host", "gate@host", "up@host", "down@host",
                    "lora_h@host"]  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """A condition on a value that already has the right type; `words` complete "must be …"."""

    words: str
    holds: Callable[[Any], bool]


def _is_text(value: str) -> bool:
    # A tab, a newline or a NUL in a path is a slip of the editor, never meant.
    return value.isprintable() and value == value.strip() != ""


def _is_regex(value: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "possible nested set": legal, and not the user's concern here
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError):
            return False
    return _is_text(value)


Text = Annotated[str, Rule("text (printable, not empty)", _is_text)]
Texts = Annotated[tuple[Text, ...], Rule("a list of text, not empty", bool)]
Pattern = Annotated[str, Rule('"all", a valid regular expression', _is_regex)]
Positive = Annotated[int, Rule("an integer of at least 1", lambda n: n >= 1)]
Count = Annotated[int, Rule("an integer of at least 0", lambda n: n >= 0)]
Length = Annotated[int, Rule("an integer of at least 2 (a token and the one it predicts)", lambda n: n >= 2)]
Seed = Annotated[int, Rule("an integer from 0 to 4294967295", lambda n: 0 <= n < 2**32)]
Above0 = Annotated[float, Rule("a number above 0", lambda x: x > 0)]
From0 = Annotated[float, Rule("a number of at least 0", lambda x: x >= 0)]
Below1 = Annotated[float, Rule("a number from 0 to below 1", lambda x: 0 <= x < 1)]
Kept = Annotated[
    tuple[Activation | Offloaded, ...],
    Rule(f"a list of the activations to keep, out of {', '.join(get_args(Activation))} (or q@host … in host memory), "
         "each once", lambda names: names and len({name.partition("@")[0] for name in names}) == len(names)),
]  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    path: Text = "models/tiny-base"  # folder of the base checkpoint
    dtype: Literal["bfloat16", "float32"] = "float32"  # of the base weights and activations


@dataclass(frozen=True)
class DataConfig:
    path: Text | Texts = "bundled:tiny_verilog/train.jsonl"
    format: Literal["auto", "messages", "prompt"] = "auto"
    transform: Literal["codev_r1"] | None = None  # rewrites each row before it is rendered
    validation: Text | None = "bundled:tiny_verilog/validation.jsonl"
    max_seq_len: Length = 320
    packing: Literal["off", "pack"] = "pack"
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    overlong: Literal["drop", "truncate", "error"] = "drop"
    limit: Positive | None = None  # use the first so many rows


@dataclass(frozen=True)
class LoraConfig:
    targets: Pattern | Texts = "all"  # "all", one regex, or a list of projection names
    exclude: tuple[Text, ...] = ()
    rank: Positive = 32
    alpha: Above0 = 64.0
    dropout: Below1 = 0.0
    init_from: Text | None = None  # a PEFT folder, ours or a foreign one, to go on from


@dataclass(frozen=True)
class MeshConfig:
    auto: bool = False  # fit the axes to the devices that are there; then no axis may be given
    data: Positive = 1
    fsdp: Positive = 1
    tp: Positive = 1
    expert: Positive = 1
    replicate_kv: bool = False  # allow tp beyond the KV heads, by copies of them
    cpu_devices: Count = 0  # so many fake CPU devices; 0: the real ones


@dataclass(frozen=True)
class TrainConfig:
    method: Literal["lora", "full"] = "lora"
    steps: Positive | None = 380  # optimizer updates; either this or epochs
    epochs: Positive | None = None
    batch_size: Positive = 4  # rows per optimizer update
    accumulation: Positive = 1  # micro-batches that an update is computed in
    seed: Seed = 0
    remat: Literal["none", "full", "auto"] | Kept = "none"
    compile_cache: Text | None = "~/.cache/gemma_tpu/xla"  # a folder or a bucket; null: compile at every start


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw"] = "adamw"
    lr: Above0 = 3e-3  # the peak, after warm-up
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Count = 20
    weight_decay: From0 = 0.001
    clip: Above0 | None = 1.0  # global norm of the gradients; null: no clipping
    b1: Below1 = 0.9
    b2: Below1 = 0.999
    eps: Above0 = 1e-8


@dataclass(frozen=True)
class CheckpointConfig:
    every: Positive = 100  # updates
    keep: Positive = 3


@dataclass(frozen=True)
class LogConfig:
    every: Positive = 10  # updates between two lines on the console; metrics.jsonl has every one
    progress: bool = True


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(auto=True))
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run_dir: Text = "runs/tiny_cpu"
    recipe: Text = "lora_sft.py"


MESH_AXES = ("data", "fsdp", "tp", "expert")

# Naming a key of one side says that what a lower layer (the defaults, or the file under an override) says on
# the other side is not meant: `train.steps=5` must work on a file with epochs. The values: of an unused side.
ALTERNATIVES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"train.steps": None}, {"train.epochs": None}),
    ({"mesh.auto": False}, {f"mesh.{axis}": 1 for axis in MESH_AXES}),
)


def conflicts(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Rules between keys: the keys, and what must hold. Rules on the model or the devices live with those."""
    train, mesh = config.train, config.mesh
    if train.batch_size % train.accumulation:
        yield (
            ("train.batch_size", "train.accumulation"),
            f"train.batch_size ({train.batch_size}) must divide by train.accumulation ({train.accumulation})",
        )
    if (train.steps is None) == (train.epochs is None):
        yield (
            ("train.steps", "train.epochs"),
            f"train.steps ({train.steps}) or train.epochs ({train.epochs}): give exactly one of the two",
        )
    given = [f"mesh.{axis}" for axis in MESH_AXES if getattr(mesh, axis) != 1]
    if mesh.auto and given:
        yield ("mesh.auto", *given), f"mesh.auto chooses every axis itself: remove it, or {', '.join(given)}"


class Mismatch(Exception):
    """The value is not of this type, or breaks its rule."""


_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def cast(kind: Any, value: Any) -> Any:
    """`value` as `kind` has it, or Mismatch. Nothing is guessed: "3" is no integer, `yes` is no boolean."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = cast(args[0], value)
        if all(rule.holds(inner) for rule in args[1:]):
            return inner
    elif origin in (Union, types.UnionType):
        for member in args:
            try:
                return cast(member, value)
            except Mismatch:
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(cast(args[0], item) for item in value)
    elif kind is float:
        return _number(value)
    elif type(value) is kind:  # exact: a bool is no int
        return value
    raise Mismatch


def _number(value: Any) -> float:
    """Any finite number; also as text, because YAML 1.1 reads `1e-4` as text."""
    number = type(value) in (int, float) or (isinstance(value, str) and _NUMBER.fullmatch(value))
    try:
        finite = float(value) if number else math.nan
    except OverflowError:
        finite = math.inf
    if not math.isfinite(finite):
        raise Mismatch
    return finite


def words(kind: Any) -> str:
    """What a value of this type is, to complete "must be …"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return args[1].words
    if origin in (Union, types.UnionType):
        return " or ".join(words(member) for member in args)
    if origin is Literal:
        return " or ".join(map(str, args)) if len(args) < 3 else f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"a list of {words(args[0])}"
    return {bool: "true or false", types.NoneType: "null"}[kind]


def _choices(kind: Any) -> Iterator[str]:
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    elif get_origin(kind) in (Union, types.UnionType):
        for member in get_args(kind):
            yield from _choices(member)


def closest(kind: Any, value: Any) -> str:
    """The choice that a misspelt word was meant to be, to complete the error."""
    near = difflib.get_close_matches(value, list(_choices(kind)), 1) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""
