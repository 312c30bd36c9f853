"""The peers' environments: which packages, and a folder for each that is filled when it is first asked for."""

import subprocess
import sys
from pathlib import Path

DEFAULT = Path(__file__).resolve().parents[2] / ".bench-envs"
PACKAGES = {
    "trl": ["trl==1.16.*", "peft==0.21.*", "torch==2.15.*", "transformers==5.23.*"],
    "tunix": ["google-tunix==0.1.7", "qwix==0.1.8", "jax==0.10.2", "libtpu==0.0.51"],
}


def ready(env: str, envs: Path) -> bool:
    """Whether it is there and has these packages."""
    stamp = envs.resolve() / env / "installed.txt"
    return stamp.exists() and stamp.read_text() == "\n".join(PACKAGES[env])


def python(env: str, envs: Path) -> Path:
    """The Python of an environment under `envs`, which is made where it is missing or has other packages."""
    folder = envs.resolve() / env
    found = folder / "bin" / "python"
    if not ready(env, envs):
        print(f"installing {', '.join(PACKAGES[env])} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([found, "-m", "pip", "install", "--quiet", *PACKAGES[env]], check=True)
        (folder / "installed.txt").write_text("\n".join(PACKAGES[env]))
    return found
