"""What docs/security.md promises, each promise by a test: no code out of a file, no path out of a folder, no secret in
anything that is written or printed, and a small server that cannot be held up for ever."""

import ast
import asyncio
import http.server
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from runs_helper import PLANTED
from safetensors.numpy import save_file

from gemma_tpu import cli
from gemma_tpu import config as configs
from gemma_tpu.commands import lite_cli
from gemma_tpu.errors import UserError
from gemma_tpu.lite import patience
from gemma_tpu.lite.app import Routes
from gemma_tpu.lite.requests import Limits, Refused
from gemma_tpu.sampling import endpoint
from gemma_tpu.storage.remote import File, RemoteSource
from gemma_tpu.storage.shards import open_checkpoint

ROOT = Path(__file__).parent.parent

# --- nothing in a file is run ---

UNPICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
ARCHIVES = {"tarfile", "zipfile"}
SHELLS = {
    ("os", "system"),
    ("os", "popen"),
    ("subprocess", "getoutput"),
    ("subprocess", "getstatusoutput"),
    ("shutil", "unpack_archive"),
    ("yaml", "load"),
    ("yaml", "load_all"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("yaml", "safe_load"),
    ("jinja2", "Environment"),
    ("jinja2", "Template"),
}


def dangers(source: str) -> list[str]:
    """Every way in a module by which a file could become code, or a word a command."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"imports {name}" for name in names if name.split(".")[0] in UNPICKLERS | ARCHIVES]
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        named = {word.arg: word.value for word in node.keywords}
        if isinstance(called, ast.Name) and called.id in ("eval", "exec", "compile", "__import__"):
            found.append(f"calls {called.id}")
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            if (called.value.id, called.attr) in SHELLS:
                found.append(f"calls {called.value.id}.{called.attr}")
            if (called.value.id, called.attr) == ("torch", "load") and not _is(named.get("weights_only"), True):
                found.append("torch.load without weights_only=True")
        for word in ("shell", "allow_pickle", "trust_remote_code"):
            if word in named and not _is(named[word], False):
                found.append(f"{word} is not False")
    return found


def _is(node: ast.AST | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", ["gemma_tpu", "recipes", "scripts"])
def test_no_module_can_run_what_a_file_holds(path: str) -> None:
    # The tokenising processes answer their parent through a pipe that nobody else holds; the module needs the name of
    # an error, and YAML of our own in scripts is not a user's.
    known = {"workers.py": ["imports pickle"], "accelerators.py": ["calls yaml.safe_load"]}
    found = {str(file): dangers(file.read_text()) for file in (ROOT / path).rglob("*.py")}
    wrong = {name: told for name, told in found.items() if told and told != known.get(Path(name).name)}
    assert len(found) > 1 and not wrong


def test_of_pickle_the_package_knows_the_name_of_one_error() -> None:
    tree = ast.parse((ROOT / "gemma_tpu/data/workers.py").read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle"
    }
    assert used == {"UnpicklingError"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from tarfile import open",
        "import zipfile as z",
        "eval('1')",
        "exec(x)",
        "__import__('os')",
        "os.system('x')",
        "subprocess.run('x', shell=True)",
        "np.load(f, allow_pickle=True)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(f)",
        "AutoModel.from_pretrained(f, trust_remote_code=True)",
        "AutoModel.from_pretrained(f, trust_remote_code=given)",
        "jinja2.Environment()",
    ],
)
def test_the_search_for_dangers_finds_them(source: str) -> None:
    assert dangers(source)


def test_a_chat_template_is_rendered_in_a_sandbox(tmp_path: Path, base32: Path) -> None:
    """It comes with a checkpoint from anywhere: it may write text, and reach nothing."""
    from gemma_tpu.data.tokenizer import Tokenizer

    proof = tmp_path / "proof"
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base32 / name).read_bytes())
    for attack in (
        "{{ cycler.__init__.__globals__.os.system('touch PROOF') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ lipsum.__globals__['os'].popen('touch PROOF') }}",
        "{% for c in ().__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10 ** 9) | list }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
    ):
        (folder / "chat_template.jinja").write_text(attack.replace("PROOF", str(proof)))
        with pytest.raises(UserError, match="the chat template (refuses|breaks on)"):
            Tokenizer(folder).prompt([{"role": "user", "content": "q"}])
    assert not proof.exists()


# --- no path leads out of a folder ---


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/{}/secret.safetensors",
        "sub/../../secret.safetensors",
        "..\\secret.safetensors",
        "./secret.safetensors",
        "~/secret.safetensors",
    ],
)
def test_an_index_names_files_beside_it_alone(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "secret.safetensors")
    index = {"weight_map": {"a": name.format(tmp_path)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="plain .* file name beside the index"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//x", "./x", "a\\..\\x", ""])
def test_a_bucket_or_a_hub_that_lists_a_way_out_is_refused(name: str) -> None:
    class Store(RemoteSource):
        def _list(self, recursive: bool) -> dict[str, File]:
            return {name: File(name, 3)}

        def _fetch(self, name: str, start: int, end: int) -> bytes:
            raise AssertionError("nothing of it is read")

    with pytest.raises(UserError, match="no plain relative paths"):
        Store("gs://bucket/model").local_files()


# --- no secret in what is written and printed ---


def secrets_in(*texts: str | bytes) -> list[str]:
    data = b"\n".join(text if isinstance(text, bytes) else text.encode() for text in texts)
    return [name for name, value in PLANTED.items() if value.encode() in data]


def everything(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def planted(monkeypatch: Any) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


def test_the_search_for_secrets_finds_them() -> None:
    assert all(secrets_in(f"x{value}y") == [name] for name, value in PLANTED.items())


def test_a_run_keeps_no_secret_in_its_folder(one_device_run: Path) -> None:
    """Trained by the command line in a process that has them all in its environment."""
    files = everything(one_device_run)
    assert len(files) > 8 and not secrets_in(*files)


LAUNCH = "launch configs/tiny_cpu.yaml --on v6e-8 --bucket gs://mine model.path=gs://mine/m --with"


@pytest.mark.parametrize("line", [
    *(f"{LAUNCH} {way}" for way in ("spot", "gke", "skypilot")),
    "serve MODEL --on cpu", "validate configs/tiny_cpu.yaml model.path=MODEL", "schema",
])  # fmt: skip
@pytest.mark.usefixtures("planted")
def test_a_script_and_a_report_hold_no_secret(
    line: str, base32: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    cli.main([word.replace("MODEL", str(base32)) for word in line.split()])
    said = capsys.readouterr()
    assert len(said.out) + len(said.err) > 100
    assert not secrets_in(said.out, said.err, *everything(tmp_path))


@pytest.mark.usefixtures("planted")
def test_doctor_says_where_a_token_is_and_not_what(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from gemma_tpu.onboarding import doctor

    monkeypatch.setattr(doctor, "_devices", lambda: iter(()), raising=False)
    found = [doctor._token(), doctor._bucket("memory://x")]
    assert "HF_TOKEN" in found[0].found and not secrets_in(*map(str, found))


class _Echo(http.server.BaseHTTPRequestHandler):
    """A server that repeats whatever it was asked with, the key included."""

    def _say(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._say(200, {"data": [{"id": "tiny"}]} if self.path.endswith("/models") else {"echo": str(self.headers)})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.headers["Authorization"])  # type: ignore[attr-defined]
        self._say(400, {"error": {"message": f"refused: {self.headers['Authorization']}"}})

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def echo() -> Iterator[Any]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("planted")
def test_a_key_that_a_server_repeats_is_not_printed_or_kept(
    echo: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"http://127.0.0.1:{echo.server_port}"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q"}\n')
    (tmp_path / "scorers.py").write_text("def any(row, text): return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(["eval", "prompts", "rows.jsonl", url, "--scorer", "scorers:any", "--out", "out"]) != 0
    assert cli.main(["sample", url, "--prompt", "q"]) != 0
    cli.main(
        [
            "bench",
            url,
            "--data",
            "rows.jsonl",
            "--output",
            "4",
            "--qps",
            "inf",
            "--prompts",
            "1",
            "--out",
            "bench.json",
            "--warmup",
            "0",
        ]
    )
    said = capsys.readouterr()
    assert any(PLANTED["OPENAI_API_KEY"] in (one or "") for one in echo.asked)  # it was asked with the key
    assert not secrets_in(said.out, said.err, *everything(tmp_path))
    assert "refused: Bearer …" in said.err


@pytest.mark.parametrize(
    "url", ["http://me:hunter2@127.0.0.1:1/v1", "https://hunter2@host", "http://host/v1?api_key=hunter2"]
)
@pytest.mark.parametrize(
    "argv",
    [
        ["bench", "URL", "--preset", "paper"],
        ["sample", "URL", "--prompt", "q"],
        ["eval", "prompts", "rows.jsonl", "URL", "--scorer", "scorers:any"],
    ],
)
def test_a_password_in_the_url_of_a_server_is_refused_without_being_shown(
    argv: list[str], url: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q"}\n')
    (tmp_path / "scorers.py").write_text("def any(row, text): return 1.0\n")
    assert cli.main([word.replace("URL", url) for word in argv]) == 2
    said = capsys.readouterr()
    assert "hunter2" not in said.out + said.err and "OPENAI_API_KEY" in said.err
    assert not any(b"hunter2" in data for data in everything(tmp_path))


@pytest.mark.parametrize(
    "text", ["model: {path: 's3://AKIA:hunter2@bucket/x'}", "data: {path: [a, 'https://u:hunter2@h/x']}"]
)
def test_a_password_in_a_config_is_refused_without_being_shown(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match="credentials") as caught:
        configs.load(tmp_path / "run.yaml")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(UserError, match="credentials") as caught:
        configs.load("configs/tiny_cpu.yaml", ["data.path=gs://u:hunter2@bucket/x"])
    assert "hunter2" not in str(caught.value)


def test_a_hub_revision_is_no_password() -> None:
    assert configs.load("configs/tiny_cpu.yaml", ["model.path=hf://google/gemma-4-31B-it@main"])
    assert endpoint.api("http://127.0.0.1:8000/v1/") == "http://127.0.0.1:8000/v1"


# --- serve-lite ---


def test_serve_lite_listens_on_this_machine_alone_unless_told() -> None:
    args = cli.parse(["serve-lite", "models/tiny"])
    assert args.host == "127.0.0.1" and lite_cli._loopback(args.host) and args.max_body == 8
    assert not lite_cli._loopback("0.0.0.0")


@pytest.fixture
def patient(monkeypatch: Any) -> Iterator[int]:
    """The port of a web server as serve-lite has it, before an application that says ok."""
    monkeypatch.setattr(patience, "HEAD_SECONDS", 0.3)

    async def ok(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    listener = socket.create_server(("127.0.0.1", 0))
    options = uvicorn.Config(
        ok, log_config=None, log_level="critical", lifespan="off", http=patience.Patient, timeout_keep_alive=1
    )
    web = uvicorn.Server(options)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not web.started:
        time.sleep(0.01)
    yield listener.getsockname()[1]
    web.should_exit = True
    thread.join(10)
    listener.close()


HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize("said", [b"", HEAD, HEAD + b"\r\n" + HEAD])
def test_who_never_ends_a_head_is_hung_up_on(said: bytes, patient: int) -> None:
    with socket.create_connection(("127.0.0.1", patient), timeout=10) as line:
        line.sendall(said)
        begun, heard = time.monotonic(), b""
        while piece := line.recv(1000):  # an end, no timeout
            heard += piece
        assert time.monotonic() - begun < 5
    assert (b"200 OK" in heard) == said.startswith(HEAD + b"\r\n")


def test_a_drop_at_a_time_does_not_help(patient: int) -> None:
    with socket.create_connection(("127.0.0.1", patient), timeout=10) as line:
        with pytest.raises(OSError):
            for _ in range(100):
                line.sendall(b"G")
                time.sleep(0.02)
            assert line.recv(1)  # closed: nothing
            raise AssertionError("it was listened to for two seconds")


def test_a_head_without_end_is_refused(patient: int) -> None:
    with socket.create_connection(("127.0.0.1", patient), timeout=10) as line:
        line.sendall(HEAD + b"X: " + b"y" * (1 << 20))
        assert b"400 Bad Request" in line.recv(1000)


def test_who_asks_in_time_is_answered_as_often_as_they_ask(patient: int) -> None:
    with socket.create_connection(("127.0.0.1", patient), timeout=10) as line:
        for _ in range(3):
            line.sendall(HEAD + b"\r\n")
            assert b"200 OK" in line.recv(1000)


def test_a_body_that_does_not_come_or_does_not_end_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(patience, "BODY_SECONDS", 0.05)

    class Slow:
        async def stream(self) -> Any:
            while True:
                yield b"x"
                await asyncio.sleep(0.01)

    class Large:
        async def stream(self) -> Any:
            while True:
                yield b"x" * 1000

    class Server:
        limits, engine = Limits(body=100_000), None

    for stream, status in ((Slow(), 408), (Large(), 413)):
        with pytest.raises(Refused, match="limit here") as caught:
            asyncio.run(Routes(Server())._body(stream))  # type: ignore[arg-type]
        assert caught.value.status == status


def test_every_promise_of_the_page_names_a_test_that_is_there() -> None:
    promised = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/security.md").read_text()))
    there = {
        name for file in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert len(promised) > 15 and not promised - there
