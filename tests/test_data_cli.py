"""`gemma-tpu data`: counts under the promised keys, rows one can read, a page, and errors without a traceback."""

import json
import re
from pathlib import Path

import pytest

from gemma_tpu import cli
from gemma_tpu.data import display

KEYS = {"rows", "kept", "dropped", "tokens", "target_tokens", "percentiles", "padding_waste", "packing_efficiency",
        "recommended_max_seq_len"}  # fmt: skip


@pytest.fixture
def config(base32, tmp_path: Path) -> str:
    rows = [{"prompt": f"add {i}", "response": "assign y = a; // \x1b[31m"} for i in range(60)]
    lines = [json.dumps(row) for row in rows] + ["{", json.dumps({"prompt": "x " * 400, "response": "long"})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    text = f"model: {{path: {base32}}}\ndata: {{path: {tmp_path}/rows.jsonl, cache: {tmp_path}/cache, workers: 1}}\n"
    (tmp_path / "c.yaml").write_text(text)
    return str(tmp_path / "c.yaml")


def run(capsys, *args: object) -> tuple[int, str, str]:
    code = cli.main(["data", *map(str, args)])
    return code, *capsys.readouterr()


def test_json_has_the_promised_keys_and_figures_that_add_up(config, capsys) -> None:
    code, out, err = run(capsys, config, "--json", "data.validation=0.2")
    found = json.loads(out)
    assert code == 0 and KEYS <= found.keys() and KEYS <= found["validation"].keys()
    assert found["rows"] == found["kept"] + sum(found["dropped"].values())
    assert found["kept"] + found["validation"]["kept"] == 60
    assert found["dropped"]["not_JSON"] == 1
    assert set(found["padding_waste"]) == {"pad", "bucket", "pack"}
    assert sum(found["histogram"]["counts"]) + sum(found["validation"]["histogram"]["counts"]) == 61
    assert set(found["share_kept"]) == {"1024", "2048", "4096", "8192", "16384", "32768"}
    assert "rows.jsonl:61: column 2" in err and "packing efficiency" in err


def test_shown_rows_mark_what_is_trained_turn_by_turn_and_steer_no_terminal(config, capsys, monkeypatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    code, out, _ = run(capsys, config, "--show", 2)
    assert code == 0 and "== rows.jsonl:1\n" in out and "== rows.jsonl:31\n" in out
    assert "<|turn>user\nadd 0<turn|>" in out
    assert "⟦assign y = a; // ␛[31m<turn|>⟧" in out and "\x1b" not in out
    assert re.search(r"-- turn 1: \d+ tokens, 0 trained", out)
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = run(capsys, config, "--show", 1)[1]
    assert f"{display.BOLD}{display.GREEN}assign y = a; // ␛[31m{display.RESET}" in coloured and "⟦" not in coloured


def test_the_page_has_its_pictures_and_rows(config, tmp_path, capsys) -> None:
    code, _, err = run(capsys, config, "--html", tmp_path / "out" / "page.html")
    text = (tmp_path / "out" / "page.html").read_text()
    assert code == 0 and "wrote" in err
    for words in ("Rows by their length in tokens", "Rows on packed sheets", "Tokens laid out, padding included",
                  "rows.jsonl:61: column 2", '<span class="trained special">&lt;turn|&gt;</span>'):  # fmt: skip
        assert words in text, words
    assert text.count("<svg") == 3 and "http://www.w3.org" in text
    assert not re.search(r'(src|href)="http', text)


def test_preference_pairs_are_counted_by_side(config, tmp_path, capsys) -> None:
    pairs = [{"prompt": "q", "chosen": f"good {i}", "rejected": "bad"} for i in range(5)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    code, out, _ = run(capsys, config, f"data.path={tmp_path}/p.jsonl", "--json")
    found = json.loads(out)
    assert code == 0 and found["kept"] == found["rejected"]["kept"] == 5
    assert found["target_tokens"] > found["rejected"]["target_tokens"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["data.path=none.jsonl"], "none.jsonl: no such file"),
        (["data.transform=nowhere:f"], "data.transform nowhere:f: importing nowhere failed: ModuleNotFoundError"),
        (["data.columns={reply: x}"], "data.columns gives reply, which no format reads"),
        (["data.strict=true"], "cannot be used; correct or remove them"),
        (["data.max_seq_len=2"], "none of the 62 rows is left to train on"),
        (["model.path=nowhere"], "nowhere"),
        (["--show", "-1"], "--show -1"),
    ],
)
def test_a_users_mistake_is_one_message(config, capsys, arguments: list[str], words: str) -> None:
    code, _, err = run(capsys, config, *arguments)
    assert code == 2 and words in err and "Traceback" not in err


def test_a_folder_in_place_of_a_page_is_refused_at_once(config, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(capsys, config, "--html", "/")
    assert "argument --html: / is a folder; name a file" in capsys.readouterr().err
