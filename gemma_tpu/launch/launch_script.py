"""A job as one bash script that creates the machines, trains on them, follows them and deletes them.

It is bundled/launch/*.sh under a header of values, and brings its files along; what is printed is what `--run` runs.
No secret is in it: HF_TOKEN is read from the environment when it runs.
"""

import shlex
from collections.abc import Iterator

from gemma_tpu import assets
from gemma_tpu import config as configs
from gemma_tpu.errors import UserError
from gemma_tpu.launch import manifests
from gemma_tpu.launch.launching import Job

_SCRIPTS = {"skypilot": "skypilot.sh", "gke": "gke.sh"}  # the others: tpu_vm.sh


def script(job: Job, action: str) -> str:
    """A bash script that does `action`: run_it, logs or delete."""
    name = _SCRIPTS.get(job.request.engine, "tpu_vm.sh")
    parts = [_head(job), _values(job), *_files(job), _bundled("common.sh"), _bundled(name), f"{action}\n"]
    return "\n".join(part if part.endswith("\n") else f"{part}\n" for part in parts)


def _bundled(name: str) -> str:
    return assets.resolve(f"bundled:launch/{name}").read_text(encoding="utf-8")


def _head(job: Job) -> str:
    machine, engine = job.machine, job.request.engine
    lines = [f"{job.request.name}: gemma-tpu train on {machine.slice}, by {engine}", "", "Before it runs:"]
    lines += [f"  {note}" for note in job.notes]
    lines += ["", "Where its values come from:"]
    lines += [f"  {what}: {source}" for what, source in machine.sources.items()]
    return "#!/usr/bin/env bash\n" + "".join(f"# {line}".rstrip() + "\n" for line in lines) + "set -euo pipefail\n"


def _values(job: Job) -> str:
    request, machine = job.request, job.machine
    values = {
        "NAME": request.name, "PROJECT": request.project or "", "BUCKET": request.bucket, "MIRROR": job.mirror,
        "CHECKPOINTS": job.config.checkpoint.folder or "", "RUN_DIR": job.config.run_dir,
        "ACCELERATOR": machine.accelerator, "RUNTIME": machine.runtime or "", "HOSTS": str(machine.hosts),
        "SPOT": "1" if job.spot else "", "RESTARTS": str(job.restarts),
        "QUEUED": "1" if request.engine == "queued-resource" else "", "WAIT_HOURS": str(request.wait_hours or 24),
        "SERVICE_ACCOUNT": request.service_account or "", "SOURCE": str(job.source or ""),
        "PACKAGE": request.package or "", "EXTRAS": job.extras, "ANY_REGION": "1" if request.any_region else "",
        "YES": "1" if request.yes else "",
    }  # fmt: skip
    if request.engine == "gke":
        values |= {
            "CLUSTER": request.cluster or "", "LOCATION": job.location, "IMAGE": request.image or "",
            "MACHINE": machine.machine, "TOPOLOGY": machine.slice.topology, "QUEUE": job.queue,
            "NAMESPACE": job.namespace,
        }  # fmt: skip
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    quiet = "# shellcheck disable=SC2034,SC2016  # not every way needs every value, and none is expanded"
    return "\n".join([quiet, "{", *lines, f"ZONES=({' '.join(map(shlex.quote, job.zones))})", "}"])


def _files(job: Job) -> Iterator[str]:
    """Each file that the script brings along, as a function that prints it."""
    yield _printed("config", configs.to_yaml(job.config))
    yield _printed("machine", _bundled("machine.sh"))
    if job.request.engine == "skypilot":
        yield _printed("task", manifests.skypilot(job))
    if job.request.engine == "gke":
        yield _printed("jobset", manifests.jobset(job))
        yield _printed("queue", manifests.queue(job))
        yield _printed("dockerfile", manifests.dockerfile(job))


def _printed(name: str, text: str) -> str:
    mark = f"END_OF_{name.upper()}"
    if mark in text.splitlines():
        raise UserError(f"the config has a line {mark}, which ends it in the script; write it otherwise")
    return f"{name}() {{\n  cat <<'{mark}'\n{text.rstrip()}\n{mark}\n}}\n"
