"""A config.json as transformers reads it: types, class defaults, rotary parameters.

Invariant: what is read here equals what transformers computes with (compared in
tests/unit/models/test_hf_config.py); where transformers and vLLM would read a file differently it
is refused. Pure: no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's frequency-dependent stretching of rotary positions."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class YarnRopeScaling:
    """YaRN (arXiv 2309.00071).

    Slow rotations are stretched by `factor`, fast ones are left, those between in part.
    """

    factor: float
    original_max_position: int
    attention_factor: float
    """Multiplies rotated queries and keys, each."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """Rotations over the original window above and below which a dimension is fast or slow."""
    truncate: bool = True
    """Round the range between them to complete dimensions."""

    @property
    def window(self) -> int:
        """Positions that it reaches."""
        return int(self.factor * self.original_max_position)


RopeScaling = Llama3RopeScaling | YarnRopeScaling


@dataclass(frozen=True)
class Fields:
    """Values of a config.json; every ValueError names model.path, `source`, key and value."""

    values: Mapping[str, Any]
    source: str
    within: str = ""
    """Key of the object that they are in."""

    def given(self, key: str) -> bool:
        """Whether the key has a value other than null."""
        return self.values.get(key) is not None

    def integer(self, key: str) -> int:
        """A whole number, 1 or more."""
        value = self._needed(key)
        # Not isinstance: True is an int in Python.
        if type(value) is not int or value < 1:
            raise self.wrong(key, "a whole number of 1 or more")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self._needed(key) if default is None else self.values.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.wrong(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def section(self, key: str) -> Fields | None:
        """The object under a key; None where it is null, empty or absent."""
        # An empty object says nothing, as in transformers.
        value = self.values.get(key) or None
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return None if value is None else Fields(value, self.source, f"{key}.")

    def wrong(self, key: str, wanted: str) -> ValueError:
        """That the key's value is not what it must be."""
        return ValueError(
            f"model.path: {self.source} has {self.within}{key}={self.values.get(key)!r} in "
            f"config.json; it must be {wanted}"
        )

    def _needed(self, key: str) -> Any:
        if not self.given(key):
            raise ValueError(
                f"model.path: {self.source}/config.json lacks {self.within}{key}; download it again"
            )
        return self.values[key]


def refuse_layers_of_other_kinds(config: Fields, num_layers: int) -> None:
    """Raise ValueError unless every layer attends to all earlier tokens."""
    kinds = config.values.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * num_layers:
        raise config.wrong("layer_types", f"{num_layers} times full_attention")


def read_rope(config: Fields, default_theta: float) -> tuple[float, RopeScaling | None]:
    """Base of the rotary positions and how they are stretched.

    transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling; where rope_scaling
    is given it takes the place of rope_parameters.
    """
    scaling, parameters = config.section("rope_scaling"), config.section("rope_parameters")
    rope = scaling or parameters or Fields({}, config.source)
    # A base among the rotary parameters goes before that of the model.
    of_all = {"rope_theta": config.values.get("rope_theta", default_theta)}
    rope = Fields(of_all | dict(rope.values), rope.source, rope.within)
    theta = rope.number("rope_theta")
    if theta <= 1:
        raise rope.wrong("rope_theta", "above 1")
    if (
        parameters is not None
        and parameters.given("rope_theta")
        and parameters.number("rope_theta") != theta
    ):
        raise ValueError(
            f"model.path: {config.source} has rope_theta={parameters.values['rope_theta']} in "
            f"rope_parameters, which its rope_scaling replaces: transformers would take {theta:g}; "
            "put both into rope_parameters"
        )
    # transformers 5 nests a set of parameters for each kind of layer.
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise ValueError(
            f"model.path: {config.source} has rotary positions by kind of layer, which is not "
            "supported"
        )
    for where in (rope, config):
        if where.values.get("partial_rotary_factor") not in (None, 1.0):
            partial = where.values["partial_rotary_factor"]
            raise ValueError(
                f"model.path: {config.source} has partial_rotary_factor={partial}; only 1.0 is "
                "supported"
            )
    return theta, _read_scaling(config, rope)


def _read_scaling(config: Fields, rope: Fields) -> RopeScaling | None:
    # Older files say `type`.
    kinds = [rope.values[key] for key in ("rope_type", "type") if rope.given(key)] or ["default"]
    kind = kinds[0]
    if kinds[-1] != kind:
        raise ValueError(
            f"model.path: {config.source} has rope_type={kind!r} and type={kinds[-1]!r}; remove one"
        )
    if kind == "default":
        return None
    if kind not in ("llama3", "yarn"):
        raise ValueError(
            f"model.path: {config.source} has rope type {kind!r}; supported are default, llama3 "
            "and yarn (where the stretching is optional, remove it from config.json for the "
            "model's native context)"
        )
    key = "original_max_position_embeddings"
    original = (
        rope.integer(key) if key in rope.values else config.integer("max_position_embeddings")
    )
    if config.given(key) and config.values[key] != original:
        raise config.wrong(key, f"{original}, as for its rotary positions")
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return Llama3RopeScaling(rope.number("factor"), low, high, original)
    return _read_yarn(rope, original)


def _read_yarn(rope: Fields, original: int) -> YarnRopeScaling:
    factor = rope.number("factor")
    if factor < 1:
        raise rope.wrong("factor", "1 or more")
    if rope.given("attention_factor"):
        attention = rope.number("attention_factor")
    # By truth, as in transformers: 0 counts as absent.
    elif rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        attention = _mscale(factor, rope.number("mscale")) / _mscale(
            factor, rope.number("mscale_all_dim")
        )
    else:
        attention = _mscale(factor, 1.0)
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    return YarnRopeScaling(factor, original, attention, fast, slow, rope.flag("truncate", True))


def _mscale(factor: float, weight: float) -> float:
    """How much sharper attention is made for a longer window."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
