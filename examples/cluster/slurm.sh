#!/usr/bin/env bash
# One Ray node on each machine of the job; the first one also runs the driver:
#   sbatch examples/cluster/slurm.sh settings.yaml runs/first
# If the job is ended at its time limit, submit it again: it resumes.
#SBATCH --job-name=autopeft
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@300
set -euo pipefail
settings=$1 output=$2

export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(openssl rand -hex 32)
export RAY_AUTH_TOKEN
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname -I | cut -d ' ' -f 1)
port=$((20000 + SLURM_JOB_ID % 10000))

srun --nodes=1 --ntasks=1 -w "$head" ray start --head --node-ip-address="$address" \
  --port="$port" --num-cpus="$SLURM_CPUS_PER_TASK" --include-dashboard=false --block &
sleep 20
if ((SLURM_JOB_NUM_NODES > 1)); then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
    ray start --address="$address:$port" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
  sleep 20
fi

verb=(search "$settings" --output "$output")
[[ -e $output/settings.yaml ]] && verb=(resume "$output")
srun --overlap --nodes=1 --ntasks=1 -w "$head" autopeft "${verb[@]}" --ray-address="$address:$port" &
driver=$!
trap 'kill -TERM "$driver"' TERM
wait "$driver"
