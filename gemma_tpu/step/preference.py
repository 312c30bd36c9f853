"""Losses on pairs of answers: DPO, its length-normalised form, IPO, and SimPO, which needs no reference.

A sheet holds pairs as segments: the chosen answer, then the rejected one, each behind its own copy of the prompt. The
reference is the same model with its adapter off: no second model lies in memory.

Letters: B rows, T tokens, D hidden, V vocabulary, P pairs of a row (places for them, most of them empty), S segments.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_tpu.gemma.model import Decoder, softcap
from gemma_tpu.gemma.remat import Remat
from gemma_tpu.gemma.sites import sites
from gemma_tpu.schema import Config, PreferenceConfig
from gemma_tpu.step.loss import MOST_TOKENS
from gemma_tpu.step.step import Batch

SHORTEST = 2  # tokens of an answer behind its prompt


@dataclass(frozen=True)
class Pairs:
    """The objective of a run on pairs; its weight is the number of pairs."""

    section: PreferenceConfig

    def __call__(self, model: Decoder, batch: Batch, key: jax.Array | None, remat: Remat) -> jax.Array:
        """Sum of the losses of one micro-batch's pairs [B, T]."""
        policy_BS, count_BS = answers(model, batch, key, remat)
        if self.section.loss == "simpo":
            score_BS = policy_BS
        else:
            reference_BS, _ = answers(without_adapter(model), batch, None, "none")
            score_BS = policy_BS - jax.lax.stop_gradient(reference_BS)
        if self.section.loss != "dpo":
            score_BS = score_BS / jnp.maximum(count_BS, 1)
        losses_BP = pair_losses(self.section, score_BS[:, 1::2] - score_BS[:, 2::2])
        return jnp.sum(jnp.where(count_BS[:, 1::2] * count_BS[:, 2::2] > 0, losses_BP, 0.0))

    def weight(self, batch: Batch) -> jax.Array:
        counts_BS = _by_segment((batch["weights"] > 0).astype(jnp.float32), batch["segment_ids"])
        return jnp.sum((counts_BS[..., 1::2] * counts_BS[..., 2::2]) > 0).astype(jnp.float32)


def objective(config: Config) -> Pairs | None:
    """What a config trains for; None: the cross entropy of every target."""
    return None if config.preference.loss is None else Pairs(config.preference)


def pair_losses(section: PreferenceConfig, delta: jax.Array) -> jax.Array:
    """By how much the chosen answer's score is above the rejected one's -> the loss of the pair."""
    if section.loss == "ipo":
        return jnp.square(delta - 1 / (2 * section.beta))
    return -jax.nn.log_sigmoid(section.beta * delta - section.margin)


def without_adapter(model: Decoder) -> Decoder:
    """The frozen base of a model, which is left as it is."""
    bare = nnx.clone(model)
    for site in sites(bare):
        for name, value in list(vars(site.projection).items()):
            if name.startswith("lora_") and isinstance(value, nnx.Variable):
                setattr(site.projection, name, None)
    return bare


def answers(model: Decoder, batch: Batch, key: jax.Array | None, remat: Remat) -> tuple[jax.Array, jax.Array]:
    """(log-probability, number of targets) of each segment of each row, [B, S]; segment 0 is padding."""
    x_BTD = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"], key=key, remat=remat)
    logps_BT = _log_probabilities(x_BTD, model.embed.w[...], batch["targets"], model.arch.logit_softcap)
    seen_BT = (batch["weights"] > 0).astype(jnp.float32)
    return (_by_segment(logps_BT * seen_BT, batch["segment_ids"]), _by_segment(seen_BT, batch["segment_ids"]))


def _by_segment(x_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Sums over segments, over any leading dims."""
    places = 2 * (x_BT.shape[-1] // (2 * SHORTEST)) + 1
    one_hot_BTS = (segments_BT[..., None] == jnp.arange(places)).astype(jnp.float32)
    return jnp.einsum("...T,...TS->...S", x_BT, one_hot_BTS, precision=jax.lax.Precision.HIGHEST)


def _log_probabilities(x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, cap: float | None) -> jax.Array:
    """Of every target, some tokens of each row at a time: logits of all of them never exist at once.

    Each chunk's logits are made again in the backward pass. The target's own is picked by a comparison, which stays
    where its part of a split vocabulary lies.
    """
    rows, tokens = targets_BT.shape
    size = max(1, min(tokens, MOST_TOKENS // rows))
    padded = -tokens % size

    def pieces(x_BT: jax.Array) -> jax.Array:
        x_BT = jnp.pad(x_BT, [(0, 0), (0, padded)] + [(0, 0)] * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(rows, -1, size, *x_BT.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_BtD, targets_Bt = piece
        logits_BtV = jnp.einsum("BtD,VD->BtV", x_BtD, w_VD, preferred_element_type=jnp.float32)
        logits_BtV = softcap(logits_BtV, cap)
        hit_BtV = targets_Bt[..., None] == jnp.arange(w_VD.shape[0])
        return jnp.sum(jnp.where(hit_BtV, logits_BtV, 0.0), -1) - jax.nn.logsumexp(logits_BtV, -1)

    found = jax.lax.map(one, (pieces(x_BTD), pieces(targets_BT)))
    return jnp.moveaxis(found, 0, 1).reshape(rows, -1)[:, :tokens]
