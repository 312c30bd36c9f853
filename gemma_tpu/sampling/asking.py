"""What is asked of a model, whoever answers: prompts, which sample of each, where a text ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, TypeVar

from gemma_tpu.errors import UserError

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Asked:
    """One completion that is wanted: its prompt, as text or as a conversation, and which sample of it."""

    prompt: str | Messages
    sample: int = 0


class Wanted(Protocol):
    """How answers are to be drawn: what is read of `drawing.Settings` where JAX is not loaded."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def seed(self) -> int: ...


class Written(TypedDict):
    """A completion."""

    text: str
    tokens: list[int] | None  # None: of a server, which gives text alone
    finish_reason: str | None
    logprobs: list[float] | None


How = TypeVar("How", bound=Wanted, contravariant=True)


class Write(Protocol[How]):
    """That of a Writer, or of an Endpoint, whose answers come from a server."""

    def __call__(
        self, asked: Sequence[Asked], settings: How, *, stop: Sequence[str] = ...,
        on_text: Callable[[int, str], None] | None = ..., on_done: Callable[[int, Written], None] | None = ...,
    ) -> list[Written]: ...  # fmt: skip


def conversation(prompt: str, system: str | None = None) -> Messages:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]


def every(
    prompts: Sequence[str], *, n: int = 1, system: str | None = None, raw: bool = False, temperature: float = 1.0
) -> list[Asked]:
    """`n` samples of every prompt, in order: user turns, or (`raw`) texts to continue as they stand."""
    if raw and system is not None:
        raise UserError("a raw prompt has no turns, so it takes no system text; leave one of the two out")
    if n > 1 and temperature == 0:
        raise UserError(f"{n} samples at temperature 0 would all be the same; set a temperature above 0")
    return [Asked(text if raw else conversation(text, system), sample) for text in prompts for sample in range(n)]


def check_stop(stop: Sequence[str]) -> None:
    if any(not text for text in stop):
        raise UserError("an empty stop string stops everything at once; leave it out")


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    places = [place for one in stop if (place := text.find(one)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
