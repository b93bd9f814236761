"""How is a comparison of two checkpoints, or of two outputs, shown?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import click
import numpy as np

from dask_ep.cli.command import DIFFERENT, FAILED, complain, debug_option
from dask_ep.cli.options import refuse
from dask_ep.cli.run_command import choose_where, where_options
from dask_ep.cli.terminal import progress_bar
from dask_ep.cluster.interrupts import Interrupts
from dask_ep.jobs.compare import (
    Comparison,
    TensorDifferences,
    compare_checkpoints,
    compare_outputs,
)
from dask_ep.jobs.difference import Difference
from dask_ep.storage.remote import is_remote

MOST_SHOWN = 8
"""Maximum number of experts, pairs of experts and names of tensors that are shown."""


@click.command("compare")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--tokens", metavar="PATH", help="Hidden states (n, d), the layer's input.")
@click.option("--layer-index", type=click.IntRange(0), help="Layer of the checkpoints.")
@click.option(
    "--token-ids", metavar="PATH", help="Token ids (n,), for layers that look experts up by token."
)
@click.option(
    "--routing",
    metavar="PATH",
    multiple=True,
    help="For outputs: the routing of A, for errors by expert; repeat it for the routing of B.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    help="Largest error of a row, |a - b| / |a|; exit code 3 beyond it.",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Fraction of the rows that must be within the tolerance.",
)
@click.option("--chunk-rows", type=click.IntRange(1), help="Rows per chunk.")
@click.option(
    "--scratch",
    type=click.Path(file_okay=False, exists=True),
    help="Directory for both outputs if the layers do not fit into memory together; all workers "
    "must see it; default: $TMPDIR.",
)
@where_options
@debug_option
def compare_command(a: str, b: str, **options: Any) -> int:
    """Compare a layer of two checkpoints A and B on tokens, or two outputs A and B.

    Shows the error of a row (|a - b| / |a|) as median, 99 % and largest, and by expert; which rows
    are routed to other experts, and from which to which; and tensors that are missing or have other
    shapes. Where it runs is chosen as for `run`.

    \b
    Examples:
      dask-ep compare bf16/ fp8/ --tokens hidden.zarr --layer-index 3 --tolerance 0.1 --share 0.99
      dask-ep compare bf16/ model-Q8_0.gguf --tokens hidden.zarr --layer-index 3
      dask-ep compare a.zarr b.zarr --tolerance 1e-5
    """
    where = choose_where(options)
    names, tokens = (options.pop(key) for key in ("routing", "tokens"))
    layer, checkpoints = options.pop("layer_index"), [is_checkpoint(path) for path in (a, b)]
    if any(checkpoints):
        if not all(checkpoints):
            one = (a, b)[checkpoints.index(False)]
            raise click.UsageError(f"{one} must be a checkpoint, as the other one is")
        if tokens is None or names:
            raise click.UsageError("to compare checkpoints, give --tokens, and no --routing")
    else:
        given = {"tokens": tokens, "layer-index": layer is not None}
        given |= {name.replace("_", "-"): options.pop(name) for name in ("scratch", "token_ids")}
        refuse(given, "is for checkpoints, not for outputs")
    try:
        with Interrupts(FAILED) as interrupts, progress_bar("rows") as tell:
            options["on_progress"] = lambda done, total: tell(done, total, "")
            options["wait"] = interrupts.wait
            if any(checkpoints):
                found = compare_checkpoints(a, b, tokens, layer, where, **options)
            else:
                found = compare_outputs(a, b, where, routing=names, **options)
    except KeyboardInterrupt:
        complain("stopped")
        raise click.exceptions.Exit(FAILED) from None
    for line in described(found):
        click.echo(line)
    return 0 if found.good else DIFFERENT


def is_checkpoint(path: str) -> bool:
    """Return whether a path is a GGUF file, or a directory other than that of an array."""
    if path.endswith(".gguf"):
        return True
    if is_remote(path):
        return not path.rstrip("/").endswith((".zarr", ".npy", ".safetensors"))
    return os.path.isfile(os.path.join(path, "config.json"))


# --- text ----------------------------------------------------------------------------------------


def described(found: Comparison) -> Iterator[str]:
    """Yield the lines that describe a comparison."""
    difference = found.difference
    where = "" if found.layer is None else f"layer {found.layer}: "
    yield f"{where}{difference.rows} rows compared"
    yield f"error of a row, |a - b| / |a|: {_errors(difference)}"
    if difference.worst and difference.largest > 0:
        worst = ", ".join(f"{w.row} ({w.error:.3g})" for w in difference.worst[:MOST_SHOWN])
        yield f"worst rows: {worst}"
    if found.routing_compared:
        yield from _routing(difference)
    elif found.layer is not None:
        yield "the routing is not compared, since the layers have different numbers of experts"
    if difference.num_experts and difference.largest > 0:
        yield from _experts(difference, found.routing_compared)
    if found.tensors is not None:
        yield from _tensors(found.tensors)
    if found.tolerance is not None:
        within = difference.rows - difference.beyond
        yield (
            f"{within} of {difference.rows} rows are within {found.tolerance:g}; "
            f"{found.share:.4g} of them must be"
        )
        yield "good" if found.good else "not good"


def _errors(found: Difference, *, of_moved: bool = False) -> str:
    median, most = (found.quantile(part, of_moved=of_moved) for part in (0.5, 0.99))
    largest = "" if of_moved else f", largest {found.largest:.3g}"
    return f"median {median:.3g}, 99 % {most:.3g}{largest}"


def _routing(found: Difference) -> Iterator[str]:
    if not found.moved:
        yield "routing: every row goes to the same experts"
        return
    yield (
        f"routing: {found.moved} rows ({found.moved / found.rows:.2%}) go to other experts, the "
        f"first are {', '.join(map(str, found.first_moved))}; their errors: "
        f"{_errors(found, of_moved=True)}"
    )
    slots = ", ".join(f"{slot + 1}: {n}" for slot, n in enumerate(found.moved_slots) if n)
    yield f"  slots of A whose expert B does not choose, the best slot first: {slots}"
    if found.pairs:
        pairs = sorted(found.pairs.items(), key=lambda item: (-item[1], item[0]))[:MOST_SHOWN]
        yield f"  most often {', '.join(f'{x} -> {y} ({n})' for (x, y), n in pairs)}"


def _experts(found: Difference, routing_compared: bool) -> Iterator[str]:
    means, served = found.expert_means, np.flatnonzero(found.expert_rows)
    order = served[np.argsort(-means[served], kind="stable")][:MOST_SHOWN]
    yield f"experts with the largest mean error, of {len(served)} that have rows:"
    for e in order.tolist():
        moved = f", lost {found.lost[e]}, gained {found.gained[e]}" if routing_compared else ""
        yield (
            f"  expert {e}: {found.expert_rows[e]} rows, mean {means[e]:.3g}, largest "
            f"{found.expert_largest[e]:.3g}{moved}"
        )


def _tensors(found: TensorDifferences) -> Iterator[str]:
    yield f"tensors: {found.same} have the same name, shape and dtype"
    for (x, y), number in sorted(found.dtypes.items()):
        yield f"  {number} are {x} in A and {y} in B"
    for name, shapes in found.shapes.items():
        yield f"  {name} has other shapes: {shapes}"
    for which, names in (("A", found.only_a), ("B", found.only_b)):
        shown = [f"{name} ({n})" if n > 1 else name for name, n in names.items()]
        more = f" and {len(shown) - MOST_SHOWN} more" if len(shown) > MOST_SHOWN else ""
        if shown:
            yield f"  only in {which}: {', '.join(shown[:MOST_SHOWN])}{more}"
