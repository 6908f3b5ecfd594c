#!/usr/bin/env bash
# One node of a batch job: node.sh STAGE RECIPE [section.field=value ...], started by job.sh through srun.
set -euo pipefail
stage="$1"
shift
ranks="${SLURM_GPUS_ON_NODE:-1}"
cores="$((SLURM_CPUS_ON_NODE > ranks ? SLURM_CPUS_ON_NODE / ranks : 1))"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cores}"   # an offloaded optimizer needs them
ulimit -l unlimited 2>/dev/null ||
    echo "$(hostname): offload cannot pin much memory here (ulimit -l); ask for an unlimited memlock" >&2

# Compilers lock their caches, and network file systems lock badly. What lies there is run, so nobody else may have made
# or filled it: in /tmp it has no name that can be foretold. This user's next job finds it again.
local_files="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}"
mkdir -p "$local_files"
cache="$(find "$local_files/" -maxdepth 1 -name 'dpo_scale-compiled-*' -type d -uid "$UID" ! -perm /077 -print -quit ||
    true)"
cache="${cache:-$(mktemp -d "$local_files/dpo_scale-compiled-XXXXXX")}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$cache/torch_extensions}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$cache/triton}"
mkdir -p "$TORCH_EXTENSIONS_DIR" "$TORCHINDUCTOR_CACHE_DIR" "$TRITON_CACHE_DIR"

export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"       # nodes seldom have a way out: fetch models before
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"   # micro-batches differ in length
# Seconds for a checkpoint after a SIGTERM; the launcher's default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# The last collectives of every rank, written down when one of them times out.
export TORCH_NCCL_TRACE_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="$DPO_SCALE_LOGS/collectives-rank-"

exec accelerate launch --config_file "$LAUNCH_CONFIG" \
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$((SLURM_JOB_NUM_NODES * ranks))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$FIRST_NODE" --main_process_port "$PORT" \
    -m "dpo_scale.$stage" "$@"
