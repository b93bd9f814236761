"""Which kinds of experts are there, with which weights and options?"""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """The weights and options of a kind of expert: the keywords of its classmethod in `Experts`."""

    weights: dict[str, str]
    #: their axes after the first: d in, f hidden, o out
    options: tuple[str, ...]

    @property
    def matrices(self) -> tuple[str, ...]:
        """The weights that must be given."""
        return tuple(name for name, axes in self.weights.items() if " " in axes)


GATE_OPTIONS = (
    "activation", "limit", "alpha", "up_offset", "clamp_after", "soft_caps",
    "apply_router_weight_on_input",
)  # fmt: skip

_DOWN = {"down": "f o", "down_bias": "o"}
_GATED_DOWN = {**_DOWN, "output_scale": "o"}

EXPERT_KINDS = {
    "linear": Kind({"w": "d o", "bias": "o"}, ("transposed",)),
    "mlp": Kind({"up": "d f", "up_bias": "f", **_DOWN}, ("transposed", "activation")),
    "gated": Kind(
        {"gate": "d f", "gate_bias": "f", "up": "d f", "up_bias": "f", **_GATED_DOWN},
        ("transposed", *GATE_OPTIONS, "output_norm_eps"),
    ),
    "gated_fused": Kind(
        {"gate_up": "d 2f", "gate_up_bias": "2f", **_GATED_DOWN},
        ("transposed", "interleaved", *GATE_OPTIONS, "output_norm_eps"),
    ),
}
