"""gemma_tpu: LoRA fine-tuning of Gemma on TPU, from a YAML file to merged safetensors.

    import gemma_tpu
    model = gemma_tpu.load("models/gemma-4-31B-it", adapter="runs/mine")
    logits_BTV = model(tokens_BT, segment_ids_BT)
    gemma_tpu.merge("runs/mine", out="models/mine")

JAX is imported by the calls and not by this module: `gemma-tpu --help` must answer at once.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load", "merge", "__version__"]


def load(folder: Any, adapter: Any = None, mesh: Any = None, dtype: str | None = None) -> Any:
    """A checkpoint folder (and the adapter of a run folder) as a model; see gemma_tpu.adapter.adapters.load."""
    from gemma_tpu.adapter import adapters

    return adapters.load(folder, adapter=adapter, mesh=mesh, dtype=dtype)


def merge(*args: Any, **kwargs: Any) -> Any:
    """A run's adapter into its base's weights; see gemma_tpu.handoff.merging.merge."""
    from gemma_tpu.handoff.merging import merge as run

    return run(*args, **kwargs)
