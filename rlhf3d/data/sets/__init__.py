"""One small file for each data set: `make_map_fn(split, …)` turns a row of its source into a prompt row.

A set's module may also say: DATA_SOURCE (default: its name), HUB (repository and configuration on the Hugging Face
hub), SPLITS (those it has, default train and test), NOTES (what its user should know) and `generate(…)`, for sets
that have no source. Keyword arguments of `make_map_fn` and `generate` are the options of `rlhf3d data prepare`.
A file of a user's own needs `make_map_fn` alone.
"""
