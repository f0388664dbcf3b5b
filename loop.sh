#!/usr/bin/env bash
# The paper's Algorithm 1: stage 0 once, then for each new task stage 1 (RL of the head) and stage 2 (SFT of everything).
#
#   bash loop.sh metaworld 4                   four rounds on Meta-World; round i takes the i-th RL task
#   bash loop.sh kitchen 2                     two rounds in Franka Kitchen
#   SMOKE=1 bash loop.sh metaworld 1           every stage and file in a few minutes, too short to learn anything
#
# From the environment, all optional:
#   RUN=name       the run's folder is runs/<name>       (default: the domain and the seed, smoke runs apart)
#   SEED=0         weights, batches, exploration
#   VLM=tiny       or a BLIP-2: a local folder, or a hub name such as Salesforce/blip2-opt-2.7b
#   PYTHON=        an interpreter that has requirements.txt; default: .venv, made here on first use
# Given again, the same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")"

if [ $# -ne 2 ] || ! [[ $2 =~ ^[0-9]+$ ]]; then
  sed -n '2,13s/^# \{0,1\}//p' "$0"
  exit 2
fi
DOMAIN=$1 ROUNDS=$2 SEED=${SEED:-0} VLM=${VLM:-tiny} SMOKE=${SMOKE:-}
export AGAIN="bash loop.sh $DOMAIN $ROUNDS" # what a stopped stage tells the user to give again
OUT=runs/${RUN:-$DOMAIN-seed$SEED${SMOKE:+-smoke}}

source venv.sh

# A smoke run is the same commands with small numbers. Its D_e is its own, so that a real run never trains on it.
STAGE0="" RL="" SFT="" DATA=runs/D_e
if [ -n "$SMOKE" ]; then
  DATA=runs/D_e-smoke
  STAGE0="--demos 2 --steps 60 --batch 32 --episodes 1"
  RL="--env-steps 1500 --envs 8 --rollout 32 --warmup 1 --successes 2 --episodes 1"
  SFT="--steps 30 --batch 32 --episodes 1"
fi

"$PYTHON" report.py --run "$OUT" --domain "$DOMAIN" --rounds "$ROUNDS" --seed "$SEED" --vlm "$VLM" --announce

"$PYTHON" stage0_sft.py --domain "$DOMAIN" --data "$DATA" --out "$OUT/0-sft" --vlm "$VLM" --seed "$SEED" $STAGE0

PARENT=0-sft
for ((i = 1; i <= ROUNDS; i++)); do
  TASK=$("$PYTHON" -c "from domains import $DOMAIN as d; print(d.RL_TASKS[($i - 1) % len(d.RL_TASKS)])")
  "$PYTHON" stage_rl.py --domain "$DOMAIN" --task "$TASK" --parent "$OUT/$PARENT" --out "$OUT/$i-rl-$TASK" \
    --seed "$SEED" $RL
  "$PYTHON" stage_sft.py --domain "$DOMAIN" --data "$DATA" --parent "$OUT/$i-rl-$TASK" --out "$OUT/$i-sft" \
    --seed "$SEED" $SFT
  PARENT=$i-sft
done

"$PYTHON" report.py --run "$OUT" --domain "$DOMAIN" --rounds "$ROUNDS" --seed "$SEED" --vlm "$VLM"
