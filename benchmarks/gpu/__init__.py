"""Times on a GPU; what checks values there is in tests/gpu, whose record of a device this takes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
