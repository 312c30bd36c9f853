"""The checkpoint's tokenizer and chat template: text to ids, conversations to prompts and training rows.

Nothing of a chat template is re-implemented here. Which part of a rendered conversation is the model's is
found by rendering: once in full, once up to each answer with the generation prompt, once with a marker in the
answer's place. That works for any template that renders turns one after the other, and refuses the others.

Text is encoded piece by piece, prompt and answer apart, because that is how serving sees it: the prompt is
encoded alone and the model continues with new tokens. Encoded in one go, the last token of the prompt and the
first of the answer could merge into one that serving never produces.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma_tpu.errors import UserError
from gemma_tpu.sources import local_folder

Messages = list[dict[str, Any]]
TrainOn = Literal["assistant", "last_assistant", "all"]

ASSISTANT = ("assistant", "model")  # the templates of Gemma accept both names
UNTRAINED = ("tool_calls", "tool_responses", "reasoning", "reasoning_content")  # some templates drop these
END_OF_TURN = ("<turn|>", "<end_of_turn>")  # Gemma 4, Gemma 3: where no generation_config.json says it


@dataclass(frozen=True)
class _Answer:
    """One assistant turn in the full render: text[start:end] is its content and end-of-turn token."""

    start: int
    end: int
    inserted: str  # what the generation prompt has just before the answer and the full render lacks


class Tokenizer:
    """Tokenizer and chat template of one checkpoint folder."""

    def __init__(self, folder: str | Path):
        self.folder = local_folder(folder)  # of a remote checkpoint, its small files come here
        self._tokenizer = _load(self.folder)
        self._backend = self._tokenizer.backend_tokenizer
        # A tokenizer.json may carry the truncation of whoever saved it, and that loses ids unseen.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = len(self._tokenizer)
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.eos_id: int | None = self._tokenizer.eos_token_id
        self.pad_id: int = self._pad_id()
        self.stop_ids: tuple[int, ...] = self._stop_ids()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`. Special tokens written in it count as such; none is added but a BOS asked for."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return self._bos_once(ids) if bos else ids

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def prompt(self, messages: Messages) -> list[int]:
        """What a server feeds the model for its next answer: one BOS, the turns, the generation prompt."""
        _check_messages(messages)
        return self._bos_once(self.encode(self._render(messages, add_generation_prompt=True)))

    def training(self, messages: Messages, train_on: TrainOn = "assistant") -> tuple[list[int], list[bool]]:
        """One training row: its ids, and for each whether it is a target of the loss.

        Targets are the answers' contents and end-of-turn tokens, of every assistant turn or of the last one.
        With "all" every token is a target but BOS and what only the generation prompt has.
        The ids before the first target are those of `prompt(messages before it)`. Where the generation prompt
        has text that a finished conversation lacks (Gemma 4's empty thought channel), it is inserted before
        each answer that is a target. A row without an assistant turn has no target, except with "all".
        """
        if train_on not in ("assistant", "last_assistant", "all"):
            raise UserError(f"train_on is {train_on!r}: it must be assistant, last_assistant or all")
        _check_messages(messages)
        text = self._render(messages)
        indices = [i for i, message in enumerate(messages) if message["role"] in ASSISTANT]
        chosen = indices[-1:] if train_on == "last_assistant" else indices

        ids: list[int] = []
        mask: list[bool] = []
        position = 0
        for answer in [self._locate(messages, i, text) for i in chosen]:
            if answer.start < position:
                raise UserError("the chat template does not render the answers one after the other")
            between = text[position : answer.start]
            between_ids, between_mask = self._between(between, answer.inserted, train_on)
            answer_ids = self.encode(text[answer.start : answer.end])
            ids += between_ids + answer_ids
            mask += between_mask + [True] * len(answer_ids)
            position = answer.end
        rest_ids, rest_mask = self._between(text[position:], "", train_on)
        ids, mask = ids + rest_ids, mask + rest_mask

        if self.bos_id is not None:
            mask = [False] * (len(self._bos_once(ids)) - len(ids)) + mask
            ids = self._bos_once(ids)
            mask[0] = False
        return ids, mask

    def _between(self, text: str, inserted: str, train_on: TrainOn) -> tuple[list[int], list[bool]]:
        """The ids between two answers. Only "all" trains them, and never the inserted part."""
        ids = self.encode(text + inserted)
        if train_on != "all":
            return ids, [False] * len(ids)
        shared = _common_prefix(ids, self.encode(text))
        return ids, [i < shared for i in range(len(ids))]

    def _locate(self, messages: Messages, index: int, text: str) -> _Answer:
        """Where messages[index] stands in `text`, the full render; a UserError if that is not certain."""
        where = f"assistant turn {index + 1} of {len(messages)}"
        content = messages[index].get("content")
        if not isinstance(content, str):
            raise UserError(f"{where}: its content is {type(content).__name__}, it must be a string")
        lost = [key for key in UNTRAINED if messages[index].get(key)]
        if lost:
            raise UserError(f"{where}: training on {', '.join(lost)} is not supported; keep role and content")
        if index == 0:
            raise UserError(f"{where}: nothing comes before it that it could answer; add a user turn")
        before, after = self._around(messages, index, where)
        prompt = self._render(messages[:index], add_generation_prompt=True)
        if not prompt.startswith(before):
            raise UserError(
                f"{where}: the chat template writes {before[_common_prefix(before, prompt) :]!r} before the "
                "answer, which the generation prompt lacks: the model would learn to answer a prompt that "
                "serving never sends; use a template whose generation prompt ends where the answer begins"
            )
        end_of_turn = self._end_of_turn(after, where)
        for candidate in (content, content.strip()):
            if text.startswith(before + candidate + end_of_turn):
                end = len(before) + len(candidate) + len(end_of_turn)
                return _Answer(start=len(before), end=end, inserted=prompt[len(before) :])
        shown = text[len(before) :] if text.startswith(before) else text
        raise UserError(
            f"{where}: its content {_short(content)} followed by {end_of_turn!r} is not what the chat "
            f"template renders, which is {_short(shown)}: the template rewrites it or joins it with the next "
            "turn; change the data to what the template leaves alone"
        )

    def _around(self, messages: Messages, index: int, where: str) -> tuple[str, str]:
        """The text that the template writes before and after the content of messages[index]."""
        marker = "[[answer]]"
        while any(marker in str(message) for message in messages):
            marker = f"[{marker}]"
        probe = self._render([*messages[:index], messages[index] | {"content": marker}])
        before, found, after = probe.partition(marker)
        if not found or marker in after:
            raise UserError(f"{where}: the chat template does not render its content exactly once")
        return before, after

    def _end_of_turn(self, after: str, where: str) -> str:
        """The text of the stop token with which the template closes an answer."""
        first = self.encode(after)[:1]
        token = self._backend.id_to_token(first[0]) if first else ""
        if not first or first[0] not in self.stop_ids or not after.startswith(token):
            stops = ", ".join(f"{self._backend.id_to_token(i)} ({i})" for i in self.stop_ids)
            raise UserError(
                f"{where}: the chat template closes it with {_short(after)}, which does not begin with a "
                f"stop token ({stops or 'none known'}): the model would never learn to stop; put the id of "
                f"the end-of-turn token into eos_token_id of {self.folder / 'generation_config.json'}"
            )
        return token

    def _render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            raise UserError(
                f"{self.folder}: no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); copy the one of the instruction-tuned checkpoint there"
            )
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, KeyError, AttributeError) as error:  # a template can raise all four
            raise UserError(f"{self.folder}: the chat template refuses the conversation: {error}") from error

    def _bos_once(self, ids: list[int]) -> list[int]:
        if self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def _pad_id(self) -> int:
        if self._tokenizer.pad_token_id is not None:
            return self._tokenizer.pad_token_id
        if self.eos_id is None:
            raise UserError(f"{self.folder}/tokenizer_config.json: it sets neither pad_token nor eos_token")
        return self.eos_id

    def _stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generation: as generation_config.json has them, else EOS and end of turn."""
        declared = _read_json(self.folder / "generation_config.json").get("eos_token_id")
        if isinstance(declared, int):
            return (declared,)
        if declared:
            return tuple(declared)
        named = _read_json(self.folder / "tokenizer_config.json").get("eot_token")
        turns = [self._backend.token_to_id(text) for text in (named, *END_OF_TURN) if isinstance(text, str)]
        return tuple(dict.fromkeys(i for i in (self.eos_id, *turns) if i is not None))


def _load(folder: Path):
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json there; name a checkpoint folder that has its tokenizer")
    from transformers import PreTrainedTokenizerFast  # seconds cheaper to import than AutoTokenizer

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a corrupt file
        file = folder / "tokenizer.json"
        raise UserError(f"{file}: not a readable tokenizer ({error}); copy it anew") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy it anew from the checkpoint") from error


def _check_messages(messages: Messages) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages is {_short(str(messages))}: it must be a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(
                f"message {i + 1} of {len(messages)} is {_short(str(message))}: it must be an object with a "
                "role (system, user, assistant) and a content"
            )


def _common_prefix(a, b) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
