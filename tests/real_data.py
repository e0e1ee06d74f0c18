"""Where the tests look for CIFAR-10 and CelebA; neither set is part of the project."""

import os
from pathlib import Path

import pytest


def real_data_dir(name: str) -> str:
    """A TFDS data directory that holds `name`; skips the test where there is none."""
    shared = Path(__file__).parents[2] / "shared" / "tensorflow_datasets"
    places = [os.environ.get("TFDS_DATA_DIR", ""), str(shared)]
    for place in places:
        if place and (Path(place) / name).is_dir():
            return place
    pytest.skip(f"no {name} in TFDS_DATA_DIR or ../shared/tensorflow_datasets")
