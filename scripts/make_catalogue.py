"""Writes gemma_tpu/bundled/catalogue.json: the planned figures of every shipped config, for `gemma-tpu ls`."""

import json
from dataclasses import asdict

from gemma_tpu import assets
from gemma_tpu.onboarding import catalogue


def main() -> None:
    found = {path.name: catalogue.plan(path) for path in catalogue.shipped("configs")}
    text = json.dumps({name: asdict(one) if one else None for name, one in found.items()}, indent=1)
    assets.resolve(catalogue.FIGURES).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
