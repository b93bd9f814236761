"""Which errors may a caller want to tell apart?

Each is of one of Python's own kinds as well. `JobError` and `NoDeviceError` mean that a command was
wrongly used: it ends with exit code 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dask_ep.laws.decision import Decision


class JobError(ValueError):
    """A job has a key that is unknown, missing or wrong, or keys that contradict each other."""


class NoDeviceError(RuntimeError):
    """CuPy is missing, or finds no device."""


class DoesNotFit(MemoryError):
    """A job does not fit into its memory limit.

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


class ReadError(OSError):
    """Rows that should be there could not be read: a file is missing, short or damaged."""


class DeviceMemoryError(MemoryError):
    """A device has not enough memory for a chunk or for a rank's experts."""


class OutputInUse(RuntimeError):
    """Another run writes this output now."""


class LostOwnerError(RuntimeError):
    """Nobody could be found who serves a rank."""


class UnfitClusterError(RuntimeError):
    """The cluster cannot do the job: `problems` says why, one sentence each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("; ".join(problems))
