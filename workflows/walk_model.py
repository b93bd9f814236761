# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "transformers>=5.24", "dask-ep[mkl,onednn]"]
# [tool.uv.sources]
# dask-ep = { path = ".." }
# ///
"""Send a text through a whole model, block by block, in the memory of one block.

    python workflows/walk_model.py MODEL text.txt --out acts/ --save hidden,routing --layers 0-3

MODEL is a checkpoint directory. TEXT is a text file with one document per line; or token ids as
.npy or .zarr, (sequences, length), with negative ids as padding at the end; or, with --start, a
directory of hidden states written by vLLM's extract_hidden_states.

Attention, norms and dense parts are transformers' own; MoE modules are computed by dask_ep, from
the same files. Written to acts/:

    block_003.zarr           hidden states (N, d) after block 3     with --save hidden
    routing_003.zarr         (N, k) experts of each row             with --save routing
    topk_weights_003.zarr    (N, k) and their weights               with --save routing
    stats_003.safetensors    statistics of its experts, for prune_experts.py    with --collect
    moe_input_003.zarr       (N, d) the input of its MoE module     with --save moe_input
    final.zarr               (N, d) after the last norm
    loss.npy                 (N,) loss of each token, NaN for the last of a document; not for a
                             model without a head, such as a classifier
    tokens.npy, lengths.npy  token ids (N,), and the lengths of the documents
    summary.json             tokens, loss, perplexity, seconds and bytes of each block

Rows are tokens, document after document, without padding. A walk that was stopped for any reason
continues with --resume at the chunk where it stopped, with the same bits in the end.
"""

from __future__ import annotations

import click
from walk.options import Options

from dask_ep.cli.run_command import choose_where, where_options
from dask_ep.jobs.backends import on_gpus
from dask_ep.jobs.job import PRECISIONS
from dask_ep.layers.collect import WHAT

SAVES = ("hidden", "routing", "moe_input")


class Names(click.ParamType):
    """A comma-separated list of known words."""

    name = "names"

    def __init__(self, known: tuple[str, ...]):
        self.known = known

    def convert(self, value, parameter, context) -> frozenset[str]:
        names = value if isinstance(value, frozenset) else frozenset(filter(None, value.split(",")))
        if unknown := sorted(names - set(self.known)):
            self.fail(f"must be some of {', '.join(self.known)}, but has {', '.join(unknown)}")
        return names


class Blocks(click.ParamType):
    """A range of blocks: "3", or "0-23"."""

    name = "blocks"

    def convert(self, value, parameter, context) -> range:
        if isinstance(value, range):
            return value
        first, dash, last = value.partition("-")
        ends = (first, last if dash else first)
        if not all(end.isdecimal() for end in ends) or int(ends[1]) < int(ends[0]):
            self.fail(f"invalid blocks: {value!r} (try 3, or 0-23)")
        return range(int(ends[0]), int(ends[1]) + 1)


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.argument("text", type=click.Path(exists=True))
@click.option("--out", required=True, help="Directory to write.")
@click.option("--layers", type=Blocks(), help="Blocks to save; the walk ends after the last.")
@click.option("--save", type=Names(SAVES), default=frozenset(), help=f"Some of {','.join(SAVES)}.")
@click.option(
    "--collect",
    type=Names(WHAT),
    default=frozenset(),
    metavar="NAMES",
    help=f"Statistics of experts, some of {','.join(WHAT)}.",
)
@click.option(
    "--compare",
    type=click.Path(exists=True, file_okay=False),
    metavar="MODEL2",
    help="Another checkpoint of the model, walked through at the same time and compared.",
)
@click.option(
    "--length",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Maximum tokens of a document; longer ones are cut, but requests are refused.",
)
@click.option(
    "--chunk-rows",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Maximum rows of a token chunk.",
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Maximum tokens of a batch in attention; a longer document is its own batch.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Dtype of weights and hidden states; auto: the checkpoint's.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", *PRECISIONS]),
    default="auto",
    show_default=True,
    help="Precision of the experts' products; auto: the dtype's, as everywhere else in the block.",
)
@click.option(
    "--start",
    type=click.IntRange(0),
    metavar="BLOCK",
    help="Start at this block; TEXT holds the hidden states that are its input.",
)
@click.option(
    "--column",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Index of the layer in the files of --start.",
)
@where_options
@click.option("--resume", is_flag=True, help="Continue a walk that was stopped.")  # fmt: skip
def main(**options) -> None:
    where = choose_where(options)
    if on_gpus(where):
        raise click.UsageError("a walk computes on the host: run without --gpu")
    try:
        from walk.drive import run  # needs torch: imported after the arguments are checked

        summary = run(Options(**options, where=where), lambda line: click.echo(line, err=True))
    except (OSError, ValueError, MemoryError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(describe(summary))


def describe(summary: dict) -> str:
    """Return the result in a few lines."""
    lines = [
        (
            f"{summary['tokens']:,} tokens in {summary['documents']:,} documents, "
            f"{summary['seconds']:,.0f} s, {summary['bytes_read'] / 1e9:.2f} GB of weights read"
        ),
    ]
    if "loss" in summary:
        lines.append(f"loss {summary['loss']:.6f}, perplexity {summary['perplexity']:.4f}")
    if "loss" in summary.get("compare", {}):
        other = summary["compare"]
        lines.append(
            f"compared: loss {other['loss']:.6f}, perplexity {other['perplexity']:.4f}, "
            f"KL divergence {other['kl']:.3g}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
