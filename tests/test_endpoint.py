"""The client of OpenAI-compatible servers, against a small one on 127.0.0.1 that fails on demand."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gemma_tpu import cli
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.sampling.asking import Asked, conversation, every
from gemma_tpu.sampling.drawing import Settings
from gemma_tpu.sampling.endpoint import Endpoint
from gemma_tpu.storage import retry

HOT = Settings(max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3)


class Server:
    """Answers with what it was asked; `faults` are taken by the next requests: a status, "drop", "text" or "odd"."""

    def __init__(self):
        self.models, self.faults, self.bodies, self.keys = ["tiny"], [], [], set()
        self.busy = self.most = 0
        self.pause = 0.0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self):
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path, body):
        if path == "/v1/models":
            return {"data": [{"id": name} for name in self.models]}
        logprobs = {"token_logprobs": [-0.5, -0.25]}
        choice = {"text": f"said {body.get('prompt')} END more", "finish_reason": "length", "logprobs": logprobs}
        if path == "/v1/chat/completions":
            said = {"role": "assistant", "content": f"heard {body['messages'][-1]['content']}"}
            choice = {"message": said, "finish_reason": "stop", "logprobs": {"content": [{"logprob": -1.5}]}}
        return {"choices": [choice]}

    def _handler(server):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize, disable_nagle_algorithm = -1, True  # an answer in one packet, at once

            def log_message(self, *_):
                pass

            def do_GET(self):
                self.do_POST()

            def do_POST(self):
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                with server._lock:
                    server.busy += 1
                    server.most = max(server.most, server.busy)
                    server.keys.add(self.headers.get("Authorization"))
                    fault = server.faults.pop(0) if server.faults and body else None
                    server.bodies += [body] if body else []
                time.sleep(server.pause)
                with server._lock:
                    server.busy -= 1
                if fault == "drop":
                    self.close_connection = True
                    return
                status, data = 200, json.dumps(server.answer(self.path, body)).encode()
                if isinstance(fault, int):
                    status, data = fault, json.dumps({"error": {"message": f"no, {fault}"}}).encode()
                elif fault:
                    data = {"text": b"<html>", "odd": b'{"choices": []}'}[fault]
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        return Handler


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(retry.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found = Server()
    yield found
    found.stop()


def test_texts_and_conversations_go_where_they_belong(server):
    asked = [Asked("two plus"), Asked(conversation("hello", "be brief"))]
    text, chat = Endpoint(server.url).write(asked, HOT)
    assert text == {"text": "said two plus END more", "tokens": None, "finish_reason": "length",
                    "logprobs": [-0.5, -0.25]}  # fmt: skip
    assert (chat["text"], chat["finish_reason"], chat["logprobs"]) == ("heard hello", "stop", [-1.5])
    plain = next(body for body in server.bodies if "prompt" in body)
    assert plain.items() >= {"model": "tiny", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9}.items()
    assert not {"top_k", "min_p", "repetition_penalty", "stop"} & set(plain), "what others than vLLM refuse"
    turns = next(body for body in server.bodies if "messages" in body)
    assert [turn["role"] for turn in turns["messages"]] == ["system", "user"]


def test_every_rule_is_sent_and_a_stop_string_that_the_server_leaves_in_is_cut(server):
    settings = Settings(temperature=1.0, top_k=5, min_p=0.1, repetition_penalty=1.2)
    found = Endpoint(server.url + "/v1/").write([Asked("a")], settings, stop=[" END"])
    assert found[0]["text"] == "said a"
    wanted = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "stop": [" END"]}
    assert server.bodies[0].items() >= wanted.items()


def test_samples_of_a_prompt_have_seeds_of_their_own_which_stay(server):
    asked = every(["a", "b"], n=3, raw=True)
    Endpoint(server.url, concurrency=1).write(asked, HOT)
    seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds)) == 3 and seeds[:3] == seeds[3:]
    Endpoint(server.url, concurrency=1).write(asked[2:3], HOT)
    assert server.bodies[-1]["seed"] == seeds[2]


def test_answers_are_in_order_and_many_are_asked_for_at_once(server):
    server.pause = 0.05
    done = []
    found = Endpoint(server.url, concurrency=4).write(
        every([f"{n}" for n in range(12)], raw=True), HOT, on_done=lambda number, one: done.append(number)
    )
    assert [one["text"] for one in found] == [f"said {n} END more" for n in range(12)]
    assert server.most == 4 and sorted(done) == list(range(12))


@pytest.mark.parametrize("fault", [429, 500, 503, "drop"])
def test_what_may_pass_is_asked_again(server, fault, capsys):
    server.faults = [fault, fault]
    assert Endpoint(server.url).write([Asked("a")], HOT)[0]["text"] == "said a END more"
    assert len(server.bodies) == 3 and "trying again" in capsys.readouterr().err


def test_what_never_passes_ends_with_the_reason(server):
    server.faults = [500] * 3
    with pytest.raises(RunError, match="completions failed 3 times, last with HTTPError: .*500"):
        Endpoint(server.url, attempts=3).write([Asked("a")], HOT)
    with pytest.raises(RunError, match="failed 2 times, last with URLError"):
        Endpoint("http://127.0.0.1:1", attempts=2)


def test_what_the_server_refuses_is_the_users_to_mend_and_is_not_asked_again(server):
    server.faults = [400]
    with pytest.raises(UserError, match="400: no, 400"):
        Endpoint(server.url).write([Asked("a")], HOT)
    server.faults = [401]
    with pytest.raises(UserError, match="no, 401; set OPENAI_API_KEY"):
        Endpoint(server.url).write([Asked("a")], HOT)
    assert len(server.bodies) == 2


@pytest.mark.parametrize("fault, words", [("text", "is no JSON"), ("odd", "not that of an OpenAI-compatible server")])
def test_an_answer_of_another_kind_is_shown(server, fault, words):
    server.faults = [fault]
    with pytest.raises(RunError, match=words):
        Endpoint(server.url).write([Asked("a")], HOT)


def test_the_key_is_sent_and_several_models_have_to_be_chosen_from(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k1")
    server.models = ["one", "two"]
    with pytest.raises(UserError, match="serves one, two: say which"):
        Endpoint(server.url)
    Endpoint(server.url, model="two").write([Asked("a")], HOT)
    assert server.bodies[0]["model"] == "two" and server.keys == {"Bearer k1"}


def test_what_was_answered_is_not_asked_again_after_a_failure(server, tmp_path):
    file, asked = tmp_path / "kept.jsonl", every([f"{n}" for n in range(6)], raw=True)
    server.faults = [None, None, None, 400]
    with pytest.raises(UserError, match="no, 400"):
        Endpoint(server.url, concurrency=1).write(asked, HOT, resume=file)
    assert len(file.read_text().splitlines()) == 3
    file.write_text(file.read_text() + '{"asked": "cut off whi')  # a process killed while it wrote
    found = Endpoint(server.url, concurrency=1).write(asked, HOT, resume=file)
    assert [one["text"] for one in found] == [f"said {n} END more" for n in range(6)]
    assert len(server.bodies) == 4 + 3, "three more, and not six"
    assert Endpoint(server.url).write(asked, HOT, resume=file) == found and len(server.bodies) == 7
    Endpoint(server.url).write(asked[:1], Settings(max_new_tokens=8), resume=file)
    assert len(server.bodies) == 8, "other settings are another question"


def test_a_file_of_something_else_is_refused_and_left_alone(server, tmp_path):
    file = tmp_path / "notes.txt"
    for text in ("my notes\n", "my notes"):
        file.write_text(text)
        with pytest.raises(UserError, match="name another file"):
            Endpoint(server.url).write([Asked("a")], HOT, resume=file)
        assert file.read_text() == text


def test_sample_asks_a_server_like_a_model(server, capsys, tmp_path):
    argv = ["sample", server.url, "--prompt", "x", "--prompt", "y", "--raw", "--json", "--resume", str(tmp_path / "f")]
    assert cli.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["text"] for one in found["samples"]] == ["said x END more", "said y END more"]
    assert found["text"] == "said x END more" and found["target"] == server.url
    assert cli.main(["sample", server.url, "--prompt", "x", "--rows", "3"]) == 2
    assert "--rows: nothing that a server has" in capsys.readouterr().err
