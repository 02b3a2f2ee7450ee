# Sourced by the sbatch scripts of this folder: where the ranks meet, and what a finished job step means.

# The first node of the job and a port that follows from the job's number; either may be set by the caller.
export_meeting_point() {
  if [[ -z "${MASTER_ADDR:-}" ]]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  fi
  export MASTER_ADDR
  export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
}

# 75 = saved after a signal: queue the job again, and it resumes by itself. 4 = a rank hung; 128 and more = a rank was
# killed: queue it again too, MM15_MAX_RESTARTS times in the job's life (default 3; 0 = never). The count lies in a file
# beside the log, because a requeued script begins anew. Anything else ends the job with that code.
finish() {
  local code=$1 limit=${MM15_MAX_RESTARTS:-3} counted=".mm15-faults-$SLURM_JOB_ID" faults=0
  if [[ $code -eq 75 ]]; then
    echo "the run was interrupted after a checkpoint; requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  if [[ $code -eq 4 || $code -ge 128 ]]; then
    if [[ -e $counted ]]; then
      faults=$(<"$counted")
    fi
    if [[ $faults -lt $limit ]]; then
      echo $((faults + 1)) >"$counted"
      echo "a rank hung or was killed (code $code); requeueing job $SLURM_JOB_ID, restart $((faults + 1)) of $limit"
      scontrol requeue "$SLURM_JOB_ID"
      exit 0
    fi
    echo "a rank hung or was killed (code $code), and $faults of $limit restarts (MM15_MAX_RESTARTS) are used up"
  fi
  rm -f "$counted"
  exit "$code"
}
