"""Data: one row for each question, written as train.parquet and test.parquet."""

import random

import pyarrow as pa
import pyarrow.parquet as pq


def row(low):
    question = f"I think of a number from {low} to {low + 19}. Answer with one number."
    secret = random.Random(low).randint(low, low + 19)
    return {
        "data_source": "secret_number",
        "prompt": [{"role": "user", "content": question}],
        "reward_model": {"style": "rule", "ground_truth": str(secret)},
    }


for name, lows in (("train", range(1, 81)), ("test", range(81, 101))):
    pq.write_table(pa.Table.from_pylist([row(low) for low in lows]), f"{name}.parquet")
