"""A data set of your own in twenty lines: rlhf3d data prepare tools/data/own_set.py --source
my_rows.jsonl --output …

Here a source row is {"question": …, "solution": …} with the answer in the solution's last box.
Raise ValueError for a row that cannot be used: it is left out, and counted with your reason.
"""

from rlhf3d.rewards.math_answer import last_boxed

SPLITS = ("train", "test")


def make_map_fn(split, suffix="Put the final answer within \\boxed{}."):
    def to_row(row, index):
        answer = last_boxed(row["solution"])
        if not answer:
            raise ValueError("its solution has no box")
        return {
            "data_source": "my/problems",  # its scorer: reward.scorers={my/problems: math_verify}
            "prompt": [{"role": "user", "content": f"{row['question']} {suffix}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {
                "split": split,
                "index": index,
                "question": row["question"],
                "answer": row["solution"],
            },
        }

    return to_row
