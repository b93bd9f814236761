"""Which replica of an expert serves a row?

A row's ticket follows from its global row number: `row * STRIDE mod TICKETS`, where
`STRIDE / TICKETS` is the golden ratio, so that any run of rows, and any regular stride through them
(the first token of every sequence), spreads evenly over the tickets. Every replica of an expert
serves a range of tickets. A row's replicas therefore depend only on its number, not on chunks,
ranks or time.

Axis letters: `n` rows, `k` slots per row, `E` experts, `R` ranks, `P` physical experts per rank.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from dask_ep.arrays.checks import raise_bad_index
from dask_ep.arrays.namespaces import namespace, to_host
from dask_ep.kernel.error_context import error_context

_TICKET_BITS = 40
TICKETS = 1 << _TICKET_BITS
"""Number of tickets; that many rows have different ones, and E * TICKETS fits into an int64."""

STRIDE = 0x9E3779B97F
"""TICKETS times the golden ratio; odd, so that row numbers map one to one to tickets."""

_BIN_BITS = _TICKET_BITS - 6  # 64 bins of tickets, from which the search for a replica starts


class Tickets:
    """The replicas of some physical experts, looked up by ticket."""

    def __init__(self, physical: np.ndarray, stops: np.ndarray):
        self._physical, self._stops = physical, stops
        self._num_experts = int(physical.max()) + 1

    def choose(self, routing: np.ndarray, row_offset: int) -> np.ndarray:
        """Return the replicas that the rows' tickets choose, as in `Placement.rewrite`."""
        xp = namespace(routing)
        _check_routing(routing, self._num_experts, row_offset)
        if self._holders.size == self._num_experts:  # one replica each: there is no choice
            return xp.asarray(self._home)[routing]
        key = _keys(routing, row_offset, xp).ravel()
        if xp is np:
            nth = self._nth_holder(key)
        else:
            nth = xp.searchsorted(xp.asarray(self._last_keys), key, side="right")
        physical = xp.asarray(self._holders)[nth].reshape(routing.shape)
        return xp.where(routing < 0, np.int32(-1), physical)

    def _nth_holder(self, key: np.ndarray) -> np.ndarray:
        """Return which of `_holders` serves each key, by a binary search from a nearby start."""
        nth = self._first_guess[key >> _BIN_BITS]
        passed = np.flatnonzero(key >= self._last_keys[nth])
        while passed.size:
            nth[passed] += 1
            passed = passed[key[passed] >= self._last_keys[nth[passed]]]
        return nth

    @cached_property
    def _holders(self) -> np.ndarray:
        """(replicas,) int32: physical experts that are not empty, by expert, then by number."""
        return _by_expert(self._physical).astype(np.int32)

    @cached_property
    def _last_keys(self) -> np.ndarray:
        """(replicas,) int64, ascending: expert * TICKETS + stop of each of `_holders`."""
        experts = self._physical.ravel()[self._holders].astype(np.int64)
        return experts * TICKETS + self._stops.ravel()[self._holders]

    @cached_property
    def _first_guess(self) -> np.ndarray:
        """(E * bins,) int32: the first of `_holders` that serves any ticket of the bin."""
        bins = self._num_experts << (_TICKET_BITS - _BIN_BITS)
        starts = np.arange(bins, dtype=np.int64) << _BIN_BITS
        return np.searchsorted(self._last_keys, starts, side="right").astype(np.int32)

    @cached_property
    def _home(self) -> np.ndarray:
        """(E + 1,) int32: physical expert of each expert with one replica; [-1] is for -1."""
        return np.append(self._holders, np.int32(-1))


def ticket_load(
    routing: np.ndarray, num_experts: int, row_offset: int = 0, bins: int = 1024
) -> np.ndarray:
    """Count the rows of each expert by ticket.

    Parameters
    ----------
    routing : (n, k) or (n,) integer array, -1 for no expert
    num_experts : int, E
    row_offset : int, the global index of the first row
    bins : int, a power of two: number of equal ranges of tickets

    Returns
    -------
    load : (E, bins) int64; summed over chunks it is the best input of `exact`, and summed over the
        last axis it is the plain load of each expert

    Examples
    --------
    >>> import numpy as np
    >>> from dask_ep.placement.replica_choice import ticket_load
    >>> ticket_load(np.array([[0, 1], [1, -1]]), num_experts=3, bins=2)
    array([[1, 0],
           [1, 1],
           [0, 0]])
    """
    _check_routing(routing, num_experts, row_offset)
    key = _keys(routing, row_offset, np)[routing >= 0]
    shift = (TICKETS // bins).bit_length() - 1
    return np.bincount(key >> shift, minlength=num_experts * bins).reshape(num_experts, bins)


def _keys(routing: np.ndarray, row_offset: int, xp: Any) -> np.ndarray:
    """Return expert * TICKETS + ticket of the row, int64, in the shape of the routing."""
    ticket = xp.arange(routing.shape[0], dtype=np.uint64)
    ticket *= np.uint64(STRIDE)  # wraps at 2**64, a multiple of TICKETS
    ticket += np.uint64(row_offset * STRIDE % TICKETS)
    ticket &= np.uint64(TICKETS - 1)
    key = routing.astype(np.int64)
    key *= TICKETS
    key += ticket.astype(np.int64).reshape(-1, *[1] * (routing.ndim - 1))
    return key


def _by_expert(physical: np.ndarray) -> np.ndarray:
    """Return (replicas,) flat positions of the places in use, by expert, then position."""
    flat = physical.ravel()
    used = np.flatnonzero(flat >= 0)
    return used[np.argsort(flat[used], kind="stable")]


def _nth_replicas(physical: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each of `_by_expert`, its position, expert, and number among the replicas."""
    at = _by_expert(physical)
    experts = physical.ravel()[at]
    first = np.searchsorted(experts, experts, side="left")
    return at, experts, np.arange(at.size) - first


def even_stops(physical: np.ndarray) -> np.ndarray:
    """Return (R, P) int64 stops with which the replicas of each expert share its rows evenly."""
    at, experts, nth = _nth_replicas(physical)
    replicas = np.bincount(experts)[experts]
    stops = np.zeros(physical.size, np.int64)
    stops[at] = (nth + 1) * TICKETS // replicas
    return stops.reshape(physical.shape)


def share_sizes(physical: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return (R, P) int64 the number of tickets that each replica serves."""
    at, _, nth = _nth_replicas(physical)
    ends = stops.ravel()[at]
    sizes = np.zeros(physical.size, np.int64)
    sizes[at] = ends - np.where(nth > 0, np.roll(ends, 1), 0)
    return sizes.reshape(physical.shape)


def _check_routing(routing: np.ndarray, num_experts: int, row_offset: int) -> None:
    """Raise for an index outside [-1, E), naming the row."""
    if routing.size == 0:
        return
    low, high = to_host(routing.min(), routing.max())
    if low < -1 or high >= num_experts:
        with error_context("placement", row_offset or None):
            raise_bad_index(routing, num_experts)
