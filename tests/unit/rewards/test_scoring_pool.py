"""Scoring by functions that hang, crash, exit and misbehave: real processes throughout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf3d.rewards.custom import load_custom_reward
from rlhf3d.rewards.function import RewardFunction
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rewards.score import Outcome, RewardError, ScoreItem
from rlhf3d.rewards.scorers import BuiltinReward

UNRULY = """
import multiprocessing, os, re, subprocess, sys, time

def child():
    pass

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "sleep":
        time.sleep(1000)
    if solution_str == "regex":  # never returns to the interpreter
        re.match("(a+)+$", "a" * 60 + "b")
    if solution_str == "raise":
        raise KeyError("the reason")
    if solution_str == "exit":
        os._exit(7)
    if solution_str == "sys.exit":
        sys.exit(3)
    if solution_str == "segfault":
        os.kill(os.getpid(), 11)
    if solution_str == "recursion":
        return compute_score(data_source, solution_str, ground_truth)
    if solution_str == "text":
        return "1.0"
    if solution_str == "unpicklable":
        return {"score": 1.0, "why": lambda: 0}
    if solution_str == "grandchild":
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        open(extra_info["pid_file"], "w").write(f"{process.pid}\\n")
        time.sleep(1000)
    if solution_str == "process":
        process = multiprocessing.Process(target=child)
        process.start()
        process.join()
        return float(process.exitcode == 0)
    if solution_str == "modules":
        heavy = ("torch", "ray", "vllm", "pyarrow")
        return {"score": 0.0, "heavy": [name for name in heavy if name in sys.modules]}
    return {"score": float(solution_str), "pid": os.getpid()}
"""


class Unsendable(RewardFunction):
    def __reduce__(self) -> str:
        raise TypeError("it holds a socket")


@pytest.fixture
def unruly(tmp_path: Path) -> Path:
    path = tmp_path / "unruly.py"
    path.write_text(UNRULY)
    return path


def items(*texts: str, **extra_info: object) -> list[ScoreItem]:
    return [
        ScoreItem("mine", text, "1", {"index": 40 + i, **extra_info})
        for i, text in enumerate(texts)
    ]


def gone(pid: int, within_s: float = 30.0) -> bool:
    """Whether the process ends in time (a zombie has ended)."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_order_is_kept_over_workers_and_processes_are_reused() -> None:
    batch = [ScoreItem("rlhf3d/arithmetic", f"it is {i}", str(i - i % 2)) for i in range(200)]
    with RewardManager(BuiltinReward(), workers=2, timeout_s=10.0) as pool:
        scores = pool.score_batch(batch)
        assert [s.value for s in scores] == [1.0, 0.0] * 100
        assert [s.extra["answer"] for s in scores] == [str(i) for i in range(200)]
        assert pool.score_batch([]) == []
        assert pool.score_batch(batch[:1])[0].value == 1.0


def test_items_are_scored_while_others_are_awaited(unruly: Path, tmp_path: Path) -> None:
    """The second part of the batch is made only when the first has been scored."""
    with RewardManager(load_custom_reward(unruly), workers=2, timeout_s=5.0) as pool:
        pool.score_batch(items("1", "1"))
        pid_file = tmp_path / "pid"
        scoring = pool.start(4)
        first = items("grandchild", "7", pid_file=str(pid_file))
        scoring.add({3: first[0], 0: first[1]})
        deadline = time.monotonic() + 20.0
        while not pid_file.exists():
            assert time.monotonic() < deadline, "what was added is not scored before finish()"
            time.sleep(0.01)
        scoring.add({2: items("5")[0]})
        scoring.add({1: items("6")[0]})
        scores = scoring.finish()
        assert [s.value for s in scores] == [7.0, 6.0, 5.0, 0.0]
        assert scores[3].outcome is Outcome.TIMEOUT and "sample 3" in (scores[3].message or "")
        assert [s.value for s in pool.score_batch(items("2"))] == [2.0]


def test_several_batches_are_scored_at_once_and_fail_alone(unruly: Path) -> None:
    with RewardManager(load_custom_reward(unruly), timeout_s=20.0, max_error_rate=0.4) as pool:
        one, failing, other = pool.start(3), pool.start(2), pool.start(2)
        one.add(dict(enumerate(items("1", "2"))))
        failing.add(dict(enumerate(items("raise", "raise"))))
        other.add(dict(enumerate(items("4", "5"))))
        one.add({2: items("3")[0]})
        assert [s.value for s in other.finish()] == [4.0, 5.0]
        with pytest.raises(RewardError, match="1 of 2 completions were not scored"):
            failing.finish()
        assert [s.value for s in one.finish()] == [1.0, 2.0, 3.0]


def test_hanging_calls_are_killed_at_the_deadline_and_the_pool_goes_on(unruly: Path) -> None:
    with RewardManager(load_custom_reward(unruly), workers=1, timeout_s=2.0) as pool:
        pool.score_batch(items("1"))
        start = time.monotonic()
        scores = pool.score_batch(items("1", "sleep", "2", "regex", "3"))
        assert time.monotonic() - start < 30.0
        assert [s.outcome.value for s in scores] == [
            "scored",
            "timeout",
            "scored",
            "timeout",
            "scored",
        ]
        assert [s.value for s in scores] == [1.0, 0.0, 2.0, 0.0, 3.0]
        assert scores[3].message is not None
        assert "sample 3" in scores[3].message and "reward.timeout_s=2" in scores[3].message


def test_what_is_waited_for_can_be_named(unruly: Path) -> None:
    with RewardManager(load_custom_reward(unruly), workers=1, timeout_s=2.0) as pool:
        pool.score_batch(items("1"))
        began = time.monotonic()
        batch = pool.start(2)
        batch.add(dict(enumerate(items("sleep", "sleep"))))
        found = batch.waited
        assert found.names == ["the scorer (2 completions)"] and found.timeout_s == 4.0
        assert began <= found.since <= time.monotonic()
        batch.finish()
        assert batch.waited.names == ["the scorer (0 completions)"]


def test_failures_are_errors_with_traceback_and_sample_and_cost_nobody_else(unruly: Path) -> None:
    texts = [
        "raise",
        "1",
        "exit",
        "2",
        "sys.exit",
        "segfault",
        "recursion",
        "text",
        "unpicklable",
        "3",
    ]
    with RewardManager(load_custom_reward(unruly), workers=2, timeout_s=20.0) as pool:
        scores = pool.score_batch(items(*texts))
    messages = {text: score.message or "" for text, score in zip(texts, scores, strict=True)}
    assert [s.value for s in scores if s.outcome is Outcome.SCORED] == [1.0, 2.0, 1.0, 3.0]
    assert sum(s.outcome is Outcome.ERROR for s in scores) == 6
    assert "sample 0" in messages["raise"] and "index 40" in messages["raise"]
    assert "KeyError: 'the reason'" in messages["raise"] and "unruly.py" in messages["raise"]
    assert "exit code 7" in messages["exit"] and "exit code -11" in messages["segfault"]
    assert "SystemExit" in messages["sys.exit"] and "RecursionError" in messages["recursion"]
    assert "'1.0', not a finite number" in messages["text"] and "lambda" in scores[8].extra["why"]


def test_a_batch_is_given_up_as_soon_as_too_many_have_failed(unruly: Path) -> None:
    start = time.monotonic()
    message = r"2 of 100 completions .*reward\.max_error_rate=0\.01 allows 1"
    with RewardManager(load_custom_reward(unruly), timeout_s=1.0, max_error_rate=0.01) as pool:
        with pytest.raises(RewardError, match=message):
            pool.score_batch(items(*["sleep"] * 100))
        assert pool.score_batch(items("1"))[0].value == 1.0
    with pytest.raises(AssertionError, match="the pool is closed"):
        pool.score_batch(items("1"))
    assert time.monotonic() - start < 30.0


def test_what_a_killed_call_started_dies_with_it(unruly: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with RewardManager(load_custom_reward(unruly), workers=1, timeout_s=5.0) as pool:
        (score,) = pool.score_batch(items("grandchild", pid_file=str(pid_file)))
        assert score.outcome is Outcome.TIMEOUT
        assert gone(int(pid_file.read_text()))


def test_functions_may_start_processes_and_scorers_load_nothing_heavy(unruly: Path) -> None:
    with RewardManager(load_custom_reward(unruly), workers=1, timeout_s=60.0) as pool:
        process, modules = pool.score_batch(items("process", "modules"))
    assert process.value == 1.0
    assert modules.extra["heavy"] == []


def test_a_worker_that_died_between_batches_is_replaced(unruly: Path) -> None:
    with RewardManager(load_custom_reward(unruly), workers=1, timeout_s=10.0) as pool:
        pid = pool.score_batch(items("1"))[0].extra["pid"]
        os.kill(pid, signal.SIGKILL)
        assert gone(pid)
        (score,) = pool.score_batch(items("2"))
        assert score.value == 2.0 and score.extra["pid"] != pid


def test_a_function_that_cannot_be_loaded_stops_at_once(unruly: Path) -> None:
    reward = load_custom_reward(unruly)
    unruly.write_text("import time; time.sleep(1000)")
    late = pytest.raises(RewardError, match=r"did not load within 2\.0 s")
    with RewardManager(reward, startup_timeout_s=2.0, workers=1, timeout_s=1.0) as pool, late:
        pool.score_batch(items("1"))
    unruly.write_text("1 / 0")
    with (
        RewardManager(reward, workers=1, timeout_s=1.0) as pool,
        pytest.raises(RewardError, match="ZeroDivisionError"),
    ):
        pool.score_batch(items("1"))
    with pytest.raises(ValueError, match="cannot be sent to another process"):
        RewardManager(Unsendable())


def test_close_and_refused_sizes(unruly: Path) -> None:
    pool = RewardManager(load_custom_reward(unruly))
    pid = pool.score_batch(items("1"))[0].extra["pid"]
    pool.close()
    assert gone(pid)
    with pytest.raises(ValueError, match=r"reward\.workers=0"):
        RewardManager(BuiltinReward(), workers=0)


@pytest.mark.parametrize("text", ["1", "regex"])
def test_scorers_die_with_a_killed_parent(unruly: Path, text: str) -> None:
    """Idle or in a call that holds the interpreter: no scorer survives the driver's SIGKILL."""
    driver = (
        "from rlhf3d.rewards.manager import RewardManager\n"
        "from rlhf3d.rewards.custom import load_custom_reward\n"
        "from rlhf3d.rewards.score import ScoreItem\n"
        f"pool = RewardManager(load_custom_reward({str(unruly)!r}), timeout_s=3.0)\n"
        "print(int(pool.score_batch([ScoreItem('', '1', '')])[0].extra['pid']), flush=True)\n"
        f"pool.score_batch([ScoreItem('', {text!r}, '')])\n"
        "input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", driver], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.5)
    finally:
        parent.kill()
        parent.communicate()
    assert gone(pid, within_s=10.0)


BATCH = """
import asyncio, os, time

calls = 0

def batch(data_sources, solution_strs, ground_truths, extra_infos, factor=1.0):
    global calls
    calls += 1
    if "sleep" in solution_strs:
        time.sleep(1000)
    seen = {"calls": calls, "pid": os.getpid()}
    return [{"score": factor * float(text), **seen} for text in solution_strs]

def short(data_sources, solution_strs, ground_truths, extra_infos):
    numbered = dict.fromkeys(range(len(solution_strs)), 1)
    return {"one": [1.0], "dict": numbered, "none": None}[data_sources[0]]

async def judge(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "hang":
        await asyncio.sleep(1000)
    await asyncio.sleep(0.2)
    return float(solution_str)

async def judge_batch(data_sources, solution_strs, ground_truths, extra_infos):
    return [await judge("", text, "") for text in solution_strs]
"""


@pytest.fixture
def batch_file(tmp_path: Path) -> Path:
    path = tmp_path / "batch.py"
    path.write_text(BATCH)
    return path


def test_a_batch_function_is_given_shares_and_keeps_the_order(batch_file: Path) -> None:
    reward = load_custom_reward(batch_file, "batch", {"factor": 2.0})
    with RewardManager(reward, workers=2, timeout_s=20.0) as pool:
        scores = pool.score_batch(items(*map(str, range(101))))
    assert [s.value for s in scores] == [2.0 * i for i in range(101)]
    assert len({(s.extra["pid"], s.extra["calls"]) for s in scores}) == 2


def test_a_failed_batch_is_halved_until_the_sample_is_alone(batch_file: Path) -> None:
    texts = [str(i) for i in range(40)]
    texts[17], texts[31] = "no number", "sleep"
    with RewardManager(load_custom_reward(batch_file, "batch"), workers=2, timeout_s=3.0) as pool:
        scores = pool.score_batch(items(*texts))
    outcomes = {i: s.outcome.value for i, s in enumerate(scores) if s.failed}
    assert outcomes == {17: "error", 31: "timeout"}
    assert "sample 17" in (scores[17].message or "") and "could not convert" in (
        scores[17].message or ""
    )
    assert [s.value for i, s in enumerate(scores) if i not in outcomes] == [
        float(i) for i in range(40) if i not in outcomes
    ]


def test_scores_that_are_not_one_for_each_of_a_batch_are_errors(batch_file: Path) -> None:
    said = {"one": "returned 1 scores", "dict": "returned dict", "none": "returned NoneType"}
    with RewardManager(load_custom_reward(batch_file, "short"), workers=1, timeout_s=20.0) as pool:
        for kind, message in said.items():
            scores = pool.score_batch(
                [replace(item, data_source=kind) for item in items("1", "2", "3")]
            )
            assert [s.outcome.value for s in scores] == ["error"] * 3
            assert (
                message in scores[0].reason and "for each of its 3 completions" in scores[0].reason
            )
    with RewardManager(load_custom_reward(batch_file, "batch"), workers=1, timeout_s=20.0) as pool:
        assert pool.score_batch([]) == []


def test_async_calls_run_together_and_fail_alone(batch_file: Path) -> None:
    texts = [str(i) for i in range(30)]
    texts[4] = "no number"
    with RewardManager(load_custom_reward(batch_file, "judge"), workers=1, timeout_s=10.0) as pool:
        pool.score_batch(items("1"))
        start = time.monotonic()
        scores = pool.score_batch(items(*texts))
        assert time.monotonic() - start < 3.0  # one after the other they need 6 s
        assert [i for i, s in enumerate(scores) if s.failed] == [4]
        assert "sample 4" in (scores[4].message or "")
    with RewardManager(
        load_custom_reward(batch_file, "judge_batch"), workers=1, timeout_s=10.0
    ) as pool:
        assert [s.value for s in pool.score_batch(items("3", "1"))] == [3.0, 1.0]


def test_a_hanging_async_call_costs_its_own_sample(batch_file: Path) -> None:
    with RewardManager(load_custom_reward(batch_file, "judge"), workers=1, timeout_s=5.0) as pool:
        scores = pool.score_batch(items("1", "hang", "2"))
    assert [s.outcome.value for s in scores] == ["scored", "timeout", "scored"]


ODD = """
import asyncio, concurrent.futures, enum, multiprocessing
slots = asyncio.Semaphore(2)
class Color(str, enum.Enum):
    RED = "red"
class Detail:
    def __reduce__(self):
        raise RuntimeError("cannot be sent")
def judge(text):
    return float(text)
def args(**kwargs):
    return kwargs["solution_str"]
async def with_slots(data_source, solution_str, ground_truth, extra_info=None):
    async with slots:
        await asyncio.sleep(0.002)
        return 1.0
async def exits(data_source, solution_str, ground_truth, extra_info=None):
    raise SystemExit(0) if solution_str == "1" else ValueError("no")
def spawns(data_source, solution_str, ground_truth, extra_info=None):
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(judge, solution_str).result()
def rich(data_source, solution_str, ground_truth, extra_info=None):
    import numpy
    print("said aloud")
    more = {"color": Color.RED, "detail": Detail(), 3: numpy.arange(3), "reward_model": "judge"}
    return {"score": numpy.float32(1), "acc": numpy.bool_(True), "log": "x" * 10_000_000, **more}
def acc(data_source, solution_str, ground_truth, extra_info=None):
    odd = {"none": None, "text": "1", "nan": float("nan"), "list": [1]}
    return {"score": 1.0, "acc": odd[solution_str]}
"""


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    (tmp_path / "odd.py").write_text(ODD)
    return tmp_path / "odd.py"


def test_what_a_file_keeps_for_its_coroutines_stays_usable(odd: Path) -> None:
    with RewardManager(load_custom_reward(odd, "with_slots"), workers=1, timeout_s=30.0) as pool:
        for _ in range(3):
            assert [score.value for score in pool.score_batch(items(*"x" * 70))] == [1.0] * 70
    with RewardManager(load_custom_reward(odd, "exits"), workers=1, timeout_s=30.0) as pool:
        ended, failed = pool.score_batch(items("1", "2"))
    assert "it ends the process: sys.exit(0)" in ended.reason and failed.reason == "ValueError: no"


def test_a_file_may_have_a_spawn_pool_of_its_own(odd: Path) -> None:
    with RewardManager(load_custom_reward(odd, "spawns"), workers=1, timeout_s=60.0) as pool:
        assert pool.score_batch(items("0.5"))[0].value == 0.5


def test_extras_cross_as_plain_values_and_prints_are_no_output(
    odd: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with RewardManager(load_custom_reward(odd, "rich"), workers=1, timeout_s=30.0) as pool:
        (score,) = pool.score_batch(items("a"))
    assert (score.value, score.accuracy, score.outcome) == (1.0, 1.0, Outcome.SCORED)
    extra = score.extra
    assert (extra["color"], extra["3"], extra["returned_reward_model"]) == (
        "red",
        [0, 1, 2],
        "judge",
    )
    assert type(extra["color"]) is str and "Detail" in extra["detail"] and len(extra["log"]) == 2000
    captured = capfd.readouterr()
    assert captured.out == "" and "said aloud" in captured.err


def test_acc_is_checked_like_the_score(odd: Path) -> None:
    with RewardManager(load_custom_reward(odd, "acc"), workers=1, timeout_s=30.0) as pool:
        for score in pool.score_batch(items("none", "text", "nan", "list")):
            assert score.outcome is Outcome.ERROR and "returned acc = " in score.reason


def test_memory_is_bounded_and_the_process_replaced(tmp_path: Path) -> None:
    path = tmp_path / "hungry.py"
    path.write_text(
        "from rlhf3d.rewards.function import RewardFunction\n"
        "class Hungry(RewardFunction):\n"
        "    memory_gib = 0.5\n"
        "    def score_items(self, items):\n"
        "        return [float(len(bytearray(int(i.solution_str))) > 0) for i in items]\n"
    )
    driver = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from hungry import Hungry\n"
        "from rlhf3d.rewards.manager import RewardManager\n"
        "from rlhf3d.rewards.score import ScoreItem\n"
        "with RewardManager(Hungry(), workers=1, timeout_s=20.0) as pool:\n"
        "    items = [ScoreItem('', text, '') for text in ('10', str(2**32), '10')]\n"
        "    for s in pool.score_batch(items):\n"
        "        print(s.outcome.value, 'out of memory' in (s.message or ''))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", driver, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:3] == ["scored False", "error True", "scored False"]
