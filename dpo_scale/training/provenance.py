"""What an exported model says of where it comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def without_folders(value: Any) -> Any:
    """A JSON value in which only the name is left of each absolute path.

    An exported folder is made to be given away: it says which data, model and settings it is of, and nothing about the
    machine on which they lie.
    """
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
