"""For vLLM's multimodal classes, which import torchvision even where only text is asked.

PyPI has torchvision for CUDA alone. Beside a torch for CPUs its C++ part is left out, as it should be, but then the
import fails at two operators that nobody has declared. They are declared here when torchvision is first imported, and
never called. A torchvision for CPUs brings its own.
"""

import importlib.abc
import sys
from importlib.metadata import version

KEPT = []  # what is declared goes with its library


class Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            if not version(name).endswith("+cpu"):
                import torch

                KEPT.append(torch.library.Library(name, "DEF"))
                for operator in ("nms", "qnms"):
                    KEPT[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, Declare())
