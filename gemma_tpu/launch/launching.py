"""A config and a slice as one job: what must lie in the bucket, what the machine gets, what to know before it runs.

What a machine reads must lie where it can reach it, and what a run leaves must outlive the machine: both are held
against the config here, and everything that is wrong is said at once.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_tpu import assets
from gemma_tpu import config as configs
from gemma_tpu.errors import UserError
from gemma_tpu.gemma import sizes
from gemma_tpu.hardware import clouds
from gemma_tpu.hardware.clouds import Machine
from gemma_tpu.schema import MESH_AXES, Config

ENGINES = ("tpu-vm", "queued-resource", "spot", "skypilot", "gke")
_TPU_VMS = ("tpu-vm", "queued-resource", "spot")
# Options that mean something with some engines alone.
_OF = {"project": (*_TPU_VMS, "gke"), "service_account": _TPU_VMS, "wait_hours": ("queued-resource",),
       "restarts": ("queued-resource", "spot", "gke"),
       **dict.fromkeys(("cluster", "location", "image", "queue", "namespace"), ("gke",))}  # fmt: skip
_NAMES = {"location": "cluster-location"}


@dataclass(frozen=True)
class Request:
    """What the user asks for, as it stands on the command line."""

    engine: str
    machine: Machine
    bucket: str
    name: str
    project: str | None = None
    zones: tuple[str, ...] = ()  # in place of the table's
    spot: bool = False
    restarts: int | None = None
    wait_hours: int | None = None
    service_account: str | None = None
    package: str | None = None  # what pip installs; None: this checkout
    any_region: bool = False
    yes: bool = False
    cluster: str | None = None  # of GKE, and so the rest
    location: str | None = None
    image: str | None = None
    queue: str | None = None
    namespace: str | None = None


@dataclass(frozen=True)
class Job:
    """A request that holds together: the config as the machine gets it, and where what it leaves lies."""

    request: Request
    config: Config
    extras: str  # of the package: what its data and its trackers need there
    source: Path | None  # of the package: a checkout, or None where pip finds it
    notes: tuple[str, ...]

    @property
    def machine(self) -> Machine:
        return self.request.machine

    @property
    def spot(self) -> bool:
        return self.request.spot or self.request.engine == "spot"

    @property
    def zones(self) -> tuple[str, ...]:
        return self.request.zones or self.machine.zones

    @property
    def mirror(self) -> str:
        return f"{self.request.bucket}/{self.request.name}/run"

    @property
    def restarts(self) -> int:
        return self.request.restarts or 100

    @property
    def queue(self) -> str:
        return self.request.queue or "gemma-tpu"

    @property
    def namespace(self) -> str:
        return self.request.namespace or "default"

    @property
    def location(self) -> str:
        return self.request.location or clouds.region_of(self.zones[0])


def job_of(request: Request, config: Config) -> Job:
    source = _checkout() if request.package is None else None
    problems = [*_request_problems(request, source), *_config_problems(request, config)]
    if problems:
        raise UserError(f"{request.name} cannot be launched as it is:\n  " + "\n  ".join(problems))
    folder, cache = config.checkpoint.folder, config.train.compile_cache
    settled = replace(
        config,
        run_dir=f"runs/{request.name}",
        checkpoint=replace(config.checkpoint, folder=folder or f"{request.bucket}/{request.name}/checkpoints"),
        train=replace(config.train, compile_cache=cache if _far(cache) else f"{request.bucket}/compile_cache"),
    )
    changed = tuple(f"the machine gets {line.replace(' -> ', ', now ')}"
                    for line in configs.differences(config, settled))  # fmt: skip
    return Job(request, settled, ",".join(_extras(settled)), source, (*changed, *_notes(request, config)))


def _extras(config: Config) -> list[str]:
    found = {"tpu": True, "gcs": True}
    paths = [config.model.path, config.data.path, config.data.validation, config.checkpoint.folder]
    for path in map(str, paths):  # a list of paths reads like any of them
        found |= {"s3": True} if "s3://" in path else {}
        found |= {"parquet": True} if ".parquet" in path else {}
        found |= {"datasets": True} if "hf://datasets/" in path else {}
    return [*found, *config.log.trackers]


def _far(path: str | None) -> bool:
    return path is not None and "://" in path


def _checkout() -> Path | None:
    root = assets.PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "recipes").is_dir() else None


# --- what is wrong ---

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_BUCKET = re.compile(r"gs://[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9](/[^/\s]+)*")
_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z][a-z0-9]*")


def _request_problems(request: Request, source: Path | None) -> Iterator[str]:
    if not _NAME.fullmatch(request.name):
        yield (f"--name {request.name}: must be 1 to 40 of a-z, 0-9 and -, begin with a letter and not end with -")
    if not _BUCKET.fullmatch(request.bucket):
        yield f"--bucket {request.bucket}: must be gs://name or gs://name/folder, without a slash at the end"
    for zone in request.zones:
        if not _ZONE.fullmatch(zone):
            yield f"--zone {zone}: must be a zone like {request.machine.zones[0]}"
    engine, place = request.engine, request.machine.slice
    if engine != "gke" and request.machine.runtime is None:
        yield f"--with {engine}: {place.chip.name} is rented through GKE alone: --with gke"
    if engine == "tpu-vm" and request.spot:
        yield "--with tpu-vm --spot: take --with spot, which creates the machine again when it is taken away"
    for name, engines in _OF.items():
        if getattr(request, name) is not None and engine not in engines:
            option = _NAMES.get(name, name).replace("_", "-")
            yield f"--{option}: nothing that --with {engine} has; it is of {', '.join(engines)}"
    if engine == "queued-resource" and request.restarts is not None and not request.spot:
        yield "--restarts: of spot machines; give --spot too"
    if engine == "gke":
        for name in ("cluster", "image"):
            if getattr(request, name) is None:
                yield f"--{name} is missing: --with gke needs it"
    if request.package is None and source is None:
        yield ("--package is missing: this is no checkout that could be sent to the machine; say what pip is to "
               "install, e.g. --package 'gemma_tpu[tpu,gcs] @ git+https://HOST/REPOSITORY@TAG'")


def _config_problems(request: Request, config: Config) -> Iterator[str]:
    bucket = request.bucket
    path = config.model.path
    if not _far(path):
        last = path.rstrip("/").rpartition("/")[2]
        known = [sizes.hub_id(size) for size in sizes.known()]
        hub = next((one for one in known if last.lower() == one.rpartition("/")[2].lower()), path)
        yield (f"model.path {path} is on this machine, and the slice streams it from a bucket: "
               f"gemma-tpu stage {hub} {bucket}/models/{last}, then model.path={bucket}/models/{last}")
    for key, value in (("data.path", config.data.path), ("data.validation", config.data.validation)):
        for one in (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ():
            if not _far(one) and not one.startswith("bundled:"):
                there = f"{bucket}/{one.lstrip('./~')}"
                yield f"{key} {one} is on this machine: gcloud storage cp {one} {there}, then {key}={there}"
    for key, value in (("lora.init_from", config.lora.init_from), ("checkpoint.folder", config.checkpoint.folder)):
        if value is not None and not _far(value):
            yield f"{key} {value} is on this machine: put it into the bucket, or leave the key out"
    if _far(config.run_dir):
        yield (f"run_dir {config.run_dir}: the run folder is on the machine and copied to {bucket}/{request.name}/run; "
               "leave it as a plain folder")
    if not (assets.PACKAGE.parent / "recipes" / config.recipe).is_file() and not (
        assets.PACKAGE / "recipes" / config.recipe
    ).is_file():
        yield f"recipe {config.recipe} is a file of this machine; launch sends the shipped recipes alone"
    yield from _mesh_problems(request.machine, config)


def _mesh_problems(machine: Machine, config: Config) -> Iterator[str]:
    mesh, devices = config.mesh, machine.slice.devices
    if mesh.cpu_devices:
        yield f"mesh.cpu_devices {mesh.cpu_devices} runs on the CPU of a TPU machine: leave it out"
    product = math.prod(getattr(mesh, axis) for axis in MESH_AXES)
    if not mesh.auto and not mesh.cpu_devices and product != devices:
        told = " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in MESH_AXES if getattr(mesh, axis) > 1) or "1"
        yield (f"mesh ({told} = {product}) must take the {devices} devices of {machine.slice}: set mesh=auto, or the "
               f"axes; gemma-tpu plan CONFIG --on {machine.slice.name} shows which hold the model")


def _notes(request: Request, config: Config) -> Iterator[str]:
    """What must be so before the script runs, and what it will mean."""
    machine, place = request.machine, request.machine.slice
    if _far(config.model.path) and not config.model.path.startswith("hf://"):
        yield f"{config.model.path} holds the checkpoint (gemma-tpu stage), and is streamed from there: no disk"
    if any(str(path).startswith("hf://") for path in (config.model.path, config.data.path, config.data.validation)):
        yield "HF_TOKEN is in the environment of this shell, if what is read from the hub is gated"
    yield f"the machine's service account may read and write {request.bucket} (roles/storage.objectAdmin)"
    yield f"quota for {place.chip.name} in the zone, of the kind that is asked for (on demand or preemptible)"
    if request.engine == "gke":
        yield (f"the cluster {request.cluster} runs JobSet 0.6 or later and Kueue, and its service account default may "
               "write the bucket (Workload Identity)")
    if machine.hosts > 1:
        yield f"{place.name} is {machine.hosts} machines of {machine.chips_per_host} chips; each runs the same command"
    price = place.spot_usd if request.spot or request.engine == "spot" else place.usd
    if price is not None:
        told = f"${price:.2f}" if isinstance(price, float) else f"${price[0]:.2f} to ${price[1]:.2f}"
        yield f"{place.name} costs about {told} an hour ({place.chip.sources['prices']})"
    elif place.chip.kind == "tpu":
        yield f"no public price of {place.name} is known"
