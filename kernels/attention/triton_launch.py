"""Launches the attention kernels: forward with its logsumexp, and all gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..relaunch import launch
from ..sizes import cdiv, next_power_of_2
from ..sums import column_sums
from ..target import Arch, arch_of, keep_scale, on_device, precision
from . import configs
from .configs import Config, Media
from .settings import Settings
from .triton_keys import attention_keys
from .triton_rows import attention_combine, attention_rows

# Few rows: those of all batch rows that read one key row share a tile.
PACKED_ROWS = 16


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    settings: Settings,
    *,
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The output [B, Lq, H, D] and the logsumexp [B, Lq, H] in fp32, -inf for rows that see nothing.

    Args:
        q, k, v, extra_k, extra_v: as for `attention`, checked, the last dimension contiguous.
        settings: the rest.
        config, splits: instead of the chosen ones.
    """
    batch, queries, heads, width = q.shape
    key_heads, keys = k.shape[2], k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    arch, media = arch_of(q.device), _media(settings)
    group = heads // key_heads
    pack = _pack(q, k, extra_k, settings)
    rows, clusters = queries * group * pack, batch // pack
    if config is None:
        tiles = cdiv(rows, 128) * key_heads * clusters
        burden = _burden(settings, extra_k)
        config = configs.forward_config(arch, rows, tiles, width, q.element_size(), media, burden)
    programs = cdiv(rows, config.BM) * key_heads * clusters
    if splits is None:
        splits = configs.splits_for(arch, programs, keys, settings.images, config.BN)
    target, target_lse = out, lse
    if splits > 1:
        target = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
        target_lse = torch.empty(splits, *q.shape[:3], dtype=torch.float32, device=q.device)
    with on_device(q):
        _launch_rows(programs * splits, q, k, v, extra_k, extra_v, None, target, target_lse, settings, pack, splits,
                     config, arch)  # fmt: skip
        if splits > 1:
            total = batch * queries * heads
            launch(
                attention_combine, (total,),
                target, target_lse, out, lse, total,
                SPLITS=splits, D=width, BD=next_power_of_2(width), num_warps=2,
            )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    settings: Settings,
    *,
    query_config: Config | None = None,
    key_config: Config | None = None,
    parts: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, and those of the second source; each contiguous, in the dtype of what it is the gradient of."""
    batch, queries, heads, width = q.shape
    key_heads = k.shape[2]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if dq.numel() == 0:
        zeros = [
            None if x is None else torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (extra_k, extra_v)
        ]
        return dq, torch.zeros_like(k), torch.zeros_like(v), zeros[0], zeros[1]
    if grad.stride(3) != 1:
        grad = grad.contiguous()
    arch, media = arch_of(q.device), _media(settings)
    group = heads // key_heads
    pack = _pack(q, k, extra_k, settings)
    rows = queries * group * pack
    if query_config is None:
        burden = _burden(settings, extra_k)
        query_config = configs.query_gradient_config(arch, rows, width, q.element_size(), media, burden)
    delta = torch.empty_like(lse)
    with on_device(q):
        programs = cdiv(rows, query_config.BM) * key_heads * (batch // pack)
        _launch_rows(programs, q, k, v, extra_k, extra_v, (grad, out, delta), dq, lse, settings, pack, 1,
                     query_config, arch)  # fmt: skip
        order = None
        if settings.kv_index is not None:
            order = _order(settings.kv_index, k.shape[0])
        same = (q, grad, lse, delta, settings)
        fold = batch // k.shape[0] if order is None else 1
        dk, dv = _launch_keys(*same, k, v, fold, order, key_config, parts, extra_k)
        if extra_k is None or extra_v is None:
            return dq, dk, dv, None, None
        if extra_k.shape[0] == 1:
            fold, order = batch, None
        elif extra_k.shape[0] == k.shape[0]:
            fold = batch // k.shape[0] if order is None else 1
        else:
            fold, order = 1, None
        extra = _launch_keys(*same, extra_k, extra_v, fold, order, key_config, parts, None, key_base=k.shape[1])
        return dq, dk, dv, *extra


def _launch_rows(
    programs: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    gradient: tuple[Tensor, Tensor, Tensor] | None,
    target: Tensor,
    lse: Tensor,
    settings: Settings,
    pack: int,
    splits: int,
    config: Config,
    arch: Arch,
) -> None:
    """Forward; or with `gradient` (dO, output, delta), backward, which writes delta."""
    s = settings
    grad, out, delta = gradient or (None, None, None)
    batch, queries, heads, width = q.shape
    key_rows, keys, key_heads, _ = k.shape
    D0, D1 = configs.blocks_of(width, q.element_size())
    masks, media_strides, words = _masks(s, batch)
    extra_strides = (0,) * 6
    extra_keys, own = 0, False
    if extra_k is not None and extra_v is not None:
        extra_keys, own = extra_k.shape[1], _own_extra(extra_k, k)
        shared = extra_k.shape[0] == 1
        extra_strides = tuple(
            0 if shared and i == 0 else stride for x in (extra_k, extra_v) for i, stride in enumerate(x.stride()[:3])
        )
    launch(
        attention_rows, (programs,),
        q, k, v, extra_k, extra_v, grad, out, delta, target, lse, *masks, s.kv_index,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *extra_strides,
        *((0, 0, 0) if grad is None else grad.stride()[:3]), *media_strides,
        batch, queries, keys, extra_keys, key_heads, heads // key_heads, pack,
        1 if s.kv_index is not None else batch // key_rows,
        s.prefix, s.images, s.tokens, s.scale, s.dropout_p, keep_scale(s.dropout_p), s.seed,
        BACKWARD=grad is not None, CAUSAL=s.causal, UNIFORM=_uniform(s, extra_k), EXTRA_OWN=own,
        DROPOUT=s.dropout_p > 0, IMAGE_WORDS=words, SPLITS=splits, EIGHTS=_eights(q, k, v, grad, extra_k, extra_v),
        D=width, D0=D0, D1=D1, BM=config.BM, BN=config.BN,
        PRECISION=precision(arch, q.dtype), **config.options,
    )  # fmt: skip


def _launch_keys(
    q: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    settings: Settings,
    k: Tensor,
    v: Tensor,
    fold: int,
    order: tuple[Tensor, Tensor] | None,
    config: Config | None,
    parts: tuple[int, int] | None,
    extra_k: Tensor | None,
    key_base: int | None = None,
) -> tuple[Tensor, Tensor]:
    """dk and dv of one source; with key_base it is the second one, which no mask concerns."""
    s, first = settings, key_base is None
    batch, queries, heads, width = q.shape
    key_rows, keys, key_heads, _ = k.shape
    if k.numel() == 0:
        return torch.empty_like(k), torch.empty_like(v)
    D0, D1 = configs.blocks_of(width, q.element_size())
    arch = arch_of(q.device)
    masks, media_strides, words = _masks(s, batch) if first else ((None,) * 5, (0, 0), 0)
    group = heads // key_heads
    if config is None:
        # A program goes over one of the sources, and no mask concerns the second.
        burden = _burden(s, extra_k) - (extra_k is not None) if first else int(s.dropout_p > 0)
        config = configs.key_gradient_config(
            arch, queries * group, width, q.element_size(), _media(s) if words else None, burden
        )
    blocks = s.images * cdiv(s.tokens, config.BN) if words else cdiv(keys, config.BN)
    programs = blocks * key_heads * key_rows
    if parts is None:
        # With kv_index, how many rows read a key row is on the device: as many each, says the guess.
        sharing = max(1, batch // key_rows) if order is not None else fold
        tiles = cdiv(queries * group, config.BM)
        parts = configs.parts_for(arch, programs, sharing, tiles, s.images if words else 0)
    number = parts[0] * parts[1]
    shape, dtype = (k.shape, k.dtype) if number == 1 else ((number, *k.shape), torch.float32)
    dk, dv = (torch.empty(shape, dtype=dtype, device=k.device) for _ in "kv")
    attention_keys[(programs * number,)](
        q, k, v, grad, lse, delta, dk, dv, *masks, *(order or (None, None)),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], *media_strides, k.numel(),
        queries, keys, key_base or 0, key_rows, key_heads, group, fold, *parts, s.prefix, s.images, s.tokens,
        s.scale, s.dropout_p, keep_scale(s.dropout_p), s.seed,
        CAUSAL=s.causal and first, UNIFORM=first and _uniform(s, extra_k), DROPOUT=s.dropout_p > 0, IMAGE_WORDS=words,
        EIGHTS=_eights(q, k, v, grad), D=width, D0=D0, D1=D1, BM=config.BM, BN=config.BN,
        PRECISION=precision(arch, q.dtype), **config.options,
    )  # fmt: skip
    if number == 1:
        return dk, dv
    return column_sums(dk.view(number, -1), k.shape, k.dtype), column_sums(dv.view(number, -1), k.shape, k.dtype)


def _masks(s: Settings, batch: int) -> tuple[tuple[Tensor | None, ...], tuple[int, int], int]:
    """(key_lengths, key_padding, first, last, words) as the kernels take them, media strides, and words a row."""
    padding = None if s.key_padding is None else s.key_padding.contiguous().view(torch.uint8)
    lengths = None if s.key_lengths is None else s.key_lengths.contiguous()
    if s.images == 0:
        return (lengths, padding, None, None, None), (0, 0), 0
    number = cdiv(s.images, 64)
    if s.words is not None:
        words = s.words if s.words.stride(2) == 1 else s.words.contiguous()
        strides = words.stride()
        return (lengths, padding, None, None, words), (strides[0] if words.shape[0] > 1 else 0, strides[1]), number
    assert s.first is not None
    assert s.last is not None
    first, last = s.first, s.last
    if first.stride() != last.stride():
        first, last = first.contiguous(), last.contiguous()
    strides = first.stride()
    return (lengths, padding, first, last, None), (strides[0] if first.shape[0] > 1 else 0, strides[1]), number


def _pack(q: Tensor, k: Tensor, extra_k: Tensor | None, s: Settings) -> int:
    """How many batch rows share a tile."""
    batch, queries, heads, _ = q.shape
    fold = 1 if s.kv_index is not None or k.shape[0] == 0 else batch // k.shape[0]
    if fold == 1 or fold * queries * heads // k.shape[2] > PACKED_ROWS or s.key_padding is not None:
        return 1
    # Rows with lengths of their own could leave holes in an image, which nobody sees and yet would be read.
    own_ends = s.key_lengths is not None and s.images > 0
    return 1 if own_ends or (extra_k is not None and _own_extra(extra_k, k)) else fold


def _own_extra(extra_k: Tensor, k: Tensor) -> bool:
    return extra_k.shape[0] not in (1, k.shape[0])


def _uniform(s: Settings, extra_k: Tensor | None) -> bool:
    """Next to any real score, the constant scores of rows beyond the images vanish."""
    return s.beyond_mean and s.images > 0 and (extra_k is None or extra_k.shape[1] == 0)


def _burden(s: Settings, extra_k: Tensor | None) -> int:
    """As `configs` counts it."""
    parts = (s.key_lengths is not None, s.key_padding is not None, s.causal, _uniform(s, extra_k), extra_k is not None)
    return (s.dropout_p > 0) + sum(parts)


def _eights(q: Tensor, *others: Tensor | None) -> bool:
    """Whether to tell the compiler that heads lie multiples of 8 apart, because it cannot see multiples of 16."""
    return q.shape[3] % 16 == 8 and all(x is None or x.stride(2) % 8 == 0 for x in (q, *others))


def _media(s: Settings) -> Media | None:
    return Media(s.tokens, cdiv(s.images, 64)) if s.images else None


def _order(kv_index: Tensor, key_rows: int) -> tuple[Tensor, Tensor]:
    """The batch rows ordered by the key row that they read, and where each key row's begin."""
    ordered, rows = torch.sort(kv_index, stable=True)
    bounds = torch.arange(key_rows + 1, dtype=ordered.dtype, device=ordered.device)
    return rows, torch.searchsorted(ordered, bounds)
