"""recipes/gpu_baseline/train.py under FSDP2 on CPUs, for test_baseline.py.

accelerate takes FSDP for something that GPUs alone have; here two processes of a CPU pass for two GPUs. Sharding,
gathering, the trainer and the recipe are those of a GPU machine. Writes `sharded` into the run folder when parameters
really were.
"""

import os
import runpy
import sys
from pathlib import Path

os.environ |= {
    "ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true", "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip

from accelerate import PartialState  # noqa: E402
from accelerate.utils import DistributedType, fsdp_utils  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

_start, _prepare = PartialState.__init__, fsdp_utils.fsdp2_prepare_model


def start(self, *args, **options):
    _start(self, *args, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def prepare(accelerator, model):
    found = _prepare(accelerator, model)
    if all(isinstance(parameter, DTensor) for parameter in found.parameters()):
        (Path(sys.argv[1]) / "sharded").touch()
    return found


PartialState.__init__ = start
fsdp_utils.fsdp2_prepare_model = prepare
import accelerate.accelerator  # noqa: E402

accelerate.accelerator.fsdp2_prepare_model = prepare
HERE = Path(__file__).resolve().parent.parent / "recipes" / "gpu_baseline"
sys.path.insert(0, str(HERE))
runpy.run_path(str(HERE / "train.py"), run_name="__main__")
