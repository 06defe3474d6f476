"""Loss and gradient of a chunk of logits in plain PyTorch: the definition, and the CPU implementation."""

from __future__ import annotations

import torch
from torch import Tensor


def chunk_loss(
    logits: Tensor, targets: Tensor, label_smoothing: float, softcap: float | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of some rows, and its gradient with respect to their logits.

    With z = softcap * tanh(logits / softcap), or the logits themselves, and e = label_smoothing:
        loss_r = (1 - e) (lse(z_r) - z_r[target]) + e (lse(z_r) - mean(z_r))
        d loss_r / d z_r = softmax(z_r) - (1 - e) onehot(target) - e / V

    Args:
        logits: [R, V]; may be overwritten.
        targets: [R] int64 in [0, V).
        label_smoothing, softcap: as above.
        gradient: whether it is wanted.

    Returns:
        The sum over the rows in fp32 (fp64 for fp64 logits), and the gradient [R, V] in the dtype of `logits`.
    """
    dtype, size = logits.dtype, logits.shape[1]
    z = logits if dtype == torch.float64 else logits.float()
    slope = None
    if softcap is not None:
        t = torch.tanh(z / softcap)
        z = t * softcap
        slope = t.square_().neg_().add_(1.0) if gradient else None
    lse = torch.logsumexp(z, dim=1)
    picked = z.gather(1, targets.unsqueeze(1)).squeeze(1)
    losses = lse - picked
    if label_smoothing:
        losses = losses + label_smoothing * (picked - z.mean(dim=1))
    if not gradient:
        return losses.sum(), None
    z = z.sub_(lse.unsqueeze(1)).exp_()
    z.scatter_add_(1, targets.unsqueeze(1), z.new_full((1, 1), label_smoothing - 1.0).expand(len(targets), 1))
    if label_smoothing:
        z.sub_(label_smoothing / size)
    if slope is not None:
        z.mul_(slope)
    return losses.sum(), z.to(dtype)
