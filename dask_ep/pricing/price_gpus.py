"""What does a run on GPUs cost?

The figures of the ordinary plan, except where GPUs change them: memory, which is a GPU's and that
of its host, and time, since a GPU computes while chunks are read, go up, come down and
are written. `Rates` are of a GPU then, in products and copies of its memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dask_ep.laws.costs import Need
from dask_ep.laws.device_memory import DEVICE_CHUNK_BYTES, OnDevice
from dask_ep.laws.memory_law import host_need, rows_within
from dask_ep.pricing.price import Plan


@dataclass(frozen=True, eq=False, kw_only=True)
class PlanOnGpus(Plan):
    """What one way to run a job on GPUs costs; `memory_limit` is that of a GPU.

    Notes
    -----
    Time is that of the busiest of what goes on side by side: a GPU's products and the steps between
    them, the copies up, the copies down, reading and writing, packets. How much of that GPUs in
    fact hide behind each other nobody has measured.
    """

    @property
    def on_device(self) -> OnDevice:
        """The sizes that count on a GPU."""
        assert self.work.on_device is not None
        return self.work.on_device

    # --- memory ----------------------------------------------------------------------------

    @cached_property
    def host_need(self) -> Need:
        """What its worker needs of the host, as the routing is."""
        return host_need(self.work, self.layout, self.spread)

    @property
    def process_parts(self) -> dict[str, int]:
        """Bytes of the host that a worker uses at most, by what they are for."""
        return self.host_need.parts(self.chunk_rows)

    @property
    def process_limit(self) -> int | None:
        """Bytes of the host that it may use."""
        return self.layout.host_limit

    @property
    def memory_figures(self) -> dict[str, tuple[int, int | None]]:
        """Memory that is used at most, and its limit, by what it is."""
        return {
            "memory of a GPU, at most": (self.memory_bytes, self.memory_limit),
            "of its worker on the host": (self.process_bytes, self.process_limit),
        }

    @property
    def places(self) -> str:
        """What serves the ranks."""
        return f"{self.workers} GPUs"

    # --- time ------------------------------------------------------------------------------

    @property
    def load_seconds(self) -> float:
        """Time to read the experts and to bring them up, for the worker that has most."""
        stored = self.experts_of_a_worker * self.work.expert_stored + self.work.layer.stored
        return stored / min(self.rates.read, self.rates.lane)

    @property
    def busy_seconds(self) -> float:
        """Time of the slowest of what a worker does side by side."""
        work, rates, rows = self.work, self.rates, self.rows / self.workers
        of_layer = self.layer_flops / self.workers
        made = self.on_device.made_bytes / self.slots_per_row  # once written, once read
        products = (self._per_worker(self.flops).max() + of_layer) * self.on_device.products
        on_device = (
            products / rates.flops + 2 * self._per_worker(self.rank_rows).max() * made / rates.copy
        )
        up, down = (rows * width * work.dtype.itemsize for width in (work.d, work.d_out))
        files = (up / rates.read + down / rates.write) / self.threads
        packets = self.exchanged_bytes / self.workers / rates.link
        return max(on_device, up / rates.lane, down / rates.lane, files, packets)

    # --- advice and forms ------------------------------------------------------------------

    @property
    def advised_chunk_rows(self) -> int:
        """Rows of a chunk as a run takes them: large, and within the memory."""
        advised = DEVICE_CHUNK_BYTES // self.on_device.row_bytes
        advised = min(advised, -(-self.rows // (4 * self.workers * self.threads)))
        most = rows_within(self.decision.work, self.layout, self.decision.as_stored)
        return int(max(min(advised, most), 1))

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain numbers, lists and text."""
        host = {"host_bytes": self.process_bytes, "host_limit": self.process_limit}
        return super().to_dict() | {"gpu": True, **host, "host_parts": self.process_parts}
