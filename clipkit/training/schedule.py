"""The learning rate as a function of the step."""

import math
import re


def warmup_steps(warmup: str, *, total_steps: int, global_batch_size: int) -> int:
    """Read a warm-up: steps ("500"), a share of the run ("2%") or samples ("50k samples").

    Raises:
      ValueError: the text is none of these.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kKmM]?)\s*(%|samples|steps)?\s*", warmup)
    if not match:
        raise ValueError(f'schedule.warmup is {warmup!r}; give steps ("500"), a share ("2%") or samples ("50k samples")')
    number = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6}[match[2].lower()]
    if match[3] == "%":
        return round(total_steps * number / 100)
    return round(number / global_batch_size) if match[3] == "samples" else round(number)


def cosine(progress: float) -> float:
    """1 at progress 0, 0 at progress 1 (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(step: int, *, name: str, peak: float, warmup: int, total_steps: int, cooldown: float = 0.0) -> float:
    """Return the learning rate of a step.

    Args:
      step: Optimizer step, from 0.
      name: "cosine" to 0; "constant"; "constant_with_cooldown", which falls to 0 linearly at the end.
      peak: Learning rate after warm-up.
      warmup: Steps of linear warm-up; step s has peak * (s + 1) / warmup.
      total_steps: Steps of the whole run.
      cooldown: Share of the run that constant_with_cooldown falls in.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if name == "cosine":
        return peak * cosine((step - warmup) / max(1, total_steps - warmup))
    if name == "constant_with_cooldown":
        fall = round(cooldown * total_steps)
        return peak * min(1.0, (total_steps - step) / max(1, fall))
    assert name == "constant", name
    return peak
