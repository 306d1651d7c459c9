"""What the tests of Qwen Code share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a path short enough for a socket; it is ours alone."""
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as made:
        yield Path(made)
