"""TRL's turn of benchmarks/prepare.py: SFTTrainer's own preparation of a dataset, without a model."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import datasets
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    cores = len(os.sched_getaffinity(0))
    config = SFTConfig(output_dir=tempfile.mkdtemp(), packing=True, max_length=settings["length"], report_to=[],
                       dataset_num_proc=cores, use_cpu=True, bf16=False)  # fmt: skip
    # The preparation reads these attributes of a trainer; building a whole one would load a model.
    trainer = SFTTrainer.__new__(SFTTrainer)
    trainer._tokenizer, trainer.chat_template, trainer.completion_only_loss = tokenizer, None, True
    for _ in sys.stdin:
        with tempfile.TemporaryDirectory() as cache:  # reading the JSONL is part of it, finding a cache is not
            start = time.perf_counter()
            rows = datasets.load_dataset("json", data_files=settings["rows"], split="train", cache_dir=cache)
            packed = trainer._prepare_dataset(rows, tokenizer, config, True, None, "train")
            seconds = time.perf_counter() - start
            tokens = targets = 0
            for batch in packed.with_format("numpy").iter(64):
                tokens += sum(len(ids) for ids in batch["input_ids"])
                targets += sum(int((labels != -100).sum()) for labels in batch["labels"])
            print(json.dumps({"seconds": seconds, "tokens": tokens, "targets": targets, "sheets": len(packed)}),
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
