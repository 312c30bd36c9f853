"""Machines up: what is printed is valid, and what it does when zones are full, machines vanish and somebody says no."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from gemma_tpu import cli, config
from gemma_tpu.errors import UserError
from gemma_tpu.hardware import chips, clouds
from gemma_tpu.launch import launch_script, launching

TOKEN = "hf_a-token-that-must-not-be-seen"
ROOT = Path(__file__).parent.parent
FULL = "ERROR: (gcloud.compute.tpus.tpu-vm.create) There is no more capacity in the zone"
QUOTA = "ERROR: Quota limit 'TPUV6EPreemptiblePerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0"
SETTLED = ["model.path=gs://mine/models/gemma-4-31B-it", "data.path=gs://mine/codev.jsonl", "mesh=auto"]
GKE = {"cluster": "tpus", "image": "us-docker.pkg.dev/project/images/gemma-tpu:1"}


def request(engine="spot", on="v6e-8", **more) -> launching.Request:
    extra = GKE if engine == "gke" else {}
    machine = clouds.machine_of(chips.find(on))
    return launching.Request(engine=engine, machine=machine, bucket="gs://mine", name="run-1", **(extra | more))


def job(engine="spot", on="v6e-8", overrides=(), **more) -> launching.Job:
    chosen = config.load("gemma4_31b_v5p8_fast.yaml", [*SETTLED, *overrides])
    return launching.job_of(request(engine, on, **more), chosen)


@pytest.fixture
def cloud(tmp_path):
    """cloud(scenario, job, action) -> (exit code, stderr, the calls): the script against a cloud that is not there."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("gcloud", "kubectl", "sky"):
        body = (ROOT / "tests/fake_cloud.py").read_text()
        (tools / tool).write_text(f"#!{sys.executable} -SE\n{body}")
        (tools / tool).chmod(0o755)

    def call(job, action="run_it", answer="", machines=None, **scenario):
        scenario = {"bucket": "US-EAST5", "machines": machines or {}, "endings": ["0"]} | scenario
        (tmp_path / "state.json").write_text(json.dumps(scenario))
        (tmp_path / "calls.jsonl").write_text("")
        path = tmp_path / "launch.sh"
        path.write_text(launch_script.script(job, action))
        env = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path), "FAKE_CLOUD": str(tmp_path), "HF_TOKEN": TOKEN,
               "GEMMA_TPU_PAUSE": "0", "GEMMA_TPU_GRACE": "0", "TMPDIR": str(tmp_path)}  # fmt: skip
        done = subprocess.run(["bash", path], input=answer, capture_output=True, text=True, env=env, timeout=60)
        calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
        seen = [*done.stderr.splitlines(), *(word for one in calls for word in one["argv"])]
        assert not [text for text in seen if TOKEN in text], "the token is in a log or on a command line"
        return done.returncode, done.stderr, calls

    return call


def lines(calls, *words) -> list[str]:
    every = [" ".join(one["argv"]) for one in calls]
    return [line for line in every if all(word in line for word in words)]


# --- paths of a run ---


def test_a_full_zone_is_followed_by_the_next(cloud):
    code, err, calls = cloud(job("tpu-vm"), create={"us-east5-a": [FULL]})
    assert code == 0, err
    made = lines(calls, "tpu-vm create")
    assert [re.search(r"--zone=(\S+)", line)[1] for line in made] == ["us-east5-a", "us-east5-b"]
    assert "--accelerator-type=v6e-8" in made[0] and "--version=v2-alpha-tpuv6e" in made[0]
    assert "--spot" not in made[0]
    assert "no capacity in us-east5-a" in err and "run-1 is ready in us-east5-b" in err
    assert not lines(calls, "delete"), "nobody has said that it may be deleted"
    assert "costs until it is deleted" in err and "--delete" in err


def test_no_room_anywhere_ends_an_on_demand_run_and_says_what_waits(cloud):
    code, err, calls = cloud(job("tpu-vm"), create={"us-east5-a": [FULL], "us-east5-b": [FULL]})
    assert code == 1 and "--with queued-resource, which waits" in err
    assert len(lines(calls, "tpu-vm create")) == 2


def test_missing_quota_stops_at_once(cloud):
    code, err, calls = cloud(job("spot"), create={"us-east5-a": [QUOTA]})
    assert code == 1 and len(lines(calls, "tpu-vm create")) == 1
    assert "no quota for v6e-8 on spot in us-east5-a, and waiting does not help" in err


def test_an_error_of_another_kind_stops_with_what_the_cloud_says(cloud):
    code, err, calls = cloud(job("spot"), create={"us-east5-a": ["ERROR: PERMISSION_DENIED: tpu.nodes.create"]})
    assert code == 1 and len(lines(calls, "tpu-vm create")) == 1
    assert "PERMISSION_DENIED" in err and "what gcloud says stands above" in err


def test_a_spot_machine_that_is_taken_away_is_made_again_and_the_run_goes_on(cloud):
    code, err, calls = cloud(job("spot"), endings=["preempted", "preempted", "0"])
    assert code == 0, err
    words = ["tpu-vm create", "scp", "machine.sh prepare", "machine.sh start", "follow", "tpu-vm delete"]
    order = [word for one in calls for word in words if word in " ".join(one["argv"])]
    assert order == words * 2 + words[:5]
    assert "--spot" in lines(calls, "tpu-vm create")[0]
    assert "restart 2 of at most 100, from the checkpoints in gs://mine/run-1/checkpoints" in err
    starts = [one for one in calls if "machine.sh start" in " ".join(one["argv"])]
    assert [one["stdin"] for one in starts] == [f"{TOKEN}\n"] * 3


def test_restarts_end_at_their_limit(cloud):
    code, err, calls = cloud(job("spot", restarts=2), endings=["preempted"] * 5)
    assert code == 1 and "given up after 2 restarts" in err
    assert len(lines(calls, "tpu-vm create")) == 3


def test_spot_without_room_asks_again(cloud):
    code, err, calls = cloud(job("spot"), create={"us-east5-a": [FULL, FULL], "us-east5-b": [FULL]})
    assert code == 0, err
    assert [re.search(r"--zone=(\S+)", line)[1] for line in lines(calls, "tpu-vm create")] == [
        "us-east5-a", "us-east5-b", "us-east5-a", "us-east5-b"]  # fmt: skip


def test_a_lost_connection_is_not_a_lost_machine(cloud):
    code, err, calls = cloud(job("spot"), endings=["dropped", "0"])
    assert code == 0, err
    assert len(lines(calls, "tpu-vm create")) == 1 and len(lines(calls, "machine.sh start")) == 1
    assert [line.split("--command=")[1].split()[-1] for line in lines(calls, "follow")] == ["+1", "20"]


@pytest.mark.parametrize("ended, code", [("2", 2), ("137", 1)])
def test_a_run_that_fails_is_not_tried_again(cloud, ended, code):
    found, err, calls = cloud(job("spot"), endings=[ended])
    assert found == code and len(lines(calls, "tpu-vm create")) == 1
    assert f"training ended with exit code {ended}" in err and "still there in us-east5-a, and costs" in err


def test_a_machine_that_is_there_is_used_again(cloud):
    code, err, calls = cloud(job("tpu-vm"), machines={"us-east5-b": "READY"})
    assert code == 0 and not lines(calls, "tpu-vm create") and lines(calls, "machine.sh start", "us-east5-b")


def test_a_run_that_goes_on_is_followed_and_nothing_under_it_is_replaced(cloud):
    code, err, calls = cloud(job("tpu-vm"), machines={"us-east5-a": "READY"}, running=True)
    assert code == 0 and "training goes on there already" in err
    assert lines(calls, "follow") and not lines(calls, "scp") and not lines(calls, "machine.sh start")


def test_whether_it_is_there_must_be_known(cloud):
    code, err, calls = cloud(job("tpu-vm"), broken=True)
    assert code == 1 and "UNAUTHENTICATED" in err and not lines(calls, "create")
    code, err, calls = cloud(job("tpu-vm"), "delete", answer="y\n", broken=True)
    assert code == 1 and "nothing to delete" not in err


def test_the_queue_is_waited_for_and_a_request_that_failed_goes_to_the_next_zone(cloud):
    states = ["WAITING_FOR_RESOURCES", "FAILED", "PROVISIONING", "ACTIVE"]
    code, err, calls = cloud(job("queued-resource"), queue=states)
    assert code == 0, err
    made = lines(calls, "queued-resources create")
    assert [re.search(r"--zone=(\S+)", line)[1] for line in made] == ["us-east5-a", "us-east5-b"]
    assert "--node-id=run-1" in made[0] and "--runtime-version=v2-alpha-tpuv6e" in made[0]
    assert "--valid-until-duration=24h" in made[0]
    assert lines(calls, "queued-resources delete", "--force", "us-east5-a")


def test_each_machine_of_a_slice_gets_the_package_and_the_token_by_itself(cloud):
    code, err, calls = cloud(job("tpu-vm", "v5p-16"))
    assert code == 0, err
    assert all("--worker=all" in line for line in lines(calls, "scp") + lines(calls, "machine.sh prepare"))
    starts = sorted(lines(calls, "machine.sh start"))
    assert [re.search(r"--worker=(\S+)", line)[1] for line in starts] == ["0", "1"]


# --- the bucket's region ---


def test_zones_outside_the_buckets_region_are_left_out(cloud):
    code, err, calls = cloud(job("tpu-vm"), bucket="EUROPE-WEST4")
    assert code == 0 and "europe-west4-a" in lines(calls, "tpu-vm create")[0]
    assert "left out, for gs://mine is in europe-west4: us-east5-a" in err


@pytest.mark.parametrize("where, zone", [("US", "us-east5-a"), ("EU", "europe-west4-a"), ("ASIA", "asia-northeast1-b")])
def test_a_bucket_of_a_continent_is_near_its_zones(cloud, where, zone):
    code, err, calls = cloud(job("tpu-vm"), bucket=where)
    assert code == 0 and f"--zone={zone}" in lines(calls, "tpu-vm create")[0]


def test_a_bucket_that_is_near_no_zone_is_refused_before_anything_is_made(cloud):
    code, err, calls = cloud(job("tpu-vm"), bucket="AFRICA-SOUTH1")
    assert code == 2 and "none of the zones is" in err and not lines(calls, "create")
    code, err, calls = cloud(job("tpu-vm", any_region=True), bucket="AFRICA-SOUTH1")
    assert code == 0 and "across regions, slowly and at a price" in err


def test_a_bucket_that_is_not_there_is_said_with_how_to_make_it(cloud):
    code, err, calls = cloud(job("tpu-vm"), bucket=None)
    assert code == 2 and "gcloud storage buckets create gs://mine --location=us-east5" in err


# --- taking down ---


@pytest.mark.parametrize("engine, answer", [("tpu-vm", "n\n"), ("tpu-vm", ""), ("queued-resource", "maybe\n"),
                                            ("skypilot", "n\n"), ("gke", "n\n")])  # fmt: skip
def test_deleting_asks_and_only_yes_is_yes(cloud, engine, answer):
    machines = {"us-east5-a": "ACTIVE"}
    code, err, calls = cloud(job(engine), "delete", answer=answer, machines=machines)
    assert code == 1 and "[y/N]" in err and "goes on costing" in err
    assert not lines(calls, "delete") and not lines(calls, "cancel")


@pytest.mark.parametrize("engine, deleted", [("tpu-vm", "tpu-vm delete run-1 --zone=us-east5-b --quiet"),
                                             ("queued-resource", "queued-resources delete run-1 --zone=us-east5-b"),
                                             ("skypilot", "jobs cancel --name run-1 --yes"),
                                             ("gke", "node-pools delete run-1")])  # fmt: skip
def test_yes_deletes(cloud, engine, deleted):
    code, err, calls = cloud(job(engine), "delete", answer="y\n", machines={"us-east5-b": "READY"})
    assert code == 0 and lines(calls, deleted), err


def test_there_may_be_nothing_to_delete(cloud):
    code, err, calls = cloud(job("tpu-vm"), "delete")
    assert code == 0 and "nothing to delete" in err and "[y/N]" not in err


def test_the_log_can_be_followed_later(cloud):
    code, err, calls = cloud(job("spot"), "logs", machines={"us-east5-b": "READY"})
    assert code == 0 and "exit code 0" in err and not lines(calls, "create")
    code, err, calls = cloud(job("spot"), "logs")
    assert code == 2 and "there is no run-1 in" in err


# --- SkyPilot and GKE ---


def test_skypilot_is_given_the_task_and_the_token_by_its_name(cloud):
    chosen = job("skypilot", zones=("us-east5-a", "us-east5-b"), spot=True)
    code, err, calls = cloud(chosen)
    assert code == 0, err
    assert lines(calls, "jobs launch --name run-1 --secret HF_TOKEN task.yaml")
    code, err, calls = cloud(job("skypilot"))
    assert code == 2 and "these zones are not" in err and not lines(calls, "jobs launch")


def test_gke_makes_the_pool_the_image_the_secret_and_the_jobset(cloud):
    chosen = job("gke", "v6e-16", spot=True, zones=("us-east5-a", "us-east5-b"))
    code, err, calls = cloud(chosen, create={"us-east5-a": [FULL]}, endings=["", "Completed"])
    assert code == 0, err
    pools = lines(calls, "node-pools create")
    assert len(pools) == 2 and "--node-locations=us-east5-b" in pools[1]
    assert {"--machine-type=ct6e-standard-4t", "--num-nodes=4", "--tpu-topology=4x4", "--spot"} <= {*pools[1].split()}
    assert lines(calls, "builds submit", f"--tag={GKE['image']}")
    piped = [one for one in calls if one["tool"] == "kubectl" and one["stdin"]]
    assert piped[0]["stdin"] == TOKEN and "--from-file=token=/dev/stdin" in piped[0]["argv"]
    kinds = [tree["kind"] for one in piped[1:] for tree in yaml.safe_load_all(one["stdin"])]
    assert kinds == ["Secret", "ResourceFlavor", "ClusterQueue", "LocalQueue", "ConfigMap", "JobSet"]
    code, err, calls = cloud(chosen, endings=["Failed"])
    assert code == 1 and "the JobSet run-1 is Failed" in err


# Keys of a task and of its resources, from SkyPilot 0.14.1's sky/utils/schemas.py (additionalProperties: False).
TASK = {"name", "workdir", "num_nodes", "resources", "file_mounts", "setup", "run", "envs", "secrets", "config"}
RESOURCES = {"cloud", "region", "zone", "infra", "cpus", "memory", "accelerators", "accelerator_args", "use_spot",
             "job_recovery", "disk_size", "any_of", "ordered", "image_id", "labels"}  # fmt: skip


@pytest.mark.parametrize("on", ["v5e-8", "v5p-8", "v5p-16", "v6e-8", "v6e-16"])
def test_the_skypilot_task_has_the_form_that_skypilot_wants(on):
    chosen = job("skypilot", on, spot=True)
    task = yaml.safe_load(printed(launch_script.script(chosen, "run_it"), "task"))
    assert set(task) <= TASK and set(task["resources"]) <= RESOURCES
    machine = chosen.machine
    assert task["resources"]["accelerators"] == f"tpu-{machine.accelerator}"
    assert task["resources"]["accelerator_args"] == {"runtime_version": machine.runtime}
    assert task["resources"]["use_spot"] is True and task["secrets"] == {"HF_TOKEN": ""}
    for one in task["resources"]["ordered"]:
        assert re.fullmatch(r"gcp/([a-z]+-[a-z]+\d)/\1-[a-z]", one["infra"])


@pytest.mark.parametrize("on, hosts, per_host, machine", [
    ("v5e-1", 1, 1, "ct5lp-hightpu-1t"), ("v5e-16", 4, 4, "ct5lp-hightpu-4t"), ("v5p-8", 1, 4, "ct5p-hightpu-4t"),
    ("v5p-16", 2, 4, "ct5p-hightpu-4t"), ("v6e-8", 1, 8, "ct6e-standard-8t"), ("v6e-32", 8, 4, "ct6e-standard-4t"),
    ("tpu7x-16", 2, 4, "tpu7x-standard-4t"),
])  # fmt: skip
def test_the_jobset_asks_for_the_slices_machines(on, hosts, per_host, machine):
    chosen = job("gke", on, spot=True)
    text = launch_script.script(chosen, "run_it")
    given, jobset = yaml.safe_load_all(printed(text, "jobset"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gemma-tpu"}
    (replicated,) = jobset["spec"]["replicatedJobs"]
    work = replicated["template"]["spec"]
    assert (work["parallelism"], work["completions"], work["completionMode"]) == (hosts, hosts, "Indexed")
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert {"name", "action"} <= set(rule)  # JobSet 0.12's schema requires both
    pod = work["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": per_host}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == chosen.machine.slice.topology
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == chosen.machine.label
    assert pod["restartPolicy"] == "Never" and pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    mounted = {one["name"] for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in pod["volumes"]} and chosen.machine.machine == machine
    assert config.from_dict(yaml.safe_load(given["data"]["config.yaml"])) == chosen.config
    flavor, cluster, local = yaml.safe_load_all(printed(text, "queue"))
    (resources,) = cluster["spec"]["resourceGroups"]
    assert resources["flavors"][0]["name"] == flavor["metadata"]["name"]
    assert resources["flavors"][0]["resources"] == [{"name": "google.com/tpu", "nominalQuota": hosts * per_host}]
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]


def printed(text: str, name: str) -> str:
    mark = f"END_OF_{name.upper()}"
    return re.search(rf"^{name}\(\) {{\n  cat <<'{mark}'\n(.*?)^{mark}$", text, re.S | re.M)[1]


# --- the scripts as text ---


@pytest.mark.parametrize("engine", launching.ENGINES)
def test_every_script_is_bash_without_a_warning_and_without_a_secret(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    odd = "data.path=gs://mine/a 'quoted' $(name).jsonl"
    for action in ("run_it", "logs", "delete"):
        text = launch_script.script(job(engine, overrides=[odd]), action)
        path = tmp_path / "launch.sh"
        path.write_text(text)
        assert TOKEN not in text and text.endswith(f"{action}\n")
        assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
        if shutil.which("shellcheck") and action == "run_it":  # the others differ in their last word
            found = subprocess.run(["shellcheck", path], capture_output=True, text=True)
            assert found.returncode == 0, found.stdout
        assert config.from_dict(yaml.safe_load(printed(text, "config"))).data.path == odd.partition("=")[2]


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud, whose flags are compared with, is not installed")
def test_gcloud_knows_every_command_and_flag(cloud):
    tree = gcloud_tree()
    calls = []
    runs = [(job("tpu-vm", service_account="a@b"), {}), (job("spot"), {"endings": ["preempted", "0"]}),
            (job("queued-resource", spot=True), {"queue": ["FAILED", "ACTIVE"]}),
            (job("gke", "v6e-16", spot=True), {"create": {"us-east5-a": [FULL]}, "endings": ["Completed"]})]
    for one, scenario in runs:
        calls += cloud(one, **scenario)[2]
        calls += cloud(one, "delete", answer="y\n", machines={"us-east5-a": "READY"})[2]
    checked = set()
    for one in calls:
        if one["tool"] != "gcloud":
            continue
        node, words = tree, list(one["argv"])
        while words and words[0] in node.get("commands", {}):
            node = node["commands"][words.pop(0)]
        assert "commands" not in node or not node["commands"], f"no such command: {one['argv']}"
        known = {*node["flags"], *tree["flags"], "--version", "--tag"}  # --version stands for gcloud's own there
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= known, f"{one['argv']}: {flags - known}"
        checked |= flags
    assert len(checked) > 15


def gcloud_tree() -> dict:
    """gcloud's commands and flags, from the file that its shell completion reads."""
    root = Path(shutil.which("gcloud")).resolve().parent.parent
    file = root / "data/cli/gcloud_completions.py"
    if not file.is_file():
        pytest.skip("this gcloud has no table of its flags")
    spec = importlib.util.spec_from_file_location("gcloud_completions", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.STATIC_COMPLETION_CLI_TREE


# --- what runs on the machine ---


@pytest.fixture
def machine(tmp_path):
    """machine(command, stdin) -> the finished process: machine.sh with a uv and a gemma-tpu that only say things."""
    here, home = tmp_path / "gemma-tpu", tmp_path / "home"
    tools = home / ".local/bin"
    tools.mkdir(parents=True)
    here.mkdir()
    chosen = job("spot")
    (here / "machine.sh").write_text(printed(launch_script.script(chosen, "run_it"), "machine"))
    (here / "settings.sh").write_text(f"PACKAGE=''\nEXTRAS=tpu,gcs\nMIRROR={chosen.mirror}\n")
    (here / "config.yaml").write_text("")
    source = tmp_path / "source"
    source.mkdir()
    (source / "pyproject.toml").write_text("")
    with tarfile.open(here / "source.tgz", "w:gz") as tar:
        tar.add(source / "pyproject.toml", "pyproject.toml")
    trainer = f"""#!/bin/sh
echo "args $*, unbuffered $PYTHONUNBUFFERED, token ${{HF_TOKEN:+given}}"
[ "$1" = --version ] || [ "$HF_TOKEN" = {TOKEN} ]
"""
    (home / "trainer").write_text(trainer)
    (tools / "uv").write_text(f"""#!/bin/sh
echo "uv $*" >> {home}/uv.log
[ "$1" = venv ] || exit 0
mkdir -p {home}/gemma-tpu-env/bin
cp {home}/trainer {home}/gemma-tpu-env/bin/gemma-tpu
ln -sf {sys.executable} {home}/gemma-tpu-env/bin/python
chmod +x {home}/gemma-tpu-env/bin/gemma-tpu
""")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text("#!/bin/sh\nexit 0\n")  # pip install uv
    for path in (tools / "uv", tmp_path / "bin/python3"):
        path.chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(home)}

    def call(*command, stdin=""):
        return subprocess.run(["bash", here / "machine.sh", *command], input=stdin, capture_output=True, text=True,
                              env=env, timeout=60)  # fmt: skip

    call.here, call.home = here, home
    return call


def test_a_machine_is_prepared_and_runs_with_the_token_in_its_environment_alone(machine):
    done = machine("prepare")
    assert done.returncode == 0, done.stderr
    said = (machine.home / "uv.log").read_text()
    assert "venv --quiet --python 3.12" in said and f"{machine.here}/source[tpu,gcs]" in said
    started = machine("start", stdin=f"{TOKEN}\n")
    assert started.returncode == 0 and "started on" in started.stdout
    followed = machine("follow")
    assert "args train config.yaml --mirror gs://mine/run-1/run, unbuffered 1, token given" in followed.stdout
    assert (machine.here / "exit").read_text().strip() == "0"
    files = [path for path in machine.here.rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_a_run_without_a_token_has_none_and_its_failure_is_kept(machine):
    assert machine("prepare").returncode == 0
    machine("start", stdin="\n")
    assert "token \n" in machine("follow").stdout
    assert (machine.here / "exit").read_text().strip() == "1"


def test_preparing_again_keeps_the_environment(machine):
    machine("prepare")
    assert machine("prepare").returncode == 0
    assert (machine.home / "uv.log").read_text().count("venv") == 1


# --- what is refused ---


def refusal(**more) -> str:
    overrides = more.pop("overrides", SETTLED)
    with pytest.raises(UserError) as error:
        launching.job_of(request(**more), config.load("gemma4_31b_v5p8_fast.yaml", overrides))
    return str(error.value)


def test_what_lies_on_this_machine_is_refused_with_the_way_into_the_bucket():
    told = refusal(overrides=["mesh.fsdp=4", "data.validation=more.jsonl", "checkpoint.folder=here"])
    assert "gemma-tpu stage google/gemma-4-31B-it gs://mine/models/gemma-4-31B-it, then model.path=gs://mine" in told
    assert "gcloud storage cp data/codev_r1.jsonl gs://mine/data/codev_r1.jsonl, then data.path=gs://mine" in told
    assert "data.validation more.jsonl is on this machine" in told and "checkpoint.folder here" in told
    assert "mesh (fsdp 4 = 4) must take the 8 devices of v6e-8" in told
    assert told.count("\n  ") == 5


def test_what_a_run_leaves_goes_into_the_bucket():
    chosen = job("spot")
    assert chosen.config.checkpoint.folder == "gs://mine/run-1/checkpoints"
    assert chosen.config.train.compile_cache == "gs://mine/compile_cache"
    assert chosen.config.run_dir == "runs/run-1" and chosen.mirror == "gs://mine/run-1/run"
    kept = job("spot", overrides=["checkpoint.folder=gs://other/x", "train.compile_cache=gs://other/y"])
    assert kept.config.checkpoint.folder == "gs://other/x" and kept.config.train.compile_cache == "gs://other/y"


@pytest.mark.parametrize("more, words", [
    ({"bucket_": "mine"}, "must be gs://name"), ({"name_": "Run_1"}, "must be 1 to 40 of a-z"),
    ({"zones": ("europe",)}, "must be a zone like us-east5-a"),
    ({"engine": "spot", "on": "tpu7x-8"}, "tpu7x is rented through GKE alone"),
    ({"engine": "tpu-vm", "spot": True}, "take --with spot"),
    ({"engine": "gke", "cluster": None}, "--cluster is missing"),
    ({"engine": "spot", "cluster": "x"}, "--cluster: nothing that --with spot has; it is of gke"),
    ({"engine": "gke", "service_account": "a@b"}, "--service-account: nothing that --with gke has; it is of tpu-vm"),
    ({"engine": "tpu-vm", "restarts": 3}, "--restarts: nothing that --with tpu-vm has"),
    ({"engine": "queued-resource", "restarts": 3}, "--restarts: of spot machines; give --spot too"),
    ({"engine": "skypilot", "project": "p"}, "--project: nothing that --with skypilot has"),
    ({"engine": "spot", "wait_hours": 3}, "--wait-hours: nothing that --with spot has; it is of queued-resource"),
    ({"overrides": [*SETTLED, "run_dir=gs://mine/x"]}, "leave it as a plain folder"),
    ({"overrides": [*SETTLED, "recipe=own.py"]}, "the shipped recipes alone"),
])  # fmt: skip
def test_what_cannot_be_launched_is_said(more, words):
    changes = {name.rstrip("_"): more.pop(name) for name in list(more) if name.endswith("_")}
    if not changes:
        assert words in refusal(**more)
        return
    from dataclasses import replace

    with pytest.raises(UserError, match=re.escape(words)):
        launching.job_of(replace(request(), **changes), config.load("gemma4_31b_v5p8_fast.yaml", SETTLED))


def test_where_there_is_no_checkout_to_send_a_package_is_asked_for(monkeypatch):
    monkeypatch.setattr(launching, "_checkout", lambda: None)
    assert "--package is missing: this is no checkout" in refusal(engine="tpu-vm")
    assert job("tpu-vm", package="gemma_tpu[tpu] @ git+https://x/y").source is None


def test_the_machine_gets_the_extras_that_the_config_needs():
    assert job().extras == "tpu,gcs"
    more = job(overrides=["data.path=[gs://mine/a.parquet, hf://datasets/org/name]", "log.trackers=[wandb]"])
    assert more.extras == "tpu,gcs,parquet,datasets,wandb"
    assert "'/source[tpu,gcs,s3]'" in launch_script.script(job("gke", overrides=["data.path=s3://x/a.jsonl"]), "run_it")


def test_a_slice_that_nobody_rents_and_one_that_is_unknown():
    with pytest.raises(UserError, match="no cloud is known that rents it"):
        clouds.machine_of(chips.find("h100x2"))
    with pytest.raises(UserError, match="nearest: v6e-8"):
        chips.find("v6e-7")


def test_an_own_file_goes_over_the_table(tmp_path, monkeypatch):
    own = tmp_path / "own.yaml"
    own.write_text("tpus: {v6e: {zones: [europe-west4-a]}}")
    monkeypatch.setenv(clouds.VARIABLE, str(own))
    machine = clouds.machine_of(chips.find("v6e-8"))
    assert machine.zones == ("europe-west4-a",) and machine.runtime == "v2-alpha-tpuv6e"
    assert machine.sources["zones"].text == str(own) and "cloud.google.com" in machine.sources["runtime"].text
    own.write_text("tpus: {v6e: {zone: [europe-west4-a], runtime: 3}, v9: {label: x}}")
    with pytest.raises(UserError) as error:
        clouds.machine_of(chips.find("v6e-8"))
    told = str(error.value)
    assert "tpus.v6e.zone: unknown key; did you mean zones?" in told and "tpus.v6e.runtime: 3 must be like" in told
    assert "tpus.v9: is new and needs every key; missing: runtime" in told


# --- the command ---


def test_the_command_prints_the_script_and_one_object_under_json(capsys):
    argv = ["launch", "gemma4_31b_v5p8_fast.yaml", *SETTLED, "--on", "v5p-8", "--with", "spot", "--bucket", "gs://mine/"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert out.startswith("#!/usr/bin/env bash\n# gemma4-31b-v5p8-fast:") and "printed, not done" in err
    assert cli.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["script"] == out and found["zones"][0] == "us-east5-a" and found["hosts"] == 1
    assert found["checkpoints"] == "gs://mine/gemma4-31b-v5p8-fast/checkpoints"


def test_without_gcloud_run_says_how_to_get_it(capfd, monkeypatch, tmp_path):
    for tool in ("bash", "mktemp", "rm"):
        os.symlink(shutil.which(tool), tmp_path / tool)
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = ["launch", "gemma4_31b_v5p8_fast.yaml", "--on", "v5p-8", "--with", "spot", "--bucket", "gs://mine", *SETTLED]
    assert cli.main([*argv, "--run"]) == 2
    assert "error: gcloud is not installed: https://cloud.google.com/sdk/docs/install" in capfd.readouterr().err
