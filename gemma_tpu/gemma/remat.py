"""Which activations are kept for the backward pass, and where; what is not is computed again."""

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import jax
from jax.ad_checkpoint import checkpoint_name

# "none", "full", or the names of the activations to keep: on the device, or ("gate@host") in the host's memory
Remat = str | Sequence[str]
HOST = "@host"
ATTENTION = "attention"  # the name of its output and of its row sums, which its kernels give themselves

Function = TypeVar("Function", bound=Callable[..., object])
Tree = TypeVar("Tree")


def named(x: Tree, name: str) -> Tree:
    """The same, under the name by which it can be kept."""
    return cast(Tree, checkpoint_name(x, name))


def rematerialise(run: Function, remat: Remat) -> Function:
    """`run`, whose backward pass computes again what `remat` does not keep."""
    if remat == "none":
        return run
    names = () if remat == "full" else tuple(remat)
    host = [name.removesuffix(HOST) for name in names if name.endswith(HOST)]
    device = [name for name in names if not name.endswith(HOST)]
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(*device)
    if host:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=device, names_which_can_be_offloaded=host,
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    return cast(Function, jax.checkpoint(run, policy=policy, prevent_cse=False))
