"""Child modules of a block: read their weights where that is safe, call them where it is not.

A kernel wants the bare weight of a linear layer. That is right only for a plain, unhooked `nn.Linear`; a child that
PEFT, bitsandbytes, accelerate, FSDP or a forward hook has wrapped computes something else and must be called.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..kernels.linear import ACTIVATIONS, StackedWeight, can_pack, pack_weight, packed_linear
from ..kernels.norm import Norm
from .rows import Rows, defers_norm
from .state import Derived, needs_graph

# RMSNorm classes of other libraries whose forward is weight * x / rms(x) with fp32 statistics, by class name; a family
# adds the names it knows.
RMS_NORM_CLASSES = {"IdeficsRMSNorm"}
# Begins, or ends, the names of packed weights in a module's `Derived`.
PACKED = "packed"
# Output heads of other libraries, by class name, and when they compute what nn.Linear does; a family adds what it knows.
LINEAR_HEADS: dict[str, Callable[[Any], bool]] = {}


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more, or something else, than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _plain(*tensors: Tensor | None) -> bool:
    return all(t is None or type(t) in _PLAIN for t in tensors)


_PLAIN = (nn.Parameter, Tensor)

# A decode step asks the following of every child, so they look straight into nn.Module's tables: its __getattr__ alone
# would cost as much as all of a block's small ops.


def readable_linear(module: nn.Module) -> bool:
    """Whether `module` is exactly `F.linear(x, module.weight, module.bias)`."""
    if type(module) is not nn.Linear or hooked(module):
        return False
    parameters = module._parameters
    bias = parameters.get("bias", module)  # the module: not among its parameters, and not plain
    return type(parameters.get("weight")) in _PLAIN and (bias is None or type(bias) in _PLAIN)


def readable_head(module: nn.Module) -> bool:
    """Whether `module`, the output head of a language model, is exactly `F.linear(x, module.weight, module.bias)`."""
    is_linear = LINEAR_HEADS.get(type(module).__name__)
    if is_linear is None:
        return readable_linear(module)
    return is_linear(module) and not hooked(module) and _plain(module.weight, module.bias)


def read_norm(module: nn.Module) -> Norm | None:
    """The norm that `module` computes, or None when it has to be called."""
    if hooked(module):
        return None
    kind, parameters = type(module), module._parameters
    weight = parameters.get("weight", module)
    if not _plain(weight):
        return None
    if kind is nn.LayerNorm and len(module.normalized_shape) == 1:
        bias = parameters.get("bias", module)
        return Norm("layer_norm", weight, bias, module.eps) if _plain(bias) else None
    if kind is nn.RMSNorm and len(module.normalized_shape) == 1:
        eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
        return Norm("rms_norm", weight, None, eps)
    return Norm("rms_norm", weight, None, module.variance_epsilon) if kind.__name__ in RMS_NORM_CLASSES else None


def normalize(x: Tensor, norm: nn.Module | Norm) -> Tensor:
    """norm(x), fused where the child can be read."""
    read = norm if isinstance(norm, Norm) else read_norm(norm)
    return norm(x) if read is None else ops.normalize(x, read)


def norm_linear(
    x: Tensor,
    norm: nn.Module | Norm | None,
    linear: nn.Module,
    *,
    activation: str | None = None,
    gate: nn.Module | None = None,
    head_norm: nn.Module | None = None,
    packs: Derived | None = None,
) -> Tensor:
    """act(linear(norm(x))), or act(gate(norm(x))) * linear(norm(x)) for a gated activation.

    `head_norm` is applied to each head of linear(norm(x)), an ungated result without an activation; the heads are as wide as
    its weight. `packs` keeps the linears' packed weights, where the model was fused with them.
    """
    if head_norm is not None:
        return _head_norm_linear(x, norm, linear, head_norm, packs)
    linears_read = readable_linear(linear) and (gate is None or readable_linear(gate))
    if linears_read and serves_packed(packs, x, linear, gate):
        assert packs is not None
        x = x if norm is None else normalize(x, norm)
        if gate is not None:
            return activate(_packed(x, gate, packs), activation) * _packed(x, linear, packs)
        y = _packed(x, linear, packs)
        return y if activation is None else activate(y, activation)
    x, read = _read_or_apply(x, norm, linears_read)
    if linears_read:
        return ops.norm_linear(
            x,
            linear._parameters["weight"],
            linear._parameters["bias"],
            norm=read,
            activation=activation,
            gate_weight=None if gate is None else gate._parameters["weight"],
            gate_bias=None if gate is None else gate._parameters["bias"],
        )
    if gate is not None:
        return activate(gate(x), activation) * linear(x)
    return linear(x) if activation is None else activate(linear(x), activation)


def _read_or_apply(x: Tensor, norm: nn.Module | Norm | None, fuses: bool) -> tuple[Tensor, Norm | None]:
    """x and the norm that is still to be applied to it: `norm` where it can be read and what follows `fuses` it."""
    if norm is None:
        return x, None
    read = norm if isinstance(norm, Norm) else read_norm(norm)
    return (x, read) if read is not None and fuses else (normalize(x, norm), None)


def _head_norm_linear(
    x: Tensor, norm: nn.Module | Norm | None, linear: nn.Module, head_norm: nn.Module, packs: Derived | None
) -> Tensor:
    read, readable = read_norm(head_norm), readable_linear(linear)
    fuses = readable and read is not None and read.kind == "rms_norm" and read.weight is not None
    if fuses and not serves_packed(packs, x, linear):
        x, pending = _read_or_apply(x, norm, True)
        weight, bias = linear._parameters["weight"], linear._parameters["bias"]
        return ops.norm_linear(x, weight, bias, norm=pending, head_norm=read)
    y = norm_linear(x, norm, linear, packs=packs)
    return normalize(y.unflatten(-1, (-1, head_norm.weight.shape[0])), head_norm).flatten(-2)


def activate(x: Tensor, activation: str | None) -> Tensor:
    """The activation behind `norm_linear`'s name for it; "swiglu" and "geglu" name the function of their gate."""
    return ACTIVATIONS[{"swiglu": "silu", "geglu": "gelu"}.get(activation or "", activation)](x)


def linear_residual(
    x: Tensor,
    linear: nn.Module,
    residual: Tensor,
    *,
    gate: Tensor | None = None,
    row_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    packs: Derived | None = None,
) -> Tensor:
    """residual + tanh(gate) * row_mask * dropout(linear(x)), in one op where the child can be read."""
    readable = readable_linear(linear)
    packed = readable and serves_packed(packs, x, linear)
    if readable and not packed:
        weight, bias = linear._parameters["weight"], linear._parameters["bias"]
        return ops.linear_residual(
            x, weight, bias, residual=residual, gate=gate, row_mask=row_mask, dropout_p=dropout_p
        )
    branch = _packed(x, linear, packs) if packed and packs is not None else linear(x)
    if dropout_p > 0:
        branch = F.dropout(branch, dropout_p)
    if gate is not None:
        return ops.gated_residual(residual, branch, gate, row_mask)
    return residual + (branch if row_mask is None else branch * row_mask.unsqueeze(-1))


def linear_post_norm(
    x: Tensor,
    linear: nn.Module,
    norm: nn.Module,
    residual: Rows,
    *,
    dropout_p: float = 0.0,
    packs: Derived | None = None,
    defer: bool = False,
) -> Rows:
    """norm(residual + dropout(linear(x))), the post-norm edge of a BERT block; one op where both children can be read.

    Args:
        x: [..., K].
        residual: [..., N].
        dropout_p: 0 in evaluation.
        packs: keeps the linear's packed weight, where the model was fused with it.
        defer: leave the norm pending where that saves a launch.

    Returns:
        [..., N].
    """
    read, readable = read_norm(norm), readable_linear(linear)
    packed = readable and serves_packed(packs, x, linear)
    if read is None or packed or not readable:
        y, values = norm_linear(x, None, linear, packs=packs), residual.normalized()
        if read is not None:
            return Rows(ops.layer_norm(y, read.weight, read.bias, read.eps, residual=values, dropout_p=dropout_p))
        return Rows(norm(values + F.dropout(y, dropout_p, dropout_p > 0)))
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    deferred = defer and dropout_p == 0 and defers_norm(x, weight, bias, residual.values, read.weight, read.bias)
    values = ops.linear_residual(
        x,
        weight,
        bias,
        residual=residual.values,
        residual_norm=residual.norm,
        norm=None if deferred else read,
        dropout_p=dropout_p,
    )
    return Rows(values, read if deferred else None)


def serves_packed(packs: Derived | None, x: Tensor, *linears: nn.Module | None, names: Iterable[Hashable] = ()) -> bool:
    """Whether packed weights may stand for these linears in this call: CPU inference in the weights' own dtype.

    Where they may not, those that `packs` keeps of them are dropped, and what it keeps under `names`: training, or a cast,
    is not to pay for a second copy of the weights.
    """
    if packs is None:
        return False
    served = _can_serve_packed(x, linears)
    if not served:
        packs.forget(*((PACKED, id(linear)) for linear in linears), *names)
    return served


def _can_serve_packed(x: Tensor, linears: Iterable[nn.Module | None]) -> bool:
    if torch.is_autocast_enabled("cpu"):
        return False
    for linear in linears:
        if linear is not None:
            weight, bias = linear._parameters["weight"], linear._parameters["bias"]
            if x.dtype != weight.dtype or not can_pack(weight) or needs_graph(x, weight, bias):
                return False
    return True


def _packed(x: Tensor, linear: nn.Module, packs: Derived) -> Tensor:
    weight = linear._parameters["weight"]
    packed = packs.get((PACKED, id(linear)), (weight,), lambda: pack_weight(weight))
    return packed_linear(x, packed, linear._parameters["bias"])


def stacked_linear(
    x: Tensor, stacked: StackedWeight, norm: Norm | None, name: Hashable, packs: Derived | None = None
) -> tuple[Tensor, ...]:
    """`ops.stacked_linear`, over packed weights where the model was fused with them; `name` tells stacks apart."""
    weight = stacked.weight
    if packs is None:
        return ops.stacked_linear(x, stacked, norm=norm)
    served = can_pack(weight) and x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
    if not served or needs_graph(x, weight, stacked.bias):
        packs.forget((PACKED, name))
        return ops.stacked_linear(x, stacked, norm=norm)
    packed = packs.get((PACKED, name), (weight,), lambda: pack_weight(weight))
    return packed_linear(x if norm is None else ops.normalize(x, norm), packed, stacked.bias).split(stacked.sizes, -1)


def weights_of(children: Sequence[nn.Module]) -> tuple[list[Tensor | None], Hashable] | None:
    """The tensors that the children's outputs depend on, and an equally deciding hashable; None if that is not known.

    Known are plain linears, bitsandbytes linears, and PEFT layers in eval mode. A hooked child may do anything.
    """
    tensors: list[Tensor | None] = []
    extras: list[Hashable] = []
    for child in children:
        if readable_linear(child):
            tensors += (child.weight, child.bias)
            continue
        if any(hooked(m) for m in child.modules()) or (child.training and _has_dropout(child)):
            return None
        tensors += (*child.parameters(), *child.buffers())
        extras.append(_adapter_state(child))
    if not _plain_storage(tensors):
        return None
    return tensors, tuple(extras)


def _has_dropout(child: nn.Module) -> bool:
    return any(getattr(m, "p", 0) for m in child.modules() if isinstance(m, nn.modules.dropout._DropoutNd))


def _adapter_state(child: nn.Module) -> Any:
    """What of a PEFT layer changes its output without changing a tensor."""
    if not hasattr(child, "active_adapters"):
        return type(child)
    return (
        type(child),
        tuple(child.active_adapters),
        bool(getattr(child, "disable_adapters", False)),
        tuple(getattr(child, "merged_adapters", ())),
        tuple(sorted(getattr(child, "scaling", {}).items())),
    )


def _plain_storage(tensors: Sequence[Tensor | None]) -> bool:
    try:
        for t in tensors:
            if t is not None:
                t.untyped_storage()
    except (RuntimeError, NotImplementedError):  # sharded and fake tensors own no storage of their own
        return False
    return True


def resolve(module: nn.Module, path: str) -> Any:
    """The child or parameter at a dotted path: `resolve(block, "attn.to_q")`."""
    found: Any = module
    for name in path.split("."):
        child = found._modules.get(name)
        if child is None:
            child = found._parameters.get(name)
        found = getattr(found, name) if child is None else child
    return found
