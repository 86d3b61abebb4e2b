"""`rlhf3d convert` as a script: `python tools/convert_checkpoint.py SRC DST [--to hf|megatron]
[--verify] …`.
"""

from __future__ import annotations

import sys

from rlhf3d.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
