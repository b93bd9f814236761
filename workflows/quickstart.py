"""A Mixture-of-Experts layer over a file of token rows, from start to end, on local threads.

    python workflows/quickstart.py --rows 200000

Token rows stream from a file through their experts into another file: only a few chunks per thread
are in memory at a time, however many rows there are.
"""

import argparse
import tempfile
from pathlib import Path

from dask_ep import Experts, expert_parallel, open_tokens, store
from dask_ep.arrays.blas import one_blas_thread
from dask_ep.jobs.example import Example, write_example
from dask_ep.jobs.job import load_job
from dask_ep.jobs.verify import verify_job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="for data; default: a temporary one")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--d", type=int, default=512, help="width of a token row")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--k", type=int, default=2, help="experts that each row goes to")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        sizes = Example(options.rows, options.d, options.experts, options.k, kind="gated")
        job = load_job(write_example(directory, sizes))

        tokens = open_tokens(job.tokens)  # lazy, (n, d)
        routing = open_tokens(job.routing, like=tokens)  # (n, k) expert indices
        weights = open_tokens(job.topk_weights, like=tokens)  # (n, k)
        experts = Experts.gated(
            directory / "gate.zarr", directory / "up.zarr", directory / "down.zarr"
        )
        y = expert_parallel(tokens, routing, experts, topk_weights=weights)
        print("lazy:", y)

        with one_blas_thread():  # one product per thread, one thread per product
            output = store(y, job.out, inputs=[job.tokens, job.routing, job.topk_weights])
        print("stored:", output.path, output.shape)

        found = verify_job(job)
        print(f"checked {found.rows} rows: error {found.relative_error:.1e} of their terms,")
        print("good" if found.good else "DIFFERENT")


if __name__ == "__main__":
    main()
