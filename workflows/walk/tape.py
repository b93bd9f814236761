"""Which operations will use a tensor that is not known yet?

    begin ──> a placeholder of the same shape; from here on each operation is intercepted:
                  on tensors that depend on it    recorded, with the other tensors that it takes
                  on others                       computed now, and not recorded
    stop
    play  ──> the recorded operations run on the tensor itself

Operations are those of torch's dispatcher, below everything that Python code may do with tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MARK = "%"
"""Prefix of the number of a tensor that depends on the unknown one."""


class Tape(TorchDispatchMode):
    """Records what is done with a tensor between `begin` and `stop`.

    Attributes
    ----------
    given : the tensor that was passed to `begin`
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: torch.Tensor | None = None
        self._shape: list[int] = []
        self._steps: list[tuple[str, Any, Any]] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []
        self._changed: set[int] = set()
        self._taken: set[int] = set()
        self._runs = False

    def begin(
        self, given: torch.Tensor, kind: type[torch.Tensor], shape: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return a placeholder for the unknown tensor: NaN, by default in the shape of `given`.

        Raises
        ------
        RuntimeError
            If it was called before.
        """
        if self.given is not None:
            raise RuntimeError("a block must call its MoE module once, but calls it again")
        self.given, self._shape = given, list(given.shape if shape is None else shape)
        unknown = given.new_full(self._shape, torch.nan).as_subclass(kind)
        self._number(unknown)
        self._runs = True
        self.__enter__()
        return unknown

    def stop(self) -> None:
        if self._runs:
            self._runs = False
            self.__exit__(None, None, None)

    def written(self, out: torch.Tensor) -> dict[str, Any]:
        """Return the record from which `play` computes `out`.

        Raises
        ------
        RuntimeError
            If `out` does not depend on the unknown tensor.
        """
        if self.given is None or id(out) not in self._numbers:
            raise RuntimeError(
                "a block's output must depend on its MoE module's output, but "
                f"{'the module was not called' if self.given is None else 'it was not used'}"
            )
        return {"steps": self._steps, "out": self._numbers[id(out)], "shape": self._shape}

    def check_known(self, values: Iterable[Any]) -> None:
        """Raise if what a block hands on, besides its output, depends on the unknown tensor."""
        if any(id(value) in self._numbers for value in values):
            raise RuntimeError(
                "only a block's hidden states may depend on its MoE module's output, but something "
                "else that it returns does too"
            )

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
                "what a block does must not depend on the values of its MoE module's output, "
                f"which are not known yet, but this one reads them ({func})"
            )
        self._steps.append(step)
        for tensor in tensors:
            self._number(tensor)
        return out

    def _number(self, tensor: torch.Tensor) -> None:
        self._numbers[id(tensor)] = len(self._alive)
        self._alive.append(tensor)

    def _check(self, tensors: list[torch.Tensor]) -> None:
        """Raise if one shares memory with a tensor that an unknown value was written to."""
        if self._changed.intersection(map(_memory_of, tensors)):
            raise RuntimeError(
                "a block must not read memory through another tensor after a value that depends on "
                "its MoE module's output was written there, as this one does"
            )


def _memory_of(tensor: torch.Tensor) -> int:
    """Return a number that identifies the memory that a tensor shares with its views."""
    return tensor.untyped_storage()._cdata


def _written_by(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the tensors that an operation writes to."""
    arguments = func._schema.arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    targets = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    leaves = tree_leaves([given.get(name) for name in targets])
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def play(written: dict[str, Any], tensor: torch.Tensor) -> torch.Tensor:
    """Run the recorded operations on the tensor itself."""
    values = [tensor.view(written["shape"])]

    def value(name: Any) -> Any:
        known = isinstance(name, str) and name.startswith(MARK)
        return values[int(name[len(MARK) :])] if known else name

    for name, args, kwargs in written["steps"]:
        args, kwargs = tree_map(value, (args, kwargs))
        values += tree_leaves(_operation(name)(*args, **kwargs))
    return values[written["out"]]


def _operation(name: str) -> Any:
    """Return the operation with a name such as ``aten.add.Tensor``."""
    found = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found
