# shellcheck shell=bash
# What the batch scripts share: start a stage on all nodes, stop it in time, queue the job again until it is finished.
# Sourced on the first node: job.sh STAGE RECIPE [section.field=value ...]
set -euo pipefail
stage="$1"
shift
PATH="$PWD/.venv/bin:$PATH"                        # where launch/install.sh puts it; or an active environment

run="$(dpo-scale status --folder -- "$@")"         # a mistake in the recipe ends the job here
export DPO_SCALE_LOGS="$run/logs/job-$SLURM_JOB_ID-start-${SLURM_RESTART_COUNT:-0}"
mkdir -p "$DPO_SCALE_LOGS"
rm -f "$run/STOP"                                  # it was meant for an earlier start

FIRST_NODE="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export FIRST_NODE
export PORT="$((20000 + SLURM_JOB_ID % 10000))"    # below the range that systems give away

is_ours_to_requeue() {                             # else it is cancelled, preempted or has lost a node: SLURM's affair
    # A script that outlives the loss of a node may see its own job's next start.
    [[ "$(scontrol show job --oneliner "$SLURM_JOB_ID")" == \
        *" JobState=RUNNING "*" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

out_of_time=""
stop_in_time() {
    out_of_time=yes
    touch "$run/STOP"                              # after its current step the run commits a checkpoint and ends
    local end
    end="$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([^ ]*\) .*/\1/p')"
    # Scoring and loading make no steps; what they have stored stays. A job that reaches its end is not queued again.
    (sleep "$(($(date -d "$end" +%s) - $(date +%s) - 60))" && is_ours_to_requeue && scontrol requeue "$SLURM_JOB_ID") &
}
trap stop_in_time USR1
trap 'touch "$run/STOP"' TERM

srun --kill-on-bad-exit=1 --wait=60 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    bash launch/slurm/node.sh "$stage" "$@" &
launch=$!
while kill -0 "$launch" 2>/dev/null; do
    wait "$launch" || true                         # a trap ends a wait early
done

ours=""
if is_ours_to_requeue; then ours=yes; fi
code=0
dpo-scale status --of "$stage" ${ours:+--count-failure} ${out_of_time:+--out-of-time} -- "$@" || code=$?
if [ "$ours$code" = yes85 ]; then
    scontrol requeue "$SLURM_JOB_ID"
else
    exit "$code"
fi
