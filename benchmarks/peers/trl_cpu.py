"""TRL's turn: its SFTTrainer with PEFT's LoRA on every projection, sdpa attention, padded or packed.

    trl_cpu.py SETTINGS padded|packed       in an environment of its own (trl, peft, transformers, torch)
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from turns import Rows, Turns, settings


class Counting(SFTTrainer):
    """Counts the tokens that are not padding."""

    tokens = 0

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = inputs.get("attention_mask")  # packed rows fill their sheet and have none
        self.tokens = int(inputs["input_ids"].numel() if mask is None else mask.sum())
        return super().training_step(model, inputs, *args, **kwargs)


class Paced(TrainerCallback):
    def __init__(self, turns: Turns):
        self.turns, self.trainer = turns, None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.turns.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        base = sum(p.numel() for p in self.trainer.model.parameters() if not p.requires_grad)
        trainable = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
        self.turns.step(self.trainer.tokens, trainable=trainable, base=base)


def build(chosen: dict[str, Any], rows: Rows, packed: bool, turns: Turns) -> Counting:
    arguments = SFTConfig(
        output_dir=str(Path(chosen["checkpoint"]).parent / "trl"), max_steps=1_000_000, learning_rate=chosen["lr"],
        lr_scheduler_type="constant", packing=packed, max_length=chosen["packed" if packed else "padded"],
        per_device_train_batch_size=1 if packed else chosen["rows_per_step"],
        # The defaults are bfloat16 and recomputation; here everybody is float32 and recomputes nothing.
        bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, logging_steps=10_000, seed=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        chosen["checkpoint"], dtype=torch.float32, attn_implementation="sdpa"
    )
    paced = Paced(turns)
    trainer = Counting(
        model, args=arguments, train_dataset=Dataset.from_dict({"input_ids": rows}), callbacks=[paced],
        processing_class=AutoTokenizer.from_pretrained(chosen["checkpoint"]),
        peft_config=LoraConfig(r=chosen["rank"], lora_alpha=chosen["alpha"], lora_dropout=0.0,
                               target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    paced.trainer = trainer
    return trainer


def main() -> None:
    turns = Turns()
    chosen, rows = settings()
    build(chosen, rows, sys.argv[2] == "packed", turns).train()


if __name__ == "__main__":
    sys.exit(main())
