"""What a step is measured against: limits by hand, ratios, verdicts, the tables of a document."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf3d.models.spec import ModelSpec

BENCH = Path(__file__).parents[3] / "tools" / "bench"
sys.path.append(str(BENCH))

import step  # noqa: E402
import step_job  # noqa: E402
import step_limits  # noqa: E402
import step_parts  # noqa: E402
import step_report  # noqa: E402

# Weights that a token meets in a layer: q, k, v and out of 4 x 4, gate, up and down of 4 x 10.
SPEC = ModelSpec("llama", 2, 4, 2, 2, 2, 10, 100, tie_embeddings=True)
LAYER = 4 * 4 * 4 + 3 * 4 * 10
ROWS = step_limits.Rows(prompts=3, completions=2, prompt=8, response=4, longest=6)
RATES = step_limits.Rates(forward_flops=10.0, backward_flops=20.0, copied_bytes=100.0)


def results(**figures: list[float]) -> step_report.Results:
    """Figures in no unit, `__` for a slash."""
    made = step_report.Results({"machine": "a test"})
    for name, values in figures.items():
        made.add(name.replace("__", "/"), "", values)
    return made


def test_a_forward_pass_counts_a_prompt_once_and_the_head_at_responses() -> None:
    prompts = 2 * 24 * (2 * LAYER + 4 * 4 * 4)  # 3 x 8 tokens, each of which sees 4 others
    responses = 2 * 24 * (2 * LAYER + 4 * 4 * 10)  # 3 x 2 x 4, which see 8 and 2
    head = 2 * 24 * 4 * 100
    forward = (prompts + responses + head) / 10
    assert step_limits.forward_s(SPEC, ROWS, RATES) == pytest.approx(forward)
    assert step_limits.backward_s(SPEC, ROWS, RATES) == pytest.approx(2 * forward * 10 / 20)


def test_an_update_adds_one_pass_of_adam() -> None:
    weights = 2 * (LAYER + 2 * 4) + 100 * 4 + 4
    passes = step_limits.forward_s(SPEC, ROWS, RATES) + step_limits.backward_s(SPEC, ROWS, RATES)
    update = step_limits.update_s(SPEC, ROWS, RATES)
    assert update - passes == pytest.approx(34 * weights / 100)


def test_generation_is_bound_by_products_or_by_memory() -> None:
    fast_memory = step_limits.Rates(10.0, 20.0, math.inf)
    fast_products = step_limits.Rates(math.inf, math.inf, 100.0)
    prefill = 2 * 24 * (2 * LAYER + 4 * 4 * 4) + 2 * 3 * 4 * 100
    decoding = 2 * 24 * (2 * LAYER + 4 * 4 * 10) + 2 * 24 * 4 * 100
    products = step_limits.generate_s(SPEC, ROWS, fast_memory, "bfloat16")
    assert products == pytest.approx((prefill + decoding) / 10)
    # 6 steps read all weights; each of 24 tokens reads keys and values of 10: 2 layers x 2 x 4.
    read = 2 * (6 * (2 * LAYER + 400) + 24 * 10 * 16)
    memory = step_limits.generate_s(SPEC, ROWS, fast_products, "bfloat16")
    assert memory == pytest.approx(read / 100)


def test_a_step_computes_old_logprobs_in_its_update_and_syncs_as_fast_as_it_packs() -> None:
    limits = step_limits.step_limits(SPEC, ROWS, RATES, "bfloat16", sync_s=0.5)
    assert limits["old_logprobs"] == 0.0 and limits["sync_weights"] == 0.5
    assert limits["ref_logprobs"] == step_limits.forward_s(SPEC, ROWS, RATES)
    copied = step_limits.step_limits(SPEC, ROWS, RATES, "bfloat16", sync_s=None)
    assert copied["sync_weights"] == pytest.approx(2 * 2 * step_limits.parameters(SPEC) / 100)


def test_a_ratio_is_of_values_measured_in_turn() -> None:
    found = results(generation__ours=[90.0, 300.0, 100.0], generation__vllm=[100.0, 300.0, 100.0])
    (asked,) = [asked for asked in step_report.ASKED if asked.top == "generation/ours"]
    assert found.ratio(asked) == [0.9, 1.0, 1.0]
    assert found.short() == []  # the median of 0.9, 1 and 1


@pytest.mark.parametrize(
    ("figures", "short"),
    [
        ({"generation__ours": [96.0], "generation__vllm": [100.0]}, "0.97"),
        ({"sync__update": [1.6], "sync__packing": [1.0]}, "1.5"),
        ({"sync__update": [1.5], "sync__packing": [1.0]}, None),
        ({"step_s__trl": [2.4], "step_s__one": [1.0]}, "2.5"),
        ({"step__step": [1.4], "limit__step": [1.0]}, "1.3"),
        ({"sync__update": [9.0]}, None),  # nothing to compare it with
    ],
)
def test_what_falls_short_is_named(figures: dict[str, list[float]], short: str | None) -> None:
    found = results(**figures).short()
    assert len(found) == (short is not None)
    assert short is None or short in found[0]


def test_the_tables_say_what_was_not_measured_and_why() -> None:
    found = results(sync__update=[2.0, 3.0], sync__packing=[1.0, 2.0])
    found.missing["step_s/trl"] = "TRL is not installed"
    text = step_report.markdown(found)
    assert "| update of the engine ÷ packing alone | 1.75 | 1.50 to 2.00 | ≤ 1.5 | no |" in text
    assert "| TRL's step ÷ ours | TRL is not installed |  | ≥ 2.5 |  |" in text
    assert "| generation ÷ raw vLLM | not measured |  | ≥ 0.97 |  |" in text
    assert found.as_json()["ratios"]["TRL's step ÷ ours"]["reached"] is None


def test_a_distance_is_above_1_where_there_is_room() -> None:
    found = results()
    found.add("forward/bfloat16/ours", "tokens/s", [900.0], limit=1000.0)
    found.add("sync/update", "s", [3.0], limit=2.0)
    text = step_report.markdown(found)
    assert "| 900 | 900 to 900 | 1000 | 1.11 |" in text
    assert "| 3 | 3 to 3 | 2 | 1.50 |" in text


def test_phases_stand_beside_their_limits() -> None:
    sizes = step_job.Sizes("model", "data", 3, 2, 8, 6)
    bench = step_parts.Bench(Path("job.yaml"), sizes, results(), repeats=1)
    row: dict[str, Any] = {"prompt_length/mean": 8, "response_length/mean": 4}
    row |= {"response_length/max": 6, "timing_s/step": 50.0, "timing_s/advantages": 1.0}
    bench.packing_s, bench.rates["bfloat16"] = 0.5, RATES
    step_parts.add_phases(bench, SPEC, "bfloat16", [row, row | {"timing_s/step": 70.0}])
    figures = bench.results.figures
    assert figures["step/step"].values == (50.0, 70.0)
    expected = step_limits.step_limits(SPEC, ROWS, RATES, "bfloat16", 0.5)
    assert figures["limit/step"].values == (sum(expected.values()),) * 2
    assert "| advantages | 1 | 1 to 1 | 0 | – |" in step_report.markdown(bench.results)


def test_phases_without_rates_have_no_limits() -> None:
    text = step_report.markdown(results(step__step=[50.0]))
    assert "| step | 50 | 50 to 50 | not measured |  |" in text


def test_sides_take_turns_and_the_warm_up_counts_for_nothing() -> None:
    called: list[tuple[str, int]] = []

    def call(name: str, turn: int) -> int:
        called.append((name, turn))
        return turn

    calls = {"a": lambda turn: call("a", turn), "b": lambda turn: call("b", turn)}
    assert step_parts.in_turn(calls, 2, warm_up=True) == {"a": [1, 2], "b": [1, 2]}
    assert called == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_tables_replace_what_is_between_the_marks() -> None:
    text = f"before\n{step_report.BEGIN}\nold\n{step_report.END}\nafter\n"
    once = step_report.replace_marked(text, "new")
    assert once == f"before\n{step_report.BEGIN}\n\nnew\n\n{step_report.END}\nafter\n"
    assert step_report.replace_marked(once, "new") == once
    with pytest.raises(ValueError, match="do not edit"):
        step_report.replace_marked("no marks", "new")


def test_the_page_has_the_marks() -> None:
    page = BENCH.parents[1] / "docs" / "performance.md"
    step_report.replace_marked(page.read_text(encoding="utf-8"), "")


@pytest.mark.parametrize(("measured", "code"), [([1.4], 0), ([1.6], 1)])
def test_the_exit_code_says_whether_all_was_reached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measured: list[float], code: int
) -> None:
    def sync(bench: step_parts.Bench) -> None:
        bench.results.add("sync/update", "s", measured)
        bench.results.add("sync/packing", "s", [1.0])

    document, figures = tmp_path / "page.md", tmp_path / "figures.json"
    document.write_text(f"{step_report.BEGIN}\n{step_report.END}\n")
    monkeypatch.setattr(step_parts, "sync", sync)
    monkeypatch.setattr(step, "write_job", lambda sizes, folder: folder / "job.yaml")
    options = ["--parts", "sync", "--folder", str(tmp_path), "--write", str(document)]
    monkeypatch.setattr(sys, "argv", ["step.py", *options, "--json", str(figures), "rollout.n=2"])
    assert step.main() == code
    assert "packing alone | 1." in document.read_text() and "rollout.n=2" in document.read_text()
    assert '"sync/update"' in figures.read_text()
