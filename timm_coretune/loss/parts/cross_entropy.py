"""Cross-entropy of rows, also where logits of -inf exclude classes"""

from typing import Optional

import torch

from ...mining import at_least_float32


def nll(
    log_p: torch.Tensor,
    target: torch.Tensor,
    smoothing: float = 0.0,
    class_weight: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Cross-entropy of each row (B,) in nats.

    Args:
        log_p: Log-probabilities (B, C).
        target: Class indices (B,) int64, or soft targets (B, C).
        smoothing: Share of a class index target that is spread evenly over all classes.
        class_weight: Factor for the log-probability of each class (C,). Being linear in the target, the cross-entropy
            of a mixture of two targets is the mixture of their weighted cross-entropies.
    """
    if class_weight is not None:
        log_p = finite(log_p) * class_weight.to(log_p.dtype)
    if target.ndim == 2:
        # 0 * -inf would be NaN: a class that is excluded costs nothing if the target has no share of it
        return -(target.to(log_p.dtype) * finite(log_p)).sum(dim=-1)
    loss = -log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return torch.lerp(loss, -log_p.mean(dim=-1), smoothing) if smoothing else loss


def finite(x: torch.Tensor) -> torch.Tensor:
    """Raise -inf to the lowest finite number, in float32 or better, so that it can be mixed. NaN and inf stay."""
    x = at_least_float32(x)
    return x.clamp(min=torch.finfo(x.dtype).min)


def infinite_again(loss: torch.Tensor) -> torch.Tensor:
    """Turn the losses that come of the lowest finite number into inf, which they stand for."""
    return loss.masked_fill(loss > 1e-8 * torch.finfo(loss.dtype).max, float('inf'))
