"""Files that travel with the package: `launch/...` and `ds_configs/...`.

In a checkout they lie at its root; in an installed wheel inside the package, under `shipped/`.
"""

from __future__ import annotations

from pathlib import Path

from dpo_scale.errors import UserError

_PACKAGE = Path(__file__).parent


def shipped_file(name: str) -> Path:
    """The path of a shipped file, such as `ds_configs/zero3.json`. Raises UserError if there is none."""
    for root in (_PACKAGE / "shipped", _PACKAGE.parent):
        if (root / name).is_file():
            return root / name
    raise UserError(f"{name}: no such file here, and none of that name comes with the package")
