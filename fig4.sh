#!/usr/bin/env bash
# The paper's Fig. 4, why there are two stages: success over RL's steps on each RL task, for
#
#   scratch     PPO through the whole VLA, never trained before
#   sft-whole   PPO through the whole VLA, from stage 0
#   sft-head    PPO on the head alone, the VLM frozen, from stage 0: the paper's stage 1
#
#   bash fig4.sh metaworld runs/metaworld-seed0/0-sft        ends with runs/fig4-metaworld-seed0/curves.png
#
# SEED=0, PYTHON= as in loop.sh; RL= further arguments of stage_rl.py. Given again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")"

if [ $# -ne 2 ]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0"
  exit 2
fi
GIVEN="SEED RL PYTHON" source venv.sh
DOMAIN=$1 START=$2 SEED=${SEED:-0}
OUT=runs/fig4-$DOMAIN-seed$SEED
[ -f "$START/config.json" ] || { echo "error: $START is no checkpoint: give a finished 0-sft" >&2 && exit 2; }

read -r VLM SIZE < <("$PYTHON" -c "import json; c = json.load(open('$START/config.json')); print(c['vlm'], c['image_size'])")
"$PYTHON" stage0_sft.py --domain "$DOMAIN" --out "$OUT/untrained" --vlm "$VLM" ${SIZE:+--image-size $SIZE} --seed "$SEED" \
  --steps 0 --episodes 0
FOLDERS=()
for TASK in $("$PYTHON" -c "from domains import $DOMAIN as d; print(*d.RL_TASKS)"); do
  for ARM in scratch sft-whole sft-head; do
    WHOLE=--train-vlm PARENT=$START
    [ $ARM = scratch ] && PARENT=$OUT/untrained
    [ $ARM = sft-head ] && WHOLE=--no-train-vlm
    "$PYTHON" stage_rl.py --domain "$DOMAIN" --task "$TASK" --algo ppo $WHOLE --parent "$PARENT" \
      --out "$OUT/$ARM/$TASK" --seed "$SEED" --successes 0 --episodes 0 ${RL:-}
    FOLDERS+=("$OUT/$ARM/$TASK")
  done
done
"$PYTHON" report.py --curves "${FOLDERS[@]}" --out "$OUT"
