"""A GPU that is not there: fake tensors on which whatever would wait for the device is an error.

Shapes, dtypes and devices are worked out, and the Triton launchers run as they would on a GPU, up to the launch, which is
recorded. There are no values, so nothing can be read on the host: not by `.item()`, `bool` and `.tolist()`, nor by ops
whose results are as large as the values say, nor by copies to the CPU. The device is torch's PrivateUse1, because fake
tensors on "cuda" need a torch that is built for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mllm_fast.kernels import runtime
from mllm_fast.kernels.attention import dispatch
from mllm_fast.kernels.launch import ARCHITECTURES, Variant, recording
from mllm_fast.modules import children

DEVICE = "fakegpu"
if not hasattr(torch, DEVICE):
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    # What autocast asks of a device, also to be switched off.
    getattr(torch, DEVICE).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    # What torch asks of every device that there is, for as long as this process lives.
    getattr(torch, DEVICE).get_rng_state = lambda *_: torch.empty(0, dtype=torch.uint8)
    getattr(torch, DEVICE).set_rng_state = lambda *_: None
_explain = runtime.explain


class HostReadError(RuntimeError):
    """Something would have waited for the device."""


_READS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "argwhere", "masked_select", "unique_dim", "_unique2",
    "unique_consecutive", "repeat_interleave.Tensor", "multinomial",
}  # fmt: skip


class NoHostReads(TorchDispatchMode):
    """Raises `HostReadError` at any op on the fake GPU that a host would wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, overload = func.overloadpacket.__name__, func._overloadname
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(t.device.type == DEVICE for t in tensors)
        if on_device:
            by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
                t.dtype == torch.bool for t in tree_leaves(args[1]) if isinstance(t, Tensor)
            )
            sized = name == "repeat_interleave" and (overload != "Tensor" or kwargs.get("output_size") is not None)
            if by_mask or (not sized and ({name, f"{name}.{overload}"} & _READS)):
                raise HostReadError(f"{func} reads a tensor on the device")
        if name == "_local_scalar_dense" and not on_device:
            return 0  # what is on the host may be read there
        if name == "_to_copy" and not on_device and torch.device(kwargs.get("device") or "cpu").type == DEVICE:
            # Fake tensors work constants out for real, which this device cannot.
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=DEVICE)
        out = func(*args, **kwargs)
        leaves = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if on_device and any(t.device.type == "cpu" for t in leaves):
            raise HostReadError(f"{func} copies from the device to the host")
        return out


class FakeGpu:
    """Makes fakes, and records launches: see `fake_gpu`."""

    def __init__(self, launches: list[Variant]) -> None:
        self.launches = launches
        self._mode = FakeTensorMode()

    def tensor(self, t: Tensor) -> Tensor:
        """A tensor like `t` on the fake GPU."""
        with self._mode:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE)

    def inputs(self, inputs: Any) -> Any:
        """The same for all tensors in a structure."""
        return tree_map(lambda x: self.tensor(x) if isinstance(x, Tensor) else x, inputs)

    def module(self, module: nn.Module) -> nn.Module:
        """The module itself, its weights moved to the fake GPU for good."""
        moved: dict[int, Any] = {}
        for m in module.modules():
            for table in (m._parameters, m._buffers):
                for name, t in table.items():
                    if t is None:
                        continue
                    if id(t) not in moved:  # tied weights stay one
                        fake = self.tensor(t)
                        moved[id(t)] = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
                    table[name] = moved[id(t)]
        return module

    @contextlib.contextmanager
    def running(self, grad: bool = False) -> Iterator[None]:
        """What runs inside runs on the fake GPU."""
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) must not build a real one
        try:
            with torch.set_grad_enabled(grad), self._mode, NoHostReads():
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(before)


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """A fake H100, which the library takes for a real one."""
    with (
        mock.patch.object(runtime, "triton_unavailable_reason", return_value=None),
        mock.patch.object(runtime, "explain", lambda name, kind: _explain(name, _as_cuda(kind))),
        mock.patch.object(runtime, "chosen", lambda name, kind: _explain(name, _as_cuda(kind))[0]),
        mock.patch.object(dispatch, "architecture_of", return_value="sm_90"),
        # Fake weights are read as the plain ones that they stand for.
        mock.patch.object(children, "_PLAIN", (*children._PLAIN, FakeTensor)),
        recording(ARCHITECTURES["sm_90"]) as launches,
    ):
        yield FakeGpu(launches)


def _as_cuda(device_type: str) -> str:
    return "cuda" if device_type == DEVICE else device_type
