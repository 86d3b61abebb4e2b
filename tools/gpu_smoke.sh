#!/usr/bin/env bash
# Does everything work on this machine's GPUs? One takes about 15 minutes; with two, what needs a second one follows.
#   bash tools/gpu_smoke.sh [pytest's options]      (from the project's folder, after `make setup`)
set -euo pipefail
exec "${VENV:-.venv}/bin/python" -m pytest -q -s -m "gpu or gpu2" tests/gpu "$@"
