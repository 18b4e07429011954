#!/usr/bin/env bash
# A Ray cluster for the length of one Slurm job, a Ray node a Slurm node, and a command on it. From a checkout whose
# environment is active, on storage that all nodes share:
#   sbatch --nodes=4 --gpus-per-node=4 --cpus-per-task=32 --time=24:00:00 cluster/slurm.sh \
#     rayclip eval --cluster --model ViT-B-32:openai --data cifar10 --eps 1/255 --out /shared/results
# The same command again goes on from what lies in --out. Other jobs on these nodes cannot join: the token is this job's.
#SBATCH --job-name=rayclip
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: sbatch --nodes=N --gpus-per-node=G cluster/slurm.sh COMMAND ..." >&2
  exit 2
fi

# In the environment of this job's own processes: on no disk, on no command line
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export RAY_USAGE_STATS_ENABLED=0

port=$((20000 + SLURM_JOB_ID % 20000))
tmp=/tmp/ray-$SLURM_JOB_ID
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
head_ip=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
export RAY_ADDRESS=$head_ip:$port

common=(--block --temp-dir="$tmp" --num-cpus="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" --disable-usage-stats)
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
  common+=(--num-gpus="$SLURM_GPUS_ON_NODE")
fi

on() { # NODE COMMAND ...: beside the steps that run already
  local node=$1
  shift
  srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --kill-on-bad-exit=1 "$@"
}

on "$head" ray start --head --node-ip-address="$head_ip" --port="$port" --dashboard-host=127.0.0.1 "${common[@]}" &
head_step=$!

for _ in $(seq 60); do
  if ray status > /dev/null 2>&1; then
    break
  fi
  if ! kill -0 "$head_step" 2> /dev/null; then
    echo "the Ray head on $head did not start: see above" >&2
    exit 1
  fi
  sleep 2
done
ray status > /dev/null

for node in "${nodes[@]:1}"; do
  on "$node" ray start --address="$RAY_ADDRESS" "${common[@]}" &
done

# Workers may come later: shards are given to whoever is there. Slurm ends the Ray steps with this script.
on "$head" "$@"
