"""TensorBoard: curves, completions as text, and the configuration, in a folder of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf3d.observability.samples import Kind, Sample
from rlhf3d.observability.trackers.protocol import COLUMNS, RunFacts, table_rows

TENSORBOARD_DIR = "tensorboard"


class TensorBoard:
    """See `Tracker`."""

    def __init__(self, facts: RunFacts) -> None:
        # Imported here: it pulls in torch, which reading a run's metrics does not need.
        from torch.utils.tensorboard import SummaryWriter

        # Steps after the checkpoint are written again: TensorBoard hides the first writing.
        purge_step = None if facts.resume_step is None else facts.resume_step + 1
        self._writer = SummaryWriter(str(facts.folder / TENSORBOARD_DIR), purge_step=purge_step)
        about = {"config": facts.config, "versions": facts.versions}
        for name, values in about.items():
            rows = [[key, value] for key, value in values.items()]
            if rows:
                text = markdown_table(("name", "value"), rows)
                self._writer.add_text(name, text, facts.resume_step or 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        # By itself it writes every two minutes.
        self._writer.flush()

    def samples(self, step: int, rows: Sequence[Sample], kind: Kind) -> None:
        """See `Tracker`."""
        text = markdown_table(COLUMNS, table_rows(step, rows))
        self._writer.add_text(f"samples/{kind}", text, step)

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table for TensorBoard's text page; line breaks and bars of the texts stay in their cell."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")


track = TensorBoard
