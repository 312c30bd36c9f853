"""What the GPU side starts from: the resolved config, the same first adapter as a PEFT folder, the rate of each update.

    python recipes/gpu_baseline/hand_over.py CONFIG run_dir=runs/mine_gpu [key=value ...]

Written into run_dir; recipes/gpu_baseline/train.py goes on from there. It reads headers and shapes, no weight: seconds.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from batches import loader_of

from gemma_tpu import config as configs
from gemma_tpu.adapter import peft_folder
from gemma_tpu.cli import run_script
from gemma_tpu.errors import UserError
from gemma_tpu.hardware import devices
from gemma_tpu.run import runs
from gemma_tpu.run.metrics import say
from gemma_tpu.schema import Config, LoraConfig, OptimConfig

START, RECORD = "start", "hand_over.json"


def refuse(config: Config) -> None:
    """All that TRL, PEFT or torch would do otherwise; better no comparison than one of two things."""
    lora, optim = LoraConfig(), OptimConfig()
    only = {
        "train.method": (config.train.method, "lora"), "preference.loss": (config.preference.loss, None),
        "model.quantise": (config.model.quantise, None), "lora.dora": (config.lora.dora, lora.dora),
        "lora.init": (config.lora.init, lora.init), "optim.name": (config.optim.name, optim.name),
        "optim.loraplus_ratio": (config.optim.loraplus_ratio, optim.loraplus_ratio),
    }  # fmt: skip
    wrong = [f"{key} = {found}: the baseline has {'none' if have is None else have} alone"
             for key, (found, have) in only.items() if found != have]  # fmt: skip
    if wrong:
        raise UserError("\n  ".join(["this config has no fair counterpart in TRL + PEFT:", *wrong]))


def main(path: str, overrides: list[str]) -> dict[str, Any]:
    config = configs.load(path, overrides)
    refuse(config)
    devices.cpu()
    run = runs.open_run(config)
    if run.metrics.exists() or run.checkpoints.exists():
        raise UserError(f"{run.path} holds a run already: give the baseline a folder of its own, run_dir=...")
    loader = loader_of(config)
    adapter, base, flops = first_adapter(config)
    run.write_config(config)
    named = peft_folder.write(run.path / START, adapter, base=base, native=True, overwrite=True)
    rates, notes = rates_of(config, loader.total_steps)
    record = {
        "plan": loader.plan, "steps": loader.total_steps, "rates": rates, "flops_per_token": flops,
        "scheme": {"modules": len(adapter), "rank": named["r"], "alpha": named["lora_alpha"]},
        "notes": [*loader.notes, *notes],
    }  # fmt: skip
    runs.write_text(run.path / RECORD, json.dumps(record) + "\n")
    here = Path(__file__).parent
    say(f"{run.path}/ is ready: {loader.total_steps:,} updates, {len(adapter)} modules of rank {named['r']}; next:\n"
        f"accelerate launch --config_file {here}/h100x2.yaml {here}/train.py {run.path}")
    return record


def first_adapter(config: Config) -> tuple[dict[str, Any], str, float]:
    """(A and B by the checkpoint's tensors, as `gemma-tpu train` starts them; the base's name; FLOPs of a token)"""
    from gemma_tpu.adapter import adapters, lora, start
    from gemma_tpu.estimate import roofline
    from gemma_tpu.gemma import loading
    from gemma_tpu.handoff import card, merging
    from gemma_tpu.step import job
    from gemma_tpu.training import program

    model, checkpoint = loading.build(config.model.path, dtype=config.model.dtype)
    say(lora.table(program.adapt(model, config)))
    if (folder := config.lora.init_from) is None:
        values = lora.initial(model, config.train.seed)
    else:
        values, told = start.taken_up(model, folder, config.lora.dora, config.train.seed, checkpoint)
        say("\n".join(told))
    record = {"method": "lora", "adapter": lora.record(model, config.lora), "config": configs.to_dict(config)}
    found = merging.lora_updates(adapters.Trained(Path(config.run_dir), 0, record, values), model.arch)
    flops = roofline.work(model.arch, job.Job.of(config, {}, "none")).useful
    return found, card.name_of(str(config.model.path)), flops


def rates_of(config: Config, steps: int) -> tuple[list[float], list[str]]:
    """The learning rate of every update, from the schedule that `gemma-tpu train` compiles into its step."""
    import jax
    import numpy as np

    from gemma_tpu.step import optim

    schedule, notes = optim.schedule(config.optim, steps)
    return [float(rate) for rate in np.asarray(jax.vmap(schedule)(np.arange(steps)))], notes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[])
    given = parser.parse_args()
    sys.exit(run_script(main, given.config, given.overrides))
