#!/bin/bash
# Several nodes of a SLURM cluster as one machine. Options before the script are sbatch's, words after it those of dino-edu:
#   sbatch --nodes 2 slurm.sh train imagenet_vits16 --root IMAGENET --stream --workers 8 --out runs/vits16
# The environment of dino_edu must be active, and the output folder one that all nodes share.
# A job that ran out of time has written a checkpoint: submit the same line again, or beforehand with --dependency=afterany:JOB.
#SBATCH --job-name=dino-edu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

PROCESSES=${PROCESSES:-gpu}        # on each node: a number, or gpu for one a GPU
RESTARTS=${RESTARTS:-3}            # how often all of them start again after one has died
PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}   # where the nodes meet, on the first of them
OPTIONS=${OPTIONS:-}               # more options of torchrun

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # else a restart may meet addresses of the processes that died (pytorch issue 135712)

# shellcheck disable=SC2086
srun --kill-on-bad-exit=0 python -m torch.distributed.run \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$PROCESSES" --max-restarts "$RESTARTS" \
  --rdzv-backend c10d --rdzv-endpoint "$first:$PORT" --rdzv-id "$SLURM_JOB_ID" $OPTIONS \
  -m dino_edu.cli "$@"
