"""One thing varied at a time: the setting that takes the difference away is named."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf3d.observability.mismatch.causes import Settings
from rlhf3d.observability.mismatch.diagnosis import diagnose
from rlhf3d.observability.mismatch.pairs import ARRAYS, Pairs
from rlhf3d.observability.mismatch.trial import Finding, Kind, Variation, conclude

TOKENS, ROW = 400, 20
SETTINGS = Settings("bfloat16")


def pairs_off_by(difference: float, seed: int = 0) -> Pairs:
    """Rows whose sides part by that much, in both directions."""
    rng = np.random.default_rng(seed)
    trainer = -rng.gamma(2.0, 1.0, TOKENS)
    place = np.arange(TOKENS) % ROW
    columns = dict.fromkeys(ARRAYS, np.zeros(TOKENS, dtype=int)) | {
        "engine": trainer + rng.choice([-1, 1], TOKENS) * difference,
        "trainer": trainer,
        "row": np.arange(TOKENS) // ROW,
        "position": 5 + place,
        "prompt_length": np.full(TOKENS, 5),
        "row_length": np.full(TOKENS, 5 + ROW),
    }
    return Pairs(**columns)


def found(settings: Settings = SETTINGS, **off: float) -> Finding:
    """`off`: by how much both sides part in each comparison."""
    kinds: dict[Kind, float] = {"configured": 1.0, **off}  # type: ignore[typeddict-item]
    variations = [Variation(kind, pairs_off_by(size), settings) for kind, size in kinds.items()]
    return conclude(diagnose(variations[0].pairs, settings), variations)


@pytest.mark.parametrize(
    ("off", "setting"),
    [
        ({"again": 0.01, "read": 1.0, "sampled": 0.01}, "weight sync"),
        ({"again": 1.0, "whole": 0.01, "read": 0.01, "sampled": 1.0}, "rollout.top_p"),
        ({"again": 1.0, "read": 0.01, "sampled": 1.0, "raw": 0.0}, "rollout.temperature"),
        ({"again": 1.0, "read": 0.01, "sampled": 1.0, "raw": 1.0}, "sampling"),
        ({"again": 1.0, "read": 1.0, "sampled": 0.0, "float32": 0.01}, "model.dtype"),
    ],
)
def test_the_setting_that_takes_it_away_is_named(off: dict[str, float], setting: str) -> None:
    finding = found(**off)
    assert finding.fault and finding.setting.startswith(setting)


def test_where_nothing_takes_it_away_none_is_named() -> None:
    alike = found(again=1.0, read=1.0, sampled=0.0)
    assert alike.fault and not alike.setting and "agrees with itself" in alike.text
    unlike = found(again=1.0, read=1.0, sampled=1.0)
    assert unlike.fault and not unlike.setting and "agrees with itself" not in unlike.text


def test_sides_that_agree_have_no_fault() -> None:
    finding = found(configured=0.01, again=0.01, read=0.01, sampled=0.0)
    assert not finding.fault and "agree: no setting" in finding.text


def test_what_the_configuration_asks_for_hides_nothing_else() -> None:
    """A part of the vocabulary is expected; what is left with all of it is not."""
    settings = Settings("bfloat16", top_k=20)
    pairs = pairs_off_by(0.0)
    cut = Pairs(**{name: getattr(pairs, name) for name in ARRAYS} | {"engine": pairs.trainer + 1})
    assert diagnose(cut, settings).verdict == "healthy"

    def of(whole: float) -> Finding:
        others = {"whole": pairs_off_by(whole), "float32": pairs_off_by(0.01)}
        kinds: dict[Kind, Pairs] = {"configured": cut, **others}  # type: ignore[typeddict-item]
        made = [Variation(kind, found, settings) for kind, found in kinds.items()]
        return conclude(diagnose(cut, settings), made)

    assert not of(0.01).fault and "as the configuration asks" in of(0.01).text
    assert of(1.0).fault and of(1.0).setting.startswith("model.dtype")


def test_an_engine_without_the_weights_is_named() -> None:
    own = [Variation("configured", pairs_off_by(1.0), SETTINGS)]
    for number, size in enumerate((0.01, 2.0)):
        own.append(Variation("read", pairs_off_by(size), SETTINGS, f"engine {number}"))
    finding = conclude(diagnose(own[0].pairs, SETTINGS), own)
    assert finding.setting == "weight sync" and "engine 1 does not" in finding.text
