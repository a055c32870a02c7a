"""Counts what would make the host wait for an accelerator, on a machine without one."""

from __future__ import annotations

from typing import Any, Self

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Calls that read a tensor on the host. On a CPU `.cpu()` dispatches no operator.
_READING = {"cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__", "__index__"}
# Operators that read values themselves: the size of their result depends on them.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"}


class _Calls(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READING and not (name == "numpy" and self.found[-1:] == ["cpu"]):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class HostTransfers(TorchDispatchMode):
    """Inside the block: `to_host` names the reads, `to_device` counts tensors made from data.

    `.cpu().numpy()` counts once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.to_host: list[str] = []
        self.to_device = 0
        self._calls = _Calls(self.to_host)

    def __enter__(self) -> Self:
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._calls.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in _WAITING:
            self.to_host.append(name)
        self.to_device += name == "lift_fresh"
        return func(*args, **(kwargs or {}))
