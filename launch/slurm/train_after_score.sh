#!/usr/bin/env bash
# Two jobs, the second one after the first: launch/slurm/train_after_score.sh RECIPE [section.field=value ...]
set -euo pipefail
: "${1:?usage: launch/slurm/train_after_score.sh RECIPE [section.field=value ...]}"
score="$(sbatch --parsable launch/slurm/score.sbatch "$@")"
score="${score%%;*}"                               # where a cluster's name comes with the number
train="$(sbatch --parsable --dependency="afterok:$score" --kill-on-invalid-dep=yes launch/slurm/train.sbatch "$@")"
echo "job $score scores the reference, job ${train%%;*} trains after it"
