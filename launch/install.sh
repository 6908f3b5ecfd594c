#!/usr/bin/env bash
# Make .venv beside this repository's README and install dpo_scale into it. Safe to repeat; quick when nothing changed.
# Usage: launch/install.sh [EXTRA]     EXTRA: test, tensorboard, wandb (as in pyproject.toml)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extra="${1:-}"

python=""
for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
[ -n "$python" ] || { echo "dpo_scale needs Python 3.10 to 3.13; set PYTHON to one" >&2; exit 1; }
command -v c++ >/dev/null || command -v g++ >/dev/null || {
    echo "dpo_scale needs a C++ compiler: DeepSpeed compiles its communication code (Debian: apt-get install g++)" >&2
    exit 1
}

# Without a GPU torch comes as a CPU build; any other torch would bring gigabytes of CUDA.
constraints=()
command -v nvidia-smi >/dev/null || constraints=(-c "$root/launch/constraints-cpu.txt")

stamp="$root/.venv/.installed-${extra:-base}"
state="$(cat "$root/pyproject.toml" "$root/launch/constraints-cpu.txt" | cksum) ${constraints[*]:-}"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$state" ]; then
    [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv" || {
        echo "could not make $root/.venv (Debian: apt-get install python3-venv)" >&2
        exit 1
    }
    echo "Installing dpo_scale${extra:+ with its $extra extra} into .venv (some minutes the first time) ..."
    log="$root/.venv/install.log"
    "$root/.venv/bin/python" -m pip install --disable-pip-version-check "${constraints[@]}" \
        -e "$root${extra:+[$extra]}" >"$log" 2>&1 || {
        tail -n 20 "$log" >&2
        echo "installation failed; all of its output is in $log" >&2
        exit 1
    }
    echo "$state" >"$stamp"
fi
