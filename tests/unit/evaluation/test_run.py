"""An evaluation with a scripted engine: what is written, what is continued, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import make_tiny_model

from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.data import dataset as dataset_module
from rlhf3d.data.parquet import write_parquet
from rlhf3d.data.rows import PromptRow
from rlhf3d.evaluation.model import find_model, model_digest
from rlhf3d.evaluation.records import Generation, read_generations, results
from rlhf3d.evaluation.run import evaluate
from rlhf3d.evaluation.settings import EvaluationSettings
from rlhf3d.evaluation.view import results_view
from rlhf3d.rewards.score import RewardError
from rlhf3d.rollout.api import Completion, FinishReason, Request, Stops, written_by

SETTINGS = EvaluationSettings(n=4, max_prompt_length=128, max_tokens=32, method="strict")


class ScriptedEngine:
    """Answers `#### 4` greedily, and 4, 5, 4, or nothing by turns when sampled.

    It fails after `calls` calls.
    """

    def __init__(self, tokenizer: object, calls: int = 1000) -> None:
        self.tokenizer, self.calls = tokenizer, calls
        self.seen: list[tuple[bool, int]] = []
        self.prompts: list[tuple[int, ...]] = []
        self.closed = False
        self.made: dict[int, Completion] = {}

    def submit(self, requests: Mapping[int, Request]) -> None:
        if not self.calls:
            raise RuntimeError("the power went")
        self.calls -= 1
        texts = ["#### 4", "so #### 5", "#### 4", "no idea"]
        self.made = {}
        for number, request in requests.items():
            greedy = request.sampling.greedy
            self.seen.append((greedy, request.seed))
            self.prompts.append(request.prompt_ids)
            text = texts[0] if greedy else texts[request.seed % 4]
            ids = tuple(self.tokenizer(text)["input_ids"])  # type: ignore[operator]
            finish: FinishReason = "length" if text == texts[3] else "stop"
            self.made[number] = Completion(ids, (0.0,) * len(ids), finish, written_by(0))

    def poll(self, timeout_s: float) -> dict[int, Completion]:
        return dict([self.made.popitem()]) if self.made else {}

    def abort(self, numbers: Collection[int]) -> None:
        raise AssertionError(numbers)

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> object:
    from rlhf3d.tokenizer.load import load_tokenizer

    return load_tokenizer(model)


def write(folder: Path, truths: Sequence[str]) -> Path:
    rows = [
        PromptRow(
            "openai/gsm8k",
            [{"role": "user", "content": f"question {i}"}],
            "math",
            {"ground_truth": truth},
            {"level": f"Level {i % 2}"},
        )
        for i, truth in enumerate(truths)
    ]
    write_parquet(rows, folder / "test.parquet", {})
    return folder / "test.parquet"


def never(stops: Stops) -> ScriptedEngine:
    raise AssertionError("nothing is left to generate")


def test_it_writes_generations_and_figures(
    tmp_path: Path, model: Path, tokenizer: object, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write(tmp_path, ["4", "5", "4"]), tmp_path / "out"
    engine = ScriptedEngine(tokenizer)
    steps: list[tuple[str, int, int]] = []
    report = evaluate(
        model,
        [data],
        output,
        SETTINGS,
        lambda stops: engine,
        batch=2,
        progress=lambda *step: steps.append(step),
    )
    assert engine.closed and steps == [
        ("greedy", 2, 3),
        ("greedy", 3, 3),
        ("sampled", 8, 12),
        ("sampled", 12, 12),
    ]
    assert report["greedy"]["by"]["openai/gsm8k"]["mean@1"] == pytest.approx(2 / 3)
    assert set(report["greedy"]["by"]) == {
        "openai/gsm8k",
        "openai/gsm8k level=Level 0",
        "openai/gsm8k level=Level 1",
    }
    assert report["greedy"]["by"]["openai/gsm8k level=Level 0"]["mean@1"] == 1.0
    generations = read_generations(output)
    assert len(generations) == 3 + 12 and len(set(engine.seen)) == 3 + 12
    sampled = [g for g in generations if g.mode == "sampled"]
    assert {g.outcome for g in sampled} == {"scored", "unparsable"}
    assert report["sampled"]["outcomes"]["unparsable"] == sum(g.answer is None for g in sampled)
    assert report["sampled"]["truncated"] == sum(g.response == "no idea" for g in sampled)
    by_hand = sum(g.answer == g.ground_truth for g in sampled) / 12
    assert report["sampled"]["by"]["openai/gsm8k"]["mean@4"] == pytest.approx(by_hand)
    assert json.loads((output / "results.json").read_text()) == report
    shown = results_view(report)
    shown.show()
    assert shown.data == report and "openai/gsm8k" in capsys.readouterr().out


def test_a_long_prompt_of_a_set_too_large_to_scan_is_left_out(
    tmp_path: Path, model: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 0 and 2 are looked at before; that row 1 is too long comes out later."""
    monkeypatch.setattr(dataset_module, "SCANNED", 3)
    monkeypatch.setattr(dataset_module, "PROBED", 2)
    rows = [
        PromptRow(
            "openai/gsm8k", [{"role": "user", "content": text}], "math", {"ground_truth": "4"}
        )
        for text in ("a", "b" * 200, "c", "d")
    ]
    data = tmp_path / "test.parquet"
    write_parquet(rows, data, {})
    settings = replace(SETTINGS, overlong="filter")

    def run(make: Callable[[Stops], ScriptedEngine]) -> dict[str, Any]:
        return evaluate(model, [data], tmp_path / "out", settings, make)

    report = run(lambda stops: ScriptedEngine(tokenizer))
    assert report["prompts"] == {"used": 3, "dropped": 1, "truncated": 0}
    made = read_generations(tmp_path / "out")
    assert len(made) == 3 + 12 and {g.index for g in made} == {0, 2, 3}
    assert run(never) == report, "nothing is missing"


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_one_that_was_cut_off_continues_to_the_same_end(
    tmp_path: Path, model: Path, tokenizer: object, calls: int
) -> None:
    data = write(tmp_path, ["4", "5", "4"])

    def run(output: str, make: Callable[[Stops], ScriptedEngine]) -> dict[str, object]:
        return evaluate(model, [data], tmp_path / output, SETTINGS, make, batch=2)

    whole = run("whole", lambda stops: ScriptedEngine(tokenizer))
    with pytest.raises(RuntimeError, match="the power went"):
        run("cut", lambda stops: ScriptedEngine(tokenizer, calls))
    if calls:
        with (tmp_path / "cut" / "generations.jsonl").open("a") as file:
            file.write('{"mode": "greedy", "ind')
    again, kept = ScriptedEngine(tokenizer), len(read_generations(tmp_path / "cut"))
    assert kept == [0, 2, 3, 11][calls]
    assert run("cut", lambda stops: again) == whole
    assert len(again.seen) == 15 - kept
    assert read_generations(tmp_path / "cut") == read_generations(tmp_path / "whole")
    assert run("cut", never) == whole


def test_one_that_goes_on_tomorrow_has_the_same_prompts(
    tmp_path: Path, model: Path, tokenizer: object
) -> None:
    data, template = write(tmp_path, ["4", "5"]), tmp_path / "dated.jinja"
    template.write_text(
        "{{ strftime_now('%f') }}{% for m in messages %} {{ m.content }}{% endfor %}"
    )
    settings = replace(SETTINGS, n=0, chat_template=str(template))

    def run(engine: ScriptedEngine, **options: bool) -> None:
        evaluate(
            model, [data], tmp_path / "out", settings, lambda stops: engine, batch=1, **options
        )

    first, rest, anew = (
        ScriptedEngine(tokenizer, 1),
        ScriptedEngine(tokenizer),
        ScriptedEngine(tokenizer),
    )
    with pytest.raises(RuntimeError, match="the power went"):
        run(first)
    run(rest)
    run(anew, restart=True)
    begun = [engine.prompts[0][:6] for engine in (first, rest, anew)]
    assert begun[0] == begun[1] != begun[2], "each writes the microsecond of its beginning"


def test_other_evaluations_and_other_files_are_not_overwritten(
    tmp_path: Path, model: Path, tokenizer: object
) -> None:
    data, output = write(tmp_path, ["4"]), tmp_path / "out"
    settings = replace(SETTINGS, n=0)
    evaluate(model, [data], output, settings, lambda stops: ScriptedEngine(tokenizer))
    with pytest.raises(ValueError, match=r"another evaluation \(temperature, method differ\)"):
        evaluate(
            model, [data], output, replace(settings, temperature=0.5, method="flexible"), never
        )
    with pytest.raises(ValueError, match=r"another evaluation \(prompts differ\)"):
        evaluate(model, [write(tmp_path, ["5"])], output, settings, never)
    evaluate(model, [data], output, settings, lambda stops: ScriptedEngine(tokenizer), restart=True)
    assert read_generations(output)[0].score == 0.0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="files that are no evaluation"):
        evaluate(model, [data], tmp_path / "mine", settings, never, restart=True)


def test_another_chat_template_is_another_evaluation(
    tmp_path: Path, model: Path, tokenizer: object
) -> None:
    data, own = write(tmp_path, ["4"]), tmp_path / "own.jinja"
    own.write_text("{{ messages[0].content }}=")
    settings = replace(SETTINGS, chat_template=str(own))
    engine = ScriptedEngine(tokenizer)
    evaluate(model, [data], tmp_path / "out", settings, lambda stops: engine)
    assert {tokenizer.decode(ids) for ids in engine.prompts} == {"question 0="}  # type: ignore[attr-defined]
    own.write_text("{{ messages[0].content }}:")
    for changed in (settings, SETTINGS):
        with pytest.raises(ValueError, match=r"another evaluation .*chat_template"):
            evaluate(model, [data], tmp_path / "out", changed, never)


def test_mistakes_are_named(tmp_path: Path, model: Path) -> None:
    data = write(tmp_path, ["4"])
    with pytest.raises(ValueError, match="--n 0: must be"):
        evaluate(model, [data], tmp_path / "out", EvaluationSettings(greedy=False), never)
    with pytest.raises(ValueError, match=r"= 2048 tokens, more than the model's window of 1024"):
        evaluate(model, [data], tmp_path / "out", EvaluationSettings(), never)
    with pytest.raises(ValueError, match="no model at"):
        find_model(tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_environment_answers_no_prompt_whose_end_is_cut_off() -> None:
    with pytest.raises(ValueError, match=r"--overlong truncate_right with --environment.*_left"):
        EvaluationSettings(overlong="truncate_right", environment=EnvironmentConfig(path="e.py"))


def test_truths_that_no_rule_compares_with_are_told_before_generation(
    tmp_path: Path, model: Path
) -> None:
    row = PromptRow(
        "openai/gsm8k", [{"role": "user", "content": "why"}], "", {"ground_truth": {"target": 4}}
    )
    write_parquet([row], tmp_path / "test.parquet", {})
    with pytest.raises(
        ValueError,
        match=r"DATA: the row that asks 'why': reward_model.ground_truth: a built-in scorer",
    ):
        evaluate(model, [tmp_path / "test.parquet"], tmp_path / "out", SETTINGS, never)
    assert not (tmp_path / "out").exists()


def test_models_are_found_and_told_apart(tmp_path: Path, model: Path) -> None:
    assert find_model(model) == model
    for step in (2, 10):
        make_tiny_model(tmp_path / "run" / "checkpoints" / f"step_{step}" / "hf", seed=step)
    assert find_model(tmp_path / "run").parent.name == "step_10"
    assert find_model(tmp_path / "run" / "checkpoints" / "step_2").name == "hf"
    digests = {
        model_digest(find_model(tmp_path / "run" / "checkpoints" / f"step_{step}"))
        for step in (2, 10)
    }
    assert len({model_digest(model), *digests}) == 3


def test_equal_answers_vote_together() -> None:
    base = Generation("sampled", 0, 0, "m", "?", "", "1/2", "\\frac12", 1.0, "scored", 3, "stop")
    other = [replace(base, sample=1, answer="1/2"), replace(base, sample=2, answer="3", score=0.0)]
    last = replace(base, sample=3, answer="3", score=0.0, outcome="timeout")
    figures = results([base, *other, last])["sampled"]["by"]["m"]
    assert figures["maj@4"] == 1.0 and figures["mean@4"] == 0.5


def test_a_reward_function_of_ones_own_scores(
    tmp_path: Path, model: Path, tokenizer: object
) -> None:
    """Of a data source that nothing built in knows; a change in its file is another evaluation."""
    row = PromptRow(
        "mine", [{"role": "user", "content": "question"}], "math", {"ground_truth": "4"}
    )
    write_parquet([row], tmp_path / "test.parquet", {})
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def worth(data_source, solution_str, ground_truth, extra_info=None, by=1.0):\n"
        "    return by\n"
    )
    settings = replace(
        SETTINGS, n=0, reward_path=str(reward), reward_name="worth", reward_kwargs={"by": 0.25}
    )

    def run(settings: EvaluationSettings) -> dict[str, Any]:
        return evaluate(
            model,
            [tmp_path / "test.parquet"],
            tmp_path / "out",
            settings,
            lambda stops: ScriptedEngine(tokenizer),
        )

    assert run(settings)["greedy"]["by"]["mine"]["mean@1"] == 0.25
    reward.write_text(reward.read_text().replace("return by", "return 2 * by"))
    with pytest.raises(ValueError, match=r"holds another evaluation \(reward_path differ\)"):
        run(settings)
    with pytest.raises(ValueError, match="did you mean 'worth'"):
        run(replace(settings, reward_name="wroth"))
    with pytest.raises(ValueError, match="no built-in scorer for data_source 'mine'"):
        run(replace(settings, reward_path=None))


def test_a_reward_that_fails_stops_it_and_its_errors_are_no_wrong_answers(
    tmp_path: Path, model: Path, tokenizer: object
) -> None:
    (tmp_path / "own.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info): return no"
    )
    settings = replace(SETTINGS, reward_path=str(tmp_path / "own.py"))
    with pytest.raises(
        RewardError, match=r"2 of 3 completions were not scored.*\n.*\n[\s\S]*NameError"
    ):
        evaluate(
            model,
            [write(tmp_path, "445")],
            tmp_path / "out",
            settings,
            lambda stops: ScriptedEngine(tokenizer),
            batch=2,
        )
    assert read_generations(tmp_path / "out") == []


DOORS = """
class Doors:
    def reset(self, row, seed):
        self.turns = 0
        return "say it twice"

    def step(self, text):
        if row_fails(self):
            raise KeyError("no such door")
        self.turns += 1
        return "again", float(text == "#### 4"), self.turns == 2
"""


def test_an_environment_answers_and_one_that_fails_is_no_wrong_answer(
    tmp_path: Path, model: Path, tokenizer: object
) -> None:
    file = tmp_path / "doors.py"
    fails = "def row_fails(doors):\n    return doors.truth == '5'\n"
    code = DOORS.replace("self.turns = 0", "self.turns, self.truth = 0, row['ground_truth']")
    file.write_text(fails + code)
    settings = replace(
        SETTINGS,
        n=0,
        max_tokens=200,
        environment=EnvironmentConfig(path=str(file), name="Doors", max_error_rate=0.5),
        weights={"accuracy": 1.0, "environment": 0.5},
    )
    data, output = write(tmp_path, ["4", "5", "4"]), tmp_path / "out"
    report = evaluate(model, [data], output, settings, lambda stops: ScriptedEngine(tokenizer))
    figures = report["greedy"]
    assert figures["by"]["openai/gsm8k"]["mean@1"] == 1.0
    assert figures["by"]["openai/gsm8k"]["prompts"] == 2
    assert (figures["outcomes"]["scored"], figures["outcomes"]["env_error"]) == (2, 1)
    results_view(report).show()
    generations = read_generations(output)
    by_index = {generation.index: generation for generation in generations}
    assert [turn["content"] for turn in by_index[0].turns] == ["#### 4", "again", "#### 4"]
    assert by_index[1].outcome == "env_error" and "say it twice" in by_index[0].prompt
    # Continued with the same file, refused with another one.
    evaluate(model, [data], output, settings, never)
    file.write_text(fails + code + "\n")
    with pytest.raises(ValueError, match=r"holds another evaluation \(environment differ"):
        evaluate(model, [data], output, settings, never)


def test_a_template_that_leaves_an_environments_answers_out_is_refused(
    tmp_path: Path, model: Path, tokenizer: object
) -> None:
    (tmp_path / "doors.py").write_text("def row_fails(doors):\n    return False\n" + DOORS)
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    settings = replace(
        SETTINGS,
        chat_template=str(tmp_path / "chat.jinja"),
        environment=EnvironmentConfig(path=str(tmp_path / "doors.py"), name="Doors"),
    )
    data = write(tmp_path, ["4"])
    with pytest.raises(ValueError, match=r"does not write the assistant's earlier messages"):
        evaluate(model, [data], tmp_path / "out", settings, lambda stops: ScriptedEngine(tokenizer))
    assert not (tmp_path / "out").exists(), "refused before anything is written"


def test_an_environment_alone_may_say_what_is_right(
    tmp_path: Path, model: Path, tokenizer: object
) -> None:
    file = tmp_path / "doors.py"
    file.write_text("def row_fails(doors): return False\n" + DOORS)
    settings = replace(
        SETTINGS,
        n=0,
        max_tokens=200,
        environment=EnvironmentConfig(path=str(file), name="Doors"),
        weights={"environment": 0.5},
    )
    data = write(tmp_path, ["4", "5"])
    engine = ScriptedEngine(tokenizer)
    report = evaluate(model, [data], tmp_path / "out", settings, lambda stops: engine)
    # Both turns are rewarded.
    assert report["greedy"]["by"]["openai/gsm8k"]["mean@1"] == 2.0
