# Sourced by loop.sh: turns its arguments and environment variables into the stages' arguments.
if [ $# -lt 1 ] || [ $# -gt 2 ] || ! [[ ${2:-1} =~ ^[0-9]+$ ]]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
  exit 2
fi
VARIABLES="RUN SEED METHOD START SFT_LAUNCH SFT_ARGS RL VLM SMOKE PYTHON" source tools/setup.sh
DOMAIN=$1
SEED=${SEED:-0}
VLM=${VLM:-tiny}
METHOD=${METHOD:-ire-vla}
START=${START:-}
RL=${RL:-}
STAGE0=
SFT=
DATA=runs/D_e
case $(tr -d '[:space:]' <<<"${SMOKE:-}" | tr '[:upper:]' '[:lower:]') in
  "" | 0 | n | no | f | false | off) SMOKE= ;;
  *) SMOKE=1 ;;
esac
NAME=$DOMAIN-$METHOD-seed$SEED${SMOKE:+-smoke}
OUT=runs/${RUN:-${NAME/-ire-vla-seed/-seed}}

NAMES=$("$PYTHON" -m tools.lookup rl-tasks "$DOMAIN")
RL_TASKS=($NAMES)
ROUNDS=${2:-${#RL_TASKS[@]}}

# A smoke run is the same commands with small numbers. It has a D_e of its own, so that no real run trains on it.
if [ -n "$SMOKE" ]; then
  DATA=runs/D_e-smoke
  STAGE0="--demos 2 --steps 60 --batch 32 --episodes 1"
  RL="--env-steps 1500 --envs 8 --rollout 32 --warmup 1 --successes 2 --episodes 1 --sacfd.num-demos 2 --sacfd.warmup 200 --sacfd.utd 1 $RL"
  SFT="--demos 2 --steps 30 --batch 32 --episodes 1"
fi
if [[ ${SFT_ARGS:-} == *--cache* ]]; then
  STAGE0+=" --lora-targets language"
fi
STAGE0+=" ${SFT_ARGS:-}"
SFT+=" ${SFT_ARGS:-}"
case $METHOD in
  ire-vla | sft-only) ;;
  ire-vla-freeze) SFT+=" --freeze-vlm" ;;
  ppo-replay) RL+=" --algo ppo --train-vlm" ;;
  rl-lora) RL+=" --algo ppo --train-vlm --theta lora --all-tasks --successes 0" ;;
  *)
    echo "error: METHOD must be ire-vla, ire-vla-freeze, ppo-replay, rl-lora or sft-only (got $METHOD)" >&2
    exit 2
    ;;
esac

if [ -n "$START" ]; then
  if [ ! -f "$START/config.json" ] && [ ! -d "$OUT/0-sft" ]; then
    echo "error: START=$START is not a checkpoint: use a finished 0-sft" >&2
    exit 2
  fi
  if [ ! -d "$OUT/0-sft" ]; then
    OF=$(sed -n '/"domain"/{s/.*"domain": *"\([^"]*\)".*/\1/p;q;}' "$START/config.json")
    if [ -n "$OF" ] && [ "$OF" != "$DOMAIN" ]; then
      echo "error: START=$START is a checkpoint of $OF, not of $DOMAIN: use one of $DOMAIN, or loop.sh $OF" >&2
      exit 2
    fi
    mkdir -p "$OUT"
    ln -sfn "$(cd "$START" && pwd)" "$OUT/0-sft"
  elif [ -d "$START" ] && ! cmp -s "$START/heads.safetensors" "$OUT/0-sft/heads.safetensors"; then
    echo "error: $OUT started from a different stage 0 than START=$START: use that one, or another RUN" >&2
    exit 2
  fi
fi
