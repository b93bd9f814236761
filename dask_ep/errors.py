"""Which errors may a caller want to tell apart?

`JobError` and `NoDeviceError` mean that a command was wrongly used: it ends with exit code 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dask_ep.laws.decision import Decision


class JobError(ValueError):
    """A job says something that cannot be meant."""


class NoDeviceError(RuntimeError):
    """CuPy is missing, or finds no device."""


class DoesNotFit(MemoryError):
    """A job cannot be run so within its memory limit.

    Attributes
    ----------
    proposal : dict
        Options of ``dask-ep run`` with which it can, by name; empty if none were found.
    decision : Decision
        How it was to run.
    """

    def __init__(self, message: str, proposal: dict[str, Any], decision: Decision):
        super().__init__(message)
        self.proposal, self.decision = proposal, decision
