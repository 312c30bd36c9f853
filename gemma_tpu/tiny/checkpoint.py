"""Tiny random checkpoints in the layout in which Google publishes Gemma 3 and 4: real files, small only in size.

Every tensor is random, norms and scales too, so that no branch of the model is an identity and a loader or a
merge that mixes two tensors up cannot pass by luck. The scales are chosen so that the model trains from here.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from gemma_tpu.assets import BUNDLED
from gemma_tpu.errors import RunError, UserError
from gemma_tpu.tiny.archs import ARCHS, TinyArch, TinyDims
from gemma_tpu.tiny.config import GENERATION, model_config
from gemma_tpu.tiny.tokenizer import write_tokenizer
from gemma_tpu.tiny.weights import tensor_shapes, write_weights

DTYPES = ("bfloat16", "float32")
TEXTS = ("base.jsonl", "train.jsonl")
EMPTY_THOUGHT = r"<|channel>thought\n<channel|>"  # as the bundled template spells it


def write_tiny(
    out: str | Path,
    arch: str = "gemma4-31b",
    seed: int = 0,
    dtype: str = "bfloat16",
    *,
    text_only: bool = False,
    tokenizer: bool = True,
    texts: Iterable[str] | None = None,
    **dims: int,
) -> Path:
    """Writes a random checkpoint of `arch` to the folder `out` and returns it; the same seed, the same bytes.

    `dims` are fields of TinyDims. `text_only` writes the layout of the …ForCausalLM class, which has no towers.
    The tokenizer is trained on `texts`, by default on the conversations bundled with the package.
    """
    from safetensors import SafetensorError

    out = Path(out)
    sizes = _check(out, arch, dtype, dims)
    row = ARCHS[arch]
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and renamed: a run that dies leaves no half checkpoint under the user's name.
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        work.chmod(0o755)
        _write_json(work / "config.json", model_config(sizes, dtype, text_only, arch))
        _write_json(work / "generation_config.json", GENERATION)
        write_weights(work, tensor_shapes(sizes, text_only, arch), seed, dtype, row.family.is_gemma3)
        if tokenizer:
            write_tokenizer(work, _bundled_texts() if texts is None else texts, sizes.vocab, row.family.words)
            (work / "chat_template.jinja").write_text(_chat_template(row), encoding="utf-8")
        os.replace(work, out)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out}: the checkpoint could not be written ({error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def _check(out: Path, arch: str, dtype: str, dims: dict[str, int]) -> TinyDims:
    """All that is wrong with the arguments, at once; otherwise the sizes."""
    wrong = []
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        wrong.append(f"{out} exists and is not an empty folder: name another, or remove it first")
    if arch not in ARCHS:
        wrong.append(f"arch {arch!r} is unknown: one of {', '.join(ARCHS)}")
    if dtype not in DTYPES:
        wrong.append(f"dtype {dtype!r} is unknown: one of {', '.join(DTYPES)}")
    known = [field.name for field in fields(TinyDims)]
    unknown = [name for name in dims if name not in known]
    if unknown:
        wrong.append(f"unknown sizes {', '.join(unknown)}: known are {', '.join(known)}")
    for name in dims:
        least = 0 if name in known and getattr(TinyDims, name) == 0 else 1
        if name in known and (not isinstance(dims[name], int) or dims[name] < least):
            wrong.append(f"{name} is {dims[name]!r}: it must be an integer of at least {least}")
    if arch in ARCHS and (useless := [name for name in dims if name in known and ARCHS[arch].lacks(name)]):
        wrong.append(f"{arch} has no {', '.join(useless)}: leave it out")
    if wrong:
        raise UserError("\n".join(wrong))
    sizes = replace(ARCHS[arch].dims, **dims)
    if broken := ARCHS[arch].broken_rules(sizes):
        raise UserError("\n".join(broken))
    return sizes


def _chat_template(row: TinyArch) -> str:
    """The family's template; Gemma 4's is that of 31B, whose generation prompt the smallest sizes have in part."""
    text = (BUNDLED / row.family.template).read_text(encoding="utf-8").replace("Gemma 4 31B", row.title)
    return text if row.empty_thought else text.replace(EMPTY_THOUGHT, "")


def _bundled_texts() -> Iterator[str]:
    """Every message of the bundled training rows; what is held out teaches the tokenizer nothing."""
    for name in TEXTS:
        with (BUNDLED / "tiny_verilog" / name).open(encoding="utf-8") as lines:
            for line in lines:
                yield from (message["content"] for message in json.loads(line)["messages"])


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
