"""What did a cluster do: who computed what, who read what, what travelled?"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from distributed import Client, SchedulerPlugin, get_worker

from dask_ep.sources import Source


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


def received(client: Client) -> set[tuple[str, float, int]]:
    """What all workers received by now: (key, when, bytes)."""
    logs = client.run(_transfers)
    return {transfer for log in logs.values() for transfer in log}


def _transfers(dask_worker):
    return [
        (str(key), entry["start"], size)
        for entry in dask_worker.transfer_incoming_log
        for key, size in entry["keys"].items()
    ]
