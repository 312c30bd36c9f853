"""Where files that ship with the package lie: data under `bundled/`, and the recipes and configs.

In a checkout, recipes/ and configs/ stand at the top level, where users read and copy them; in a wheel the
same files lie inside the package. `resolve` and `find` hide that difference from everybody else.
"""

from pathlib import Path

from gemma_tpu.errors import UserError

PACKAGE = Path(__file__).resolve().parent
BUNDLED = PACKAGE / "bundled"


def resolve(path: str) -> Path:
    """`bundled:tiny_verilog/train.jsonl` is a file of the package; anything else is the user's own path."""
    if path.startswith("bundled:"):
        return BUNDLED / path.removeprefix("bundled:")
    return Path(path).expanduser()


def folder(name: str) -> Path:
    """Where the shipped recipes or configs lie."""
    return PACKAGE / name if (PACKAGE / name).is_dir() else PACKAGE.parent / name


def find(folder: str, name: str) -> Path:
    """A file that the user names: the path if it exists, else the shipped one in `folder` (recipes, configs).

    Only `name` and `folder/name` fall back: a path into another folder that is mistyped must not silently run
    the shipped file that happens to have its name.
    """
    own = Path(name).expanduser()
    if own.is_file():
        return own
    root = PACKAGE / folder if (PACKAGE / folder).is_dir() else PACKAGE.parent / folder
    shipped = sorted(path.name for path in root.glob("*.*") if path.suffix in (".py", ".yaml"))
    if own.parent in (Path("."), Path(folder)) and own.name in shipped:
        return root / own.name
    if own.exists():
        raise UserError(f"{name}: no such file, it is a folder")
    raise UserError(f"{name}: no such file; shipped {folder}: {', '.join(shipped) or 'none'}")
