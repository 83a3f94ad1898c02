"""`python -m gcnsim FOLDER`: which instructions are implemented, and which of them tests executed; see opcodes.py."""

from __future__ import annotations

import sys
from pathlib import Path

from .opcodes import report

print(report(Path(sys.argv[1])))
