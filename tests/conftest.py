"""Settings that all tests share."""

from __future__ import annotations

import os
import signal
from itertools import count
from threading import Event
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings

from dask_ep.arrays import blas
from dask_ep.storage import journal
from tests import processes

settings.register_profile(
    "default", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


WAITING = {"cluster", "cli", "workflows"}
"""Rooms whose tests wait for processes: side by side with others, which use the time, if first."""


@pytest.fixture
def bokeh():
    """What draws reports, where it is installed; imported, so that no test pays for it."""
    pytest.importorskip("bokeh.plotting", reason="bokeh is not installed")
    return pytest.importorskip("bokeh.embed")


@pytest.fixture
def gate(tmp_path):
    """A file while which the experts `Waits(gate)` wait."""
    file = tmp_path / "wait"
    file.touch()
    yield file
    file.unlink(missing_ok=True)


@pytest.fixture
def stop_after(monkeypatch):
    """Make what stops a run after some of its rows and blocks; no further one is recorded."""

    def make(rows: int, blocks: int):
        written, waits, stopped, plainly = count(), Event(), Event(), journal.record_done

        def record(*args, **keywords):
            if next(written) >= blocks and not stopped.is_set():
                waits.set()
                stopped.wait(60)
                raise RuntimeError("stopped")  # or all others could be done meanwhile
            plainly(*args, **keywords)

        def stop(progress):
            if progress.rows_done >= rows:
                waits.wait(60)
                stopped.set()
                raise KeyboardInterrupt

        monkeypatch.setattr(journal, "record_done", record)
        return stop

    return make


@pytest.fixture
def float32_products(monkeypatch):
    """A CPU, or an environment, that multiplies bfloat16 no faster than float32."""
    monkeypatch.setattr(blas, "bfloat16_library", lambda: None)


@pytest.fixture(autouse=True)
def environment_as_it_was():
    """Nannies in this process set BLAS variables in it, which later tests' processes would get."""
    with mock.patch.dict(os.environ):
        yield


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.parent.name not in WAITING)


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # xdist begins with files of many tests
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's way in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    processes.watch_starts()
    config.processes_end = processes.end_with_this_process()


def pytest_unconfigure(config):
    config.processes_end.stdin.close()
    config.processes_end.wait()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    processes.refuse_to("" if item.get_closest_marker("slow") else item.nodeid)
    try:
        return (yield)
    finally:
        processes.refuse_to("")
