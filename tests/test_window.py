"""Chunks under way: which tasks may be held, and that all of them come to their end."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from dask_ep.homes import Home
from dask_ep.ranks import OwnersOfRank
from dask_ep.window import Held, Window, find_ends, find_entries

RANKS = 2


@dataclass(eq=False)
class Task:
    """What a window looks at of a scheduler's task."""

    key: object
    priority: tuple[float, ...] = ()
    state: str = "released"
    dependencies: set[Task] = field(default_factory=set)
    dependents: set[Task] = field(default_factory=set)
    worker_restrictions: set[str] | None = None

    def __repr__(self) -> str:
        return str(self.key)


class Graph(dict):
    """Tasks by key, each added after those that it needs."""

    def add(self, key: object, *needed: object, generation: int = 0) -> object:
        task = self[key] = Task(key, (0, generation, len(self)))
        for dependency in needed:
            task.dependencies.add(self[dependency])
            self[dependency].dependents.add(task)
        return key

    def layer(self, name: str, tokens: list, routing: list) -> list:
        """Add the tasks of an exchange, and give the keys of the sums."""
        experts = [self.add((f"ep_experts-{name}", r)) for r in range(RANKS)]
        sums = []
        for c, (rows, indices) in enumerate(zip(tokens, routing, strict=True)):
            answers = []
            for r in range(RANKS):
                sent = self.add((f"ep_send-{name}", c, r), rows, indices)
                answers.append(self.add((f"ep_dispatch-{name}", c, r), sent, experts[r]))
            sums.append(self.add((f"ep_sum-{name}", c, 0), indices, *answers))
        return sums

    def entries(self) -> dict[object, set[object]]:
        return {
            end.key: {entry.key for entry in entries}
            for end, entries in find_entries(self.values()).items()
        }


def loads(graph: Graph, name: str, chunks: int = 3, *needed: object) -> list:
    return [graph.add((name, c), *needed) for c in range(chunks)]


def test_entries_are_what_a_chunk_is_loaded_by():
    graph = Graph()
    sums = graph.layer("a", loads(graph, "tokens"), loads(graph, "routing"))
    assert graph.entries() == {sums[c]: {("tokens", c), ("routing", c)} for c in range(3)}


def test_what_all_chunks_need_is_never_held():
    graph = Graph()
    graph.add("router")
    tokens = loads(graph, "tokens")
    routing = [graph.add(("routing", c), rows, "router") for c, rows in enumerate(tokens)]
    sums = graph.layer("a", tokens, routing)
    assert graph.entries() == {sums[c]: {("tokens", c)} for c in range(3)}
    assert find_ends(graph.values())[graph["router"]] is None


def test_a_chunk_of_two_layers_ends_with_the_second():
    graph = Graph()
    routing = loads(graph, "routing")
    first = graph.layer("a", loads(graph, "tokens"), routing)
    second = graph.layer("b", first, routing)
    assert graph.entries() == {second[c]: {("tokens", c), ("routing", c)} for c in range(3)}


def test_where_all_tokens_are_summed_between_layers_only_the_second_is_held():
    graph = Graph()
    routing = loads(graph, "routing")
    first = graph.layer("a", loads(graph, "tokens"), routing)
    graph.add("mean", *first)
    normal = [graph.add(("normal", c), rows, "mean") for c, rows in enumerate(first)]
    second = graph.layer("b", normal, loads(graph, "more routing"))
    assert graph.entries() == {second[c]: {("normal", c), ("more routing", c)} for c in range(3)}


def test_tokens_that_are_there_already_are_sent_when_their_chunk_begins():
    graph = Graph()
    for task in ("tokens", "routing"):
        loads(graph, task)
    there = set(graph)
    sums = graph.layer("a", [("tokens", c) for c in range(3)], [("routing", c) for c in range(3)])
    new = [task for key, task in graph.items() if key not in there]
    entries = {end.key: {task.key for task in of_end} for end, of_end in find_entries(new).items()}
    assert entries == {sums[c]: {("ep_send-a", c, r) for r in range(RANKS)} for c in range(3)}


def test_tokens_that_another_graph_needs_are_not_held():
    graph = Graph()
    tokens = loads(graph, "tokens")
    sums = graph.layer("a", tokens, loads(graph, "routing"))
    new = list(graph.values())
    graph.add("another graph's", *tokens)
    held = find_entries(new)
    assert {task.key for task in held[graph[sums[0]]]} == {("routing", 0)}, (
        "its packets wait for the routing"
    )


def test_who_restricts_a_task_has_it_where_he_wants_it():
    graph = Graph()
    sums = graph.layer("a", loads(graph, "tokens"), loads(graph, "routing"))
    graph["tokens", 2].worker_restrictions = {"tcp://here"}
    home = graph["routing", 2].worker_restrictions = Home({"tcp://there"})
    window = Window(graph.values(), 1)
    assert graph["tokens", 2].worker_restrictions == {"tcp://here"}
    assert isinstance(graph["routing", 2].worker_restrictions, Held)
    for end in sums:
        graph[end].state = "memory"
    window.admit(1)
    assert graph["routing", 2].worker_restrictions is home


def test_ranks_are_not_held_where_there_is_one_chunk():
    graph = Graph()
    graph.layer("a", loads(graph, "tokens", 1), loads(graph, "routing", 1))
    graph["ep_experts-a", 0].worker_restrictions = OwnersOfRank({"tcp://here"})
    assert not Window(graph.values(), 1).held


@st.composite
def graphs(draw):
    """Any graph in which some tasks are named as sums, handed in as two, and a limit."""
    graph = Graph()
    size = draw(st.integers(1, 25))
    is_second = [draw(st.booleans()) for _ in range(size)]
    for i, second in enumerate(is_second):
        pool = [key for key in graph if second or not is_second[key[1]]]
        needed = draw(st.lists(st.sampled_from(pool), max_size=3, unique=True)) if pool else []
        name = draw(st.sampled_from(["ep_sum-a", "ep_sum-b", "load", "ep_send-a"]))
        graph.add((name, i), *needed, generation=int(second) * draw(st.integers(0, 1)))
    first = [task for key, task in graph.items() if not is_second[key[1]]]
    return graph, first, draw(st.integers(1, 3)), draw(st.integers(0, size))


class Scheduler:
    """Computes tasks in any order, but none that is held; drops results, and loses some."""

    def __init__(self, limit: int, random):
        self.limit, self.random = limit, random
        self.windows: list[Window] = []
        self.known: set[Task] = set()
        self.losses_left = 5

    def hand_in(self, tasks: list[Task]) -> None:
        for window in self.windows:
            window.recount()
        self.windows.append(Window(tasks, self.limit))
        self.known |= set(tasks)
        for task in tasks:
            self.need(task)

    def need(self, task: Task) -> None:
        if task.state == "released":
            task.state = "waiting"
            for needed in task.dependencies:
                self.need(needed)

    def step(self) -> bool:
        """Compute a task, if there is one that can be."""
        for window in self.windows:
            window.admit(self.limit)
            assert len(window.under_way) <= self.limit
        ready = [
            task
            for task in self.known
            if task.state == "waiting"
            and not isinstance(task.worker_restrictions, Held)
            and all(needed.state == "memory" for needed in task.dependencies)
        ]
        if ready:
            self.random.choice(sorted(ready, key=str)).state = "memory"
            self.drop_or_lose(self.random.choice(sorted(self.known, key=str)))
        return bool(ready)

    def drop_or_lose(self, task: Task) -> None:
        needed = any(d.state == "waiting" for d in task.dependents & self.known)
        if task.state == "memory" and not needed:
            task.state = "released"
        elif task.state == "memory" and self.losses_left:
            self.losses_left -= 1
            task.state = "released"
            self.need(task)


@given(graphs(), st.randoms())
def test_every_task_is_computed_in_the_end(given_graph, random):
    graph, first, limit, steps = given_graph
    later = {task: task.dependents - set(first) for task in graph.values()}
    for task in first:
        task.dependents -= later[task]
    scheduler = Scheduler(limit, random)
    scheduler.hand_in(first)
    for _ in range(steps):
        scheduler.step()
    for task, dependents in later.items():
        task.dependents |= dependents
    scheduler.hand_in([task for task in graph.values() if task.state != "memory"])
    while scheduler.step():
        pass
    assert {task.state for task in graph.values()} <= {"memory", "released"}
