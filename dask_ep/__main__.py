"""How does ``python -m dask_ep`` start? As the command ``dask-ep``."""

from dask_ep.cli import main

if __name__ == "__main__":
    main()
