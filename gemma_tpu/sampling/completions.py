"""From prompts as text to completions as text, by a model here or by a server: what `gemma-tpu sample` prints."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gemma_tpu.adapter import adapters
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import UserError
from gemma_tpu.gemma import loading
from gemma_tpu.gemma import mesh as meshes
from gemma_tpu.sampling import sampler
from gemma_tpu.sampling.asking import Asked, Messages, Written, check_stop, cut, every
from gemma_tpu.storage.shards import open_checkpoint

ROWS = 16  # completed at a time
UNFINISHED = "\ufffd"  # what the first bytes of a character decode to


def complete(
    target: str | Path, prompts: Sequence[str], settings: sampler.Settings, *,
    system: str | None = None, raw: bool = False, n: int = 1, stop: Sequence[str] = (), mesh: Mesh | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """`n` completions of every prompt, in order, by a run folder (adapter applied) or a model folder.

    A prompt is a user turn under the checkpoint's chat template; `raw` prompts are continued as they stand.
    """
    asked = every(prompts, n=n, system=system, raw=raw, temperature=settings.temperature)
    writer = open_writer(target, mesh=mesh, rows=min(ROWS, len(asked)))
    found = writer.write(asked, settings, stop=stop, on_text=on_text)
    return [{"prompt": prompts[number // n], **one} for number, one in enumerate(found)]


def mesh_for(target: str | Path, sizes: Mapping[str, int] | None = None) -> Mesh:
    """The mesh asked for; else all accelerators, as many of them along tp as the heads allow, or one CPU device."""
    devices = jax.devices()
    if sizes is not None:
        count = math.prod(sizes.values())
        if count > len(devices):
            raise UserError(f"--mesh: {count} devices are asked for, and there are {len(devices)}")
        return meshes.build(sizes, devices[:count])
    if devices[0].platform == "cpu" or len(devices) == 1:
        return loading.one_device_mesh()
    folder = adapters.base_of(target)
    allowed = meshes.tp_choices(loading.architecture(open_checkpoint(folder)), True, len(devices))
    tp = max(n for n in allowed if len(devices) % n == 0)
    return meshes.build({"fsdp": len(devices) // tp, "tp": tp}, devices)


def open_writer(target: str | Path, *, mesh: Mesh | None = None, rows: int = ROWS) -> "Writer":
    model, folder = adapters.load_target(target, mesh=mesh)
    return Writer(sampler.Sampler(model, rows=rows), Tokenizer(folder))


class Writer:
    """A model with its tokenizer: conversations in, text out."""

    def __init__(self, model: sampler.Sampler, tokenizer: Tokenizer):
        self.sampler, self.tokenizer = model, tokenizer

    def ids(self, prompt: str | Messages) -> list[int]:
        return self.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else self.tokenizer.prompt(prompt)

    def write(
        self, asked: Sequence[Asked], settings: sampler.Settings, *, stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
        on_done: Callable[[int, Written], None] | None = None,
    ) -> list[Written]:  # fmt: skip
        """A completion of each; it ends before the first of the `stop` strings.

        `on_text(i, new text)` is called as text comes, `on_done(i, completion)` for each that is complete.
        """
        check_stop(stop)
        streams = [Stream(self.tokenizer, stop) for _ in asked]

        def finished(made: sampler.Completion) -> Written:
            text, _ = cut(self.tokenizer.decode(made.tokens), stop)
            return {"text": text, "tokens": made.tokens, "finish_reason": made.finish_reason, "logprobs": made.logprobs}

        def done(number: int, made: sampler.Completion) -> None:
            one = finished(made)
            if on_text is not None:
                on_text(number, one["text"][streams[number].shown :])
            if on_done is not None:
                on_done(number, one)

        def shown(number: int, tokens: list[int]) -> None:
            if on_text is not None:
                streams[number].show(tokens, partial(on_text, number))

        made = self.sampler.run(
            [self.ids(one.prompt) for one in asked], self.tokenizer.stop_ids, settings,
            numbers=[one.sample for one in asked], on_done=done,
            until=(lambda tokens: first_end(self.tokenizer, tokens, stop)) if stop else None,
            on_tokens=None if on_text is None else shown,
        )  # fmt: skip
        return [finished(one) for one in made]


def first_end(tokenizer: Tokenizer, tokens: list[int], stop: Sequence[str]) -> int | None:
    """How many tokens it takes until the text holds a stop string."""
    if not cut(tokenizer.decode(tokens), stop)[1]:
        return None
    low, high = 0, len(tokens)  # without one, with one
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cut(tokenizer.decode(tokens[:middle]), stop)[1] else (middle, high)
    return high


class Stream:
    """Shows text as it becomes certain: no half characters, and nothing that may turn out to be a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._tokenizer, self._stop, self.shown = tokenizer, stop, 0

    def show(self, tokens: list[int], say: Callable[[str], None]) -> None:
        text, ended = cut(self._tokenizer.decode(tokens), self._stop)
        sure = len(text.rstrip(UNFINISHED))
        if not ended:
            sure = min([sure, *(len(text) - _overlap(text, one) for one in self._stop)])
        if sure > self.shown:
            say(text[self.shown : sure])
            self.shown = sure


def _overlap(text: str, stop: str) -> int:
    """How much of the end of the text may be the beginning of the stop string."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
