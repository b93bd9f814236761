"""How is a module of a model replaced by something else?

The model stays as it is: `replaced` copies what contains the module, and the copy calls a stand-in.
Several threads do so at a time, each with copies that share the weights but nothing that a forward
may change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


class Reached(Exception):
    """Ends a forward early: the value is known, and the rest of the model need not run."""

    def __init__(self, value: Any):
        self.value = value


class StandIn(nn.Module):
    """Replaces a module: calls `act`, and otherwise looks like the module."""

    def __init__(self, module: nn.Module, act: Callable[..., Any]):
        super().__init__()
        self.__dict__.update(module=module, act=act)  # the module must not become a child

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.act(*args, **kwargs)


class Answer(torch.Tensor):
    """A module's output: some models expect just the tensor, others unpack it with the scores."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __iter__(self) -> Iterator[Any]:
        return iter((self, None))


def replaced(
    module: nn.Module, parts: Mapping[str, nn.Module] | None = None, path: str = ""
) -> nn.Module:
    """Copy a module, with some of its submodules replaced.

    The copy shares the parameters but not buffers and attributes, which some forwards change.
    """
    parts, new = parts or {}, copy.copy(module)
    new._buffers = {n: b if b is None else b.clone() for n, b in module._buffers.items()}
    new._modules = dict(module._modules)
    for name, part in module._modules.items():
        where = path + name
        if where in parts:
            new._modules[name] = parts[where]
        elif part is not None:
            new._modules[name] = replaced(part, parts, where + ".")
    return new


def with_parameters(module: nn.Module, **parameters: nn.Parameter | None) -> nn.Module:
    """Copy a module, with some of its parameters replaced."""
    new = copy.copy(module)
    new._parameters = module._parameters | parameters
    return new


def nothing(hidden_states: torch.Tensor) -> torch.Tensor:
    """Return zeros, for a shared expert whose output is in that of the MoE modules already."""
    return hidden_states.new_zeros(()).expand_as(hidden_states)


def first_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return a call's first argument, whether it is named or not."""
    return next(iter((*args, *kwargs.values())))
