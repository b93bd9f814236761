"""Reports draw what they say, in a real browser, without a network, and in colours all can tell."""

import re
import sys
from dataclasses import replace
from itertools import combinations

import dask.array as da
import numpy as np
import pytest
from dask.utils import format_bytes
from distributed import get_task_stream

from dask_ep import expert_parallel, own_experts
from dask_ep.graph import tally
from dask_ep.graph.tally import Serving
from dask_ep.jobs.plan import Machine, plan, what_if
from dask_ep.jobs.run_report import servings_of
from dask_ep.laws.costs import Rates
from dask_ep.pricing.figures import (
    BLUE,
    GREEN,
    ORANGE,
    PART_COLOURS,
    PINK,
    RED,
    STEP_COLOURS,
    short,
)
from dask_ep.pricing.report import write_plan_report, write_run_report
from dask_ep.pricing.trace import Event, Record, Recorder, Service, peak_memory
from tests.browser import DESK, NARROWEST, PHONE, look_at, print_page
from tests.cluster_processes import Cluster

pytestmark = pytest.mark.usefixtures("bokeh")

RATES = Rates(flops=1e10, copy=1e9)


@pytest.fixture(scope="module")
def job():
    rng = np.random.default_rng(0)
    share = np.arange(1, 9) ** -1.2
    routing = rng.choice(8, p=share / share.sum(), size=(600, 2))
    tokens = da.ones((600, 8), chunks=(100, 8), dtype="f4")
    return tokens, da.from_array(routing, chunks=(100, 2)), np.ones((8, 8, 8), "f4")


@pytest.fixture(scope="module")
def compared(job):
    return what_if(
        *job,
        world_size=[2, 4],
        placement=["contiguous", "exact"],
        rates=RATES,
        machine=Machine(threads=1, memory_limit="1 GiB"),
    )


@pytest.fixture(scope="module")
def planned_run(job):
    planned = plan(
        *job, world_size=4, placement="balanced", rates=RATES, machine=Machine(threads=1)
    )
    y = expert_parallel(*job, world_size=4, placement=planned.placement)
    with Recorder() as recorder:
        y.compute(scheduler="sync")
    return planned, recorder.record(peak_memory())


@pytest.mark.slow
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_browser_draws_the_plan(compared, tmp_path, width):
    write_plan_report(tmp_path / "plan.html", compared)
    found = look_at(tmp_path / "plan.html", width)
    assert found["errors"] == ""
    assert int(found["canvases"]) >= 6
    assert int(found["width"]) <= max(width, NARROWEST), "no sideways scrolling"


@pytest.mark.slow
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_browser_draws_the_run(planned_run, tmp_path, width):
    planned, record = planned_run
    events = (Event(record.seconds / 2, "rank 2 moved from <a> to <b>"),)
    record = replace(record, events=events)
    write_run_report(tmp_path / "run.html", planned, record, link="run-dask.html")
    found = look_at(tmp_path / "run.html", width)
    assert found["errors"] == ""
    assert int(found["canvases"]) >= 7
    assert int(found["width"]) <= max(width, NARROWEST), "no sideways scrolling"
    text = (tmp_path / "run.html").read_text()
    assert "rank 2 moved from &lt;a&gt; to &lt;b&gt;" in text


@pytest.mark.slow
def test_a_browser_prints_the_run(planned_run, tmp_path):
    write_run_report(tmp_path / "run.html", *planned_run)
    pages, drawings = print_page(tmp_path / "run.html")
    assert 1 <= pages <= 8
    assert drawings >= 7


def test_a_report_holds_everything_it_shows(compared, tmp_path):
    write_plan_report(tmp_path / "plan.html", compared)
    text = (tmp_path / "plan.html").read_text()
    assert not re.search(r"""<(script|link|img)[^>]*(src|href)=["']?(https?:)?//""", text)
    assert "@media print" in text
    assert 'name="viewport"' in text
    for said in ("least time of 4", "600 token rows", "The hottest expert, 0,"):
        assert said in text


def test_planned_and_measured_agree(planned_run, tmp_path):
    planned, record = planned_run
    assert record.tasks == planned.tasks
    assert record.repeated == 0
    assert record.exchanged_bytes == 0, "threads share memory"
    received = planned.packet_rows.sum(axis=0)
    assert record.received_rows() == dict(enumerate(received.tolist()))
    assert sum(record.chunks_of_workers().values()) == 6
    assert record.traffic_rows(4).sum() == received.sum()
    assert {chunk for _, chunk in record.finished()} == set(range(6))
    write_run_report(tmp_path / "run.html", planned, record)
    cells = re.findall(r"<td>(.*?)</td>", (tmp_path / "run.html").read_text())
    assert cells[:3] == ["tasks", str(planned.tasks), str(record.tasks)]
    assert cells[4] == cells[5] == f"{received.sum():,}"


def test_a_task_stream_is_read():
    stream = [
        {
            "key": key,
            "worker": worker,
            "startstops": [
                {"action": "transfer", "start": start, "stop": start + 1},
                {"action": "compute", "start": start + 1, "stop": start + 2},
            ],
        }
        for key, worker, start in [
            (("ep_experts-f", 0), "tcp://v", 10.0),
            (("ep_experts-f", 1), "tcp://w", 10.0),
            ("('ep_ranks-f',)", "tcp://w", 11.0),
            ("('ep_store-f', 0)", "tcp://v", 12.0),
            ("('ep_store-f', 1)", "tcp://v", 13.0),
            ("('ep_store-f', 1)", "tcp://w", 16.0),
            ("finalize-f", "tcp://w", 20.0),
        ]
    ]
    lost = Serving(1, 1, 3, "tcp://v", "tcp://w", 13.5, 14.5, 36, 24, 0.5)
    servings = [
        Serving(0, 1, 5, "tcp://v", "tcp://w", 12.5, 13.5, 60, 40, 2.0),
        lost,
        lost._replace(asked_by="tcp://w", start=17.0, stop=17.5, bytes_in=0, bytes_out=0, waited=0),
    ]
    record = Record.of_task_stream(stream, servings, peak_bytes=7, events=[(15.0, "worker lost")])
    assert (record.tasks, record.repeated, record.seconds) == (5, 1, 8.0)
    assert record.finished() == [(4.0, 0), (8.0, 1)]
    assert record.chunks_of_workers() == {"tcp://v": 1, "tcp://w": 1}
    assert record.events == (Event(5.0, "worker lost"),)
    assert sum(span.step == "transfer" for span in record.spans) == 6
    # Bytes of all that went, also of what was lost; rows of each chunk once.
    assert (record.exchanged_bytes, record.served_again) == (160, 1)
    assert record.received_rows() == {1: 8}
    assert record.workers() == ["tcp://w", "tcp://v"]
    assert record.traffic_rows(2).tolist() == [[0, 3], [0, 5]]
    assert record.homes() == {0: 1, 1: 0}
    (service,) = record.services()
    assert service == Service(1, "tcp://w", 11, 96, 64, busy=2.5 / 8, queue=(5 * 2 + 3 * 0.5) / 8)
    later = record.renumbered([1])
    assert (later.tasks, later.received_rows()) == (4, {1: 3})


@pytest.mark.slow
def test_a_process_cluster_does_what_was_planned(job, tmp_path):
    planned = plan(
        *job, world_size=3, placement="exact", rates=RATES, machine=Machine(workers=2, threads=1)
    )
    with (
        Cluster(tmp_path, ["a", "b"]) as cluster,
        cluster.client() as client,
        client.as_current(),
        own_experts(client, 3),
    ):
        y = expert_parallel(*job, world_size=3, placement=planned.placement)
        with servings_of(client) as servings, get_task_stream(client=client) as stream:
            client.gather(client.compute(y))
        peak = max(client.run(peak_memory).values())
        assert not any(client.run(tally.is_recorded).values()), "it is kept no more"
    record = Record.of_task_stream(stream.data, servings, peak_bytes=peak)
    assert (record.tasks, record.repeated, record.served_again) == (planned.tasks, 0, 0)
    received = planned.packet_rows.sum(axis=0)
    assert record.received_rows() == dict(enumerate(received.tolist()))
    homes = record.homes()
    assert record.exchanged_bytes == planned.exchanged_at([homes[c] for c in range(6)]) > 0
    assert record.peak_bytes <= planned.memory_bytes
    assert sum(s.bytes_in + s.bytes_out for s in record.services()) == record.exchanged_bytes
    write_run_report(tmp_path / "run.html", planned, record)
    text = (tmp_path / "run.html").read_text()
    assert f"<td>{planned.tasks}</td><td>{record.tasks}</td>" in text
    for service in record.services():
        size = format_bytes(service.bytes_in)
        where = short(service.worker)
        row = f"<td>{service.rank}</td><td>{where}</td><td>{service.rows:,}</td><td>{size}</td>"
        assert row in text


def lab(colour: str, deficiency: np.ndarray) -> np.ndarray:
    """A colour as CIE L*a*b*, seen with a colour vision deficiency."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(deficiency @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ seen / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira and Fernandes, IEEE TVCG 15(6), 2009: full severity, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


MEMORY_COLOURS = (*set(PART_COLOURS.values()), GREEN, RED)


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize(
    "together",
    [tuple(STEP_COLOURS.values()), MEMORY_COLOURS, (BLUE, ORANGE), (GREEN, BLUE)],
    ids=["steps", "memory", "loads", "choices"],
)
def test_colours_that_are_used_together_can_be_told_apart(deficiency, together):
    matrix = np.array(DEFICIENCIES[deficiency])
    distances = {
        pair: np.linalg.norm(lab(pair[0], matrix) - lab(pair[1], matrix))
        for pair in combinations(together, 2)
    }
    assert min(distances.values()) > 10, min(distances, key=distances.get)
    assert PINK in STEP_COLOURS.values()


def test_without_bokeh_the_error_says_what_to_install(compared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh.embed", None)
    with pytest.raises(ImportError, match="pip install bokeh"):
        write_plan_report(tmp_path / "plan.html", compared)
