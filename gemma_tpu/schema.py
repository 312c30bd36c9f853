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


Format = Literal["auto", "messages", "sharegpt", "prompt", "alpaca", "text", "trajectory", "preference"]
FORMATS = get_args(Format)
TRANSFORMS = ("codev_r1",)  # those that ship


def _is_transform(value: str) -> bool:
    return value in TRANSFORMS or (_is_text(value) and re.fullmatch(r".+:[A-Za-z_]\w*", value) is not None)


class Table(dict[str, Any]):
    """A mapping in a config. Hashable, as a config is; nobody changes it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


Text = Annotated[str, Rule("text (printable, not empty)", _is_text)]
Texts = Annotated[tuple[Text, ...], Rule("a list of text, not empty", bool)]
Transform = Annotated[str, Rule(f"{', '.join(TRANSFORMS)}, your own function as module:function", _is_transform)]
Transforms = Annotated[tuple[Transform, ...], Rule("a list of those, not empty", bool)]
Pattern = Annotated[str, Rule('"all", a valid regular expression', _is_regex)]
Regex = Annotated[str, Rule("a valid regular expression", _is_regex)]
Positive = Annotated[int, Rule("an integer of at least 1", lambda n: n >= 1)]
Count = Annotated[int, Rule("an integer of at least 0", lambda n: n >= 0)]
Length = Annotated[int, Rule("an integer of at least 2 (a token and the one it predicts)", lambda n: n >= 2)]
Seed = Annotated[int, Rule("an integer from 0 to 4294967295", lambda n: 0 <= n < 2**32)]
Above0 = Annotated[float, Rule("a number above 0", lambda x: x > 0)]
From0 = Annotated[float, Rule("a number of at least 0", lambda x: x >= 0)]
Below1 = Annotated[float, Rule("a number from 0 to below 1", lambda x: 0 <= x < 1)]
Share = Annotated[float, Rule("a share of the rows, above 0 and below 1", lambda x: 0 < x < 1)]
Weights = Annotated[tuple[Above0, ...], Rule("a list of numbers above 0, not empty", bool)]
Ratio = Annotated[float, Rule("a number above 0 and up to 1", lambda x: 0 < x <= 1)]
Kept = Annotated[
    tuple[Activation | Offloaded, ...],
    Rule(f"a list of the activations to keep, out of {', '.join(get_args(Activation))} (or q@host … in host memory), "
         "each once", lambda names: names and len({name.partition("@")[0] for name in names}) == len(names)),
]  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    path: Text = "models/tiny-base"  # folder of the base checkpoint
    dtype: Literal["bfloat16", "float32"] = "float32"  # of the base weights and activations
    quantise: Literal["int8", "nf4"] | None = None  # how the frozen base is held: by rows, or in blocks of 4 bits


@dataclass(frozen=True)
class DataConfig:
    path: Text | Texts = "bundled:tiny_verilog/train.jsonl"  # files, folders, patterns, URLs, datasets of the hub
    weights: Weights | None = None  # shares of the rows, one for each path
    format: Format = "auto"
    columns: dict[Text, Text] = Table()  # our name of a column: its name in the data
    transform: Transform | Transforms | None = None  # rewrites each row before it is rendered
    strict: bool = False  # a row that cannot be used ends the run instead of being left out and counted
    validation: Text | Texts | Share | None = "bundled:tiny_verilog/validation.jsonl"
    max_seq_len: Length = 320
    packing: Literal["off", "bucket", "pack"] = "pack"
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    overlong: Literal["drop", "truncate", "error"] = "drop"
    limit: Positive | None = None  # use the first so many rows
    cache: Text | None = "~/.cache/gemma_tpu/tokens"  # folder of tokenised rows; null: tokenise at every start
    workers: Positive | None = None  # processes that tokenise; null: one for each core


@dataclass(frozen=True)
class LoraConfig:
    targets: Pattern | Texts = "all"  # "all", one regex, or a list of projection names
    exclude: tuple[Text, ...] = ()
    rank: Positive = 32
    alpha: Above0 = 64.0
    dropout: Below1 = 0.0
    rank_pattern: dict[Regex, Positive] = Table()  # other ranks, by the end of a module's path, as PEFT has them
    alpha_pattern: dict[Regex, Above0] = Table()
    layers: tuple[Count, ...] | None = None  # adapters in these layers alone; null: in all
    rslora: bool = False  # scale alpha / sqrt(rank) in place of alpha / rank
    dora: bool = False  # the length of each row trains by itself
    init: Literal["kaiming", "pissa"] = "kaiming"  # random A and zero B | the base's largest singular values
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
    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    lr: Above0 = 3e-3  # the peak, after warm-up
    loraplus_ratio: Above0 = 1.0  # the rate of B over that of A: LoRA+
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: Count = 20
    warmup_ratio: Below1 | None = None  # the same as a share of the run; either this or warmup_steps
    decay_ratio: Ratio | None = None  # of wsd: the last share of the run, in which the rate falls; null: 0.2
    weight_decay: From0 = 0.001  # of matrices; norms, scalars and magnitudes have none
    clip: Above0 | None = 1.0  # global norm of the gradients; null: no clipping
    b1: Below1 | None = None  # null, here and below: the optimizer's own
    b2: Below1 | None = None
    eps: Above0 | None = None


@dataclass(frozen=True)
class PreferenceConfig:
    loss: Literal["dpo", "dpo_norm", "ipo", "simpo"] | None = None  # of recipes/dpo.py; null: no pairs
    beta: Above0 = 0.1  # how fast the loss turns with the difference of scores
    margin: From0 = 0.0  # what a chosen answer must be ahead by (SimPO's gamma)


@dataclass(frozen=True)
class CheckpointConfig:
    every: Positive = 100  # updates
    seconds: Above0 | None = None  # and whenever the last one is so old
    keep: Positive = 3  # the newest
    keep_best: Count = 1  # and those with the lowest held-out loss
    folder: Text | None = None  # null: in the run folder; or a bucket


@dataclass(frozen=True)
class LogConfig:
    every: Positive = 10  # updates between two lines on the console; metrics.jsonl has every one
    progress: bool = True
    tensorboard: bool = True
    trackers: tuple[Literal["wandb", "trackio"], ...] = ()
    project: Text = "gemma_tpu"  # of the trackers
    usd_per_hour: Above0 | None = None  # of the whole slice; null: the list price of the chips


@dataclass(frozen=True)
class EvalConfig:
    every: Positive | None = None  # updates between two held-out losses; null: before and after training alone
    patience: Positive | None = None  # stop after so many of them without a better one
    prompts: tuple[Text, ...] = ()  # completed before, at each of them and after: the same prompts each time
    max_new_tokens: Positive = 128


@dataclass(frozen=True)
class FaultsConfig:
    skips: Positive = 10  # updates in a row with a loss or gradient that is no number, and the run stops
    spike: Above0 = 10.0  # a gradient norm so many times the usual one is pointed out


@dataclass(frozen=True)
class ProfileConfig:
    start: Positive | None = None  # the first update in the trace; null: no trace
    steps: Positive = 3


@dataclass(frozen=True)
class DistributedConfig:
    coordinator: Text | None = None  # host:port of host 0; null: a TPU pod finds itself
    processes: Positive | None = None
    process: Count | None = None  # this host's number
    timeout: Above0 = 60.0  # seconds of silence after which a host counts as lost


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(auto=True))
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    run_dir: Text = "runs/tiny_cpu"
    recipe: Text = "lora_sft.py"


MESH_AXES = ("data", "fsdp", "tp", "expert")

# Naming a key of one side says that what a lower layer (the defaults, or the file under an override) says on
# the other side is not meant: `train.steps=5` must work on a file with epochs. The values: of an unused side.
ALTERNATIVES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"train.steps": None}, {"train.epochs": None}),
    ({"optim.warmup_steps": 0}, {"optim.warmup_ratio": None}),
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
    yield from _adapter_conflicts(config)
    data = config.data
    paths = 1 if isinstance(data.path, str) else len(data.path)
    if data.weights is not None and len(data.weights) != paths:
        yield (
            ("data.weights", "data.path"),
            f"data.weights ({len(data.weights)} numbers) must have one for each of data.path ({paths})",
        )
    if config.eval.every is not None and config.data.validation is None and not config.eval.prompts:
        yield (
            ("eval.every", "data.validation"),
            f"eval.every ({config.eval.every}) measures nothing: give data.validation rows, or eval.prompts",
        )
    if config.eval.patience is not None and (config.eval.every is None or config.data.validation is None):
        yield (
            ("eval.patience", "eval.every", "data.validation"),
            f"eval.patience ({config.eval.patience}) counts held-out losses: it needs eval.every and data.validation",
        )
    given = [f"mesh.{axis}" for axis in MESH_AXES if getattr(mesh, axis) != 1]
    if mesh.auto and given:
        yield ("mesh.auto", *given), f"mesh.auto chooses every axis itself: remove it, or {', '.join(given)}"


def _adapter_conflicts(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys that would do nothing, or that no arithmetic can serve together."""
    optim, lora, plain = config.optim, config.lora, LoraConfig()
    if config.train.method == "full":
        given = [f"lora.{key}" for key in ("rank_pattern", "alpha_pattern", "layers", "rslora", "dora", "init",
                                              "init_from")
                 if getattr(lora, key) != getattr(plain, key)]  # fmt: skip
        given += ["optim.loraplus_ratio"] * (optim.loraplus_ratio != 1)
        if given:
            yield ("train.method", *given), f"train.method: full has no adapter: remove {', '.join(given)}"
        if config.model.quantise:
            told = f"train.method: full trains the base, and model.quantise ({config.model.quantise}) freezes it"
            yield ("train.method", "model.quantise"), f"{told}: remove one of the two"
    if lora.init_from is not None and lora.init != "kaiming":
        told = f"lora.init ({lora.init}) and lora.init_from ({lora.init_from}) are two ways to start"
        yield ("lora.init", "lora.init_from"), f"{told}: remove one of the two"
    prefers, has_pairs = config.preference, config.recipe.rpartition("/")[2] == "dpo.py"
    if (prefers.loss is None) == has_pairs or (prefers.loss is None and prefers != PreferenceConfig()):
        told = f"preference.loss ({'null' if prefers.loss is None else prefers.loss}) and recipe ({config.recipe})"
        yield ("preference.loss", "recipe"), f"{told}: a run on pairs has a loss and dpo.py; any other has neither"
    if prefers.loss == "ipo" and prefers.margin:
        yield ("preference.margin", "preference.loss"), f"preference.margin ({prefers.margin}): ipo has none; remove it"
    if prefers.loss not in (None, "simpo") and config.train.method == "full":
        told = f"preference.loss ({prefers.loss}) takes its reference from the base with the adapter off"
        yield ("preference.loss", "train.method"), f"{told}: train.method must be lora, or the loss simpo"
    if optim.warmup_ratio is not None and optim.warmup_steps:
        told = f"optim.warmup_steps ({optim.warmup_steps}) and optim.warmup_ratio ({optim.warmup_ratio})"
        yield ("optim.warmup_steps", "optim.warmup_ratio"), f"{told}: give one of the two"
    if optim.decay_ratio is not None and optim.schedule != "wsd":
        yield (
            ("optim.decay_ratio", "optim.schedule"),
            f"optim.decay_ratio ({optim.decay_ratio}) is of the schedule wsd; this one is {optim.schedule}",
        )
    if optim.schedule == "wsd" and (optim.warmup_ratio or 0) + (optim.decay_ratio or 0.2) > 1:
        told = f"optim.warmup_ratio ({optim.warmup_ratio}) and optim.decay_ratio ({optim.decay_ratio or 0.2})"
        yield ("optim.warmup_ratio", "optim.decay_ratio"), f"{told} are more than the whole run"
    if optim.name == "lion" and optim.eps is not None:
        yield ("optim.eps", "optim.name"), f"optim.eps ({optim.eps}): lion has none; remove it"


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
    elif origin is dict:
        if isinstance(value, dict):
            return Table({cast(args[0], key): cast(args[1], item) for key, item in value.items()})
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
        return str(args[1].words)
    if origin in (Union, types.UnionType):
        return " or ".join(words(member) for member in args)
    if origin is Literal:
        return " or ".join(map(str, args)) if len(args) < 3 else f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"a list of {words(args[0])}"
    if origin is dict:
        return f"a mapping of {words(args[0])} to {words(args[1])}"
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
