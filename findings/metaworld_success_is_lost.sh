#!/usr/bin/env bash
# Meta-World 3.1.1: a scripted expert that reaches success loses it again before the episode ends.
#
# Versions: metaworld 3.1.1, gymnasium 1.4.0, mujoco 3.3.0, numpy 2.4.6, Python 3.11, CPU, no rendering.
#
# Expected by most: an expert that solves every episode also ends every episode with info["success"] 1. Success at the
# last step and success at any step then yield the same success rate.
#
# Seen: info["success"] holds for the present step only, and by default the episode goes on for 500 steps. In the tasks
# below the expert reaches success in every episode, then goes on and leaves the goal. It ends every episode with
# success 0. The success rate is 100 % by "at any step" and 0 % by "at the last step". reach-v3 shows the usual case.
# Demonstrations of 500 steps of these tasks hold mostly frames after the success is lost.
#
# Remedy: end the episode at the first success (gymnasium.make(..., terminate_on_success=True)), or report which of the
# two rates a number is.
#
# Output seen (3 episodes a task; the steps may differ slightly on other machines):
#   task                  at any step   at last step  first success    steps with success
#   coffee-button-v3      3 of 3        0 of 3        37 34 31         15 14 14
#   door-open-v3          3 of 3        0 of 3        85 88 75         30 31 32
#   handle-press-v3       3 of 3        0 of 3        35 32 26         5 5 7
#   plate-slide-side-v3   3 of 3        0 of 3        46 49 50         31 29 33
#   peg-unplug-side-v3    3 of 3        0 of 3        124 117 85       52 52 50
#   reach-v3              3 of 3        3 of 3        74 47 44         427 454 457
#   As in the header: yes
#
# Run: bash findings/metaworld_success_is_lost.sh
# The list has packaging because gymnasium imports it for MuJoCo, but a plain install of metaworld does not include it.
# Needs a network for pip. Ends with an exit status other than 0 if the behaviour changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install --quiet --disable-pip-version-check \
    metaworld==3.1.1 gymnasium==1.4.0 mujoco==3.3.0 numpy==2.4.6 scipy==1.17.1 imageio==2.38.1 packaging==26.4

cat > "$folder/show.py" <<'PYTHON_END'
import sys
import warnings

import gymnasium
import metaworld  # registers the environments
from metaworld.policies import ENV_POLICY_MAP

warnings.filterwarnings("ignore")
EPISODES = 3
LOST = ["coffee-button-v3", "door-open-v3", "handle-press-v3", "plate-slide-side-v3", "peg-unplug-side-v3"]
KEPT = ["reach-v3"]

row = "{:<22}{:<14}{:<14}{:<17}{}"
print(row.format("task", "at any step", "at last step", "first success", "steps with success"))
same = True
for task in LOST + KEPT:
    env = gymnasium.make("Meta-World/MT1", env_name=task, seed=0)
    policy = ENV_POLICY_MAP[task]()
    episodes = []
    for seed in range(EPISODES):
        observation, _ = env.reset(seed=seed)
        successes = []
        done = False
        while not done:
            # A copy, because the policy of door-open-v3 changes the array.
            action = policy.get_action(observation.copy())
            observation, _, terminated, truncated, info = env.step(action)
            successes.append(bool(info["success"]))
            done = terminated or truncated
        episodes.append(successes)
    env.close()
    solved = sum(any(e) for e in episodes)
    last = sum(e[-1] for e in episodes)
    first = " ".join(str(e.index(True) + 1) if any(e) else "-" for e in episodes)
    held = " ".join(str(sum(e)) for e in episodes)
    print(row.format(task, f"{solved} of {EPISODES}", f"{last} of {EPISODES}", first, held), flush=True)
    same = same and all(len(e) == 500 for e in episodes)
    same = same and solved == EPISODES and last == (0 if task in LOST else EPISODES)
print("As in the header:", "yes" if same else "NO, the behaviour changed")
sys.exit(0 if same else 1)
PYTHON_END
(cd "$folder" && "$python" show.py)
