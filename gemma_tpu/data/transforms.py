"""Transforms: small named functions from a conversation to a conversation, applied before it is rendered.

A transform takes the list of messages and gives a list of messages, or None to leave the row out. One of yours is
named by where it is: data.transform: my_module:shorten, or tools/mine.py:shorten. Leaving a row out is counted,
under the reason of `Drop` where it is raised.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from gemma_tpu.data.turns import Message, RowDropped
from gemma_tpu.errors import UserError

Transform = Callable[[list[Message]], list[Message] | None]
Drop = RowDropped  # Drop("no_answer", "what was looked for")

THINK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FENCE = re.compile(r"```([\w+-]*)[ \t]*\r?\n.*?```", re.DOTALL)
VERILOG = ("", "v", "sv", "verilog", "systemverilog")  # what stands behind the fence; often nothing does


def codev_r1(messages: list[Message]) -> list[Message]:
    """CodeV-R1 rows as the paper trains on them: user and assistant turns, answers without reasoning."""
    turns = [m for m in messages if m["role"] != "system"]
    return [{**m, "content": codev_answer(m["content"])} if m["role"] == "assistant" else m for m in turns]


def codev_answer(text: str) -> str:
    """The last complete <answer> block after the reasoning, else the last complete Verilog fence."""
    # Where the generation prompt took the opening tag along, all before a stray </think> is reasoning too.
    said = THINK.sub("", text).rpartition("</think>")[2]
    fences = [m.group() for m in FENCE.finditer(said) if m.group(1).lower() in VERILOG]
    whole = said[: said.rfind("</answer>") + len("</answer>")] if "</answer>" in said else ""
    # Behind the last end every <answer> would be followed to the end of the text: minutes where one repeats the word.
    found = ANSWER.findall(whole) or fences
    if not found:
        raise Drop("no_answer", "no complete <answer> block and no Verilog fence after the reasoning")
    return found[-1].strip()


SHIPPED: dict[str, Transform] = {"codev_r1": codev_r1}


def names_of(transform: str | Sequence[str] | None) -> tuple[str, ...]:
    """data.transform, one name, several, or none."""
    return () if transform is None else (transform,) if isinstance(transform, str) else tuple(transform)


def load(name: str) -> Transform:
    """The function of a name: a shipped one, module:function, or file.py:function."""
    if name in SHIPPED:
        return SHIPPED[name]
    module_name, colon, function_name = name.rpartition(":")
    if not colon:
        raise UserError(f"data.transform is {name!r}: it must be one of {', '.join(SHIPPED)}, or a function of yours "
                        "as module:function or file.py:function")  # fmt: skip
    module = _module(name, module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        where = _file(module) or module_name
        raise UserError(f"data.transform {name}: {where} has no function {function_name}")
    chosen: Transform = function
    return chosen


def identity(name: str) -> str:
    """Changes when the code does: the whole file of the function, since its helpers shape the rows too."""
    try:
        file = inspect.getsourcefile(load(name))
    except TypeError:  # a partial, say, is written nowhere: the file that gives it its name
        file = _file(_module(name, name.rpartition(":")[0]))
    source = Path(file or "")
    return hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else name


def _file(module: ModuleType) -> str | None:
    """What is built into Python has none."""
    file: str | None = getattr(module, "__file__", None)
    return file


def _module(name: str, module_name: str) -> ModuleType:
    try:
        if not module_name.endswith(".py"):
            return _imported(module_name)
        path = Path(module_name).expanduser().resolve()
        if not path.is_file():
            raise UserError(f"data.transform {name}: there is no file {path}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None, "every name that ends with .py has a loader"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except Exception as error:  # whatever the user's own code raises while it is imported
        raise UserError(f"data.transform {name}: importing {module_name} failed: "
                        f"{type(error).__name__}: {error}") from None  # fmt: skip


def _imported(module_name: str) -> ModuleType:
    """Modules of the working folder count too: an installed command does not look there by itself."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    finally:
        sys.path.remove(here)
