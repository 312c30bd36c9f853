"""The package as a user installs it: from its sdist a wheel, the wheel in an environment of its own, far from the
checkout and without torch, and the commands there from `--help` to an evaluated run: `make test-wheel`."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = {"recipes": "gemma_tpu/recipes", "configs": "gemma_tpu/configs"}  # where a wheel has them
MADE_BY_THE_BUILD = "gemma_tpu-"  # dist-info
EXTRAS = "torch, peft, trl, libtpu, pyarrow, datasets, gcsfs, s3fs, starlette, wandb, pytest".split(", ")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("GEMMA_TPU_REGISTRY") != "1" or not importlib.util.find_spec("uv"),
                       reason="installs from a package registry, by uv: make test-wheel"),
]  # fmt: skip


def uv(*argv: object) -> str:
    done = subprocess.run([sys.executable, "-m", "uv", *map(str, argv)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it and not from the checkout."""
    out = tmp_path_factory.mktemp("dist")
    uv("build", "--quiet", "--out-dir", out, ROOT)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


class Place:
    """A folder with nothing of the checkout in it, and the installed command."""

    def __init__(self, folder: Path, wheel: Path):
        self.folder, self.python = folder / "work", folder / "venv" / "bin" / "python"
        self.folder.mkdir()
        uv("venv", "--quiet", "--python", sys.executable, folder / "venv")
        uv("pip", "install", "--quiet", "--python", self.python, wheel)
        # No PYTHONPATH, no variable of this checkout's or of these tests'; a cache and a home of its own.
        self.env = {"PATH": f"{self.python.parent}:/usr/bin:/bin", "HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1",
                    "JAX_PLATFORMS": "cpu"}  # fmt: skip

    def run(self, *argv: object) -> subprocess.CompletedProcess[str]:
        """By the script that the wheel installs."""
        command = [str(self.python.parent / "gemma-tpu"), *map(str, argv)]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done

    def json(self, *argv: object) -> dict[str, Any]:
        return json.loads(self.run(*argv, "--json").stdout)

    def ask(self, code: str) -> str:
        done = subprocess.run([self.python, "-c", code], cwd=self.folder, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def place(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"), built[1])


@pytest.fixture(scope="module")
def run_dir(place: Place) -> str:
    """Three updates of the tiny LoRA on the tiny base."""
    place.run("tiny", "models/base", "--dtype", "float32")
    overrides = ["model.path=models/base", "run_dir=runs/three", "train.steps=3", "optim.warmup_steps=1",
                 "data.limit=40", "data.validation=null", "train.batch_size=2"]  # fmt: skip
    assert "ok" in place.run("validate", "tiny_cpu.yaml", *overrides).stderr
    place.run("train", "configs/tiny_cpu.yaml", *overrides)
    return "runs/three"


def tracked(*folders: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def test_the_wheel_has_the_package_the_recipes_and_the_configs_and_nothing_else(built: tuple[Path, Path]) -> None:
    wanted = tracked("gemma_tpu", *SHIPPED)
    for top, inside in SHIPPED.items():
        wanted = {inside + name.removeprefix(top) if name.startswith(f"{top}/") else name for name in wanted}
    with zipfile.ZipFile(built[1]) as wheel:
        found = {name for name in wheel.namelist() if not name.startswith(MADE_BY_THE_BUILD)}
    assert found == wanted
    assert {"gemma_tpu/py.typed", "gemma_tpu/recipes/gpu_baseline/README.md"} < found
    assert any(name.startswith("gemma_tpu/configs/workloads/") for name in found)


def test_the_sdist_has_every_file_of_the_checkout(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        found = {member.name.partition("/")[2] for member in sdist.getmembers()}
    assert tracked() == found - {"PKG-INFO"}


def test_the_installed_package_is_what_runs_and_no_extra_is_there(place: Place) -> None:
    where = place.ask("import gemma_tpu; print(gemma_tpu.__file__)")
    assert where.startswith(str(place.python.parent.parent))
    there = place.ask(f"import importlib.util as i; print([n for n in {EXTRAS} if i.find_spec(n)])")
    assert there == "[]"


def test_help_and_the_list_name_what_ships(place: Place) -> None:
    assert "examples:" in place.run("--help").stdout
    found = place.json("ls")
    assert {one["name"] for one in found["configs"]} == {path.name for path in ROOT.glob("configs/*.yaml")}
    recipes = {path.name for path in ROOT.glob("recipes/*.py")} | {"gpu_baseline"}
    assert {one["name"] for one in found["recipes"]} == recipes


def test_what_ships_can_be_copied_and_is_the_same(place: Place) -> None:
    (place.folder / "copies").mkdir()
    for name, source in (("tiny_cpu.yaml", "configs"), ("dpo.py", "recipes"), ("gpu_baseline", "recipes")):
        place.run("cp", name, "copies/" + name)
        files = [ROOT / name for name in tracked(f"{source}/{name}")]
        assert files
        for file in files:
            copy = place.folder / "copies" / file.relative_to(ROOT / source)
            assert copy.read_bytes() == file.read_bytes()


def test_doctor_finds_nothing_to_repair(place: Place) -> None:
    checks = {one["name"]: one for one in place.json("doctor")["checks"]}
    assert checks["packages"]["state"] == "ok" and "as declared" in checks["packages"]["found"]
    assert checks["torch"]["state"] == "missing"


def test_a_config_of_ones_own_is_made_and_planned(place: Place) -> None:
    rows = place.ask("from gemma_tpu import assets; print(assets.resolve('bundled:tiny_verilog/train.jsonl'))")
    place.run("init", "--data", rows, "--model", "gemma4-12b", "--slice", "v5e-4", "--out", "mine.yaml")
    planned = place.json("plan", "mine.yaml", "--fast", "--on", "v5e-4")
    assert planned["fits"] and planned["basis"] == "analytic" and planned["peak_gib_per_chip"] > 1
    assert place.json("choose", "configs/workloads/serve_31b_chat.yaml")


def test_schema_completion_and_serving_read_their_files(place: Place) -> None:
    assert "lora" in place.json("schema")["properties"]
    assert "gemma-tpu" in place.run("completion", "bash").stdout
    assert place.run("serve", "google/gemma-4-31B-it", "--on", "v6e-8").stdout.startswith("#!/")


def test_a_run_is_trained_merged_and_verified(place: Place, run_dir: str) -> None:
    losses = [json.loads(line)["loss"] for line in (place.folder / run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)
    assert place.json("merge", run_dir, "--out", "models/merged")["tensors_changed"] > 0
    found = place.json("verify", run_dir, "--merged", "models/merged")
    assert found["ok"] and found["clients"]["transformers"] == "not compared: torch is not installed"


def test_a_run_is_evaluated_and_sampled(place: Place, run_dir: str) -> None:
    found = place.json("eval", "tiny", run_dir, "--no-base", "--max-new-tokens", "4")
    assert found["total"] == 60 and found["iverilog"]
    assert place.json("sample", run_dir, "--prompt", "Verilog module top", "--max-new-tokens", "4")["tokens"]
    assert place.json("report", run_dir) and (place.folder / run_dir / "report.html").stat().st_size > 10_000
