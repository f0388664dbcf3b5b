#!/usr/bin/env bash
# The paper's Algorithm 1: stage 0 once, then for each new task stage 1 (RL of the head) and stage 2 (SFT of everything).
#
#   bash loop.sh metaworld 4                   four rounds on Meta-World; round i takes the i-th RL task
#   bash loop.sh kitchen 2                     two rounds in Franka Kitchen
#   bash loop.sh panda 2                       on a simulated Panda behind SERL's robot server, with SACfD
#   SMOKE=1 bash loop.sh metaworld 1           every stage and file in a few minutes, too short to learn anything
#
# From the environment, all optional:
#   RUN=name       the run's folder is runs/<name>       (default: domain, method if another, seed)
#   SEED=0         weights, batches, exploration
#   METHOD=ire-vla or ire-vla-freeze (stage 2 trains the head alone), ppo-replay (stage 1 trains the whole VLA),
#                  sft-only (no stage 1)
#   START=         a finished 0-sft to start from, such as another method's, instead of training one
#   SFT_LAUNCH=    what starts stages 0 and 2 instead of PYTHON, on this machine or one that shares the run's folder:
#                  "torchrun --nproc-per-node 4", "srun --gpus 4 torchrun ...", "ssh host cd $PWD && torchrun ..."
#   SFT_ARGS=      further arguments of stages 0 and 2, for a large VLM "--cache --accumulate 8 --checkpointing"
#                  (--cache also puts LoRA on the language model alone)
#   RL=            further arguments of stage 1, such as "--rollout 64"
#   VLM=tiny       or a BLIP-2: a local folder, or a hub name such as Salesforce/blip2-opt-2.7b
#   PYTHON=        an interpreter that has requirements.txt; default: .venv, made here on first use
# Given again, the same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")"

if [ $# -ne 2 ] || ! [[ $2 =~ ^[0-9]+$ ]]; then
  sed -n '2,22s/^# \{0,1\}//p' "$0"
  exit 2
fi
GIVEN="RUN SEED METHOD START SFT_LAUNCH SFT_ARGS RL VLM SMOKE PYTHON" source venv.sh
DOMAIN=$1 ROUNDS=$2 SEED=${SEED:-0} VLM=${VLM:-tiny} SMOKE=${SMOKE:-} METHOD=${METHOD:-ire-vla} START=${START:-}
NAME=$DOMAIN-$METHOD-seed$SEED${SMOKE:+-smoke}
OUT=runs/${RUN:-${NAME/-ire-vla-seed/-seed}}

# A smoke run is the same commands with small numbers. Its D_e is its own, so that a real run never trains on it.
STAGE0="" RL=${RL:-} SFT="" DATA=runs/D_e
if [ -n "$SMOKE" ]; then
  DATA=runs/D_e-smoke
  STAGE0="--demos 2 --steps 60 --batch 32 --episodes 1"
  RL="--env-steps 1500 --envs 8 --rollout 32 --warmup 1 --successes 2 --episodes 1 --sacfd.demos 2 --sacfd.warmup 200 --sacfd.utd 1 $RL"
  SFT="--steps 30 --batch 32 --episodes 1"
fi
[[ ${SFT_ARGS:-} != *--cache* ]] || STAGE0+=" --lora-targets language"
STAGE0+=" ${SFT_ARGS:-}" SFT+=" ${SFT_ARGS:-}"
case $METHOD in
  ire-vla | sft-only) ;;
  ire-vla-freeze) SFT+=" --freeze-vlm" ;;
  ppo-replay) RL+=" --algo ppo --train-vlm" ;;
  *) echo "error: unknown METHOD $METHOD: known are ire-vla, ire-vla-freeze, ppo-replay, sft-only" >&2 && exit 2 ;;
esac
if [ -n "$START" ] && [ -d "$OUT/0-sft" ]; then
  [ ! -d "$START" ] || cmp -s "$START/heads.safetensors" "$OUT/0-sft/heads.safetensors" ||
    { echo "error: $OUT began with another stage 0 than START=$START: give that, or another RUN" >&2 && exit 2; }
elif [ -n "$START" ]; then
  [ -f "$START/config.json" ] || { echo "error: START=$START is no checkpoint: give a finished 0-sft" >&2 && exit 2; }
  mkdir -p "$OUT"
  rm -rf "$OUT/.0-sft.copy" # a copy that was interrupted
  cp -r "$START" "$OUT/.0-sft.copy"
  mv "$OUT/.0-sft.copy" "$OUT/0-sft"
fi

"$PYTHON" plan.py --run "$OUT" --data "$DATA" --domain "$DOMAIN" --rounds "$ROUNDS" --seed "$SEED" --vlm "$VLM" \
  --method "$METHOD" --stage0="$STAGE0" --rl="$RL" --sft="$SFT"

[ -n "$START" ] ||
  ${SFT_LAUNCH:-"$PYTHON"} stage0_sft.py --domain "$DOMAIN" --data "$DATA" --out "$OUT/0-sft" --vlm "$VLM" --seed "$SEED" $STAGE0

PARENT=0-sft
for ((i = 1; i <= ROUNDS; i++)); do
  TASK=$("$PYTHON" -c "from domains import $DOMAIN as d; print(d.RL_TASKS[($i - 1) % len(d.RL_TASKS)])")
  if [ "$METHOD" != sft-only ]; then
    "$PYTHON" stage_rl.py --domain "$DOMAIN" --task "$TASK" --parent "$OUT/$PARENT" --out "$OUT/$i-rl-$TASK" \
      --seed "$SEED" $RL
    PARENT=$i-rl-$TASK
  fi
  ${SFT_LAUNCH:-"$PYTHON"} stage_sft.py --domain "$DOMAIN" --data "$DATA" --parent "$OUT/$PARENT" --out "$OUT/$i-sft" \
    --seed "$SEED" $SFT
  PARENT=$i-sft
done

if [[ "$SFT " =~ --episodes[\ =]0\  ]] && ! compgen -G "$OUT/*/eval.json" >/dev/null; then
  echo "all stages are in $OUT, none evaluated (--episodes 0): python evaluate.py --checkpoint $OUT/$PARENT, then python report.py --run $OUT"
else
  "$PYTHON" report.py --run "$OUT" --domain "$DOMAIN"
fi
