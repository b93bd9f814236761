"""What will be done with a tensor that is not known yet?

    begin ──> a tensor of the same shape stands for it; each operation from here on is looked at:
                  on tensors that come from it    written down, with the other tensors that it takes
                  on others                       nothing is written down: they are computed now
    stop
    play  ──> the operations that were written down, with the tensor itself

Operations are those of torch's dispatcher, below everything that Python code may do with tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MARK = "%"
"""Before the number of a tensor that comes from the unknown one."""


class Tape(TorchDispatchMode):
    """Writes down what is done with a tensor, from `begin` to `stop`.

    Attributes
    ----------
    given : what `begin` was given
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: torch.Tensor | None = None
        self._steps: list[tuple[str, Any, Any]] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []
        self._changed: set[int] = set()
        self._taken: set[int] = set()
        self._runs = False

    def begin(self, given: torch.Tensor, kind: type[torch.Tensor]) -> torch.Tensor:
        """Return what stands for the unknown tensor, of the shape of `given`, and holds NaN.

        Raises
        ------
        RuntimeError
            If there is one already.
        """
        if self.given is not None:
            raise RuntimeError("a block must call its MoE module once, but calls it again")
        self.given, unknown = given, torch.full_like(given, torch.nan).as_subclass(kind)
        self._number(unknown)
        self._runs = True
        self.__enter__()
        return unknown

    def stop(self) -> None:
        if self._runs:
            self._runs = False
            self.__exit__(None, None, None)

    def written(self, out: torch.Tensor) -> dict[str, Any]:
        """What `play` makes `out` of.

        Raises
        ------
        RuntimeError
            If it does not come from the unknown tensor.
        """
        if self.given is None or id(out) not in self._numbers:
            raise RuntimeError(
                "a block's output must come from its MoE module's, but it does not: "
                f"{'the module was not called' if self.given is None else 'it was left out'}"
            )
        shape = list(self.given.shape)
        return {"steps": self._steps, "out": self._numbers[id(out)], "shape": shape}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._taken.intersection(map(_memory_of, _written_by(func, args, kwargs))):
            raise RuntimeError(
                "a block must not change a tensor after it has combined it with its MoE module's "
                f"output, as this one does ({func})"
            )
        takes = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not any(id(tensor) in self._numbers for tensor in takes):
            self._check(takes)
            return func(*args, **kwargs)
        changes = func._schema.is_mutable

        def named(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in self._numbers:
                return f"{MARK}{self._numbers[id(value)]}"
            self._check([value])
            (self._changed if changes else self._taken).add(_memory_of(value))
            return value.clone() if changes else value

        step = (str(func), *tree_map(named, (args, kwargs)))
        out = func(*args, **kwargs)
        tensors = tree_leaves(out)
        sized = torch.Tag.dynamic_output_shape in func.tags
        if sized or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            raise RuntimeError(
                "what a block does must not depend on the numbers of its MoE module's output, "
                f"which are not known yet, but it looks at them ({func})"
            )
        self._steps.append(step)
        for tensor in tensors:
            self._number(tensor)
        return out

    def _number(self, tensor: torch.Tensor) -> None:
        self._numbers[id(tensor)] = len(self._alive)
        self._alive.append(tensor)

    def _check(self, tensors: list[torch.Tensor]) -> None:
        """Raise if one shares its memory with a tensor that was changed by what is not known."""
        if self._changed.intersection(map(_memory_of, tensors)):
            raise RuntimeError(
                "a block may change a tensor by its MoE module's output, but not look at the same "
                "memory through another one afterwards, as this one does"
            )


def _memory_of(tensor: torch.Tensor) -> int:
    """What tells the memory of a tensor and its views from all others."""
    return tensor.untyped_storage()._cdata


def _written_by(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors that an operation writes to."""
    arguments = func._schema.arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    targets = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    leaves = tree_leaves([given.get(name) for name in targets])
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def play(written: dict[str, Any], tensor: torch.Tensor) -> torch.Tensor:
    """Do what was written down, with the tensor itself."""
    values = [tensor.view(written["shape"])]

    def value(name: Any) -> Any:
        known = isinstance(name, str) and name.startswith(MARK)
        return values[int(name[len(MARK) :])] if known else name

    for name, args, kwargs in written["steps"]:
        args, kwargs = tree_map(value, (args, kwargs))
        values += tree_leaves(_operation(name)(*args, **kwargs))
    return values[written["out"]]


def _operation(name: str) -> Any:
    """The operation of a name such as ``aten.add.Tensor``."""
    found = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found
