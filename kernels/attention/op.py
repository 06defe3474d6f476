"""The public function `attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import runtime, seeds
from ..relaunch import PARTS, relaunches
from . import dispatch, reference, registered
from .libraries import LIBRARIES
from .masks import Mask, parts_of
from .plan import Shapes, plan_for
from .settings import settings_of

runtime.register_op(
    "attention",
    "softmax(q k^T * scale + mask) v: one or two key sources, media visibility, GQA, dropout",
    has_triton=True,
    details=dispatch.details,
    note=dispatch.note,
)

PARTS[Mask] = parts_of
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@relaunches
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    kv_index: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """dropout(softmax(q k^T * scale + mask)) v over the keys of one or two sources, for few queries or few keys.

    This is the attention of Flamingo's gated cross-attention and Perceiver resampler (arXiv 2204.14198, section 3.1;
    `MaskedCrossAttention` and `PerceiverAttention` in open_flamingo and flamingo_pytorch), of the Q-Former (arXiv
    2301.12597, section 3.1; `Blip2QFormerMultiHeadAttention` in transformers) and of their relatives. The two sources
    are what those concatenate (media and latents), and are not concatenated here.

    Args:
        q: [B, Lq, H, D] in fp64, fp32, bf16 or fp16. Any strides; a batch of stride 0 (expanded) is read as it is.
        k, v: [Bk, Lk, Hkv, D] of q's dtype and device; H % Hkv == 0, and query heads h * H / Hkv up to (h + 1) * H /
            Hkv share key head h.
        extra_k, extra_v: [1 | Bk | B, Le, Hkv, D], a second source that every row sees whole. With one row, all batch
            rows share it; with Bk rows it is read as k is; else row b reads its own.
        mask: what the rows see of the first source; None: all of it. A row that sees no key at all gives exactly 0
            and gets no gradient. Keys and values that nobody sees are never read.
        scale: what q k^T is multiplied with; default D ** -0.5.
        kv_index: [B] int32 or int64: batch row b reads row kv_index[b] of k and v. Default: b // (B // Bk), so that the
            beams of one image share its keys; B % Bk == 0.
        dropout_p: each probability is dropped with this chance, after the softmax, and the kept ones are divided by
            1 - dropout_p. In [0, 1].
        seed: decides the dropout pattern, together with the backend. None: drawn from torch's default CPU generator.

    Returns:
        [B, Lq, H, D] in q's dtype. Scores, softmax and sums are in fp32 (fp64 for fp64). Under autocast, inputs other
        than fp64 are cast to the autocast dtype first, as for `torch.nn.functional.scaled_dot_product_attention`.

    Saved for backward: the inputs, the output, the logsumexp [B, Lq, H] in fp32, and the seed. Differentiable once.
    Equal inputs give bitwise equal outputs and gradients. On a GPU, calls of a kind for which torch's SDPA or xformers
    was measured to be faster go there (`dispatch`; `mllm-fast info` lists them), with what these promise: gradients are
    then repeatable where `torch.use_deterministic_algorithms` asks for it, because our kernels run again.

    Raises:
        ValueError: shapes, dtypes, devices, or mask contents that do not fit.
        BackendUnavailableError: Triton is forced, and cannot serve this call.
    """
    device_type = q.device.type
    if torch.is_autocast_enabled(device_type):
        q, k, v = (_autocast(x, device_type) for x in (q, k, v))
        extra_k, extra_v = (None if x is None else _autocast(x, device_type) for x in (extra_k, extra_v))
    shapes = _shapes(q, k, v, extra_k, extra_v, kv_index)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], but is {dropout_p}")
    if scale is None:
        scale = q.shape[3] ** -0.5
    # The kernels take head dimensions whose elements lie side by side.
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    extra_k, extra_v = (x if x is None or x.stride(3) == 1 else x.contiguous() for x in (extra_k, extra_v))
    given = (q, k, v, extra_k, extra_v)
    on_triton = (
        runtime.choose_for("attention", device_type, lambda: dispatch.unsupported(q.dtype, q.shape[3])) == "triton"
    )
    tracing = torch.compiler.is_compiling()
    if mask is not None and (tracing or on_triton):
        mask.check(q.shape[0], q.shape[1], k.shape[1])
    if on_triton and runtime.current_backend() == "auto":
        library = dispatch.library_for(given, mask, kv_index, dropout_p)
        if library is not None:
            with reference.without_autocast(device_type):
                return LIBRARIES[library](*given, mask, scale)
    if tracing:
        settings = settings_of(mask, kv_index, scale, dropout_p, 0, q.device)
        return registered.run_traced(*given, settings, seeds.drawn_traced(dropout_p, seed), triton=on_triton)
    seed = seeds.drawn(dropout_p, seed)
    if on_triton:
        from . import triton_op

        return triton_op.run(*given, settings_of(mask, kv_index, scale, dropout_p, seed, q.device))
    plan = plan_for(mask, kv_index, shapes, q.device)
    tensors = tuple(x for x in given if x is not None)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        result: Tensor = reference.Attention.apply(plan, scale, dropout_p, seed, *tensors)
        return result
    with reference.without_autocast(device_type):
        return reference.infer(plan, tensors[0], reference.pairs(tensors[1:]), scale, dropout_p, seed)


def _autocast(x: Tensor, device_type: str) -> Tensor:
    """`x` as autocast gives it to an op that runs in the narrow dtype."""
    return x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(torch.get_autocast_dtype(device_type))


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, kv_index: Tensor | None
) -> Shapes:
    """The sizes of the call, checked.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit.
    """
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"q is {list(q.shape)} and k is {list(k.shape)}; expected [batch, length, heads, head_dim] for each"
        )
    batch, _, heads, size = q.shape
    key_rows, _, key_heads, key_size = k.shape
    if v.shape != k.shape:
        raise ValueError(f"v is {list(v.shape)}, but k is {list(k.shape)}; they must have one shape")
    if key_size != size or size == 0:
        raise ValueError(f"q has head_dim {size} and k has {key_size}; they must be equal and at least 1")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"q has {heads} heads and k has {key_heads}; the first must be a multiple of the second")
    _check_kind(q, k=k, v=v)
    if kv_index is not None:
        if kv_index.shape != (batch,) or kv_index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"kv_index is {list(kv_index.shape)} of {kv_index.dtype}; expected [batch={batch}] of int32 or int64"
            )
    elif batch != key_rows and (key_rows == 0 or batch % key_rows):
        raise ValueError(
            f"q has {batch} batch rows and k has {key_rows}; the first must be a multiple of the second, or kv_index "
            "must say which row of k each row of q reads"
        )
    shapes = Shapes.of(q, k, extra_k)
    if extra_k is None and extra_v is None:
        return shapes
    if extra_k is None or extra_v is None:
        raise ValueError("only one of extra_k and extra_v was given; pass both or neither")
    if extra_k.ndim != 4 or extra_k.shape != extra_v.shape or extra_k.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"extra_k is {list(extra_k.shape)} and extra_v is {list(extra_v.shape)}; expected one shape, "
            f"[1, {key_rows} or {batch}, length, {key_heads}, {size}]"
        )
    if extra_k.shape[0] not in (1, key_rows, batch):
        raise ValueError(
            f"extra_k has {extra_k.shape[0]} batch rows; expected 1, k's number ({key_rows}) or q's ({batch})"
        )
    _check_kind(q, extra_k=extra_k, extra_v=extra_v)
    return shapes


def _check_kind(q: Tensor, **others: Tensor) -> None:
    if q.dtype not in _FLOATS:
        raise ValueError(f"q is {q.dtype}; expected one of {', '.join(map(str, _FLOATS))}")
    for name, x in others.items():
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, but q is {q.dtype}; cast them to one dtype, or run under autocast")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}; move them to one device")
