"""What is to be computed, from which files, into which file?

A job is a TOML file. Its keys are those of `Job`; each is an option of ``dask-ep run`` with the
same name. Where a job runs is not part of it: the same file serves threads, local processes and a
cluster.

    tokens = "tokens.zarr"              # (n, d) floats
    routing = "routing.zarr"            # (n,) or (n, k) expert indices
    topk_weights = "topk_weights.zarr"  # (n, k) floats; without them every weight is 1
    out = "out.zarr"                    # (n, d_out), written

    [experts]
    kind = "gated"
    gate = "gate.zarr"                  # (E, d, f)
    up = "up.zarr"
    down = "down.zarr"                  # (E, f, d_out)

Instead of routing and experts, ``layer = "checkpoint/"`` and ``layer_index = 3`` take router,
experts and shared experts from a checkpoint; if routing and top-k weights are given too, for
example those that ``save_routing`` of a run wrote, they replace those of its router. A layer that
looks experts up by token (the first ones of DeepSeek-V4) takes ``token_ids`` as well. Paths are
relative to the job file; a tensor of a safetensors file is ``"file.safetensors::name"``. This file
reads, checks and writes jobs; `dask_ep.jobs.build` makes the lazy output of one.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dask_ep.arrays.checks import is_number
from dask_ep.errors import JobError
from dask_ep.experts.expert_kinds import EXPERT_KINDS
from dask_ep.placement.policies import POLICIES

PRECISIONS = ("float32", "bfloat16")
"""Precisions of products in 16 bits, see `dask_ep.Experts.with_precision`."""

MISSING = ("error", "fill")
"""What Zarr chunks that were never written mean: with "fill", they hold the array's fill value."""


@dataclass(frozen=True)
class Job:
    """A job whose keys are known, typed, complete and consistent; its files are not opened yet.

    Paths become absolute, from the working directory; addresses with "://" stay as they are.
    `load_job` reads one from a file.

    Raises
    ------
    JobError
        For a missing or contradictory key, or a wrong type.

    Examples
    --------
    >>> from dask_ep import Job
    >>> job = Job("x.npy", "y.npy", routing="r.npy", experts={"kind": "linear", "w": "w.npy"})
    >>> Job("x.npy", "y.npy", routing="r.npy")
    Traceback (most recent call last):
    dask_ep.errors.JobError: job: 'experts' is missing; a job needs tokens and out, and either ...
    """

    tokens: str
    #: (n, d) array file
    out: str
    #: where the (n, d_out) output goes: .zarr, .npy or .safetensors
    routing: str | None = None
    #: (n,) or (n, k) array file of expert indices; with a layer (n, k), instead of its router's
    topk_weights: str | None = None
    #: (n, k) array file
    experts: Mapping[str, Any] | None = None
    #: `kind` and the keywords of the `Experts` classmethod of that name
    layer: str | None = None
    #: checkpoint directory
    layer_index: int | None = None
    #: index of one of its layers
    token_ids: str | None = None
    #: (n,) array file of integers, for a layer that looks experts up by token
    world_size: int | None = None
    #: number of ranks; None means one per worker, or 1 on threads
    placement: str | None = None
    #: one of `POLICIES`, or the path of a placement in JSON
    precision: str | None = None
    #: of 16-bit products, one of `PRECISIONS`; None means "float32"
    missing: str | None = None
    #: what Zarr chunks that were never written mean: "error" (the default), or "fill"
    name: str = "job"
    #: for messages: the job file, or "options"

    def __post_init__(self) -> None:
        given = {key: value for key, value in vars(self).items() if value is not None}
        del given["name"]
        values = _checked(given, base=Path.cwd(), place=self.name)
        _check_complete(values, self.name)
        for key, value in values.items():
            object.__setattr__(self, key, value)

    def to_toml(self, directory: str | os.PathLike | None = None) -> str:
        """Write the job as the text of a job file; paths below `directory` relative to it."""
        base = None if directory is None else Path(directory).resolve()
        values = {key: getattr(self, key) for key in JOB_KEYS if getattr(self, key) is not None}
        experts = values.pop("experts", None)
        lines = [f"{key} = {_toml(value, base)}" for key, value in values.items()]
        if experts is not None:
            lines += ["", "[experts]"]
            lines += [f"{key} = {_toml(value, base)}" for key, value in experts.items()]
        return "\n".join(lines) + "\n"


# --- reading ---------------------------------------------------------------------------------


def load_job(path: str | os.PathLike | None = None, **options: Any) -> Job:
    """Read a job file, whose keys options override; or make a job from options alone.

    Parameters
    ----------
    path : path of a TOML file, optional
    **options : values for the keys of `Job`
        These override those of the file; None means "not given". Their paths are relative to the
        working directory.

    Raises
    ------
    JobError
        If the file is not TOML; for an unknown, missing or contradictory key; for a wrong type. The
        message names the file, the key, and what is allowed.
    FileNotFoundError
        If there is no such file.

    Examples
    --------
    >>> from dask_ep.jobs.job import load_job
    >>> job = load_job(tokens="x.npy", routing="r.npy", experts="w.npy", out="y.npy")
    >>> job.experts["kind"]
    'linear'
    """
    name = "options" if path is None else os.fspath(path)
    values: dict[str, Any] = {}
    if path is not None:
        values |= _checked(_parse(Path(path)), base=Path(path).resolve().parent, place=name)
    given = {key: value for key, value in options.items() if value is not None}
    values |= _checked(given, base=Path.cwd(), place="options")
    _check_complete(values, name)
    return Job(**values, name=name)


def parse_experts(text: str) -> str | dict[str, Any]:
    """Read the value of the option `experts`: a path (linear experts), or an inline TOML table.

    Examples
    --------
    >>> from dask_ep.jobs.job import parse_experts
    >>> parse_experts("w.zarr")
    'w.zarr'
    >>> parse_experts('{kind = "linear", w = "w.zarr", transposed = true}')
    {'kind': 'linear', 'w': 'w.zarr', 'transposed': True}
    """
    if not text.lstrip().startswith("{"):
        return text
    try:
        return tomllib.loads(f"experts = {text}")["experts"]
    except tomllib.TOMLDecodeError as error:
        raise JobError(
            f"options: experts must be a path or an inline table such as "
            f'\'{{kind = "linear", w = "w.zarr"}}\', but {text!r} is neither: {error}'
        ) from error


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"{path} must be a TOML file, but cannot be read as one: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, "No such job file", str(path)) from None
    except IsADirectoryError:
        raise JobError(
            f"{path} must be a TOML file, but is a directory; give the job file in it"
        ) from None


def as_job(job: Job | str | os.PathLike) -> Job:
    """Return the job itself, or that of a job file."""
    if not isinstance(job, Job | str | os.PathLike):
        raise TypeError(f"job must be a Job or the path of a job file; got {job!r}")
    return job if isinstance(job, Job) else load_job(job)


def _toml(value: Any, base: Path | None) -> str:
    """Write a value of a job in TOML, whose strings are like those of JSON."""
    if isinstance(value, list):
        return f"[{', '.join(_toml(one, base) for one in value)}]"
    if base is not None and isinstance(value, str) and os.path.isabs(value):
        path = Path(value)
        value = path.relative_to(base).as_posix() if path.is_relative_to(base) else value
        value = f"./{value}" if value.startswith("~") else value  # not somebody's home
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# --- checking --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """What a value must be: a description, a test, and how its paths become absolute."""

    words: str
    accepts: Any
    resolve: Any = None


def resolve_path(value: str, base: Path) -> str:
    """Make a path absolute, the name of its tensor apart; addresses stay as they are."""
    if "://" in value:
        return value
    file, separator, tensor = value.partition("::")
    home = file.startswith("~")  # a Path drops the "./" of a file with such a name
    place = (base / (Path(file).expanduser() if home else file)).resolve()
    try:
        os.stat(place)
    except OSError as error:  # a loop of links, which `resolve` does not report from 3.13 on
        if error.errno == errno.ELOOP:
            raise
    return f"{place}{separator}{tensor}"


def _resolve_weight(value: str | list[str], base: Path) -> str | list[str]:
    if isinstance(value, list):
        return [resolve_path(one, base) for one in value]
    return resolve_path(value, base)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value != "" and "\0" not in value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_weight(value: Any) -> bool:
    one_per_expert = isinstance(value, list) and value and all(map(_is_path, value))
    return _is_path(value) or bool(one_per_expert)


_PATH = _Kind("a path", _is_path, resolve_path)
_OUT = _Kind(
    "a local path without '::' (an address can be read, but not written)",
    lambda value: _is_path(value) and "://" not in value and "::" not in value,
    resolve_path,
)
_WEIGHT = _Kind("a path, or a list of paths with one per expert", _is_weight, _resolve_weight)
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_NUMBER = _Kind("a finite number", is_number)
_POSITIVE = _Kind("a finite number above 0", lambda value: is_number(value) and value > 0)
_WORD = _Kind("a word", _is_path)

JOB_KEYS = {
    "tokens": _PATH,
    "routing": _PATH,
    "topk_weights": _PATH,
    "experts": _Kind(
        "a table, or a path (linear experts)", lambda v: isinstance(v, dict) or _is_path(v)
    ),
    "layer": _PATH,
    "layer_index": _Kind("an integer of at least 0", lambda v: _is_int(v) and v >= 0),
    "token_ids": _PATH,
    "out": _OUT,
    "world_size": _Kind("an integer of at least 1", lambda v: _is_int(v) and v >= 1),
    "placement": _Kind(
        f"one of {', '.join(POLICIES)}, or the path of a JSON file",
        _is_path,
        lambda value, base: value if value in POLICIES else resolve_path(value, base),
    ),
    "precision": _Kind(f"one of {', '.join(PRECISIONS)}", lambda v: v in PRECISIONS),
    "missing": _Kind(f"one of {', '.join(MISSING)}", lambda v: v in MISSING),
}
"""The keys of a job, each with what it must be."""

assert set(JOB_KEYS) | {"name"} == {field.name for field in fields(Job)}

_EXPERT_OPTIONS = {
    "transposed": _FLAG,
    "interleaved": _FLAG,
    "activation": _WORD,
    "limit": _POSITIVE,
    "alpha": _NUMBER,
    "up_offset": _NUMBER,
    "clamp_after": _FLAG,
    "soft_caps": _Kind(
        "a list of two finite numbers above 0",
        lambda value: (
            isinstance(value, list)
            and len(value) == 2
            and all(is_number(cap) and cap > 0 for cap in value)
        ),
    ),
    "output_norm_eps": _POSITIVE,
    "apply_router_weight_on_input": _FLAG,
}

EXPERT_KEYS: dict[str, dict[str, _Kind]] = {
    name: dict.fromkeys(kind.weights, _WEIGHT) | {o: _EXPERT_OPTIONS[o] for o in kind.options}
    for name, kind in EXPERT_KINDS.items()
}
"""The keys of an [experts] table by kind: the keywords of the `Experts` classmethods."""

OTHER_NAMES = {
    **dict.fromkeys(("gate_proj", "w1", "wi_0"), ("gate", "up")),
    **dict.fromkeys(("up_proj", "w3", "wi_1"), ("up",)),
    **dict.fromkeys(("down_proj", "w2", "wo"), ("down",)),
    **dict.fromkeys(("gate_up_proj", "w13", "wi"), ("gate_up", "up")),
    "fc1": ("up",),
    "fc2": ("down",),
    "weight": ("w",),
    "weights": ("w",),
}
"""Names that models use for the matrices of an expert, and the keys that may be meant."""


def _checked(table: Mapping[str, Any], *, base: Path, place: str) -> dict[str, Any]:
    """Check names and types of a job's keys, and make its paths absolute."""
    values = _checked_keys(table, JOB_KEYS, base=base, place=place, whose="a job")
    experts = values.get("experts")
    if isinstance(experts, str):
        experts = {"kind": "linear", "w": experts}
    if experts is not None:
        values["experts"] = _checked_experts(experts, base=base, place=f"{place} [experts]")
    return values


def _checked_experts(table: Mapping[str, Any], *, base: Path, place: str) -> dict[str, Any]:
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in EXPERT_KEYS:
        came = "is missing" if kind is None else f"is {kind!r}{nearest(str(kind), EXPERT_KEYS)}"
        raise JobError(f"{place}: kind must be one of {', '.join(EXPERT_KEYS)}, but {came}")
    rest = {key: value for key, value in table.items() if key != "kind"}
    whose = f"a table of {kind} experts"
    values = _checked_keys(rest, EXPERT_KEYS[kind], base=base, place=place, whose=whose)
    needed = EXPERT_KINDS[kind].matrices
    for key in needed:
        if key not in values:
            raise JobError(f"{place}: {key!r} is missing; {kind} experts need {', '.join(needed)}")
    return {"kind": kind, **values}


def _checked_keys(
    table: Mapping[str, Any], kinds: Mapping[str, _Kind], *, base: Path, place: str, whose: str
) -> dict[str, Any]:
    values = {}
    for key, value in table.items():
        if key not in kinds:
            raise JobError(
                f"{place}: unknown key {key!r}{nearest(key, kinds)}; "
                f"the keys of {whose} are {', '.join(kinds)}"
            )
        if not kinds[key].accepts(value):
            raise JobError(
                f"{place}: {key} must be {kinds[key].words}, "
                f"but is {value!r} ({type(value).__name__})"
            )
        resolve = kinds[key].resolve
        try:
            values[key] = value if resolve is None else resolve(value, base)
        except (RuntimeError, OSError) as error:  # no home directory, or a loop of links
            raise JobError(f"{place}: {key}: {value!r} cannot be found: {error}") from error
    return values


def nearest(key: str, allowed: Iterable[str]) -> str:
    """Suggest a word with a similar spelling; empty if there is none."""
    near = [name for name in OTHER_NAMES.get(key, ()) if name in allowed]
    near = near or difflib.get_close_matches(key, allowed, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _check_complete(values: Mapping[str, Any], place: str) -> None:
    needs = "a job needs tokens and out, and either routing and experts or layer and layer_index"
    has_layer = "layer" in values or "layer_index" in values
    if has_layer and "experts" in values:
        raise JobError(
            f"{place}: experts and layer contradict each other: a layer has its own; {needs}"
        )
    given = {"routing", "topk_weights"} & values.keys()
    if has_layer and len(given) == 1:
        raise JobError(
            f"{place}: a layer takes routing and topk_weights together, instead of its router's, "
            f"but only {given.pop()} is given"
        )
    pair = ("layer", "layer_index") if has_layer else ("routing", "experts")
    for key in ("tokens", *pair, "out"):
        if key not in values:
            raise JobError(f"{place}: {key!r} is missing; {needs}")
