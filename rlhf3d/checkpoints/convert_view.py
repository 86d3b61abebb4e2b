"""A conversion as the command line runs it: progress on stderr, verification, and a report.

Invariant: the report says only what was done; what could not be verified is in it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf3d.checkpoints.convert import Conversion, Options, plan_conversion
from rlhf3d.checkpoints.verify import Verified, verify
from rlhf3d.observability.tables import View
from rlhf3d.terminal import Terminal
from rlhf3d.units import GIB


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    conversion: Conversion
    num_files: int
    """Of tensors."""
    seconds: float
    verified: Verified | None

    def data(self) -> dict[str, Any]:
        """Return it as plain data."""
        done = self.conversion
        return {
            "source": str(done.source),
            "destination": str(done.destination),
            "to": done.to,
            "role": done.role,
            "family": done.spec.family,
            "bytes": done.num_bytes,
            "files": self.num_files,
            "seconds": round(self.seconds, 3),
            "verified": None if self.verified is None else vars(self.verified),
            "notes": list(done.notes),
        }

    def view(self) -> View:
        """Return it for people and for programs."""
        done, gib = self.conversion, self.conversion.num_bytes / GIB
        kind = {"hf": "Hugging Face", "megatron": "Megatron"}[done.to]
        lines = [
            f"{done.destination}: {kind} {done.spec.family} {done.role}, "
            f"{done.num_weights:,} parameters, {gib:.2f} GiB in {self.seconds:.1f} s"
        ]
        if self.verified is not None:
            lines += _verified_lines(self.verified)
        return View([*lines, *(f"note: {text}" for text in done.notes)], self.data())


def _verified_lines(proof: Verified) -> list[str]:
    text = f"verified: {proof.tensors} tensors, {proof.elements:,} elements, bit for bit"
    if proof.skipped is not None:
        return [text, f"not verified: logits of Megatron and transformers ({proof.skipped})"]
    return [
        f"{text}; logits differ by at most {proof.max_logit_diff:.1e} "
        f"(largest {proof.max_logit:.1e})"
    ]


def convert(source: Path, destination: Path, options: Options, proof: bool = False) -> Report:
    """Convert with a progress bar; with `proof`, verify before the destination gets its name.

    Raises ValueError, VerifyError, and RuntimeError if the disk fails.
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    conversion = plan_conversion(source, destination, options)
    columns = (
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    began = time.monotonic()
    with Progress(*columns, console=Terminal(stderr=True)) as progress:
        seconds, verified = 0.0, None
        writing = progress.add_task(f"to {conversion.to}", total=conversion.num_bytes)

        def on_written(count: int) -> None:
            progress.advance(writing, count)

        def check(written: Path) -> None:
            nonlocal seconds, verified
            # Taken here: the time of the conversion alone, without that of the proof.
            seconds = time.monotonic() - began
            if proof:
                reading = progress.add_task("verifying", total=conversion.num_bytes)
                pair = conversion.pair(written)
                verified = verify(
                    *pair, conversion.to, lambda count: progress.advance(reading, count)
                )

        conversion.run(on_written, check)
    suffix = {"hf": "*.safetensors", "megatron": "*.distcp"}[conversion.to]
    return Report(conversion, len(list(destination.rglob(suffix))), seconds, verified)
