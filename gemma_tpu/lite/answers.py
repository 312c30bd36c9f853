"""From tokens to what OpenAI's clients read: texts that end before their stop strings, log-probabilities, chunks."""

import functools
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.lite.batch import Ask, Scores, Tokens
from gemma_tpu.lite.requests import Request
from gemma_tpu.sampling.asking import cut
from gemma_tpu.sampling.completions import UNFINISHED, Stream, first_end

Words = Callable[[int], str]


def words_of(tokenizer: Tokenizer) -> Words:
    """The text of a single token; what is half a character shows as U+FFFD."""
    return functools.lru_cache(2**16)(lambda token: tokenizer.decode([token]))


class Choice:
    """One sample as text, and how much of it has been given out."""

    def __init__(
        self, index: int, ask: Ask, request: Request, tokenizer: Tokenizer, words: Words, echo: str | None
    ):  # fmt: skip
        self.index, self.ask = index, ask
        self.echo, self.finish = echo, None if ask.limit else "length"
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.likeliest: list[Mapping[int, float]] = []
        # A prompt of one token has none to score, and is echoed like others.
        alone = request.echo and request.logprobs is not None and len(ask.tokens) == 1
        self.scores = Scores([], []) if alone else None
        self.text, self.sent = "", 0  # tokens whose log-probabilities were given out
        # Where the next of them stands in the text, in which a BOS of ours does not.
        self.offset = 0 if echo is None else len(echo) - sum(len(words(token)) for token in ask.tokens)
        self._stop, self._tokenizer = request.stop, tokenizer
        self._stream = Stream(tokenizer, request.stop)

    def take(self, new: Tokens) -> str:
        """The text that has become certain. With a stop string among it, `finish` is set."""
        self.tokens += new.tokens
        self.logprobs += new.logprobs
        self.likeliest += new.likeliest or ({} for _ in new.tokens)
        kept = first_end(self._tokenizer, self.tokens, self._stop) if self._stop else None
        if kept is not None:
            del self.tokens[kept:], self.logprobs[kept:], self.likeliest[kept:]
        self.finish = "stop" if kept is not None else new.finish
        said: list[str] = []
        if self.finish is None:
            self._stream.show(self.tokens, said.append)
        else:
            whole, _ = cut(self._tokenizer.decode(self.tokens), self._stop)
            said.append(whole[self._stream.shown :])
        self.text += "".join(said)
        return "".join(said)


class Form:
    """The objects of one answer, of completions or of a chat."""

    def __init__(self, request: Request, model: str, words: Words):
        self._request, self._words, self._chat = request, words, request.kind == "chat"
        prefix, self._object = ("chatcmpl", "chat.completion") if self._chat else ("cmpl", "text_completion")
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {**self._head, "object": self._object, "choices": [self._whole(one) for one in choices],
                "usage": usage(choices)}  # fmt: skip

    def _whole(self, choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice)
        said: dict[str, Any] = {"text": (choice.echo or "") + choice.text}
        if self._chat:
            said = {"message": {"role": "assistant", "content": choice.text}}
        return {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": choice.finish}

    def first(self, choice: Choice) -> dict[str, Any] | None:
        """What a stream has before anything was generated."""
        if self._chat:
            return self._chunk(choice.index, {"delta": {"role": "assistant", "content": ""}}, None, None)
        if choice.echo is None:
            return None
        return self._chunk(choice.index, {"text": choice.echo}, self._logprobs(choice, new=False), None)

    def more(self, choice: Choice, text: str) -> dict[str, Any] | None:
        """The chunk for new text; None where there is nothing to say."""
        if not text and choice.finish is None:
            return None
        said: dict[str, Any] = {"delta": {"content": text} if text else {}} if self._chat else {"text": text}
        return self._chunk(choice.index, said, self._logprobs(choice), choice.finish)

    def last(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return self._of_stream([]) | {"usage": usage(choices)}

    def _chunk(self, index: int, said: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        found = self._of_stream([{"index": index, **said, "logprobs": logprobs, "finish_reason": finish}])
        return found | ({"usage": None} if self._request.include_usage else {})

    def _of_stream(self, choices: list[Any]) -> dict[str, Any]:
        return {**self._head, "object": self._object + (".chunk" if self._chat else ""), "choices": choices}

    def _logprobs(self, choice: Choice, new: bool = True) -> dict[str, Any] | None:
        """Of the tokens since the last time; of the prompt's too, where it is echoed, the first time."""
        count = self._request.logprobs
        if count is None:
            return None
        tokens: list[int] = []
        logprobs: list[float | None] = []
        tops: list[Mapping[int, float] | None] = []
        if choice.scores is not None:
            tokens += choice.ask.tokens
            logprobs += [None, *choice.scores.logprobs]
            tops += [None, *choice.scores.likeliest]
            choice.scores = None
        if new:
            tokens += choice.tokens[choice.sent :]
            logprobs += choice.logprobs[choice.sent :]
            tops += choice.likeliest[choice.sent :]
            choice.sent = len(choice.tokens)
        listed = [_listed(*one, count) for one in zip(tokens, logprobs, tops, strict=True)]
        if self._chat:
            return {"content": [self._entry(token, logprob) | {"top_logprobs": [self._entry(*pair) for pair in
                                list((top or {}).items())[:count]]}
                                for token, logprob, top in zip(tokens, logprobs, listed, strict=True)]}  # fmt: skip
        texts, offsets = [self._words(token) for token in tokens], []
        for text in texts:
            offsets.append(max(0, choice.offset))
            choice.offset += len(text)
        return {"tokens": texts, "token_logprobs": logprobs, "text_offset": offsets,
                "top_logprobs": [top and self._by_text(top) for top in listed]}  # fmt: skip

    def _by_text(self, top: Mapping[int, float]) -> dict[str, float]:
        """Of tokens that look alike, the likelier one."""
        found: dict[str, float] = {}
        for token, logprob in top.items():
            text = self._words(token)
            found[text] = max(logprob, found.get(text, logprob))
        return found

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._words(token)
        # Half a character: its bytes are not those of the sign that stands for it.
        return {"token": text, "logprob": logprob, "bytes": None if UNFINISHED in text else list(text.encode())}


def _listed(
    token: int, logprob: float | None, top: Mapping[int, float] | None, count: int
) -> dict[int, float] | None:
    """The `count` likeliest, and the token itself where it is not among them; None for the first of a prompt."""
    if logprob is None or top is None:
        return None
    return dict(list(top.items())[:count]) | {token: logprob}


def usage(choices: Sequence[Choice]) -> dict[str, int]:
    asked = sum(len(ask.tokens) for ask in {choice.ask for choice in choices})
    made = sum(len(choice.tokens) for choice in choices)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
