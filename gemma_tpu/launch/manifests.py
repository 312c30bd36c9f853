"""The files that SkyPilot and Kubernetes read: a job's task, its JobSet, the Kueue objects of a first queue."""

from typing import Any

import yaml

from gemma_tpu import config as configs
from gemma_tpu.hardware.clouds import region_of
from gemma_tpu.launch.launching import Job

_CONFIG, _WORK = "/config", "/work"


def skypilot(job: Job) -> str:
    """A managed job: its machine is created again when it is taken away, zone by zone, and the run goes on."""
    machine = job.machine
    task = {
        "name": job.request.name,
        "resources": {
            "accelerators": f"tpu-{machine.accelerator}",
            "accelerator_args": {"runtime_version": machine.runtime},
            "use_spot": job.spot,
            "job_recovery": {"max_restarts_on_errors": 0},
            "ordered": [{"infra": f"gcp/{region_of(zone)}/{zone}"} for zone in job.zones],
        },
        "secrets": {"HF_TOKEN": ""},  # given by its name, from the environment, where it is needed
        "file_mounts": {"~/gemma-tpu": "./gemma-tpu"},
        "setup": "bash ~/gemma-tpu/machine.sh prepare\n",
        "run": "bash ~/gemma-tpu/machine.sh run\n",
    }
    return _yaml(task)


def jobset(job: Job) -> str:
    """The config, and one Job with a pod for each machine of the slice; a failed pod restarts them all together."""
    name, namespace = job.request.name, job.namespace
    given = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{name}-config", "namespace": namespace},
             "data": {"config.yaml": configs.to_yaml(job.config)}}  # fmt: skip
    wrong_input = {"onExitCodes": {"containerName": "train", "operator": "In", "values": [2]}, "action": "FailJob"}
    work = {
        "parallelism": job.machine.hosts,
        "completions": job.machine.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [wrong_input]},  # exit code 2: trying again cannot help
        "template": {
            "metadata": {"annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}},
            "spec": _pod(job),
        },
    }
    spec = {
        "failurePolicy": {
            "maxRestarts": job.restarts,
            "rules": [{"name": "wrong-input", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        },
        "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": work}}],
    }
    labels = {"kueue.x-k8s.io/queue-name": job.queue}
    annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    whole = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "namespace": namespace, "labels": labels, "annotations": annotations},
        "spec": spec,
    }
    return f"{_yaml(given)}---\n{_yaml(whole)}"


def _pod(job: Job) -> dict[str, Any]:
    machine, name = job.machine, job.request.name
    token = {"secretKeyRef": {"name": f"{name}-hf", "key": "token", "optional": True}}
    chips = {"google.com/tpu": machine.chips_per_host}
    container = {
        "name": "train",
        "image": job.request.image,
        "command": ["gemma-tpu", "train", f"{_CONFIG}/config.yaml", "--mirror", job.mirror],
        "workingDir": _WORK,
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}, {"name": "HF_TOKEN", "valueFrom": token}],
        "ports": [{"containerPort": 8471}],  # the TPU runtimes of a slice's machines talk there
        "resources": {"requests": chips, "limits": chips},
        "volumeMounts": [
            {"name": "config", "mountPath": _CONFIG, "readOnly": True},
            {"name": "work", "mountPath": _WORK},
        ],
    }
    selector = {
        "cloud.google.com/gke-tpu-accelerator": machine.label,
        "cloud.google.com/gke-tpu-topology": machine.slice.topology,
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "nodeSelector": selector,
        "terminationGracePeriodSeconds": 120,  # a run that is asked to stop saves first
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": f"{name}-config"}}, {"name": "work", "emptyDir": {}}],
    }
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    return pod


def queue(job: Job) -> str:
    """A queue for a cluster that has none yet: as many chips as this job takes."""
    name, chips = job.queue, job.machine.slice.chips
    resource = {"name": "google.com/tpu", "nominalQuota": chips}
    flavor = {"name": f"{job.machine.label}-{job.machine.slice.topology}", "resources": [resource]}
    labels = {
        "cloud.google.com/gke-tpu-accelerator": job.machine.label,
        "cloud.google.com/gke-tpu-topology": job.machine.slice.topology,
    }
    version = "kueue.x-k8s.io/v1beta1"
    objects = [
        {"apiVersion": version, "kind": "ResourceFlavor", "metadata": {"name": flavor["name"]},
         "spec": {"nodeLabels": labels}},
        {"apiVersion": version, "kind": "ClusterQueue", "metadata": {"name": name},
         "spec": {"namespaceSelector": {},
                  "resourceGroups": [{"coveredResources": ["google.com/tpu"], "flavors": [flavor]}]}},
        {"apiVersion": version, "kind": "LocalQueue", "metadata": {"name": name, "namespace": job.namespace},
         "spec": {"clusterQueue": name}},
    ]  # fmt: skip
    return "---\n".join(map(_yaml, objects))


def dockerfile(job: Job) -> str:
    if job.source is None:
        return f"FROM python:3.12-slim\nRUN pip install --no-cache-dir '{job.request.package}'\n"
    return (
        "FROM python:3.12-slim\nADD source.tgz /source/\n"
        f"RUN pip install --no-cache-dir '/source[{job.extras}]' && rm -rf /source\n"
    )


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Plain, sort_keys=False, width=110)


class _Plain(yaml.SafeDumper):
    """Texts of several lines stand as they are, and nothing refers to anything else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Plain.add_representer(str, _text)
