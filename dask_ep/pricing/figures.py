"""How are loads, traffic, memory and time drawn?

Each function returns one bokeh figure that fills the available width. Colours are those of Okabe
and Ito (https://jfly.uni-koeln.de/color/), which people with any kind of colour vision can tell
apart, and cividis for quantities; whatever a colour shows is also in a label or a tooltip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dask_ep.pricing.price import Plan
from dask_ep.pricing.trace import Record

INK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
RED, SKY, PINK, YELLOW = "#D55E00", "#56B4E9", "#CC79A7", "#F0E442"
GREY = "#777777"
STEP_COLOURS = {
    "experts": PINK,
    "read": GREEN,
    "route": INK,
    "chunk": SKY,
    "serve": BLUE,
    "sum": ORANGE,
    "layer": GREY,
    "store": YELLOW,
    "transfer": RED,
}
"""Colours of the steps of a run."""

PART_COLOURS = {
    "process": SKY,
    "experts": BLUE,
    "scratch": YELLOW,
    "chunks": ORANGE,
    "rows": ORANGE,
    "partial results": PINK,
    "second moments": GREY,
}
"""Colours of the uses of memory."""

MIB = 1 << 20

MOST_IN_A_LINE = 3
"""Labels of a legend in one line: more are cut off on a phone."""

MOST_NUMBERS = 6
"""Maximum ranks of a heat map whose cells are wide enough for a number, even on a phone."""

MOST_SPANS = 5000
"""Maximum number of tasks and servings in a time line: the longest are drawn."""

Figure = Any


def draw_expert_load(plan: Plan) -> Figure:
    """Draw the rows of each expert as bars."""
    experts = np.arange(plan.expert_rows.size)
    drawing = _figure(
        "Rows of each expert (dashed: mean)",
        "expert",
        "rows",
        tooltips=[("expert", "@x"), ("rows", "@top{0,0}")],
    )
    drawing.vbar(x=experts, top=plan.expert_rows, width=0.9, color=BLUE)
    mean = plan.expert_rows.mean()
    drawing.hspan(y=[mean], line_color=INK, line_dash="dashed", line_width=1.5)
    _of_whole_numbers(drawing)
    return drawing


def draw_rank_load(plan: Plan, measured: dict[int, int] | None = None) -> Figure:
    """Draw the rows of each rank as bars, their mean as a line, and measured rows as diamonds."""
    rows = plan.rank_rows if measured is None else plan.packet_rows.sum(axis=0)
    what = "served" if measured is None else "received"
    drawing = _figure(
        f"Rows {what} by each rank (dashed: mean)",
        "rank",
        "rows",
        tooltips=[("rank", "@x"), ("rows", "@top{0,0}")],
    )
    drawing.vbar(x=np.arange(rows.size), top=rows, width=0.8, color=BLUE, legend_label="planned")
    drawing.hspan(y=[rows.mean()], line_color=INK, line_dash="dashed", line_width=1.5)
    if measured is not None:
        drawing.scatter(
            x=list(measured),
            y=list(measured.values()),
            marker="diamond",
            size=12,
            fill_color=ORANGE,
            line_color=INK,
            legend_label="measured",
        )
    _legend_below(drawing)
    _of_whole_numbers(drawing)
    return drawing


def draw_imbalance(imbalance: dict[str, float]) -> Figure:
    """Draw the largest over the mean rank load of each policy, as bars from 1.0."""
    names = list(imbalance)[::-1]
    values = [imbalance[name] for name in names]
    drawing = _figure(
        "Imbalance of each placement (1.0 is perfect)",
        "work of the busiest rank / mean",
        None,
        y_range=names,
        height=80 + 34 * len(names),
        tooltips=[("placement", "@y"), ("imbalance", "@right{0.000}")],
    )
    drawing.hbar(y=names, left=1.0, right=values, height=0.7, color=BLUE)
    labels = [f" {value:.3f}" for value in values]
    drawing.text(x=values, y=names, text=labels, text_baseline="middle", text_font_size="12px")
    drawing.x_range.start, drawing.x_range.end = 1.0, 1.0 + 1.25 * max(max(values) - 1.0, 0.04)
    return drawing


def draw_traffic(rows: np.ndarray, title: str, workers: Sequence[str]) -> Figure:
    """Draw the rows (W, R) from the chunks of each worker to each rank as a heat map."""
    ranks = [str(rank) for rank in range(rows.shape[1])]
    names = list(workers)
    source, target = np.divmod(np.arange(rows.size), len(ranks))
    drawing = _figure(
        title,
        "to rank",
        "from worker",
        x_range=ranks,
        y_range=names[::-1],
        height=120 + min(26 * len(names), 480),
        tooltips=[
            ("from", "@from"),
            ("to", "@to"),
            ("rows", "@rows{0,0}"),
        ],
    )
    data = {
        "from": [names[s] for s in source],
        "to": [ranks[t] for t in target],
        "rows": rows.ravel(),
    }
    from bokeh.transform import linear_cmap

    cells = drawing.rect(
        x="to",
        y="from",
        width=1,
        height=1,
        source=data,
        line_color="white",
        fill_color=linear_cmap("rows", "Cividis256", 0, max(int(rows.max()), 1)),
    )
    if len(ranks) <= MOST_NUMBERS:
        _write_numbers(drawing, data)
    else:
        drawing.add_layout(cells.construct_color_bar(width=12), "right")
    drawing.grid.visible = False
    return drawing


def _write_numbers(drawing: Figure, data: dict[str, Any]) -> None:
    """Write the rows into the cells of a heat map: black on light ones, white on dark ones."""
    bright = data["rows"] > data["rows"].max() / 2
    drawing.text(
        x="to",
        y="from",
        text="number",
        text_color="ink",
        source=data
        | {
            "number": [f"{number:,}" for number in data["rows"].tolist()],
            "ink": np.where(bright, INK, "#FFFFFF"),
        },
        text_align="center",
        text_baseline="middle",
        text_font_size="12px",
    )


def draw_memory(plan: Plan, measured: int | None = None) -> Figure:
    """Draw the uses of a worker's memory, with its limit and what was measured."""
    names = ["planned"] if measured is None else ["measured", "planned"]
    drawing = _figure(
        "Peak memory of a worker", "MiB", None, y_range=names, height=150 + 40 * len(names)
    )
    parts, limit = plan.memory_parts, plan.memory_limit
    if measured is not None:
        parts, limit = plan.process_parts, plan.process_limit
    left = 0.0
    for name, nbytes in parts.items():
        right = left + nbytes / MIB
        drawing.hbar(
            y=["planned"],
            left=left,
            right=right,
            height=0.6,
            color=PART_COLOURS[name],
            legend_label=f"{name} {nbytes / MIB:,.0f}",
        )
        left = right
    end = left
    if measured is not None:
        drawing.hbar(
            y=["measured"],
            right=measured / MIB,
            height=0.6,
            color=GREEN,
            legend_label=f"measured {measured / MIB:,.0f}",
        )
        end = max(end, measured / MIB)
    if limit is not None:
        at = limit / MIB
        drawing.vspan(x=[at], line_color=RED, line_width=3, legend_label=f"limit {at:,.0f}")
        end = max(end, at)
    drawing.x_range.start, drawing.x_range.end = 0, 1.05 * end
    _legend_below(drawing)
    return drawing


def draw_choices(plans: Sequence[Plan], best: Plan) -> Figure:
    """Draw the predicted time of each choice; the best has another colour and a mark."""
    names = [
        f"{n}: {p.world_size} ranks, {p.policy}, {p.chunk_rows:,} rows"
        for n, p in enumerate(plans, start=1)
    ][::-1]
    shown = list(plans)[::-1]
    drawing = _figure(
        "Predicted time of each choice",
        "seconds",
        None,
        y_range=names,
        height=90 + 26 * len(names),
        tooltips=[("choice", "@y"), ("seconds", "@right{0.00}")],
    )
    seconds = [p.seconds for p in shown]
    colours = [GREEN if p is best else BLUE if p.fits else "#BBBBBB" for p in shown]
    drawing.hbar(y=names, right=seconds, height=0.75, color=colours)
    notes = [
        f" {p.seconds:.2f}{' best' if p is best else '' if p.fits else ' does not fit'}"
        for p in shown
    ]
    drawing.text(x=seconds, y=names, text=notes, text_baseline="middle", text_font_size="12px")
    drawing.x_range.start, drawing.x_range.end = 0, 1.35 * max(seconds)
    return drawing


def draw_time_line(record: Record) -> Figure:
    """Draw tasks and servings as bars from start to stop, by worker; several may overlap."""
    bars = sorted(_bars(record), key=lambda bar: bar.start - bar.stop)[:MOST_SPANS]
    names = sorted({bar.row for bar in bars}, key=lambda name: (len(name), name), reverse=True)
    drawing = _figure(
        "Tasks over time",
        "seconds",
        None,
        y_range=names,
        height=170 + min(24 * len(names), 700),
        tooltips=[
            ("step", "@step"),
            ("chunk", "@chunk"),
            ("rank", "@rank"),
            ("at", "@row"),
            ("seconds", "@start{0.000} to @stop{0.000}"),
        ],
    )
    for step, colour in STEP_COLOURS.items():
        chosen = [bar for bar in bars if bar.step == step]
        if chosen:
            drawing.hbar(
                y="row",
                left="start",
                right="stop",
                height=0.8,
                color=colour,
                alpha=0.7,
                legend_label=step,
                source={name: [getattr(bar, name) for bar in chosen] for name in Bar._fields},
            )
    if record.events:
        times = [event.time for event in record.events]
        drawing.vspan(x=times, line_color=INK, line_dash="dotted", line_width=2)
    _legend_below(drawing)
    return drawing


class Bar(NamedTuple):
    """A bar of the time line; its step is a key of `STEP_COLOURS`."""

    row: str
    step: str
    chunk: int
    rank: int
    start: float
    stop: float


def _bars(record: Record) -> Iterator[Bar]:
    steps = {"dispatch": "serve", "send": "chunk", "receipt": "store", "gram": "sum"}
    steps |= {"usage": "route", "see_router": "route"}
    for span in record.spans:
        step = steps.get(span.step, span.step)
        where = "services" if step in ("experts", "serve") else "tasks"
        if step in STEP_COLOURS:
            row = f"{short(span.worker)} {where}"
            yield Bar(row, step, span.chunk, span.rank, span.start, span.stop)
    for served in record.servings:
        row = f"{short(served.served_by)} services"
        yield Bar(row, "serve", served.chunk, served.rank, served.start, served.stop)


def draw_progress(plan: Plan, record: Record) -> Figure:
    """Draw the rows done over time; a straight line means constant speed."""
    drawing = _figure("Rows done", "seconds", "rows")
    finished = record.finished()
    done = np.cumsum([plan.chunks[chunk] for _, chunk in finished])
    times = [when for when, _ in finished]
    drawing.step(
        x=[0, *times],
        y=[0, *done.tolist()],
        mode="after",
        line_width=3,
        color=BLUE,
        legend_label="measured",
    )
    drawing.line(
        x=[0, plan.seconds],
        y=[0, plan.rows],
        color=ORANGE,
        line_dash="dashed",
        line_width=2,
        legend_label="planned",
    )
    drawing.legend.location = "bottom_right"
    return drawing


def _figure(title: str, x: str | None, y: str | None, height: int = 280, **options: Any) -> Figure:
    """Return an empty figure in the common style."""
    from bokeh.models import NumeralTickFormatter
    from bokeh.plotting import figure

    drawing: Any = figure(  # Any: its types do not know the attributes that are set below
        title=title,
        x_axis_label=x,
        y_axis_label=y,
        height=height,
        sizing_mode="stretch_width",
        toolbar_location=None,
        tools="hover" if "tooltips" in options else "",
        **options,
    )
    drawing.title.text_font_size = "15px"
    drawing.axis.axis_label_text_font_size = "13px"
    drawing.axis.major_label_text_font_size = "12px"
    drawing.outline_line_color = None
    for axis, names in ((drawing.xaxis, "x_range"), (drawing.yaxis, "y_range")):
        if not isinstance(options.get(names), list):
            axis.formatter = NumeralTickFormatter(format="0,0.[000]")
    return drawing


def _of_whole_numbers(drawing: Figure) -> None:
    """Start bars at zero, and label them with whole numbers."""
    from bokeh.models import BasicTicker

    drawing.y_range.start = 0
    drawing.xaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)


def _legend_below(drawing: Figure) -> None:
    drawing.add_layout(drawing.legend[0], "below")
    drawing.legend.orientation = "horizontal"
    drawing.legend.ncols = MOST_IN_A_LINE


def short(worker: str) -> str:
    """Return a worker's address without the protocol."""
    return worker.rsplit("//", 1)[-1]
