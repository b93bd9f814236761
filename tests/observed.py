"""What did a cluster do: who computed and served what, who read what, what travelled?"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from pathlib import Path

import dask.array as da
import numpy as np
from distributed import Client, SchedulerPlugin, get_worker

from dask_ep.cluster.exchange import SERVICES_PLUGIN
from dask_ep.graph import tally
from dask_ep.graph.tally import Serving
from dask_ep.storage.sources import Source


class Recorder(SchedulerPlugin):
    """Writes down which worker computed which key."""

    name = "recorder-of-tests"

    def __init__(self):
        self.computed = []

    def transition(self, key, start, finish, *args, worker=None, **kwargs):
        if (start, finish) == ("processing", "memory"):
            self.computed.append((key, worker))


def computed(client: Client) -> list[tuple[object, str]]:
    """(key, worker) of all that was computed since a `Recorder` was registered, in order."""
    return client.run_on_scheduler(_computed)


def _computed(dask_scheduler):
    return dask_scheduler.plugins[Recorder.name].computed


class NotedSource(Source):
    """Notes in a file how many bytes each worker read."""

    def __init__(self, source, log):
        self.source, self.log = source, log
        self.shape, self.dtype, self.name = source.shape, source.dtype, source.name

    def read(self, start, stop, out=None):
        rows = self.source.read(start, stop, out)
        with open(self.log, "a") as log:
            log.write(f"{get_worker().address} {rows.nbytes}\n")
        return rows

    def fingerprint(self):
        return self.source.fingerprint()


def bytes_read(log: Path) -> dict[str, int]:
    """Bytes that each worker read of a `NotedSource`."""
    by_worker = defaultdict(int)
    for line in log.read_text().splitlines():
        address, nbytes = line.split()
        by_worker[address] += int(nbytes)
    return by_worker


def record_services(client: Client) -> None:
    """Let all workers write down from now on what they serve; see `servings`."""
    client.run(_record_anew)


def _record_anew():
    tally.take()
    tally.record()


def servings(client: Client) -> list[Serving]:
    """What was served since `record_services`."""
    return [serving for of_worker in client.run(tally.take).values() for serving in of_worker]


def servers(servings: list[Serving]) -> dict[int, set[str]]:
    """By rank: the workers that served it."""
    where = defaultdict(set)
    for serving in servings:
        where[serving.rank].add(serving.served_by)
    return dict(where)


def received(client: Client) -> set[tuple[str, float, int]]:
    """What all workers received by now of results of tasks: (key, when, bytes)."""
    logs = client.run(_transfers)
    return {transfer for log in logs.values() for transfer in log}


def _transfers(dask_worker):
    return [
        (str(key), entry["start"], size)
        for entry in dask_worker.transfer_incoming_log
        for key, size in entry["keys"].items()
    ]


class Waits:
    """An expert that doubles rows, but not while a file is there."""

    def __init__(self, file: Path):
        self.file = file

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        while self.file.exists():
            time.sleep(0.01)
        return rows * 2


class Counted:
    """How many chunks this process has read and not given out yet, and how many at most."""

    now = most = 0
    lock = threading.Lock()

    @classmethod
    def add(cls, number: int) -> None:
        with cls.lock:
            cls.now += number
            cls.most = max(cls.most, cls.now)


def counted(layer, tokens: da.Array) -> da.Array:
    """Apply a layer to tokens, and let each worker count the chunks that it has in memory."""
    read = tokens.map_blocks(_count, 1, meta=tokens._meta)
    return layer(read).map_blocks(_count, -1, meta=tokens._meta)


def _count(block: np.ndarray, number: int) -> np.ndarray:
    Counted.add(number)
    return block


def written_slowly(y: da.Array) -> da.Array:
    """Let each block be written to slow storage, and each worker count those that it is writing."""
    return y.map_blocks(_write_slowly, dtype=y.dtype, meta=y._meta)


def _write_slowly(block: np.ndarray) -> np.ndarray:
    Counted.add(1)
    time.sleep(0.4)
    Counted.add(-1)
    return block


def chunks_held(client: Client) -> dict[str, tuple[int, int]]:
    """By worker: chunks of a `counted` layer that it has in memory now, and had at most."""
    return client.run(lambda: (Counted.now, Counted.most))


def forget_chunks(client: Client) -> None:
    """Let `chunks_held` count from nothing."""
    client.run(_forget_chunks)


def _forget_chunks():
    Counted.now = Counted.most = 0


def slots_taken(client: Client) -> dict[str, int]:
    """By worker: chunks that are in flight by its own count."""
    return client.run(_slots_taken)


def _slots_taken(dask_worker):
    services = dask_worker.plugins.get(SERVICES_PLUGIN)
    return 0 if services is None else services._admission.under_way


def slices_kept(client: Client) -> dict[str, int]:
    """By worker: ranks of layers whose experts its services hold."""
    return client.run(_slices_kept)


def _slices_kept(dask_worker):
    services = dask_worker.plugins.get(SERVICES_PLUGIN)
    return 0 if services is None else len(services._slices._held)
