"""A page as a browser shows it: headless Chromium, cut off from every network."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=20000"),
)


@dataclass(frozen=True)
class Visit:
    """What a page came to."""

    dom: str
    """The document as its scripts left it, without their own text."""
    console: tuple[str, ...]
    """Everything that was said on its console, errors and refused requests included."""


def visit(page: Path, workspace: Path, *, script: str = "", dark: bool = False) -> Visit:
    """Open a page, run a script on it, and come back with the document. Skips the test where there is no Chromium."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    visited = workspace / "visited.html"
    text = page.read_text(encoding="utf-8")
    visited.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    profile = f"--user-data-dir={workspace / 'profile'}"
    done = subprocess.run(
        [browser, *OPTIONS, *scheme, profile, "--dump-dom", visited.as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    said = tuple(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return Visit(re.sub(r"<script>.*?</script>", "", done.stdout, flags=re.DOTALL), said)
