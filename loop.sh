#!/usr/bin/env bash
# Algorithm 1 of the paper: stage 0 once, then for each new task stage 1 (RL of the head) and stage 2 (SFT of everything).
#
#   bash loop.sh toy                   every stage in three to four minutes, on a toy domain
#   bash loop.sh metaworld             one round for each RL task of Meta-World
#   bash loop.sh metaworld 4           four rounds; round i takes the i-th RL task
#   bash loop.sh kitchen               Franka Kitchen
#   bash loop.sh panda                 a simulated Panda behind SERL's robot server, with SACfD
#   SMOKE=1 bash loop.sh metaworld 1   every stage and file in a few minutes, too short to learn anything
#
# Environment variables, all optional:
#   RUN=name       name of the run's folder, runs/<name> (default: domain, method, seed)
#   SEED=0         seed of weights, batches and exploration
#   METHOD=        ire-vla (default), ire-vla-freeze (stage 2 trains the head alone), ppo-replay (stage 1 trains the
#                  whole VLA), rl-lora (stage 1 trains LoRA and head, task after task, without stage 2), or
#                  sft-only (no stage 1)
#   START=         folder of a finished 0-sft, such as another method's, to use instead of training stage 0
#   SFT_LAUNCH=    launcher of stages 0 and 2, on this machine or one that shares the run's folder:
#                  "torchrun --nproc-per-node 4", "srun --gpus 4 torchrun ...", "ssh host cd $PWD && torchrun ..."
#   SFT_ARGS=      more arguments of stages 0 and 2, such as "--cache --accumulate 8 --checkpointing" for a large VLM
#                  (--cache also confines LoRA to the language model)
#   RL=            more arguments of stage 1, such as "--rollout 64"
#   VLM=tiny       or a BLIP-2: a local folder, or a hub name such as Salesforce/blip2-opt-2.7b
#   PYTHON=        interpreter that has requirements.txt (default: .venv, made on first use)
# Rerun the same command to resume.
set -euo pipefail
cd "$(dirname "$0")"
source tools/settings.sh # DOMAIN, ROUNDS, RL_TASKS; OUT and DATA; STAGE0, RL and SFT, the stages' arguments

"$PYTHON" -m tools.plan --run "$OUT" --data "$DATA" --domain "$DOMAIN" --rounds "$ROUNDS" --seed "$SEED" --vlm "$VLM" \
  --method "$METHOD" --stage0="$STAGE0" --rl="$RL" --sft="$SFT"

# Line 1: supervised fine-tuning on D_e (Eq. 2)
[ -n "$START" ] || ${SFT_LAUNCH:-"$PYTHON"} stage0_sft.py --domain "$DOMAIN" --data "$DATA" --out "$OUT/0-sft" \
  --vlm "$VLM" --seed "$SEED" $STAGE0
PARENT=0-sft

for ((i = 1; i <= ROUNDS; i++)); do
  TASK=${RL_TASKS[(i - 1) % ${#RL_TASKS[@]}]}

  # Online RL of the new task, the VLM frozen; its successes go to D_rl (Eq. 3)
  if [ "$METHOD" != sft-only ]; then
    "$PYTHON" stage_rl.py --domain "$DOMAIN" --task "$TASK" --parent "$OUT/$PARENT" --out "$OUT/$i-rl-$TASK" \
      --seed "$SEED" $RL
    PARENT=$i-rl-$TASK
  fi

  # Supervised fine-tuning on D_e and D_rl (Eq. 4)
  if [ "$METHOD" != rl-lora ]; then
    ${SFT_LAUNCH:-"$PYTHON"} stage_sft.py --domain "$DOMAIN" --data "$DATA" --parent "$OUT/$PARENT" \
      --out "$OUT/$i-sft" --seed "$SEED" $SFT
    PARENT=$i-sft
  fi
done

if [[ "$SFT " =~ --episodes[\ =]0\  ]] && [ ! -e "$OUT/$PARENT/eval.json" ]; then
  echo "all stages are in $OUT, none is evaluated (--episodes 0). To evaluate the last one and to report:"
  echo "    python evaluate.py --checkpoint $OUT/$PARENT"
  echo "    python report.py --run $OUT"
else # reached only in simulation: a robot's stages are not evaluated here
  "$PYTHON" report.py --run "$OUT" --domain "$DOMAIN"
  [ -e "$OUT/video.mp4" ] || "$PYTHON" evaluate.py --checkpoint "$OUT/$PARENT" --tasks "${RL_TASKS[@]}" --episodes 1 \
    --video "$OUT/video.mp4"
fi
