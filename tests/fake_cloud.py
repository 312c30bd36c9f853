"""Stands in for gcloud, kubectl and sky on PATH: keeps machines in a file, records every call, fails as it is told.

The scenario is a JSON file that FAKE_CLOUD names: `bucket` (its location), `create` (zone -> what creating says, one
after the other; null: it works), `endings` (what becomes of training at each look: an exit code, "preempted", or
"dropped" for a connection that is lost), `queue` (states of a queued resource, one after the other).
"""

import fcntl
import json
import os
import re
import sys
from pathlib import Path

HOME = Path(os.environ["FAKE_CLOUD"])


def main() -> int:
    tool, words = Path(sys.argv[0]).name, sys.argv[1:]
    piped = "" if sys.stdin.isatty() else sys.stdin.read() if takes_stdin(tool, words) else ""
    with open(HOME / "calls.jsonl", "a") as calls:
        fcntl.flock(calls, fcntl.LOCK_EX)  # the machines of a slice are prepared side by side
        calls.write(json.dumps({"tool": tool, "argv": words, "stdin": piped}) + "\n")
        calls.flush()
        state = json.loads((HOME / "state.json").read_text())
        code = answer(tool, words, state)
        (HOME / "state.json").write_text(json.dumps(state))
    return code


def takes_stdin(tool: str, words: list[str]) -> bool:
    return tool == "kubectl" and any("=-" in word or "/dev/stdin" in word for word in words) or any(
        word.endswith("machine.sh start") for word in words
    )


def answer(tool: str, words: list[str], state: dict) -> int:
    line, zone = " ".join(words), option(words, "zone")
    if tool == "kubectl":
        return kubectl(line, state)
    if tool == "sky":
        return 0
    if line.startswith("storage buckets describe"):
        return say(state["bucket"]) if state.get("bucket") else wrong("ERROR: 404 gs://none not found")
    if "node-pools create" in line:
        return create(option(words, "node-locations"), state)
    if "node-pools describe" in line:
        return say("RUNNING") if state["machines"] else wrong("ERROR: code=404, message=Not found: pool.")
    if "artifacts docker images describe" in line:
        return wrong("ERROR: Image not found.")
    if re.search(r"(tpu-vm|queued-resources) create", line):
        return create(zone, state)
    if "delete" in line:
        state["machines"].pop(zone or next(iter(state["machines"]), ""), None)
        return 0
    if "describe" in line:
        return describe(zone, state)
    if "tpu-vm ssh" in line:
        return ssh(line, zone, state)
    return 0


def create(zone: str, state: dict) -> int:
    told = state.get("create", {}).get(zone, [])
    failure = told.pop(0) if told else None
    if failure:
        return wrong(failure)
    state["machines"][zone] = "READY"
    return 0


def describe(zone: str, state: dict) -> int:
    if state.get("broken"):
        return wrong("ERROR: (gcloud) UNAUTHENTICATED: log in again.")
    if zone not in state["machines"]:
        return wrong("ERROR: (gcloud) NOT_FOUND: the resource does not exist")
    if state.get("queue"):
        state["machines"][zone] = state["queue"].pop(0)
    return say(state["machines"][zone])


def ssh(line: str, zone: str, state: dict) -> int:
    if state["machines"].get(zone) not in ("READY", "ACTIVE"):
        return wrong("ERROR: the machine does not answer", 255)
    if "machine.sh running" in line:
        return 0 if state.get("running") else 1
    if "follow" in line:
        ending = state["endings"][0]
        if ending == "preempted":
            state["machines"][zone] = "PREEMPTED"
        if ending in ("preempted", "dropped"):
            state["endings"].pop(0)
            state["cut"] = ending == "dropped"
            return wrong("Connection closed", 255)
        return say("step 10 of 10, loss 0.5")
    if "exit" in line:
        if state.pop("cut", False):
            return 1
        return say(state["endings"].pop(0))
    return 0


def kubectl(line: str, state: dict) -> int:
    if "get jobset" in line:
        return say(state["endings"].pop(0))
    if "get localqueue" in line:
        return 1
    if "dry-run" in line:
        return say("kind: Secret")
    return 0


def option(words: list[str], name: str) -> str:
    return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), "")


def say(text: str) -> int:
    if text:
        print(text)
    return 0


def wrong(text: str, code: int = 1) -> int:
    print(text, file=sys.stderr)
    return code


sys.exit(main())
