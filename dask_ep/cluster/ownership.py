"""Which worker owns which rank?

One call gives every rank an owner, for all graphs and clients of a cluster, until it is closed:

    client = Client("tcp://scheduler:8786")
    with own_experts(client, world_size=16, replicas={3: 2}) as owners:
        expert_parallel(tokens, routing, experts, world_size=16).to_zarr("y.zarr")
        owners.replicate(5)          # a second owner for a hot rank, while it runs
        owners                       # in a notebook: the table of workers and their ranks

Without it the results are the same, but any worker may read any slice. `owner_plugin` has the rules
by which owners change; this file is the user's handle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from html import escape
from math import isfinite
from typing import Any

from dask.utils import format_bytes
from distributed import Client

from dask_ep.arrays.checks import check_world_size
from dask_ep.cluster.dask_internals import scheduler_address
from dask_ep.cluster.exchange import Services
from dask_ep.cluster.owner_plugin import OWNERS_PLUGIN, Ownership
from dask_ep.cluster.owner_rules import OwnerRules, burdens
from dask_ep.cluster.ranks import Change, Ranks


def own_experts(
    client: Client,
    world_size: int | None = None,
    *,
    replicas: Mapping[int, int] | None = None,
    loads: Sequence[float] | None = None,
    rules: OwnerRules | None = None,
) -> Owners:
    """Give every rank an owner on the cluster, and a new one when it is lost.

    Parameters
    ----------
    client : distributed.Client
        Client of a real or a local cluster; not an asynchronous one.
    world_size : int, optional
        Number of ranks; may be more or fewer than the workers. Default: one per GPU if workers
        declare the resource `GPU`, else one per worker; on a second call of the same client, the
        previous number.
    replicas : mapping of rank to number of owners, optional
        The load of a rank is balanced between its owners. Ranks not named have one owner.
    loads : R numbers, optional
        Work of each rank in any unit, such as token rows; default: equal. Owners get ranks in
        proportion to their memory.
    rules : OwnerRules, optional
        When owners change, and how many chunks are in flight on a worker. Default: unchanged,
        which is `OwnerRules`' defaults unless another call has changed them.

    Returns
    -------
    Owners
        Shows and changes the owners; `close`, or the end of the `with` block, frees the ranks.

    Raises
    ------
    ValueError, TypeError
        If an argument is not valid, the client is asynchronous, or there are no workers to count.
    RuntimeError
        If the scheduler cannot import dask_ep.

    Notes
    -----
    A scheduler has one plugin: a second call, from this or another client, returns a handle to the
    same owners, and changes only what it passes. Graphs of another world size get owners by the
    same rules when they arrive. The plugin is removed when all clients that called have closed
    their handles or disconnected. Afterwards each worker keeps an idle plugin, and its C library
    keeps freed memory, up to 32 MiB for each heap (`dask_ep.arrays.memory.keep_freed_memory`),
    until Dask would spill.

    Dask gives a task up (KilledWorker) when more workers have died with it than the scheduler's
    `distributed.scheduler.allowed-failures`, 3 by default: set it to the number of workers or more
    where the scheduler starts. `dask_ep.cluster.checks.check_cluster` warns about it. A worker that
    hangs is given up after Dask's ``distributed.scheduler.worker-ttl``, five minutes by default.

    Chunks begin in the order in which Dask would compute them. A user's restrictions (``workers=``,
    ``resources=``, annotations) apply to the chunks; services run on the owners. If the placement
    of a graph is local (`dask_ep.laws.travel`), each chunk is read by an owner of the rank that is
    its home. An adaptive cluster (``cluster.adapt``) keeps the only owner of a rank while work is
    pending. It counts the work of the chunks in flight, so choose its ``target_duration`` by these.

    The same workers (by name) give the same map. Results never depend on owners: a rank computes
    the same, to the bit, on every worker.

    Examples
    --------
    >>> from distributed import Client
    >>> with Client(n_workers=2, processes=False, dashboard_address=":0") as client:
    ...     with own_experts(client, world_size=4) as owners:
    ...         [len(of_rank) for of_rank in owners.owners]
    [1, 1, 1, 1]
    """
    if not isinstance(client, Client):
        raise TypeError(
            f"own_experts needs a distributed.Client, but got a {type(client).__name__}; "
            "without a cluster expert_parallel needs no owners"
        )
    if client.asynchronous:
        raise TypeError(
            "own_experts needs a synchronous client but this one is asynchronous; "
            "make it with Client(address)"
        )
    rules = OwnerRules() if rules is None else rules
    if not isinstance(rules, OwnerRules):
        raise TypeError(f"rules must be OwnerRules(...), but got a {type(rules).__name__}")
    try:
        client.register_plugin(Services())
        world_size, is_new = client.run_on_scheduler(
            _claim, client.id, world_size, replicas or {}, loads, rules
        )
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"the scheduler at {scheduler_address(client)} cannot import {error.name}; install the "
            "same packages there as on the client, at the same versions"
        ) from error
    return Owners(client, world_size, is_new)


@dataclass(frozen=True)
class WorkerRow:
    """One line of the table: a worker and the ranks that it owns."""

    name: str
    address: str
    memory: int
    """Bytes; 0 if the worker has no limit."""
    ranks: tuple[int, ...]
    load: float
    """Its share of all load, 0 to 1."""


class Owners:
    """The owners of all ranks, `world_size` in number: the handle that `own_experts` returns.

    Each access is one round trip to the scheduler, and shows its state at that moment. As a context
    manager it frees the ranks at the end of the block, unless the client had claimed them before.
    """

    def __init__(self, client: Client, world_size: int, is_new: bool):
        self.world_size = world_size
        self._client = client
        self._is_new = is_new

    @property
    def owners(self) -> list[tuple[str, ...]]:
        """Addresses of the owners of each rank, R tuples; empty if the rank waits for a worker."""
        return self._ask(_owners)

    @property
    def changes(self) -> list[Change]:
        """The changes of owners so far, oldest first; the last 10,000 of them."""
        return self._ask(_changes)

    @property
    def failures(self) -> list[str]:
        """Errors inside the plugin: if there are any, tasks may have run on any worker."""
        return self._client.run_on_scheduler(_failures)

    def move(self, rank: int, worker: str | int) -> None:
        """Make one worker, by address or name, the only owner of a rank.

        The old owner finishes what it has started; what waits there goes to the new one. The rank
        stays until that worker is lost, or it is moved again.

        Raises
        ------
        ValueError
            If there is no such rank or no such worker.
        """
        self._ask(_place, rank, worker, False)

    def replicate(self, rank: int, worker: str | int | None = None) -> None:
        """Give a rank another owner: this worker, or the least loaded one.

        Raises
        ------
        ValueError
            If there is no such rank or worker, or if the worker (or every worker) owns it already.
        """
        self._ask(_place, rank, worker, True)

    def table(self) -> list[WorkerRow]:
        """List the workers in order, with their ranks."""
        return self._ask(_table)

    def close(self) -> None:
        """Free the ranks, unless another client has claimed owners too. Safe to call twice."""
        if self._client.status == "running":
            self._client.run_on_scheduler(_answer, _release, self.world_size, self._client.id)

    def __enter__(self) -> Owners:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._is_new:
            # If the scheduler is lost, so is the plugin: let the first error be raised.
            with suppress(OSError) if error else nullcontext():
                self.close()

    def __repr__(self) -> str:
        rows = self._rows()
        if rows is None:
            return f"<Owners of {self.world_size} ranks: closed>"
        lines = [f"{row.name}: {', '.join(map(str, row.ranks)) or '-'}" for row in rows]
        return f"<Owners of {self.world_size} ranks on {len(rows)} workers: {'; '.join(lines)}>"

    def _repr_html_(self) -> str:
        rows = self._rows()
        if rows is None:
            return escape(repr(self))
        head = "<tr><th>worker</th><th>ranks</th><th>load</th><th>memory</th></tr>"
        body = "".join(
            f"<tr><td title='{escape(row.address)}'>{escape(row.name)}</td>"
            f"<td>{', '.join(map(str, row.ranks)) or '-'}</td><td>{row.load:.0%}</td>"
            f"<td>{format_bytes(row.memory) if row.memory else 'no limit'}</td></tr>"
            for row in rows
        )
        return f"<table><caption>Owners of {self.world_size} ranks</caption>{head}{body}</table>"

    def _rows(self) -> list[WorkerRow] | None:
        """The table; None if the owners or the client are closed."""
        if self._client.status != "running":
            return None
        answer = None
        with suppress(OSError):
            answer = self._client.run_on_scheduler(_answer, _table, self.world_size)
        return answer[0] if answer else None

    def _ask(self, question: Callable, *args: Any) -> Any:
        """Call a function with the plugin and the world size, on the scheduler."""
        answer = self._client.run_on_scheduler(_answer, question, self.world_size, *args)
        if answer is None:
            raise RuntimeError("these owners are closed; call own_experts(client) again")
        return answer[0]


# The functions below run on the scheduler, which passes itself to the first ones.


def _answer(question: Callable, world_size: int, *args: Any, dask_scheduler: Any) -> tuple | None:
    """The answer to a question, in a tuple; None if the owners are closed, which is no error."""
    plugin = dask_scheduler.plugins.get(OWNERS_PLUGIN)
    if plugin is None or world_size not in plugin.ranks:
        return None
    return (question(plugin, world_size, *args),)


def _failures(dask_scheduler: Any) -> list[str]:
    plugin = dask_scheduler.plugins.get(OWNERS_PLUGIN)
    return list(plugin.failures) if plugin else []


def _claim(
    client: str,
    world_size: int | None,
    replicas: Mapping[int, int],
    loads: Sequence[float] | None,
    rules: OwnerRules,
    dask_scheduler: Any,
) -> tuple[int, bool]:
    plugin: Ownership = dask_scheduler.plugins.get(OWNERS_PLUGIN) or Ownership(dask_scheduler)
    is_new = client not in plugin.claims
    if world_size is None:
        workers = plugin.workers()
        gpus = sum(dask_scheduler.workers[w].resources.get("GPU", 0) for w in workers)
        world_size = plugin.claims.get(client) or int(gpus) or len(workers)
        if world_size == 0:
            raise ValueError(
                "world_size defaults to the number of workers, but there are none; start workers "
                "first, or pass world_size"
            )
    check_world_size(world_size)
    _check(replicas, loads, world_size)
    ranks = plugin.ranks.setdefault(world_size, Ranks(world_size))
    for rank, owners in replicas.items():
        ranks.replicas[rank] = owners
    if loads is not None:
        ranks.loads = [float(load) for load in loads]
        plugin.settle_later()
    dask_scheduler.add_plugin(plugin, idempotent=True)
    plugin.claim(client, world_size, rules)
    return world_size, is_new


def _check(replicas: Mapping[int, int], loads: Sequence[float] | None, world_size: int) -> None:
    for rank, owners in replicas.items():
        if not 0 <= rank < world_size or owners < 1:
            raise ValueError(
                f"replicas must give 1 or more owners to ranks 0 to {world_size - 1}, but gives "
                f"{owners} to rank {rank}"
            )
    if loads is None:
        return
    if len(loads) != world_size:
        raise ValueError(f"loads must have one number per rank, {world_size}, but has {len(loads)}")
    if not all(isfinite(load) and load >= 0 for load in loads) or not sum(loads):
        raise ValueError(f"loads must be finite, not negative, and not all zero, but are {loads}")


def _release(plugin: Ownership, world_size: int, client: str) -> None:
    plugin.remove_client(plugin.scheduler, client)


def _owners(plugin: Ownership, world_size: int) -> list[tuple[str, ...]]:
    return plugin.ranks[world_size].listed()


def _changes(plugin: Ownership, world_size: int) -> list[Change]:
    return [change for change in plugin.ranks.changes if change.world_size == world_size]


def _table(plugin: Ownership, world_size: int) -> list[WorkerRow]:
    ranks, workers = plugin.ranks[world_size], plugin.workers()
    owners, known = ranks.living(), plugin.scheduler.workers
    burden = burdens(owners, workers, ranks.loads)
    return [
        WorkerRow(
            name=str(known[address].name),
            address=address,
            memory=known[address].memory_limit,
            ranks=tuple(rank for rank, of_rank in enumerate(owners) if address in of_rank),
            load=burden[address] / sum(ranks.loads),
        )
        for address in workers
    ]


def _place(plugin: Ownership, size: int, rank: int, worker: str | int | None, more: bool) -> None:
    """Let a worker, or the least loaded one, own a rank: together with its owners, or alone."""
    if not 0 <= rank < size:
        raise ValueError(f"rank must be 0 to {size - 1}, but is {rank}")
    workers = plugin.workers()
    owners = plugin.ranks[size].living()[rank] if more else frozenset[str]()
    named = workers if worker is None else [_address(plugin, worker)]
    load = {
        row.address: row.load / workers[row.address]
        for row in _table(plugin, size)
        if row.address in named and row.address not in owners
    }
    if not load:
        raise ValueError(
            f"rank {rank} needs a worker that does not own it yet, but its owners are "
            f"{sorted(owners)} and the workers {list(workers)}; start one more, or name another"
        )
    added = {min(load, key=load.__getitem__)}
    plugin.place(size, rank, owners | added, "replica by hand" if more else "moved by hand")


def _address(plugin: Ownership, worker: str | int) -> str:
    """Find the address of a worker by its address or its name."""
    able = {address: str(plugin.scheduler.workers[address].name) for address in plugin.workers()}
    for address, name in able.items():
        if str(worker) in (address, name):
            return address
    raise ValueError(
        f"worker must be the address or name of one that can own ranks, but {worker!r} is none of "
        f"{able}"
    )
