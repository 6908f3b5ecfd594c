#!/usr/bin/env bash
# The embedded default, from nothing to a trained and exported model: launch/demo.sh [--output FOLDER]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/launch/install.sh"
exec "$root/.venv/bin/dpo-scale" demo "$@"
