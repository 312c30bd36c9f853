"""The checkpoint's tokenizer and chat template: text to ids, conversations to prompts and training rows.

Nothing of a chat template is re-implemented: which part of a rendered conversation is the model's is found from its
own renderings (template.py), and a rendering in which that is not certain is refused.

Text is encoded piece by piece, prompt and answer apart, because that is how serving sees it: the prompt is
encoded alone and the model continues with new tokens. Encoded in one go, the last token of the prompt and the
first of the answer could merge into one that serving never produces.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gemma_tpu import plain
from gemma_tpu.data import template
from gemma_tpu.data.template import ASSISTANT, REASONING, Messages, Outline, Slot, Words, common_prefix, place, short
from gemma_tpu.errors import UserError
from gemma_tpu.storage.sources import local_folder

TrainOn = Literal["assistant", "last_assistant", "all"]
Tools = Sequence[dict[str, Any]] | None  # declarations, as OpenAI's API takes them

END_OF_TURN = ("<turn|>", "<end_of_turn>")  # Gemma 4, Gemma 3: where no generation_config.json says it
RESPONSE = ("<|tool_response>", "<tool_response|>")  # Gemma 4, where no tokenizer_config.json names them
SHAPES = 4096  # outlines kept; datasets have few shapes, trajectories nearly one each


class Stretch(NamedTuple):
    """A part of a row that is encoded by itself."""

    text: str
    inserted: str  # behind it, what only the generation prompt has; never a target
    target: bool  # is the text one?


@dataclass(frozen=True)
class Draft:
    """A training row before its text is encoded: the texts of many rows can then be encoded at once."""

    stretches: list[Stretch]
    thinking: bool = False
    lost: int = 0
    ends: bool = False  # with the tokenizer's end of sequence

    @property
    def texts(self) -> list[str]:
        """What must be encoded for it. What is inserted may share its first token with the text before it, so that a
        target before it is encoded alone too."""
        found = []
        for part in self.stretches:
            found.append(part.text + part.inserted)
            if part.inserted and part.target:
                found.append(part.text)
        return found


@dataclass(frozen=True)
class Rendered:
    """One training row, and how it was rendered."""

    ids: list[int]
    mask: list[bool]  # is the token a target of the loss?
    thinking: bool
    lost: int  # messages whose reasoning the template leaves out


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
        self._words = self._special_words()
        self._outlines: dict[str, Outline] = {}

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`. Special tokens written in it count as such; none is added but a BOS asked for."""
        (ids,) = self.encode_all([text])
        return self._bos_once(ids) if bos else ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, by all cores. Half again as fast as the backend's `encode` even for a single text: that
        one also finds where each token stands in it."""
        return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)
        return text

    def prompt(self, messages: Messages, *, tools: Tools = None, thinking: bool = False) -> list[int]:
        """What a server feeds the model for its next answer: one BOS, the turns, the generation prompt."""
        _check_messages(messages)
        return self._bos_once(self.encode(self._render(template.normal(messages), tools, thinking, True)))

    def training(
        self, messages: Messages, train_on: TrainOn = "assistant", *, tools: Tools = None, thinking: bool | None = None
    ) -> tuple[list[int], list[bool]]:
        """One training row: its ids, and for each whether it is a target of the loss. See `draft`."""
        found = self.row(messages, train_on, tools=tools, thinking=thinking)
        return found.ids, found.mask

    def row(
        self, messages: Messages, train_on: TrainOn = "assistant", *, tools: Tools = None, thinking: bool | None = None
    ) -> Rendered:
        """One training row. See `draft`."""
        draft = self.draft(messages, train_on, tools=tools, thinking=thinking)
        return self.finish(draft, iter(self.encode_all(draft.texts)))

    def draft(
        self, messages: Messages, train_on: TrainOn = "assistant", *, tools: Tools = None, thinking: bool | None = None
    ) -> Draft:
        """One training row.

        Targets are what the model says in every assistant message, or in the last one: its reasoning and tool calls
        as the template renders them, its content, and the token that ends its turn. What tools respond is no target.
        With "all" every token is a target but BOS and what only the generation prompt has. A message with
        `"weight": 0` has no target.

        The ids before the first target are those of `prompt(messages before it)`. Where the generation prompt
        has text that a finished conversation lacks (Gemma 4's empty thought channel), it is inserted before
        each answer that is a target. `thinking` None: on where the template then renders reasoning of this row.
        A row without an assistant turn has no target, except with "all".
        """
        if train_on not in ("assistant", "last_assistant", "all"):
            raise UserError(f"train_on is {train_on!r}: it must be assistant, last_assistant or all")
        _check_messages(messages)
        silent = {i for i in range(len(messages)) if not _weight(messages, i)}
        answers = [i for i, message in enumerate(messages) if message["role"] in ASSISTANT]
        chosen = set(answers[-1:] if train_on == "last_assistant" else answers) - silent
        messages = template.normal(messages)
        hollow, slots, mark = template.hollow(messages)
        outline, thinking = self._outline(hollow, slots, mark, tools, thinking)
        if wrong := [outline.wrong[i] for i in sorted(chosen & outline.wrong.keys())]:
            raise UserError("; ".join(wrong))
        texts = template.fill(outline, slots, self._render(messages, tools, thinking), messages)
        stretches = _stretches(outline, slots, texts, chosen, silent if train_on == "all" else None)
        return Draft(stretches, thinking, outline.lost)

    def draft_text(self, text: str) -> Draft:
        """A row of plain text, all of it a target."""
        return Draft([Stretch(text, "", True)], ends=True)

    def finish(self, draft: Draft, encoded: Iterator[list[int]]) -> Rendered:
        """The row of a draft; `encoded` goes on with the ids of its texts."""
        ids: list[int] = []
        mask: list[bool] = []
        for part in draft.stretches:
            found = next(encoded)
            targets = len(found) * part.target
            if part.inserted and part.target:
                targets = common_prefix(found, next(encoded))
            ids += found
            mask += [True] * targets + [False] * (len(found) - targets)
        if draft.ends and self.eos_id is not None:
            ids.append(self.eos_id)
            mask.append(True)
        if self.bos_id is not None:
            mask = [False] * (len(self._bos_once(ids)) - len(ids)) + mask
            ids = self._bos_once(ids)
            mask[0] = False
        return Rendered(ids, mask, draft.thinking, draft.lost)

    def _outline(
        self, hollow: Messages, slots: list[Slot], mark: str, tools: Tools, thinking: bool | None
    ) -> tuple[Outline, bool]:
        """The outline of a conversation, and whether thinking is on in it."""
        if thinking is None:
            thinks = any(slot.key == "reasoning" for slot in slots)
            if not thinks or not self._renders_reasoning(hollow, slots, mark, tools):
                return self._outline(hollow, slots, mark, tools, False)
            return self._outline(hollow, slots, mark, tools, True)
        shape = json.dumps([hollow, tools, thinking, [not slot.value.strip() for slot in slots]], default=str)
        found = self._outlines.get(shape)
        if found is None:
            if len(self._outlines) >= SHAPES:
                self._outlines.clear()

            def render(part: Messages, prompt: bool) -> str:
                return self._render(part, tools, thinking, prompt)

            if tools and render(hollow, False) == self._render(hollow, None, thinking):
                raise UserError("the chat template renders none of the declared tools: use one that does, or leave "
                                "the tools out of the data")  # fmt: skip
            found = self._outlines[shape] = template.outline(hollow, slots, mark, render, self._words)
        return found, thinking

    def _renders_reasoning(self, hollow: Messages, slots: list[Slot], mark: str, tools: Tools) -> bool:
        text = self._render(hollow, tools, True)
        return any(slot.key == "reasoning" and f"{mark}{n}]]" in text for n, slot in enumerate(slots))

    def _render(self, messages: Messages, tools: Tools, thinking: bool, add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            raise UserError(
                f"{self.folder}: no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); copy the one of the instruction-tuned checkpoint there"
            )
        options = {"enable_thinking": True} if thinking else {}  # off is what a server does that is told nothing
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=list(tools) if tools else None, tokenize=False,
                add_generation_prompt=add_generation_prompt, **options,
            )  # fmt: skip
            if not plain.encodes(text):
                raise ValueError("it writes half of a letter (a lone surrogate)")
            return text
        except Exception as error:  # a template is a program of somebody's, in a sandbox, and can fail in every way
            told = plain.cut(" ".join(str(error).split()), 400) or "it does not say why"
            how = "refuses" if isinstance(error, TemplateError) else "breaks on"
            raise UserError(f"{self.folder}: the chat template {how} the conversation: {told}") from error

    def _bos_once(self, ids: list[int]) -> list[int]:
        if self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def _pad_id(self) -> int:
        declared: int | None = self._tokenizer.pad_token_id
        if declared is not None:
            return declared
        if self.eos_id is None:
            raise UserError(f"{self.folder}/tokenizer_config.json: it sets neither pad_token nor eos_token")
        return self.eos_id

    def _stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generation: as generation_config.json has them, else EOS and end of turn."""
        file = self.folder / "generation_config.json"
        found = plain.require(_read_json(file), {"eos_token_id?": (int, [int], None)}, str(file))
        declared = found.get("eos_token_id")
        declared = [declared] if isinstance(declared, int) else declared or []
        if declared:
            wrong = [number for number in declared if not 0 <= number < self.vocab_size]
            if wrong:
                told = plain.first(map(str, wrong), 5)
                raise UserError(f"{file}: eos_token_id has {told}; this tokenizer's ids are below {self.vocab_size}")
            return tuple(declared)
        named = _read_json(self.folder / "tokenizer_config.json").get("eot_token")
        turns = [self._backend.token_to_id(text) for text in (named, *END_OF_TURN) if isinstance(text, str)]
        return tuple(dict.fromkeys(i for i in (self.eos_id, *turns) if i is not None))

    def _special_words(self) -> Words:
        """What renderings are cut at: the special tokens, and of those what encloses a tool's response."""
        added = {token.content: number for number, token in self._backend.get_added_tokens_decoder().items()
                 if token.special or number in self.stop_ids}  # fmt: skip
        config = _read_json(self.folder / "tokenizer_config.json")
        named: tuple[Any, Any] = (config.get("str_token"), config.get("etr_token"))
        response = next((pair for pair in (named, RESPONSE)
                         if all(isinstance(text, str) and text in added for text in pair)), None)  # fmt: skip
        return Words(added, self.stop_ids, response)


def _load(folder: Path) -> Any:
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json there; name a checkpoint folder that has its tokenizer")
    from transformers import PreTrainedTokenizerFast  # seconds cheaper to import than AutoTokenizer

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library raises bare Exception on a corrupt file, and panics past Exception
        file, told = folder / "tokenizer.json", re.sub(r"<class '([\w.]+)'>", r"\1", " ".join(str(error).split()))[:300]
        raise UserError(f"{file}: not a readable tokenizer ({told}); copy it anew, with its config") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = plain.require(plain.json_file(path), {str: object}, str(path))
    return found


def _check_messages(messages: Messages) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages is {short(str(messages))}: it must be a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(
                f"message {i + 1} of {len(messages)} is {short(str(message))}: it must be an object with a "
                "role (system, user, assistant) and a content"
            )
        content = message.get("content")
        speaks = any(message.get(key) for key in ("tool_calls", "tool_responses", *REASONING))
        if message["role"] in ASSISTANT and not isinstance(content, str) and not (content is None and speaks):
            raise UserError(
                f"{place(messages, i)}: its content is {type(content).__name__}, it must be a string"
            )


def _weight(messages: Messages, i: int) -> bool:
    weight = messages[i].get("weight")
    if weight not in (None, 0, 1):
        raise UserError(f"{place(messages, i)}: its weight is {weight!r}: it must be 0 (not trained) or 1")
    return weight != 0


def _stretches(
    outline: Outline, slots: list[Slot], texts: list[str], chosen: set[int], silent: set[int] | None
) -> list[Stretch]:
    """Stretches of a row, cut where a chosen answer begins and ends. `silent`: the messages that are no target where
    all the others are."""
    before = {n: text for i, (n, text) in outline.inserted.items() if i in chosen and text}
    runs: list[Stretch] = []
    last = None
    for n, (atom, text) in enumerate(zip(outline.atoms, texts, strict=True)):
        answer = atom.owner in chosen
        speaker = slots[atom.slot].message if atom.owner is None and atom.slot is not None else atom.owner
        target = answer if silent is None else speaker not in silent
        if n in before:
            if last is None or last[0]:  # nothing stands between two answers
                runs.append(Stretch("", "", False))
            runs[-1] = runs[-1]._replace(inserted=before[n])
            last = None
        if last == (answer, target):
            runs[-1] = Stretch(runs[-1].text + text, "", target)
        else:
            runs.append(Stretch(text, "", target))
            last = (answer, target)
    return runs
