"""The preference losses against TRL's own trainers on one tiny model with one adapter, in float32.

    python benchmarks/dpo_trl.py [--envs .bench-envs] [--json FILE]

TRL runs in an environment of its own (benchmarks/peers/environments.py). It computes the loss of DPOTrainer (sigmoid,
sigmoid_norm, ipo; reference: the model with its adapter off) and of CPOTrainer (simpo) on the pairs that this process
writes, and the two are printed side by side.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from peers import environments

THEIR_NAMES = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "ipo": "ipo", "simpo": "simpo"}
THEIRS = '''
import json, sys, types, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import numpy as np, torch, peft, transformers, trl
from datasets import Dataset
folder = Path(sys.argv[1])
given = np.load(folder / "pairs.npz")
rank, alpha = 3, 6.0
kind = getattr(transformers, json.loads((folder / "base/config.json").read_text())["architectures"][0])


names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
lora = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM")


def base():
    return kind.from_pretrained(folder / "base", dtype=torch.float32)


def filled(model):
    values = np.load(folder / "adapter.npz")
    with torch.no_grad():
        for hf in {name[2:] for name in values}:
            module = model.get_submodule("base_model.model." + hf.removesuffix(".weight"))
            module.lora_A["default"].weight.copy_(torch.tensor(values["a:" + hf]))
            module.lora_B["default"].weight.copy_(torch.tensor(values["b:" + hf]))
    return model


inputs = {"input_ids": torch.tensor(given["tokens"]).long(), "attention_mask": torch.tensor(given["seen"]).long(),
          "completion_mask": torch.tensor(given["answers"]).long()}
tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
found = {}
for name, how in json.loads(sys.argv[2]).items():
    if name == "simpo":
        from trl.experimental.cpo import CPOTrainer
        model = filled(peft.get_peft_model(base(), lora)).eval()
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        logps = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
        section = types.SimpleNamespace(loss_type="simpo", beta=how["beta"], simpo_gamma=how["margin"], alpha=0.0,
                                        label_smoothing=0.0, accelerator=types.SimpleNamespace(device="cpu"))
        found[name] = CPOTrainer.cpo_loss(section, *logps.chunk(2))[0].mean().item()
        continue
    args = trl.DPOConfig(output_dir=str(folder / "out"), loss_type=[how["theirs"]], beta=how["beta"], use_cpu=True,
                         report_to="none", bf16=False, gradient_checkpointing=False, disable_dropout=True)
    # Of an adapter that is there already TRL makes a copy for its reference: so it gets it afterwards.
    trainer = trl.DPOTrainer(model=base(), args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    filled(trainer.model).eval()
    with torch.no_grad():
        found[name] = trainer._compute_loss(trainer.model, inputs, False).item()
print("RESULT", json.dumps(found))
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", type=Path, default=environments.DEFAULT)
    parser.add_argument("--json", type=Path, help="write the losses there")
    args = parser.parse_args()
    their_python = environments.python("trl", args.envs)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from helpers import adapter_of, load, loss_and_grads, micro_batches, pairs, random_rows, sheet

    from gemma_tpu.schema import PreferenceConfig
    from gemma_tpu.step import preference
    from gemma_tpu.tiny.checkpoint import write_tiny

    sections = {"dpo": PreferenceConfig("dpo", beta=0.3), "dpo_norm": PreferenceConfig("dpo_norm", beta=2.0),
                "ipo": PreferenceConfig("ipo", beta=0.5), "simpo": PreferenceConfig("simpo", 2.0, 0.5)}  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_tiny(folder / "base", dtype="float32", layers=4, pattern=1, hidden=32, mlp=48, heads=4, kv_heads=2,
                   global_kv_heads=2, head_dim=8, global_head_dim=16, window=8, vocab=1024, text_only=True)  # fmt: skip
        model = load(folder / "base", rank=3, alpha=6.0)
        held = pairs(model, adapter_of(model))
        np.savez(folder / "adapter.npz", **{f"a:{hf}": a for hf, (a, _) in held.items()},
                 **{f"b:{hf}": b for hf, (_, b) in held.items()})  # fmt: skip
        rows = random_rows([14, 11, 9, 12, 20, 17], 1024)  # three pairs, chosen and rejected in turn
        batch = sheet([rows[:4], rows[4:]], 48)
        alone = sheet([[row] for row in [*rows[::2], *rows[1::2]]], 20)  # theirs: all chosen, then all rejected
        answers = np.zeros_like(alone["tokens"])
        answers[:, 1:] = alone["weights"][:, :-1] > 0
        np.savez(folder / "pairs.npz", tokens=alone["tokens"], seen=alone["segment_ids"] > 0, answers=answers)
        asked = {name: {"theirs": THEIR_NAMES[name], "beta": section.beta, "margin": section.margin}
                 for name, section in sections.items()}  # fmt: skip
        (folder / "theirs.py").write_text(THEIRS)
        done = subprocess.run([their_python, folder / "theirs.py", folder, json.dumps(asked)], text=True,
                              capture_output=True)  # fmt: skip
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        wanted = json.loads(done.stdout.rpartition("RESULT ")[2])
        losses = {}
        print(f"{'loss':<10}{'ours':>14}{'TRL':>14}{'difference':>14}")
        for name, section in sections.items():
            model.objective = preference.Pairs(section)
            loss, _ = loss_and_grads(model, micro_batches(batch))
            print(f"{name:<10}{loss:>14.8f}{wanted[name]:>14.8f}{abs(loss - wanted[name]):>14.2e}")
            losses[name] = {"ours": float(loss), "trl": wanted[name], "apart": abs(float(loss) - wanted[name])}
    if args.json:
        worst = float(np.max([one["apart"] for one in losses.values()]))
        args.json.write_text(json.dumps({"losses": losses, "worst": worst}, indent=1) + "\n")


if __name__ == "__main__":
    main()
