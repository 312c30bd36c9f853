"""The one seam between evaluations and whatever completes prompts: questions in, samples out as they are made.

An evaluation calls `answer` and nothing else. A sample depends on its question, its number and the seed alone, so
that an interrupted evaluation gives what an uninterrupted one gives.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gemma_tpu.errors import UserError
from gemma_tpu.samples import Key, Sample

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
    """What answers: a run folder at a step, its base, or a model folder."""

    path: Path
    step: int | None = None
    base: bool = False  # of a run folder: what it was trained from

    def identity(self) -> dict[str, Any]:
        """What stored samples belong to; reads headers only."""
        from gemma_tpu import adapters, runs
        from gemma_tpu.shards import open_checkpoint

        if not runs.is_run(self.path):
            return {"model": str(self.path), "fingerprint": open_checkpoint(self.path).fingerprint()}
        trained = adapters.read(self.path, self.step)
        known = {"model": str(trained.base_folder), "fingerprint": trained.record["base"]["fingerprint"]}
        return known if self.base else {**known, "run": str(self.path), "step": trained.step}


def answer(
    model: Model, questions: Sequence[Question], draw: Draw, wanted: Collection[Key], each: Callable[[Sample], Any]
) -> None:
    """Calls `each` with the wanted samples as they come; `draw.n` of each question are numbered from 0."""
    from gemma_tpu import adapters, runs, sampler
    from gemma_tpu.tokenizer import Tokenizer

    settings = sampler.Settings(
        max_new_tokens=draw.max_new_tokens, temperature=draw.temperature, top_k=draw.top_k, top_p=draw.top_p
    )
    if runs.is_run(model.path):
        trained = adapters.read(model.path, model.step)
        folder = trained.base_folder
        decoder = adapters.load(folder, None if model.base else trained)
    else:
        folder, decoder = model.path, adapters.load(model.path)
    tokenizer = Tokenizer(folder)
    prompts = {one.problem: tokenizer.prompt(list(one.messages)) for one in questions}
    keys = [(one.problem, number) for one in questions for number in range(draw.n)]
    # Batches are cut from the whole list and carry seeds of their own: what is drawn does not depend on what is left.
    for batch, start in enumerate(range(0, len(keys), ROWS)):
        chosen = keys[start : start + ROWS]
        if not set(chosen) & set(wanted):
            continue
        seeded = replace(settings, seed=(draw.seed + 1_000_003 * batch) % 2**32)
        made = sampler.generate(decoder, [prompts[name] for name, _ in chosen], tokenizer.stop_ids, seeded, rows=ROWS)
        for key, one in zip(chosen, made, strict=True):
            if key in wanted:
                each(Sample(*key, tokenizer.decode(one.tokens), one.finish_reason, len(one.tokens)))
