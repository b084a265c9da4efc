"""Memory counted without being used: fake tensors have shapes and storages, and no numbers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_bytes(forward: Callable[[], object], module: nn.Module) -> int:
    """What a forward pass keeps for its backward pass, beside the module's own weights."""
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive, at most; those of a module's weights apart."""

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        own = module.parameters() if module else ()
        self._own = {parameter.untyped_storage()._cdata for parameter in own}
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}
        self._now = self.most = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return made

    def _meet(self, storage: torch.UntypedStorage) -> None:
        known = self._known.get(storage._cdata)
        if storage._cdata in self._own or (known and not known[0].expired()):
            return
        self._now += storage.nbytes() - (known[1] if known else 0)
        self._known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.largest = max(self.largest, storage.nbytes())
        if self._now > self.most:  # some of them are gone
            for number in [n for n, (one, _) in self._known.items() if one.expired()]:
                self._now -= self._known.pop(number)[1]
            self.most = max(self.most, self._now)
