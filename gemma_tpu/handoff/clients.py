"""What other programs compute from the files: transformers on the merged folder, PEFT on the exported adapter.

Both hold the whole model in float32: where the memory is too small they are not asked, and that is said.
"""

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tpu.adapter.adapters import Trained
from gemma_tpu.handoff.merging import export_adapter
from gemma_tpu.storage.shards import Checkpoint

_ROOM = 1.5  # of memory over the float32 weights


def transformers_logits(folder: Path, tokens_BT: np.ndarray, segments_BT: np.ndarray) -> np.ndarray:
    return _logits(_model(folder), tokens_BT, segments_BT)


def peft_logits(trained: Trained, base: Checkpoint, tokens_BT: np.ndarray, segments_BT: np.ndarray) -> np.ndarray:
    """The base under PEFT with the adapter as `gemma-tpu adapter` exports it."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "adapter"
        native = any(name.endswith(".lora_magnitude") for name in trained.values)  # there is no other form of DoRA
        export_adapter(trained.run, out=out, base=base.where, step=trained.step, native=native)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of keys that it does not find PEFT only warns
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            model = PeftModel.from_pretrained(_model(Path(base.where)), str(out))
    return _logits(model.eval(), tokens_BT, segments_BT)


def unavailable(checkpoint: Checkpoint, *, peft: bool) -> str | None:
    """Why such a comparison cannot be made here, or None."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return "not compared: torch is not installed"
    if peft:
        try:
            import peft as found  # noqa: F401
        except ImportError:
            return "not compared: peft is not installed"
        if "://" in checkpoint.where:
            return "not compared: the base is not on this machine"
    elif "://" in checkpoint.where:
        return "not compared: the merged model is not on this machine"
    return too_large(checkpoint)


def too_large(checkpoint: Checkpoint) -> str | None:
    need = _ROOM * 4 * sum(checkpoint.info(name).size for name in checkpoint.names())
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _meminfo(), re.MULTILINE)
    if found is None or need <= int(found[1]) * 1024:
        return None
    return f"not compared: needs {need / 2**30:.0f} GiB of memory, {int(found[1]) / 2**20:.0f} are free"


def _meminfo() -> str:
    path = Path("/proc/meminfo")
    return path.read_text() if path.exists() else ""


def _model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()


def _logits(model: Any, tokens_BT: np.ndarray, segments_BT: np.ndarray) -> np.ndarray:
    """Of the real tokens, [N, V]."""
    import torch

    with torch.no_grad():
        found = model(torch.tensor(tokens_BT), attention_mask=torch.tensor(segments_BT)).logits
    real: np.ndarray = found.float().numpy()[segments_BT > 0]
    return real
