"""From prompts as text to completions as text: what `gemma-tpu sample` prints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_tpu import adapters, sampler
from gemma_tpu.errors import UserError
from gemma_tpu.tokenizer import Tokenizer

ROWS = 16  # completed at a time


def complete(
    target: str | Path, prompts: Sequence[str], settings: sampler.Settings, *,
    system: str | None = None, raw: bool = False, n: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """`n` completions of every prompt, in order, by a run folder (adapter applied) or a model folder.

    A prompt is a user turn under the checkpoint's chat template; `raw` prompts are continued as they stand.
    """
    if raw and system is not None:
        raise UserError("a raw prompt has no turns, so it takes no system text; leave one of the two out")
    if n > 1 and settings.temperature == 0:
        raise UserError(f"{n} samples at temperature 0 would all be the same; set a temperature above 0")
    model, folder = adapters.load_target(target)
    tokenizer = Tokenizer(folder)
    before = [] if system is None else [{"role": "system", "content": system}]

    def ids(prompt: str) -> list[int]:
        if raw:
            return tokenizer.encode(prompt, bos=True)
        return tokenizer.prompt([*before, {"role": "user", "content": prompt}])

    asked = [prompt for prompt in prompts for _ in range(n)]
    encoded = {prompt: ids(prompt) for prompt in prompts}
    made = sampler.generate(
        model, [encoded[prompt] for prompt in asked], tokenizer.stop_ids, settings, rows=min(ROWS, len(asked))
    )
    return [
        {"prompt": prompt, "text": tokenizer.decode(completion.tokens), "tokens": completion.tokens,
         "finish_reason": completion.finish_reason, "logprobs": completion.logprobs}
        for prompt, completion in zip(asked, made, strict=True)
    ]  # fmt: skip
