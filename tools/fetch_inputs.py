"""Download what a configuration names and this machine lacks, from the Hugging Face hub: model
folder and data sets.

python tools/fetch_inputs.py CONFIG [key=value ...]

Only what the project knows where to find: models/NAME of the families below and data/SET/*.parquet
of `rlhf3d data prepare`. Whatever else is missing is the run's to report.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rlhf3d.config.load import load_config
from rlhf3d.config.schema import Config
from rlhf3d.data import sets

OWNERS = {"Qwen": "Qwen", "Llama": "meta-llama"}
"""Owner on the hub, by how the model's name begins."""


def missing(config: Config) -> list[list[str]]:
    """The commands that bring what is not here; their programs are in this environment's folder."""
    model = Path(config.model.path)
    owner = next((owner for family, owner in OWNERS.items() if model.name.startswith(family)), None)
    commands = []
    if owner and model.parent == Path("models") and not (model / "config.json").is_file():
        hub = [
            "hf",
            "download",
            f"{owner}/{model.name}",
            "--local-dir",
            str(model),
            "--exclude",
            # Llama's weights a second time, in Meta's own format.
            "original/*",
        ]
        commands.append(hub)
    files = [Path(name) for name in (*config.data.train_files, *config.data.val_files)]
    absent = {
        file.parent.name
        for file in files
        if file.parent.parent == Path("data") and not file.is_file()
    }
    return commands + preparations(absent)


def preparations(absent: set[str]) -> list[list[str]]:
    """The commands that prepare those data sets of the hub, after the sets that they exclude."""
    of_hub = {name: sets.load(name) for name in sets.names() if hasattr(sets.load(name), "HUB")}
    excluded = {name: getattr(module, "EXCLUDE", ()) for name, module in of_hub.items()}
    commands = []
    # Sets that others exclude come before those.
    for name in sorted(absent & of_hub.keys(), key=lambda name: (bool(excluded[name]), name)):
        command = ["rlhf3d", "data", "prepare", name, "--source", "hub"]
        for other in excluded[name]:
            command += ["--exclude", f"data/{other}/test.parquet"]
        commands.append(command)
    return commands


def main() -> int:
    """Command line; prints each command before it runs."""
    try:
        config = load_config(sys.argv[1], sys.argv[2:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for command in missing(config):
        print(" ".join(command), flush=True)
        program = Path(sys.executable).parent / command[0]
        if subprocess.run([program, *command[1:]]).returncode:
            print(
                "error: bring it here by hand, or where the hub can be reached: "
                f"{' '.join(command)}",
                file=sys.stderr,
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
