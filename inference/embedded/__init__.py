"""The model that comes with the project, so that a first start needs no download."""

from pathlib import Path

MODEL = Path(__file__).parent / "weights"  # in the transformers format
