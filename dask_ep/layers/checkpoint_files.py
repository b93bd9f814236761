"""Which tensors does a checkpoint directory hold, and in which files?

    directory/config.json                     sizes and model type
              model.safetensors               all tensors; it comes first, as in transformers
              model.safetensors.index.json    or tensor name -> file, if there are several
              model-00001-of-00002.safetensors, ...

``transformers_weights`` in the config names another file or index, which then comes first.

Only headers are read, each file's at most once and only when one of its tensors is needed. The
directory is local, or an address that fsspec supports. A GGUF file can replace it, as it holds
both config and tensors.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from dask_ep.errors import ReadError
from dask_ep.storage.gguf_files import open_gguf
from dask_ep.storage.remote import is_remote, names_in, read_object
from dask_ep.storage.sources import Source, open_safetensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MODELOPT = "hf_quant_config.json"


class CheckpointFiles:
    """The files of a checkpoint: its config, and its tensors by name.

    Parameters
    ----------
    directory : str or path-like
        A local directory, or an address such as ``s3://bucket/model``.

    Raises
    ------
    ReadError
        If there is no such directory, or a required file is missing.
    ValueError
        If a file is not valid; the message names it.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = os.fspath(directory).rstrip("/")
        self._headers: dict[str, Mapping[str, Source]] = {}

    # --- which files there are ---

    @cached_property
    def file_names(self) -> list[str]:
        try:
            if is_remote(self.directory):
                return names_in(self.directory)
            return sorted(os.listdir(self.directory))
        except FileNotFoundError:
            raise ReadError(
                f"{self.directory} is not a checkpoint directory: it does not exist. Models of a "
                "hub must be downloaded first: `hf download NAME --local-dir DIRECTORY`"
            ) from None
        except OSError as error:
            why = error.strerror or error
            raise ReadError(f"{self.directory} is not a checkpoint directory: {why}") from error

    @cached_property
    def config(self) -> dict[str, Any]:
        """The contents of ``config.json``."""
        return self._read_json("config.json")

    @cached_property
    def modelopt_config(self) -> dict[str, Any]:
        """The separate file in which older exports of ModelOpt describe their format."""
        if MODELOPT not in self.file_names:
            return {}
        settings = self._read_json(MODELOPT).get("quantization") or {}
        if not isinstance(settings, dict):
            raise ValueError(
                f"{self._path(MODELOPT)}: quantization must be an object, but is {settings!r}"
            )
        return {"quant_method": "modelopt", **settings}

    @cached_property
    def first_file(self) -> str:
        """Name of the file or index that transformers would read."""
        named = self.config.get("transformers_weights")
        if named is not None:
            if not str(named).endswith((".safetensors", ".safetensors.index.json")):
                raise ValueError(
                    f"{self._path('config.json')}: transformers_weights must name a .safetensors "
                    f"file or a .safetensors.index.json, but is {named!r}"
                )
            if named not in self.file_names:
                raise ReadError(
                    f"{self._path('config.json')} says that the tensors are in {named}, but "
                    f"{self.directory} has no such file"
                )
            return named
        for name in (SINGLE, INDEX):
            if name in self.file_names:
                return name
        found = [name for name in self.file_names if name.endswith(".safetensors")]
        raise ReadError(
            f"{self.directory} must have {SINGLE} or {INDEX}; it has "
            f"{', '.join(found) or 'no .safetensors file'}"
        )

    @cached_property
    def file_of(self) -> dict[str, str]:
        """File name of every tensor, by tensor name."""
        name = self.first_file
        if name.endswith(".safetensors"):
            return dict.fromkeys(self.header(name), name)
        index = self._read_json(name)
        files = index.get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ValueError(f"{self._path(name)} must have a weight_map: tensor -> file")
        return files

    def header(self, file_name: str) -> Mapping[str, Source]:
        """The tensors of one file."""
        if file_name not in self._headers:
            if file_name not in self.file_names:
                raise ReadError(
                    f"{self._path(self.first_file)} says that tensors are in {file_name}, but "
                    f"{self.directory} has no such file"
                )
            self._headers[file_name] = open_safetensors(self._path(file_name))
        return self._headers[file_name]

    @cached_property
    def _sorted_names(self) -> list[str]:
        return sorted(self.file_of)

    def names_under(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`, found by binary search."""
        first = bisect_left(self._sorted_names, prefix)
        last = bisect_left(self._sorted_names, prefix + chr(0x10FFFF))
        return self._sorted_names[first:last]

    def under(self, prefix: str) -> dict[str, Source]:
        """The tensors whose names begin with `prefix`, by the rest of the name.

        Raises
        ------
        ValueError
            If the index and a file disagree on them.
        """
        named = {name: self.file_of[name] for name in self.names_under(prefix)}
        found: dict[str, Source] = {}
        for file_name in sorted(set(named.values())):
            header = self.header(file_name)
            here = {name for name, file in named.items() if file == file_name}
            there = {name for name in header if name.startswith(prefix)}
            for name in sorted(here ^ there):
                where = "only the index has" if name in here else "only the file has"
                raise ValueError(
                    f"{self._path(self.first_file)} and {file_name} disagree: {where} {name}"
                )
            found |= {name.removeprefix(prefix): header[name] for name in here}
        return found

    # --- reading ---

    def _path(self, file_name: str) -> str:
        return f"{self.directory}/{file_name}"

    def _read_json(self, file_name: str) -> dict[str, Any]:
        path = self._path(file_name)
        if file_name not in self.file_names:
            raise ReadError(
                f"{self.directory} must have {file_name}, but has {', '.join(self.file_names[:20])}"
            )
        try:
            if is_remote(path):
                text = read_object(path)
            else:
                with open(path, "rb") as file:
                    text = file.read()
        except OSError as error:
            raise ReadError(f"{path} cannot be read: {error.strerror or error}") from error
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}")
        return value


class GgufFiles(CheckpointFiles):
    """A GGUF file instead of a directory; its metadata is the config.

    Keys are without their prefix, the name of the architecture, which is ``model_type``.
    ``moe_layers`` lists the layers with a router, except predictors of further tokens.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        self.file_names = [os.path.basename(self.directory)]

    @cached_property
    def config(self) -> dict[str, Any]:
        settings = open_gguf(self.directory).settings
        kind = settings.get("general.architecture")
        config = {name.removeprefix(f"{kind}."): value for name, value in settings.items()}
        blocks, predictors = (config.get(f, 0) for f in ("block_count", "nextn_predict_layers"))
        if type(blocks) is not int or type(predictors) is not int:
            raise ValueError(
                f"{self.directory}: the metadata must have whole numbers for '{kind}.block_count' "
                f"and '{kind}.nextn_predict_layers', not {blocks!r} and {predictors!r}"
            )
        layers = blocks - predictors
        found = (re.fullmatch(r"blk\.(\d+)\.ffn_gate_inp\.weight", name) for name in self.file_of)
        moe = sorted(int(name[1]) for name in found if name and int(name[1]) < layers)
        return config | {"model_type": kind, "block_count": layers, "moe_layers": moe}

    @cached_property
    def file_of(self) -> dict[str, str]:
        return dict.fromkeys(self.header(self.directory), self.directory)

    def header(self, file_name: str) -> Mapping[str, Source]:
        if not self._headers:
            self._headers[file_name] = open_gguf(self.directory).tensors
        return self._headers[file_name]
