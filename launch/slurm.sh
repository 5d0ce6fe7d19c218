#!/bin/bash
# A run on two machines of eight GPUs: `sbatch launch/slurm.sh RECIPE FOLDER`. FOLDER is on a disk that both see.
#SBATCH --job-name=gemma-grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
set -euo pipefail
recipe=$1 folder=$2
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# 300 s before its time is up, or when it is preempted, each rank is told by SIGTERM: a checkpoint is written, and the exit code is not 0.
# The same command goes on with the run in FOLDER, so that the job only has to be put back into the queue.
code=0
srun --kill-on-bad-exit=1 torchrun \
  --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --max-restarts=2 \
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$host:29500" \
  -m gemma_grpo train "$recipe" "output_dir=$folder" || code=$?
if [ "$code" -ne 0 ] && grep -q '"status": "stopped"' "$folder/run.json"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
