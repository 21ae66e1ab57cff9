"""Times on a GPU, through the record of a device in tests/gpu, where values are checked."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
