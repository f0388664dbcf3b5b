#!/usr/bin/env bash
# The paper's Fig. 4, why there are two stages: training success over RL's environment steps on each RL task, for
#
#   scratch     PPO through the whole VLA, from random weights
#   sft-whole   PPO through the whole VLA, from stage 0
#   sft-head    PPO on the head alone, the VLM frozen, from stage 0: the paper's stage 1
#
#   bash tools/fig4.sh metaworld runs/metaworld-seed0/0-sft     ends with runs/fig4-metaworld-seed0/curves.png
#
# SEED=0 and PYTHON= as in loop.sh; RL= more arguments of stage_rl.py. Rerun the same command to resume.
set -euo pipefail

if [ $# -ne 2 ]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
  exit 2
fi
cd "$(dirname "$0")/.."
VARIABLES="SEED RL PYTHON" source tools/setup.sh
DOMAIN=$1
START=$2
SEED=${SEED:-0}
OUT=runs/fig4-$DOMAIN-seed$SEED
if [ ! -f "$START/config.json" ]; then
  echo "error: $START is not a checkpoint: use a finished 0-sft" >&2
  exit 2
fi

RL_TASKS=$("$PYTHON" -m tools.lookup rl-tasks "$DOMAIN")
VLM=$("$PYTHON" -m tools.lookup config "$START" vlm)
IMAGE_SIZE=$("$PYTHON" -m tools.lookup config "$START" image_size)
"$PYTHON" stage0_sft.py --domain "$DOMAIN" --out "$OUT/untrained" --vlm "$VLM" --image-size "$IMAGE_SIZE" \
  --seed "$SEED" --steps 0 --episodes 0
FOLDERS=()
for TASK in $RL_TASKS; do
  for ARM in scratch sft-whole sft-head; do
    case $ARM in
      scratch) PARENT=$OUT/untrained TRAINED=--train-vlm ;;
      sft-whole) PARENT=$START TRAINED=--train-vlm ;;
      sft-head) PARENT=$START TRAINED=--no-train-vlm ;;
    esac
    "$PYTHON" stage_rl.py --domain "$DOMAIN" --task "$TASK" --algo ppo $TRAINED --parent "$PARENT" \
      --out "$OUT/$ARM/$TASK" --seed "$SEED" --successes 0 --episodes 0 ${RL:-}
    FOLDERS+=("$OUT/$ARM/$TASK")
  done
done
"$PYTHON" -m tools.compare curves "${FOLDERS[@]}" --out "$OUT"
