"""`gemma-tpu launch`: machines up, the run on them, machines down; printed as a script, or done."""

import argparse
import re
from pathlib import Path
from typing import Any

from gemma_tpu import config
from gemma_tpu.commands.arguments import positive
from gemma_tpu.hardware import chips, clouds
from gemma_tpu.launch import launch_script, launching, scripts
from gemma_tpu.run.metrics import say

Result = dict[str, Any]
ABOUT = "create a slice, train on it, follow it and delete it: the script for that, or the deed"
EXAMPLE = "gemma-tpu launch configs/mine.yaml --on v6e-8 --with spot --bucket gs://mine --run"


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("config", metavar="CONFIG", help="a YAML file, yours or a shipped one by its name")
    one.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="e.g. model.path=gs://mine/model")
    one.add_argument("--on", metavar="SLICE", required=True, help="e.g. v6e-8")
    one.add_argument("--with", dest="engine", choices=launching.ENGINES, required=True,
                     help="spot: created again whenever it is taken away")  # fmt: skip
    one.add_argument("--bucket", metavar="gs://...", required=True, help="for checkpoints, logs and compiled programs")
    one.add_argument("--name", help="of the machine and of its folder in the bucket; by default the config's")
    one.add_argument("--project", help="of the cloud; by default gcloud's own")
    one.add_argument("--zone", metavar="ZONE", action="append", default=[],
                     help="tried in turn; may be repeated; by default those of the slice's kind")  # fmt: skip
    one.add_argument("--any-region", action="store_true", help="also zones that are not in the bucket's region")
    one.add_argument("--spot", action="store_true", help="with queued-resource, skypilot or gke: on spot machines")
    one.add_argument("--restarts", metavar="N", type=positive, help="how often a spot machine is asked for again (100)")
    one.add_argument("--wait-hours", metavar="N", type=positive, help="of a queued resource, in each zone (24)")
    one.add_argument("--service-account", metavar="EMAIL", help="of the machine; by default the project's")
    one.add_argument("--package", metavar="SPEC", help="what pip installs there; by default this checkout")
    gke = one.add_argument_group("with gke")
    gke.add_argument("--cluster", metavar="NAME", help="a cluster that runs JobSet and Kueue")
    gke.add_argument("--cluster-location", metavar="REGION", help="by default the first zone's region")
    gke.add_argument("--image", metavar="IMAGE", help="built if it is not there: REGION-docker.pkg.dev/…")
    gke.add_argument("--queue", metavar="NAME", help="Kueue's local queue (gemma-tpu)")
    gke.add_argument("--namespace", metavar="NAME", help="(default)")
    what = one.add_mutually_exclusive_group()
    what.add_argument("--logs", action="store_true", help="in place of it all: follow a run that goes on")
    what.add_argument("--delete", action="store_true", help="in place of it all: delete the machine, after asking")
    one.add_argument("--run", action="store_true", help="do it; without this the script for it is printed")
    one.add_argument("--yes", action="store_true", help="delete without asking")


def run(args: argparse.Namespace) -> tuple[Result, int]:
    job = launching.job_of(_request(args), config.load(args.config, args.overrides))
    action = "logs" if args.logs else "delete" if args.delete else "run_it"
    text = launch_script.script(job, action)
    result = {
        "name": job.request.name, "slice": job.machine.slice.name, "with": job.request.engine, "action": action,
        "zones": list(job.zones), "hosts": job.machine.hosts, "notes": list(job.notes), "mirror": job.mirror,
        "checkpoints": job.config.checkpoint.folder, "script": text,
        "sources": {what: str(source) for what, source in job.machine.sources.items()},
    }  # fmt: skip
    if not args.run:
        if not args.json:
            print(text, end="")
        say("printed, not done: add --run, or keep it as a file and run that with bash")
        return result, 0
    for note in job.notes:
        say(f"note: {note}")
    return result, scripts.run(text)


def _request(args: argparse.Namespace) -> launching.Request:
    place = chips.find(args.on)
    name = args.name or re.sub(r"[^a-z0-9]+", "-", Path(args.config).stem.lower()).strip("-")[:40].rstrip("-")
    return launching.Request(
        engine=args.engine, machine=clouds.machine_of(place), bucket=args.bucket.rstrip("/"), name=name,
        project=args.project, zones=tuple(args.zone), spot=args.spot, restarts=args.restarts,
        wait_hours=args.wait_hours, service_account=args.service_account, package=args.package,
        any_region=args.any_region, yes=args.yes, cluster=args.cluster, location=args.cluster_location,
        image=args.image, queue=args.queue, namespace=args.namespace,
    )  # fmt: skip
