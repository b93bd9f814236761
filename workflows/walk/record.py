"""What was a walk started with, and how far did it get?

    walk.json     what decides the values, and what each block took
    summary.json  at the end: tokens, loss, perplexity, and what each block took

A walk is resumed with the options and inputs it was started with, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from dask_ep.storage.files import fingerprint_files, replacing, write_text
from walk.documents import Documents, next_tokens

NAME = "walk.json"


class Record:
    """The record of a walk in its output directory.

    Parameters
    ----------
    out : directory
    begun : everything that decides the values, and the memory that experts may take
    resume : whether to continue a walk in that directory

    Raises
    ------
    FileExistsError
        If the directory is not empty, and `resume` is not set or no walk was started in it.
    ValueError
        If the walk in it was started with something else; the message says what differs.
    """

    def __init__(self, out: str, begun: dict[str, Any], resume: bool):
        self.path = os.path.join(out, NAME)
        begun = json.loads(json.dumps(begun))
        started = os.path.exists(self.path)
        if os.path.lexists(out) and not (_is_empty(out) or (started and resume)):
            how = "use --resume to continue it" if started else f"it has no {NAME} to resume from"
            raise FileExistsError(f"{out} exists; {how}, or choose another --out")
        os.makedirs(out, exist_ok=True)
        self.content = {"begun": begun, "blocks": {}}
        if started:
            self.content = read_json(self.path)
            _check_same(self.content["begun"], begun, out)
        else:
            self._write()

    @property
    def begun(self) -> dict[str, Any]:
        return self.content["begun"]

    def add(self, block: int, took: dict[str, Any], under: str | None = None) -> None:
        """Record what a block took, or something else about it under a name.

        For a block that was stopped and resumed, that is what the last run took.
        """
        entry = self.content["blocks"].setdefault(str(block), {"block": block, "bytes_read": 0})
        entry |= took if under is None else {under: took}
        self._write()

    def has(self, block: int, what: str) -> bool:
        return what in self.content["blocks"].get(str(block), {})

    def keep(self, name: str, value: Any) -> None:
        """Record a choice that the walk made itself, unless it was recorded before."""
        self.begun.setdefault(name, value)
        self._write()

    @property
    def blocks(self) -> list[dict[str, Any]]:
        return [took for _, took in sorted(self.content["blocks"].items(), key=lambda b: int(b[0]))]

    def _write(self) -> None:
        write_json(self.path, self.content)


def write_json(path: str, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1))


def read_json(path: str) -> Any:
    return json.loads(Path(path).read_text())


def fingerprint(directory: str) -> str:
    """Return a fingerprint of a checkpoint, which changes when one of its files does."""
    return _hash(json.dumps(fingerprint_files(directory), sort_keys=True).encode())


def keep_documents(out: str, documents: Documents) -> None:
    """Write token ids, lengths and each token's target, unless these files exist."""
    arrays = {
        "tokens": documents.ids,
        "lengths": documents.lengths,
        "targets": next_tokens(documents),
    }
    for name, array in arrays.items():
        path = os.path.join(out, f"{name}.npy")
        if not os.path.exists(path):
            with replacing(path) as new, open(new, "wb") as file:
                np.save(file, array)


def hash_arrays(*arrays: np.ndarray) -> str:
    return _hash(b"".join(array.tobytes() for array in arrays))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _is_empty(directory: str) -> bool:
    return os.path.isdir(directory) and set(os.listdir(directory)) <= {NAME + ".new"}


def _check_same(old: dict[str, Any], new: dict[str, Any], out: str) -> None:
    differ = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted(new)
        if name in new and old.get(name) != new[name]
    ]
    if differ:
        raise ValueError(
            f"{out} must be resumed with what it was started with, but {'; '.join(differ)}; use "
            "the same again, or choose another --out"
        )
