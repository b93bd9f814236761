"""What in a valid job is often a mistake?

Only its author can know, so it is reported once before a run, and is not an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dask_ep.jobs.build import Inputs
from dask_ep.storage.sources import Source


def find_notes(inputs: Inputs) -> list[str]:
    """Return a sentence for everything that looks like a mistake.

    Notes
    -----
    Reads no tokens and no weights, and only as much of the routing as it takes to find expert 0,
    usually the first block.
    """
    found = (note_square_weights(inputs), note_indices_from_1(inputs))
    return [note for note in found if note is not None]


def tell_notes(inputs: Inputs, on_note: Callable[[str], Any] | None) -> None:
    """Pass each sentence of `find_notes` to the callback, if there is one."""
    if on_note is not None:
        for note in find_notes(inputs):
            on_note(note)


def note_square_weights(inputs: Inputs) -> str | None:
    """Note weights that may be (E, in, out) or (E, out, in), if the job does not say which."""
    experts, job = inputs.experts, inputs.job
    if job.experts is None or "transposed" in job.experts or not experts.is_square:
        return None
    return (
        f"the experts' weights are square, {experts.d} x {experts.d}, and are read as (E, in, "
        "out). Weights of nn.Linear are (E, out, in): for these set transposed = true in "
        "[experts], otherwise transposed = false"
    )


def note_indices_from_1(inputs: Inputs) -> str | None:
    """Note a routing without expert 0, whose largest index is E - 1 or E, as if counted from 1."""
    if inputs.routing is None or inputs.layer is not None:
        return None
    E, largest = inputs.experts.num_experts, _largest_without_0(inputs.routing)
    if largest not in (E - 1, E):
        return None
    return (
        f"no row goes to expert 0, and the largest index in {inputs.routing.name} is {largest}: "
        f"the {E} experts are numbered 0 to {E - 1}. If these indices count from 1, subtract 1"
    )


def _largest_without_0(routing: Source) -> int | None:
    """Return the largest index of a routing without 0; None if it holds one."""
    largest = None
    for _, block in routing.blocks():
        if (block == 0).any():
            return None
        if block.size:
            largest = max(int(block.max()), -1 if largest is None else largest)
    return largest
