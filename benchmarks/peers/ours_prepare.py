"""Our turn of benchmarks/prepare.py: rows to packed ids, once for each line of stdin."""

import json
import sys
import time
from pathlib import Path

from gemma_tpu.data.corpus import prepare
from gemma_tpu.data.packing import best_fit
from gemma_tpu.data.tokenizer import Tokenizer
from gemma_tpu.schema import DataConfig


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    section = DataConfig(path=settings["rows"], cache=None, validation=None, max_seq_len=settings["length"],
                         overlong="truncate")  # fmt: skip
    tokenizer = Tokenizer(settings["model"])
    for _ in sys.stdin:
        start = time.perf_counter()
        rows = prepare(section, tokenizer)
        sheets = len(best_fit(rows.lengths, settings["length"]))
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": rows.tokens, "targets": rows.target_tokens, "sheets": sheets}),
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
