"""The version of the library."""

from pathlib import Path

__version__ = (Path(__file__).parent / "version.txt").read_text(encoding="utf-8").strip()
