"""How a rank loads its stage."""

from __future__ import annotations

import subprocess
import sys


def test_the_garbage_collector_leaves_alone_what_imports_make() -> None:
    code = (
        "import gc\n"
        "from dpo_scale.launched import _stage\n"
        "before = gc.get_stats()[2]['collections']\n"
        "stage = _stage('train')\n"
        "full = gc.get_stats()[2]['collections'] - before\n"
        "print(stage.__name__, full, gc.isenabled(), gc.get_freeze_count() > 10**5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["train", "0", "True", "True"]
