"""Prepare a data set as parquet: python tools/data/prepare.py NAME --source … --output … (`rlhf3d
data prepare`).
"""

import sys

from rlhf3d.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["data", "prepare"]
    main()
