#!/usr/bin/env bash
# Lint, format, types and tests, as they must pass before a change lands: tests/run.sh [PYTEST ARGUMENTS]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/launch/install.sh" test
cd "$root"
export OMP_NUM_THREADS=1 DS_ACCELERATOR="${DS_ACCELERATOR:-$(command -v nvidia-smi >/dev/null && echo cuda || echo cpu)}"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest "$@"
