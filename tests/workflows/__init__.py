"""Tests of the scripts in workflows/, whose own modules are imported from there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "workflows"))
