"""A device for tests: tensors that claim to be elsewhere ("meta"), hold real values, and refuse what a GPU would.

An operation that mixes them with tensors in host memory raises, as it would on a GPU; so does a launch of a kernel (of
Triton's interpreter) with a tensor elsewhere, without a program, with more than a GPU takes, or while the device is not
the current one. Operations for which the host would wait for a GPU are counted, and so are launches.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from grzoo.embeddings.kernels.triton import launch, storage
from grzoo.models.ops import triton_available
from torch import nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import GridExecutor

DEVICE = torch.device("meta")
MAX_GRID = (2**31 - 1, 65535, 65535)
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten._unique2.default, aten.masked_select.default,
    aten.bincount.default, aten.is_nonzero.default, aten.equal.default,
}  # fmt: skip


class OnDevice(torch.Tensor):
    """A tensor on the simulated device; `inner` has its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> "OnDevice":
        layout = {"strides": real.stride(), "dtype": real.dtype, "device": DEVICE}
        tensor = torch.Tensor._make_wrapper_subclass(cls, real.shape, **layout)
        tensor.inner = real
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return SimulatedDevice.current.run(func, args, kwargs or {})


class SimulatedDevice(TorchDispatchMode):
    """While active, `DEVICE` is the simulated device."""

    current: "SimulatedDevice"

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.is_current = False  # CUDA's current device; another one at first, as on any rank but the first
        SimulatedDevice.current = self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        here = [t for t in tensors if isinstance(t, OnDevice)]
        if func is aten.to.device:  # seen below autograd only
            with self:
                return func.decompose(*args, **kwargs)
        to = kwargs.get("device")
        if here and func not in COPIES:
            strangers = [t for t in tensors if not isinstance(t, OnDevice) and t.ndim]
            assert not strangers, f"{func} mixes the device with host memory: {[t.shape for t in strangers]}"
        lands_here = bool(here) if to is None else torch.device(to).type == DEVICE.type
        if func is aten.copy_.default:
            lands_here = isinstance(args[0], OnDevice)
        if here and func.namespace == "grzoo":  # an operator of ours: what it does is seen too
            with self:
                return OPDEFS[func.name()]._backend_fns[None](*args, **kwargs)
        if here and (func in WAITS or not lands_here or self._waits(func, args, kwargs)):
            self.waits[str(func)] += 1
        if func in COPIES and lands_here and any(not isinstance(t, OnDevice) and t.ndim for t in tensors):
            queued = kwargs.get("non_blocking", False) or (func is aten.copy_.default and any(args[2:]))
            self.waits[f"{func} to the device"] += not queued
        if to is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        result = func(*_real(args), **_real(kwargs))
        if func is aten._local_scalar_dense.default:
            return result
        if func._schema.returns and (alias := func._schema.returns[0].alias_info) is not None and alias.is_write:
            return args[0] if not func._schema.name.endswith("out") else kwargs["out"]
        return tree_map(lambda t: OnDevice(t) if isinstance(t, torch.Tensor) and lands_here else t, result)

    @staticmethod
    def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        if func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
            is_mask = any(i is not None and i.dtype == torch.bool for i in args[1])
            return is_mask and not (func is not aten.index.Tensor and args[2].numel() == 1)
        return func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None


def _real(tree: Any) -> Any:
    return tree_map(lambda t: t.inner if isinstance(t, OnDevice) else t, tree)


def check_launch(device: SimulatedDevice, grid: tuple[int, ...], tensors: list[torch.Tensor]) -> None:
    """Refuse a launch that a GPU would refuse, or do where the tensors are not."""
    assert all(isinstance(t, OnDevice) for t in tensors), "a kernel got a host tensor"
    assert device.is_current, "a kernel was launched while another device was the current one"
    assert all(0 < n <= most for n, most in zip(grid, MAX_GRID, strict=False)), f"a GPU takes no grid {grid}"


@contextlib.contextmanager
def simulated_device(patch: pytest.MonkeyPatch) -> Iterator[SimulatedDevice]:
    """Tables with placement="device" are on the simulated device, and models that `put_on_device` has put there."""
    launched = GridExecutor.__call__

    def launch_here(self: Any, *args: Any, **kwargs: Any) -> Any:
        device.launches[self.fn.__name__] += 1
        check_launch(device, self.grid, [a for a in args if isinstance(a, torch.Tensor)])
        with torch._C._DisableTorchDispatch():
            return launched(self, *_real(args), **kwargs)

    @contextlib.contextmanager
    def current_device(where: Any) -> Iterator[None]:
        before, device.is_current = device.is_current, torch.device(where).type == DEVICE.type
        try:
            yield
        finally:
            device.is_current = before

    made, autocast = torch.tensor, torch.autocast

    def tensor(data: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        """torch.tensor goes to "meta" by a way of its own, without the values."""
        return made(data, device="cpu", **kwargs).to(device or "cpu")

    def autocast_anywhere(device_type: str, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device_type == DEVICE.type else autocast(device_type, **kwargs)

    patch.setattr(torch, "tensor", tensor)
    patch.setattr(torch, "autocast", autocast_anywhere)
    patch.setattr(torch.cuda, "device", current_device)
    patch.setattr(GridExecutor, "__call__", launch_here)
    for module in (launch, triton_available):
        patch.setattr(module, "GPU", DEVICE.type)
    for module in (launch, storage):
        patch.setattr(module, "default_device", lambda: DEVICE)
    device = SimulatedDevice()
    with device:
        yield device


def put_on_device(module: nn.Module) -> nn.Module:
    """Move parameters and buffers, as `module.to(DEVICE)` on a GPU would."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().to(DEVICE), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(DEVICE)
    return module
