#!/usr/bin/env bash
# Meta-World 3.1.1: two scripted policies change the observation that they get.
#
# Versions: metaworld 3.1.1, gymnasium 1.4.0, mujoco 3.3.0, numpy 2.4.6, Python 3.11, CPU, no rendering.
#
# Expected by most: policy.get_action(observation) reads the array and leaves it as it is. A recorder may then store
# the observation before the call, and two calls with the same array return the same action.
#
# Seen: the policies of door-open-v3 and door-close-v3 shift the position of the door inside the caller's array. They
# take a slice of the observation, which is a view, and add an offset to it in place. Every stored observation is off
# by 5 to 12 cm, and a second call with the same array returns another action. drawer-open-v3 shows the usual case.
# The environment itself is not affected. A scan of all 50 policies over 30 steps each found these two only.
#
# Remedy: pass a copy, policy.get_action(observation.copy()).
#
# Output seen:
#   task            stored observations changed    shift of entries 4, 5, 6    second call, same action
#   door-open-v3    20 of 20                       -0.05 +0.00 +0.00           False
#   door-close-v3   20 of 20                       +0.05 +0.12 +0.10           False
#   drawer-open-v3  0 of 20                        +0.00 +0.00 +0.00           True
#   As in the header: yes
#
# Run: bash findings/metaworld_policy_writes_observation.sh
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
import numpy as np
from metaworld.policies import ENV_POLICY_MAP

warnings.filterwarnings("ignore")
STEPS = 20
SHIFTS = {
    "door-open-v3": (-0.05, 0.0, 0.0),
    "door-close-v3": (0.05, 0.12, 0.1),
    "drawer-open-v3": (0.0, 0.0, 0.0),
}

row = "{:<16}{:<31}{:<28}{}"
print(row.format("task", "stored observations changed", "shift of entries 4, 5, 6", "second call, same action"))
same = True
for task, expected_shift in SHIFTS.items():
    env = gymnasium.make("Meta-World/MT1", env_name=task, seed=0)
    policy = ENV_POLICY_MAP[task]()
    stored = []
    copies = []
    observation, _ = env.reset(seed=0)
    for _ in range(STEPS):
        stored.append(observation)
        copies.append(observation.copy())
        action = policy.get_action(observation)
        observation = env.step(action)[0]
    env.close()
    shift = np.array(stored) - np.array(copies)
    changed = int(np.any(shift != 0, axis=1).sum())

    observation = copies[0].copy()
    first = policy.get_action(observation)
    second = policy.get_action(observation)
    equal = bool(np.array_equal(first, second))

    print(row.format(task, f"{changed} of {STEPS}", "{:+.2f} {:+.2f} {:+.2f}".format(*shift[0, 4:7]), equal))
    expected = np.zeros_like(shift)
    expected[:, 4:7] = expected_shift
    shifts = any(expected_shift)
    same = same and np.allclose(shift, expected, atol=1e-9)
    same = same and changed == (STEPS if shifts else 0) and equal == (not shifts)
print("As in the header:", "yes" if same else "NO, the behaviour changed")
sys.exit(0 if same else 1)
PYTHON_END
(cd "$folder" && "$python" show.py)
