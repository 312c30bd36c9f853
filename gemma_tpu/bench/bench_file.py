"""The file of a measurement: what was asked, of whom, and every finished point; whole after every point.

A sweep that is run again into the same file goes on with the points that are missing, if it asks the same.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tpu.bench import vllm_result
from gemma_tpu.bench.doubts import OURS
from gemma_tpu.bench.points import Point
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.run.runs import write_text

FORMAT = "gemma-tpu bench 1"
# What must be the same for two points to stand in one file. The KV dtype is what the user says of the server.
SAME = ("endpoint", "arrivals", "seed", "temperature", "shared_prefix", "tokenizer", "data", "kv_dtype", "timeout",
        "warmup", "notes")  # fmt: skip
SAME_SERVER = ("url", "model", "root", "version")

Card = dict[str, Any]


@dataclass
class Results:
    """Everything that a file holds; `settings` and `server` as they were when it was begun."""

    path: Path | None
    settings: Card
    server: Card
    client: Card
    points: list[Card]

    @property
    def name(self) -> str:
        return "this run" if self.path is None else self.path.stem

    def find(self, point: Point) -> Card | None:
        """The point, if it was measured and anything came back."""
        key = (point.input, point.output, point.qps, point.prompts)
        for one in self.points:
            there = (one["input"], one["output"], float(one["qps"]), one["prompts"])
            if there == key and one["completed"]:
                return one
        return None

    def add(self, point: Point, card: Card) -> None:
        key = point.to_json()
        self.points = [one for one in self.points if {name: one[name] for name in key} != key] + [card]
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        whole = {"format": FORMAT, "server": self.server, "settings": self.settings, "client": self.client,
                 "points": self.points}  # fmt: skip
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(whole) + "\n")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror}") from None


def begin(path: Path, settings: Card, server: Card, client: Card) -> Results:
    """A new file (not yet written), or the one that is there if it asks the same of the same server."""
    made = Results(path, settings, server, client, [])
    if not path.exists():
        return made
    found = read(path)
    if found.settings.get("source") != OURS:
        raise UserError(f"--out {path}: is there and no result of this command; name another file")
    if not found.points:
        return made
    changed = [
        f"{name}: {there.get(name)!r} there, {now.get(name)!r} now"
        for there, now, names in ((found.settings, settings, SAME), (found.server, server, SAME_SERVER))
        for name in names if there.get(name) != now.get(name)
    ]  # fmt: skip
    if changed:
        raise UserError(
            f"--out {path} holds another measurement:\n  " + "\n  ".join(changed)
            + "\nname another file, or ask the same to go on with that one"
        )  # fmt: skip
    return found


def read(path: Path) -> Results:
    """Ours, or one of `vllm bench serve`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    found = vllm_result.objects(text, path)
    try:
        if len(found) == 1 and isinstance(found[0], dict) and found[0].get("format") == FORMAT:
            one = found[0]
            return Results(path, one["settings"], one["server"], one["client"], list(one["points"]))
        if found and all(map(vllm_result.is_one, found)):
            settings = {"source": "vllm bench serve", "endpoint": found[0].get("endpoint_type")}
            client = {"date": found[0].get("date")}
            points = [vllm_result.point(one) for one in found]
            return Results(path, settings, vllm_result.server(found[0]), client, points)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: a damaged result file ({error!r})") from None
    raise UserError(f"{path}: neither a result of this command nor one of `vllm bench serve --save-result`")
