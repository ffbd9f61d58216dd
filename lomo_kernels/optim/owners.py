"""Which optimizer manages a parameter, and which optimizer's backward runs. Only this optimizer gets gradients from it.

Nothing here holds a weak reference to a tensor: `torch.utils.swap_tensors` refuses a tensor that has one.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .managed_parameter import ManagedParameter
from .placement import local_of


class Owner(Protocol):
    """What this module knows of the `Training` of an optimizer."""

    managed_params: list[ManagedParameter]
    steps: Any  # a `Steps`, whose `current` one may run in whatever thread
    attachment: Any  # an `Attachment`


#: By id of the parameter, which its optimizer keeps alive.
_owners: dict[int, weakref.ref[Any]] = {}
#: The optimizers that manage parameters, by id.
live: dict[int, weakref.ref[Any]] = {}


def claim(ids: Iterable[int], owner: weakref.ref[Any]) -> None:
    """Notes that `owner` manages the parameters of these ids."""
    _owners.update(dict.fromkeys(ids, owner))
    live[id(owner())] = owner


def release(ids: list[int]) -> None:
    """Forgets what `claim` noted of parameters, and empties `ids`."""
    while ids:
        _owners.pop(ids.pop(), None)


def forget(owner_id: int) -> None:
    """Forgets an optimizer, whose parameters were released."""
    live.pop(owner_id, None)


def owner_of(param: Tensor) -> Any | None:
    """The live optimizer that manages `param`."""
    reference = _owners.get(id(param))
    return None if reference is None else reference()


def other_owners(managed_params: Iterable[ManagedParameter], new: Owner) -> list[Any]:
    """Optimizers besides `new` that manage some of `managed_params`. Raises RuntimeError if one is amid a step."""
    others: dict[int, Any] = {}
    for managed in managed_params:
        owner = owner_of(managed.param)
        if owner is None or owner is new:
            continue
        if owner.steps.current is not None:
            raise RuntimeError(
                f"Lomo: {managed.name} is managed by another Lomo, which is amid a step. Nothing was changed. Make the "
                "new optimizer after this step"
            )
        others[id(owner)] = owner
    return list(others.values())


# ---- Whose backward runs --------------------------------------------------------------------------------------------

_KEY = "lomo_kernels.optimizer_backward"


class OptimizerBackward:
    """One backward that an optimizer runs. It leaves no gradient on parameters that other live optimizers manage.

    The hooks of those parameters drop such a gradient as soon as it exists, also inside a reentrant checkpoint.
    Autograd would add it in place to a gradient that is in ``.grad`` already. So the older one is set aside meanwhile.

    Args:
        owner: of the optimizer that runs the backward.
    """

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self._watched: set[int] = set()  # ids of parameters that had a gradient
        self._aside: dict[int, tuple[Tensor, Tensor | None]] = {}  # parameter and gradient, by id of the parameter
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def begin(self) -> None:
        for reference in list(live.values()):
            other = reference()
            if other is None or other is self.owner:
                continue
            other.attachment.hook_all()
            for managed in other.managed_params:
                if managed.param.grad is None or not managed.param.requires_grad:
                    continue
                if local_of(managed.param) is not managed.param:  # FSDP2 and ZeRO-3 call no tensor hooks
                    self._set_aside(managed.param)
                    continue
                self._watched.add(id(managed.param))
                self._handles.append(managed.param.register_hook(self._before_accumulation(managed.param)))

    def end(self) -> None:
        """Removes the hooks, and gives back gradients that are still set aside after an error."""
        for handle in self._handles:
            handle.remove()
        for param, grad in self._aside.values():
            param.grad = grad

    def drop(self, param: Tensor) -> None:
        """Called by the hook of another optimizer's parameter. Makes its ``.grad`` what it was before this backward."""
        if id(param) not in self._watched:
            param.grad = None
        elif id(param) in self._aside:
            _, param.grad = self._aside.pop(id(param))

    def _set_aside(self, param: Tensor) -> None:
        self._aside[id(param)] = param, param.grad
        param.grad = None

    def _before_accumulation(self, param: Tensor) -> Any:
        def hook(_: Tensor | None) -> None:
            if optimizer_backward() is self:
                self._set_aside(param)

        return hook


def optimizer_backward() -> OptimizerBackward | None:
    """The innermost backward of a `Lomo` in which the caller runs. The caller may be a hook in a thread of autograd."""
    backward = torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None
    # An interrupt may have kept `Step.leave` from removing the entry.
    return backward if backward is not None and backward.owner.steps.current is not None else None


def set_optimizer_backward(backward: OptimizerBackward | None) -> None:
    """Sets what `optimizer_backward` returns. It is kept in torch's thread-local objects, which autograd copies to its
    own threads."""
    if _STASH_TAKES_A_REFERENCE:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(backward))
    torch._C._stash_obj_in_tls(_KEY, backward)


def _stash_takes_a_reference() -> bool:
    """Whether torch releases, with an entry, a reference that it never acquired. That of 2.11 does, and frees objects
    that others hold."""
    stashed = object()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(stashed))  # the reference that may be taken; else 16 bytes stay
    before = sys.getrefcount(stashed)
    torch._C._stash_obj_in_tls(_KEY, stashed)
    return sys.getrefcount(stashed) == before


_STASH_TAKES_A_REFERENCE = _stash_takes_a_reference()
set_optimizer_backward(None)


def unmanaged_leaves(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Those of `leaves` that no live optimizer manages. They get the ``.grad`` of a plain backward."""
    return [leaf for leaf in leaves if (owner := _owners.get(id(leaf))) is None or owner() is None]
