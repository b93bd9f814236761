"""What does a run on GPUs cost?

The figures are those of the ordinary plan, except where GPUs change them: memory is that of a GPU
and that of its host, and a GPU computes while chunks are read, uploaded, downloaded and written.
`Rates` then hold the products and memory copies of a GPU.
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
    Time is that of the slowest of the things that run concurrently: a GPU's products and the steps
    between them, uploads, downloads, reading and writing, packets. How far these really overlap on
    GPUs has not been measured.
    """

    @property
    def on_device(self) -> OnDevice:
        """The layer's sizes on a GPU."""
        assert self.work.on_device is not None
        return self.work.on_device

    # --- memory ----------------------------------------------------------------------------

    @cached_property
    def host_need(self) -> Need:
        """Host memory of a GPU's worker, for the routing as counted."""
        return host_need(self.work, self.layout, self.spread)

    @property
    def process_parts(self) -> dict[str, int]:
        """Bytes of the host that a worker uses at most, by use."""
        return self.host_need.parts(self.chunk_rows)

    @property
    def process_limit(self) -> int | None:
        """Bytes of the host that a worker may use."""
        return self.layout.host_limit

    @property
    def memory_figures(self) -> dict[str, tuple[int, int | None]]:
        """Peak memory and its limit, by a description of the memory."""
        return {
            "peak memory of a GPU": (self.memory_bytes, self.memory_limit),
            "peak memory of its worker on the host": (self.process_bytes, self.process_limit),
        }

    @property
    def places(self) -> str:
        """Description of the workers."""
        return f"{self.workers} GPUs"

    # --- time ------------------------------------------------------------------------------

    @property
    def load_seconds(self) -> float:
        """Time to read and upload the experts, for the worker that has the most."""
        stored = self.experts_of_a_worker * self.work.expert_stored + self.work.layer.stored
        return stored / min(self.rates.read, self.rates.lane)

    @property
    def busy_seconds(self) -> float:
        """Time of the slowest of the things that a worker does concurrently."""
        work, rates, rows = self.work, self.rates, self.rows / self.workers
        of_layer = self.layer_flops / self.workers
        made = self.on_device.made_bytes / self.slots_per_row  # written once and read once
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
        """Rows of a chunk as chosen by a run: large, and within the memory limits."""
        advised = DEVICE_CHUNK_BYTES // self.on_device.row_bytes
        advised = min(advised, -(-self.rows // (4 * self.workers * self.threads)))
        most = rows_within(self.decision.work, self.layout, self.decision.as_stored)
        return int(max(min(advised, most), 1))

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain numbers, lists and text."""
        host = {"host_bytes": self.process_bytes, "host_limit": self.process_limit}
        return super().to_dict() | {"gpu": True, **host, "host_parts": self.process_parts}
