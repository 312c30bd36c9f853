"""A base for tokenizers made up by a test, which give the ids and mask of a row at once."""

from collections.abc import Iterator
from typing import Any

from gemma_tpu.data.tokenizer import Rendered


class AtOnce:
    """Subclasses have `training`, and where the test takes plain text, `text`."""

    def draft(self, messages: list[dict[str, Any]], train_on: str, *, tools: Any = None) -> "Made":
        options = {} if tools is None else {"tools": tools}
        return Made(*self.training(messages, train_on, **options))

    def draft_text(self, text: str) -> "Made":
        ids = self.text(text)
        return Made(ids, [True] * len(ids))

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        assert not texts, "its drafts have none"
        return []

    def finish(self, draft: "Made", encoded: Iterator[list[int]]) -> Rendered:
        return Rendered(draft.ids, draft.mask, thinking=False, lost=draft.lost)


class Made:
    def __init__(self, ids: list[int], mask: list[bool], lost: int = 0):
        self.ids, self.mask, self.lost, self.texts = ids, mask, lost, []
