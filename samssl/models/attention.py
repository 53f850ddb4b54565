"""Softmax attention by whichever way is fastest where it runs."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

SHORT = 256
"""Up to so many keys a CPU multiplies plain matrices faster than its fused kernel works (fp32 and bf16)."""
LONGEST = 2048
"""Up to so many keys bf16 training on a CPU keeps the scores: the fused backward pass is slower than that.
Beyond, they would take too much memory."""
AT_ONCE = 1 << 24
"""Scores computed at once on a CPU: more would leave its caches."""


def attend(
    q: Float[Tensor, "S heads L d"],
    k: Float[Tensor, "S heads M d"],
    v: Float[Tensor, "S heads M e"],
    *,
    shown: Bool[Tensor, "S M"] | None = None,
) -> Float[Tensor, "S heads L e"]:
    """`softmax(q k^T) v`, in which e may be smaller than d; False in `shown` shuts a key out."""
    mask = None if shown is None else shown[:, None, None]
    if _keeps_scores(q, k):
        at_once = max(1, AT_ONCE // (q.shape[1] * q.shape[2] * k.shape[2]))
        parts = [slice(first, first + at_once) for first in range(0, len(q), at_once)]
        attended = [
            _attend(q[part], k[part], v[part], None if mask is None else mask[part]) for part in parts
        ]
        return attended[0] if len(attended) == 1 else torch.cat(attended)
    wider = q.shape[-1] - v.shape[-1]
    padded = F.pad(v, (0, wider)) if wider else v  # fused kernels want one width for q, k and v
    return F.scaled_dot_product_attention(q, k, padded, attn_mask=mask, scale=1.0)[..., : v.shape[-1]]


def _attend(q: Tensor, k: Tensor, v: Tensor, shown: Tensor | None) -> Tensor:
    """Attention by plain products; contiguous ones, since others fall on slow paths."""
    scores = q @ k.contiguous().transpose(-1, -2)
    if shown is not None:
        scores = scores.masked_fill(~shown, -torch.inf)
    return scores.softmax(-1) @ v.contiguous()


def _keeps_scores(q: Tensor, k: Tensor) -> bool:
    if q.device.type != "cpu" or torch.compiler.is_exporting():  # in parts, a graph has one batch size only
        return False
    trains_in_bf16 = q.dtype == torch.bfloat16 and q.requires_grad
    return k.shape[-2] <= (LONGEST if trains_in_bf16 else SHORT)
