"""Text from a model: stop strings, what is shown while it comes, and the chat."""

import io
import json

import pytest

import gemma_tpu
from gemma_tpu import cli
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.errors import UserError
from gemma_tpu.sampling import chat, completions, sampler
from gemma_tpu.sampling.asking import Asked, cut, every
from gemma_tpu.sampling.completions import Writer, complete
from gemma_tpu.sampling.drawing import Settings

FEW = Settings(max_new_tokens=24, temperature=1.5, seed=1)


@pytest.fixture(scope="module")
def writer(base32):
    return Writer(sampler.Sampler(gemma_tpu.load(base32), rows=2), Tokenizer(base32))


@pytest.fixture(scope="module")
def plain(writer):
    return writer.write(every(["one", "two"], raw=True), FEW)


def test_a_completion_ends_before_its_stop_string_wherever_tokens_end(writer, plain):
    text = plain[0]["text"]
    stop = text[len(text) // 2 :][:3]
    before = text[: text.index(stop)]
    shown: dict[int, str] = {}
    found = writer.write(every(["one", "two"], raw=True), FEW, stop=[stop, "never there"],
                         on_text=lambda i, new: shown.update({i: shown.get(i, "") + new}))  # fmt: skip
    assert found[0]["text"] == before and found[0]["finish_reason"] == "stop"
    assert found[0]["tokens"] == plain[0]["tokens"][: len(found[0]["tokens"])]
    assert len(found[0]["tokens"]) == len(found[0]["logprobs"]) < len(plain[0]["tokens"])
    assert [shown[number] for number in (0, 1)] == [one["text"] for one in found]


def test_text_is_shown_in_pieces_that_join_to_the_whole(writer, plain):
    pieces: dict[int, list[str]] = {0: [], 1: []}
    found = writer.write(every(["one", "two"], raw=True), FEW, on_text=lambda i, new: pieces[i].append(new))
    assert found == plain
    assert ["".join(pieces[i]) for i in (0, 1)] == [one["text"] for one in plain]
    assert len(pieces[0]) > 1, "as it comes, and not at the end"


@pytest.mark.parametrize("text, stop, sure", [
    ("abc", ["cd"], 2), ("abcd", ["cd"], 2), ("ab", ["xy"], 2), ("a\ufffd", [], 1), ("abab", ["abac"], 2),
])  # fmt: skip
def test_nothing_is_shown_that_may_still_be_taken_back(text, stop, sure):
    class Words:
        def decode(self, tokens):
            return text

    said = []
    completions.Stream(Words(), stop).show([1], said.append)
    assert "".join(said) == text[:sure]


def test_the_first_of_several_stop_strings_ends_a_text():
    assert cut("one two three", ["three", "two"]) == ("one ", True)
    assert cut("one", ["two"]) == ("one", False) and cut("one", []) == ("one", False)


def test_an_empty_stop_string_is_refused(writer):
    with pytest.raises(UserError, match="empty stop string"):
        writer.write([Asked("a")], FEW, stop=[""])


@pytest.mark.slow
def test_a_run_folder_completes_with_its_adapter(whole_run, base32):
    settings = Settings(max_new_tokens=8)
    tuned, base = (complete(target, ["a counter"], settings)[0] for target in (whole_run, base32))
    assert tuned["tokens"] != base["tokens"] and tuned["prompt"] == "a counter"


# --- the chat -----------------------------------------------------------------------------------------------


def talk(monkeypatch, text: str, write, **more):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return chat.chat(write, Settings(max_new_tokens=4), **more)["messages"]


def test_each_turn_of_a_chat_sees_those_before_it(monkeypatch, capsys):
    asked = []

    def write(wanted, settings, stop, on_text):
        asked.append([turn["content"] for turn in wanted[0].prompt])
        on_text(0, f"answer {len(asked)}")
        return [{"text": f"answer {len(asked)}", "finish_reason": "stop"}]

    kept = talk(monkeypatch, "first\n\nsecond\n/new\n/what\nthird\n/quit\nfourth\n", write, system="be brief")
    assert asked == [["be brief", "first"], ["be brief", "first", "answer 1", "second"], ["be brief", "third"]]
    assert [turn["role"] for turn in kept] == ["system", "user", "assistant"]
    out, err = capsys.readouterr()
    assert out == "answer 1\nanswer 2\nanswer 3\n" and err.count("/new begins another") == 2


def test_a_chat_goes_on_after_an_answer_that_was_refused_or_stopped(monkeypatch, capsys):
    faults = [UserError("too long"), KeyboardInterrupt()]

    def write(wanted, settings, stop, on_text):
        on_text(0, "half")
        if faults:
            raise faults.pop(0)
        return [{"text": "whole", "finish_reason": "length"}]

    kept = talk(monkeypatch, "a\nb\nc", write)
    assert [turn["content"] for turn in kept] == ["b", "half", "c", "whole"]
    err = capsys.readouterr().err
    assert "error: too long" in err and "cut at 4 tokens" in err


def test_sample_without_a_prompt_is_a_chat_by_the_checkpoints_template(base32, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n"))
    seen = []
    before = Tokenizer.prompt
    monkeypatch.setattr(Tokenizer, "prompt", lambda self, turns: seen.append(len(turns)) or before(self, turns))
    assert cli.main(["sample", str(base32), "--max-new-tokens", "4"]) == 0
    assert seen == [1, 3] and capsys.readouterr().out.count("\n") >= 2


@pytest.mark.parametrize("argv, words", [
    (["--json"], "nothing to continue"), (["--raw"], "has no --raw"),
    (["--n", "2", "--temperature", "1"], "has no --n"),
    (["--prompt", "a", "--model", "x"], "--model: nothing that a folder has"),
    (["--prompt", "a", "--stop", ""], "empty stop string"), (["--prompt", "a", "--rows", "0"], "--rows is 0"),
    (["--prompt", "a", "--mesh", "tp=0"], "'tp=0' is wrong"), (["--prompt", "a", "--mesh", "tp=64"], "64 devices"),
])  # fmt: skip
def test_sample_refuses_what_it_could_only_ignore(base32, capsys, argv, words):
    assert cli.main(["sample", str(base32), *argv]) == 2
    assert words in capsys.readouterr().err


def test_sample_on_a_mesh_gives_what_one_device_gives(base32, capsys):
    found = []
    for more in ([], ["--mesh", "fsdp=2,tp=2", "--rows", "2"]):
        assert cli.main(["sample", str(base32), "--prompt", "a", "--max-new-tokens", "6", "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["tokens"])
    assert found[0] == found[1]
