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

stamp="$root/.venv/.installed-${extra:-base}"
cpu_torch="$(command -v nvidia-smi >/dev/null || grep '^torch==' "$root/launch/constraints-cpu.txt")"

# Triton compiles what it launches on GPUs, and tests compile an op of DeepSpeed's; a run on CPUs compiles nothing.
if [ -z "$cpu_torch" ] || [ "$extra" = test ]; then
    command -v c++ >/dev/null || command -v g++ >/dev/null || {
        echo "dpo_scale needs a C++ compiler (Debian: apt-get install g++)" >&2
        exit 1
    }
    "$python" -c 'import pathlib, sysconfig as s; exit(not pathlib.Path(s.get_path("include"), "Python.h").exists())' || {
        echo "dpo_scale needs the headers of $python (Debian: apt-get install python3-dev)" >&2
        exit 1
    }
fi

state="$(cat "$root/pyproject.toml" "$root/launch/install.sh" | cksum) $cpu_torch"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
    exit
fi

[ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv" || {
    rm -rf "$root/.venv" # half made
    echo "could not make $root/.venv (Debian: apt-get install python3-venv)" >&2
    exit 1
}
echo "Installing dpo_scale${extra:+ with its $extra extra} into .venv (some minutes the first time) ..."
log="$root/.venv/install.log"
: >"$log"
pip_install() {
    "$root/.venv/bin/python" -m pip install --disable-pip-version-check "$@" >>"$log" 2>&1
}
constraints=()
if [ -n "$cpu_torch" ]; then
    constraints=(-c "$root/launch/constraints-cpu.txt")
    # PyPI's torch for Linux brings gigabytes of CUDA. A CPU build says so in its version; PyTorch has an index of them.
    pip_install "$cpu_torch+cpu" ||
        pip_install --extra-index-url https://download.pytorch.org/whl/cpu "${constraints[@]}" torch || true
fi
pip_install "${constraints[@]}" -e "$root${extra:+[$extra]}" || {
    tail -n 20 "$log" >&2
    echo "installation failed; all of its output is in $log" >&2
    exit 1
}
echo "$state" >"$stamp"
