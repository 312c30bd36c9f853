"""Files of rows: every kind gives the same records, streamed, each with a place a person can find it at."""

import csv
import gzip
import io
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tpu.data import records as module
from gemma_tpu.data.datafiles import DataFile, expand, is_here
from gemma_tpu.data.records import Fault, records
from gemma_tpu.errors import UserError

ROWS = [{"prompt": f"q{i} \n ü", "response": f"a{i}, \"x\""} for i in range(7)]


def read(path: Path | str) -> list:
    return [json.loads(raw) if isinstance(raw, bytes) else raw for file in expand(path) for _, raw in records(file)]


def write(folder: Path, name: str, text: str | bytes) -> Path:
    raw = text.encode() if isinstance(text, str) else text
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return folder / name


def csv_text(delimiter: str = ",") -> str:
    out = io.StringIO()
    table = csv.DictWriter(out, ["prompt", "response"], delimiter=delimiter)
    table.writeheader()
    table.writerows(ROWS)
    return out.getvalue()


LINES = "\n".join(map(json.dumps, ROWS)) + "\n"


@pytest.mark.parametrize(
    "name, text",
    [
        ("r.jsonl", LINES), ("r.jsonl.gz", LINES), ("r.json", LINES), ("r.json", json.dumps(ROWS)),
        ("r.json", json.dumps(ROWS, indent=2)), ("r.json", json.dumps({"data": ROWS})), ("r", LINES),
        ("r.json", json.dumps({"train": ROWS}, indent=1)), ("r.json.gz", json.dumps(ROWS)), ("r.csv", csv_text()),
        ("r.csv", "\ufeff" + csv_text()), ("r.tsv", csv_text("\t")), ("r.csv.gz", csv_text()),
    ],
)  # fmt: skip
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str, text: str) -> None:
    assert read(write(tmp_path, name, text)) == ROWS


def test_parquet_gives_the_same_records_without_its_nulls(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([*ROWS, {"prompt": "only"}])
    parquet.write_table(table, tmp_path / "r.parquet", row_group_size=2)
    assert read(tmp_path / "r.parquet") == [*ROWS, {"prompt": "only"}]
    broken = write(tmp_path, "b.parquet", b"PAR1 no PAR1")
    with pytest.raises(UserError, match="b.parquet: not a readable Parquet file"):
        read(broken)


def test_parquet_without_its_package_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"r.parquet: reading Parquet needs .* pip install 'gemma_tpu\[parquet\]'"):
        read(write(tmp_path, "r.parquet", b""))


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a.txt", "one\n\ntwo\n")) == [{"text": "one\n\ntwo\n"}]
    assert read(write(tmp_path, "b.md", b"x\xff")) == [Fault("not_UTF-8", "byte 1 is 0xff")]


def test_folders_and_patterns_are_their_data_files_in_order_of_name(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b.jsonl", "a.jsonl", "in/c.json", ".hidden.jsonl", "notes.log"):
        write(tmp_path, name, json.dumps([{"text": name}]) if name.endswith("json") else json.dumps({"text": name}))
    assert [row["text"] for row in read(tmp_path)] == ["a.jsonl", "b.jsonl", "in/c.json"]
    assert [row["text"] for row in read(tmp_path / "*.jsonl")] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        expand([tmp_path / "no.jsonl", tmp_path / "empty", tmp_path / "*.csv"])
    for words in ("no.jsonl: no such file", "empty: a folder without data files", "*.csv: no file fits the pattern"):
        assert words in str(caught.value)


def test_a_bucket_is_read_in_ranges_as_a_file_a_folder_or_a_pattern() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe({"/rows/a.jsonl": LINES.encode(), "/rows/b.jsonl.gz": gzip.compress(LINES.encode()), "/rows/x.log": b"no"})
    try:
        assert read("memory://rows/a.jsonl") == ROWS
        assert read("memory://rows/*.jsonl") == ROWS
        assert read("memory://rows") == ROWS + ROWS
        with pytest.raises(UserError, match="memory://rows/none.jsonl"):
            expand("memory://rows/none.jsonl")
        assert not is_here("memory://rows/a.jsonl")
    finally:
        fs.rm("/rows", recursive=True)


def test_a_parquet_file_of_a_bucket_is_read_too() -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), out)
    fs = fsspec.filesystem("memory")
    fs.pipe("/tables/r.parquet", out.getvalue())
    try:
        assert read("memory://tables/r.parquet") == ROWS
    finally:
        fs.rm("/tables", recursive=True)


def test_a_dataset_of_the_hub_comes_through_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load_dataset(path: str, **options: object) -> Iterator[dict]:
        asked.update(options, path=path)
        if options["split"] == "none":
            raise ValueError("Bad split: none")
        return iter([*ROWS, {"prompt": "p", "response": None}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read("hf://datasets/org/name@v1?split=test&name=main") == [*ROWS, {"prompt": "p"}]
    assert asked == {"path": "org/name", "name": "main", "split": "test", "revision": "v1", "streaming": True}
    with pytest.raises(UserError, match="hf://datasets/org/name.split=none: ValueError: Bad split"):
        read("hf://datasets/org/name?split=none")
    with pytest.raises(UserError, match="slice is unknown after the ?"):
        expand("hf://datasets/org/name?slice=1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'gemma_tpu\[datasets\]'"):
        read("hf://datasets/org/name")


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("r.json", "[1, 2", "not JSON after row 2"),
        ("r.json", '[{"a": 1} {"a": 2}]', "not JSON after row 1"),
        ("r.json", '{"a": \n', "r.json: not JSON"),
        ("r.json", b'[{"a": "\xff"}]', "after row 0 a byte is not UTF-8"),
        ("r.json", "[" * 100_000, "not JSON"),
        ("r.jsonl.gz", None, "r.jsonl.gz: cannot be read"),
    ],
)
def test_a_file_that_breaks_as_a_whole_is_named(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    path = tmp_path / name
    damaged = gzip.compress(LINES.encode())[:-12]
    path.write_bytes(text.encode() if isinstance(text, str) else text or damaged)
    with pytest.raises(UserError, match=words):
        read(path)


def test_a_broken_csv_row_is_a_fault_of_its_own_line(tmp_path: Path) -> None:
    path = write(tmp_path, "r.csv", b'prompt,response\n"a\nb",c\nx\n1,2,3\n\xff,y\nlast,one\n')
    (file,) = expand(path)
    assert list(records(file)) == [
        (2, {"prompt": "a\nb", "response": "c"}),
        (4, Fault("wrong_columns", "it has 1 cells less than the header")),
        (5, Fault("wrong_columns", "it has 1 more cells than the header")),
        (6, Fault("not_UTF-8", "a cell is not UTF-8")),
        (7, {"prompt": "last", "response": "one"}),
    ]


def test_a_cell_may_be_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    path = write(tmp_path, "r.csv", f"prompt,response\nq,{'a' * 200_000}\n")
    assert len(read(path)[0]["response"]) == 200_000


def test_a_long_array_is_streamed(tmp_path: Path) -> None:
    """After the first row only a block or two have been read of a file that is much longer."""
    path = write(tmp_path, "r.json", json.dumps([{"text": "x" * 1000}] * 20_000))
    taken = []

    class Counting(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            taken.append(size)
            return super().read(size)

    class Watched(DataFile):
        def open(self) -> Counting:
            return Counting(self.where)

    rows = records(Watched(str(path), path.name, "json", ""))
    assert next(rows) == (1, {"text": "x" * 1000})
    assert sum(taken) <= 3 * module.BLOCK < path.stat().st_size / 5
    rows.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=8) | st.integers(), max_size=3), max_size=6),
       st.integers(1, 9))  # fmt: skip
def test_an_array_is_read_the_same_in_blocks_of_any_size(tmp_path_factory, rows: list, block: int) -> None:
    path = tmp_path_factory.getbasetemp() / "blocks.json"
    path.write_text(json.dumps(rows, ensure_ascii=block % 2 == 0), encoding="utf-8", errors="replace")
    whole = json.loads(path.read_text())
    before, module.BLOCK = module.BLOCK, block
    try:
        (file,) = expand(path)
        assert [raw for _, raw in module._array(file)] == whole
    finally:
        module.BLOCK = before


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["jsonl", "json", "csv", "tsv", "txt"]), st.binary(max_size=80))
def test_no_file_raises_anything_but_a_user_error(tmp_path_factory, kind: str, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_bytes(raw)
    (file,) = expand(path)
    try:
        for line, record in records(file):
            assert line >= 1 and isinstance(record, bytes | dict | Fault)
    except UserError as error:
        str(error).encode(errors="replace")
