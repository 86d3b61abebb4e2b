"""How many answers a second the scoring pool takes: python tools/data/scoring_speed.py
data/math500/test.parquet

Every worked solution of the file is scored against its own ground truth (right), and against those
of `--others` other rows (nearly always wrong), as a policy's completions would be; the first half
warms the processes up, the second is measured. On a busy machine read the processor time.
"""

import argparse
import random
import resource
import time
from collections import Counter

from rlhf3d.data.parquet import read_parquet
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rewards.score import ScoreItem
from rlhf3d.rewards.scorers import BuiltinReward


def cpu_seconds() -> float:
    """Processor time of this process and its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(
    warm: list[ScoreItem], items: list[ScoreItem], workers: int, reward: BuiltinReward
) -> tuple[float, float, Counter[str]]:
    """Seconds and processor seconds of `items` in a pool that has scored `warm`, and their
    outcomes.
    """
    # Workers' time counts once they have ended: a pool that only warms up tells what to subtract.
    before = cpu_seconds()
    with RewardManager(reward, workers=workers, timeout_s=10.0) as pool:
        pool.score_batch(warm)
    warming = cpu_seconds() - before
    before = cpu_seconds()
    with RewardManager(reward, workers=workers, timeout_s=10.0) as pool:
        pool.score_batch(warm)
        start = time.monotonic()
        scores = pool.score_batch(items)
        seconds = time.monotonic() - start
    outcomes = Counter(f"{score.outcome.value} {score.value:g}" for score in scores)
    return seconds, cpu_seconds() - before - warming, outcomes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--others", type=int, default=3, help="wrong answers for each right one")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    rows = [row for row in read_parquet(arguments.file) if row.extra_info.get("answer")]
    draw = random.Random(0)
    items = [
        ScoreItem(row.data_source, text, row.reward_model["ground_truth"])
        for row in rows
        for text in [
            row.extra_info["answer"],
            *(draw.choice(rows).extra_info["answer"] for _ in range(arguments.others)),
        ]
    ]
    reward = BuiltinReward("flexible", tuple({row.data_source for row in rows}))
    half = len(items) // 2
    seconds, processor, outcomes = measure(items[:half], items[half:], arguments.workers, reward)
    count = len(items) - half
    print(
        f"{count} answers, {arguments.workers} processes: {count / seconds:.0f} a second by the "
        "clock,"
    )
    print(f"{count / processor:.0f} a second of processor time; {dict(outcomes)}")


if __name__ == "__main__":
    main()
