#!/bin/bash
# quickstart on this machine; rendered by `rlhf3d launch local`.
set -euo pipefail
cd /home/user/rlhf3d
# shellcheck disable=SC1091
source .venv/bin/activate
export RAY_USAGE_STATS_ENABLED=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0

exec rlhf3d train configs/quickstart.yaml cluster.platform=cpu cluster.num_nodes=1
