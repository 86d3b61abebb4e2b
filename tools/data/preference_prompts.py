"""Prompts for a reward model from preference pairs: rlhf3d data prepare
tools/data/preference_prompts.py --source …

Of one file of pairs (prompt, chosen, rejected), `--split train` (the default) takes those that
tools/train_reward_model.py learns from, `--split test` those that it holds out. Only a reward model
can score the completions: rows have no ground truth.
"""

from preferences import is_held_out, pair_of

SPLITS = ("train", "test")


def make_map_fn(split, data_source="preferences"):
    def to_row(row, index):
        if is_held_out(index) != (split == "test"):
            raise ValueError("it belongs to the other split")
        return {
            "data_source": data_source,
            "prompt": pair_of(row, f"row {index}").prompt,
            "ability": "dialogue",
            "reward_model": {"style": "model"},
            "extra_info": {"split": split, "index": index},
        }

    return to_row
