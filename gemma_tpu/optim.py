"""The optimizer and its schedule, by optax, from the config's `optim` section."""

import optax

from gemma_tpu.schema import OptimConfig


def schedule(section: OptimConfig, total_steps: int) -> tuple[optax.Schedule, list[str]]:
    """The learning rate by step, and what had to be changed to make it fit a short run (said, never silent)."""
    notes = []
    warmup = section.warmup_steps
    if warmup >= total_steps:
        warmup = total_steps // 10
        notes.append(f"optim.warmup_steps {section.warmup_steps} clamped to {warmup}: the run has {total_steps} steps")
    rest = max(total_steps - warmup, 1)
    shapes = {
        "cosine": lambda: optax.cosine_decay_schedule(section.lr, rest),
        "linear": lambda: optax.linear_schedule(section.lr, 0.0, rest),
        "constant": lambda: optax.constant_schedule(section.lr),
    }
    rise = optax.linear_schedule(0.0, section.lr, max(warmup, 1))
    # Step 0 already moves: the ramp counts from 1, or the first batch would be trained at rate zero.
    ramp = optax.join_schedules([lambda step: rise(step + 1), shapes[section.schedule]()], [warmup])
    return ramp, notes


def optimizer(section: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    clip = optax.identity() if section.clip is None else optax.clip_by_global_norm(section.clip)
    adamw = optax.adamw(rate, b1=section.b1, b2=section.b2, eps=section.eps, weight_decay=section.weight_decay)
    return optax.chain(clip, adamw)
