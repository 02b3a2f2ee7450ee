# Sourced by the sbatch scripts of this folder: where the ranks meet, and what a finished job step means.

# The first node of the job and a port that follows from the job's number; either may be set by the caller.
export_meeting_point() {
  if [[ -z "${MASTER_ADDR:-}" ]]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  fi
  export MASTER_ADDR
  export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
}

# 75 = saved after a signal: queue the job again, and it resumes by itself. Anything else ends the job with that code.
finish() {
  local code=$1
  if [[ $code -eq 75 ]]; then
    echo "the run was interrupted after a checkpoint; requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  exit "$code"
}
