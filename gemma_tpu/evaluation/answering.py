"""The one seam between evaluations and whatever completes prompts: questions in, samples out as they are made.

An evaluation calls `answer` and nothing else. A sample depends on its question, its number and the seed alone, so
that an interrupted evaluation gives what an uninterrupted one gives.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_tpu.errors import UserError
from gemma_tpu.evaluation.samples import Key, Sample
from gemma_tpu.sampling.asking import Asked, Write, Written

ROWS = 30  # completed at a time


@dataclass(frozen=True)
class Question:
    problem: str
    messages: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Draw:
    """How to draw: n samples of each question; temperature 0 is greedy."""

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"n is {self.n}: it must be at least 1")
        if self.n > 1 and self.temperature == 0:
            raise UserError(f"{self.n} samples at temperature 0 would all be the same; set --temperature")

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"n={self.n}, temperature {self.temperature:g}, top_p {self.top_p:g}, seed {self.seed}"


@dataclass(frozen=True)
class Model:
    """What answers: a run folder at a step, its base, a model folder, or the URL of an OpenAI-compatible server."""

    target: Path | str
    step: int | None = None
    base: bool = False  # of a run folder: what it was trained from
    served: str | None = None  # which of a server's models; its only one by default
    concurrency: int | None = None  # requests to a server at a time

    def identity(self) -> dict[str, Any]:
        """What stored samples belong to; reads headers only."""
        from gemma_tpu.adapter import adapters
        from gemma_tpu.run import runs
        from gemma_tpu.storage.shards import open_checkpoint

        if isinstance(self.target, str):
            return {"model": self.served, "url": self.target}
        if not runs.is_run(self.target):
            return {"model": str(self.target), "fingerprint": open_checkpoint(self.target).fingerprint()}
        trained = adapters.read(self.target, self.step)
        known = {"model": str(trained.base_folder), "fingerprint": trained.record["base"]["fingerprint"]}
        return known if self.base else {**known, "run": str(self.target), "step": trained.step}


def answer(
    model: Model, questions: Sequence[Question], draw: Draw, wanted: Collection[Key], each: Callable[[Sample], Any]
) -> None:
    """Calls `each` with the wanted samples as they come; `draw.n` of each question are numbered from 0."""
    from gemma_tpu.sampling.drawing import Settings

    settings = Settings(
        max_new_tokens=draw.max_new_tokens, temperature=draw.temperature, top_k=draw.top_k, top_p=draw.top_p,
        seed=draw.seed,
    )  # fmt: skip
    keys = [key for one in questions for number in range(draw.n) if (key := (one.problem, number)) in wanted]
    turns = {one.problem: list(map(dict, one.messages)) for one in questions}

    def done(place: int, made: Written) -> None:
        count = len(made["tokens"] or ())  # servers give text alone
        each(Sample(*keys[place], made["text"], made["finish_reason"] or "", count))

    _write_of(model)([Asked(turns[name], number) for name, number in keys], settings, on_done=done)


def _write_of(model: Model) -> Write[Any]:  # the settings are those of `drawing`, which loads JAX
    if isinstance(model.target, str):
        from gemma_tpu.sampling.endpoint import CONCURRENCY, Endpoint

        return Endpoint(model.target, model=model.served, concurrency=model.concurrency or CONCURRENCY).write
    from gemma_tpu.adapter import adapters
    from gemma_tpu.data.tokenizer import Tokenizer
    from gemma_tpu.run import runs
    from gemma_tpu.sampling import completions, sampler

    mesh = completions.mesh_for(model.target)
    folder, trained = model.target, None
    if runs.is_run(model.target):
        trained = adapters.read(model.target, model.step)
        folder = trained.base_folder
    decoder = adapters.load(folder, None if model.base else trained, mesh)
    return completions.Writer(sampler.Sampler(decoder, rows=ROWS), Tokenizer(folder)).write
