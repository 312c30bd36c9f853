"""Writes docs/lm_eval/general.jsonl: what the tiny base learned before any LoRA, as questions with four answers.

One right module of the base's own training data, and three in which one thing is wrong. A tuned model that picks the
right one less often has forgotten.

    python scripts/make_forgetting.py docs/lm_eval/general.jsonl
"""

import json
import random
import re
import sys
from pathlib import Path

from gemma_tpu import assets

QUESTIONS = 60
SWAPS = {"posedge": "negedge", "negedge": "posedge", "&": "|", "|": "&", "+": "-", "-": "+", "?": "&"}
EDITABLE = re.compile(r"posedge|negedge|(?<= )[&|+?-](?= )|\b\d+\b")


def wrong(answer: str, rng: random.Random) -> list[str]:
    """Three different copies with one token changed each; fewer where there is not enough to change."""
    _, _, body = answer.partition(";")
    head, places = answer[: len(answer) - len(body)], list(EDITABLE.finditer(body))
    found: list[str] = []
    for place in rng.sample(places, len(places)):
        new = SWAPS.get(place[0]) or str(int(place[0]) + 1)
        found.append(head + body[: place.start()] + new + body[place.end() :])
    return found[:3]


def main(out: Path) -> None:
    rng = random.Random(0)
    rows = [json.loads(line)["messages"] for line in assets.resolve("bundled:tiny_verilog/base.jsonl").open()]
    lines: list[str] = []
    for question, answer in rng.sample(rows, len(rows)):
        others = wrong(answer["content"], rng)
        if len(set(others)) == 3 and len(lines) < QUESTIONS:
            choices, label = others, rng.randrange(4)
            choices.insert(label, answer["content"])
            lines.append(json.dumps({"question": question["content"], "choices": choices, "label": label}))
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{out}: {len(lines)} questions")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
