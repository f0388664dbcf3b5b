"""The paper's real-world experiment (Sec. V-D) on a Franka Panda behind SERL's robot server.

NOTHING HERE HAS BEEN TRIED ON HARDWARE. The same code drives the simulated robot of robot/sim, on
which it was tried.

    python real_robot.py check                       moves nothing: is everything there, and are its values sane?
    python real_robot.py collect --checkpoint C --task pick-eggplant --out runs/panda/D_rl/pick-eggplant
    python real_robot.py train --checkpoint C --task pick-eggplant --out runs/panda/1-rl-pick-eggplant
    python real_robot.py evaluate --checkpoint C --task pick-eggplant
    python real_robot.py classifier --frames frames/ --out reward.safetensors

Environment variables name the robot (RobotConfig in robot/server.py), so that every stage finds the
same one. To try it on a simulated robot: `python -m robot.sim serve &` and
ROBOT_URL=http://127.0.0.1:5000/. The safety limits are in robot/limits.py. Read docs/real_robot.md
before the first start.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from common.cli import check_numbers, parse_command
from common.episode_file import (
    EVAL_SEED,
    ONLINE_SEED,
    EpisodeInfo,
    episode_ids,
    executed_episodes,
    write_episode,
)
from common.errors import UserError, run_cli
from common.files import (
    atomic_write,
    check_output,
    check_writable,
    make_folder,
    read_entries,
    write_json,
)
from common.rates import check_task, wilson
from domains import load_domain
from robot.limits import Fault
from robot.server import RobotConfig, possible_grippers
from robot.signals import SignalExit, stop_on_signals

# torch and the modules that import it are imported where they are used, so that --help and errors
# come at once.

# ----------------------------------------------------------------------------------------------------------------------
# check


def check() -> None:
    """Check the robot server, the state, the gripper and the cameras. This moves nothing."""
    domain = load_domain("panda")
    config = RobotConfig.from_environment()
    print(config)
    env = domain.make(domain.EXPERT_TASKS[0])
    try:
        check_robot(env)
        check_cameras(env)
    except Fault as fault:
        raise UserError(f"{fault.with_advice()}: correct it, then check again") from fault
    finally:
        env.close()
    print("ready. Nothing was moved.")


def check_robot(env) -> None:
    """Check the state and the gripper's number. Raises UserError or Fault."""
    print(f"robot server   {env.config.url} answers")
    first = env.server.get_state(env.limits.read_timeout)
    time.sleep(0.3)
    second = env.server.get_state(env.limits.read_timeout)
    check_alive(first, second)
    others = check_gripper_number(second.gripper_pos, env.config.gripper)
    state = env.read_state()
    print(
        f"state          finite, changing and inside every limit; end effector at {state.position.round(3)} m"
    )
    force = np.linalg.norm(state.force)
    if force > env.limits.contact_force:
        raise UserError(
            f"the resting end effector reports {force:.1f} N, so that a reflex would not be noticed: free it, or set "
            f"its mass in Desk"
        )
    print(f"force          {force:.1f} N")
    number = (
        f"{state.gripper_pos:g} is {state.opening:.0%} open for ROBOT_GRIPPER={env.config.gripper}"
    )
    print(f"gripper        {number}; compare it with the fingers")
    if others:
        print(
            f"               {' and '.join(others)} could report this number too: open the gripper halfway, by hand or "
            f"with /move_gripper, and check again"
        )


def check_gripper_number(gripper_pos: float, gripper: str) -> list[str]:
    """Return the other grippers that could report this number. Raises UserError if this one cannot."""
    possible = possible_grippers(gripper_pos)
    if gripper in possible:
        return [name for name in possible if name != gripper]
    advice = (
        f"set ROBOT_GRIPPER to {' or '.join(possible)}" if possible else "it fits no known gripper"
    )
    raise UserError(
        f"gripper_pos is {gripper_pos:g}, which ROBOT_GRIPPER={gripper} cannot report: {advice}"
    )


def check_alive(first, second) -> None:
    """Compare two states. Raises UserError if the state does not change, or if somebody else moves the arm."""
    if np.array_equal(first.q, second.q):
        raise UserError(
            "the robot's state does not change, although sensors are never so still: the state topic is dead, or the "
            "controller is stopped; restart the robot server"
        )
    moved = np.abs(first.q - second.q).max()
    if moved > 0.01:
        raise UserError(
            f"a joint moves by {moved:.2f} rad in 0.3 s although nothing is commanded: stop the program or the joint "
            f"controller that moves it"
        )


def check_cameras(env) -> None:
    """Check that both cameras send new, different and not uniform frames. Raises UserError or Fault."""
    seen = {}
    for name, camera in zip(("front", "wrist"), env.cameras):
        _, first, _ = camera.read(64, 32)
        time.sleep(0.3)
        image, number, age = camera.read(64, 32)
        if not age <= env.limits.frame_age or number == first:
            raise UserError(
                f"the {name} camera is frozen: its newest frame is {age:.1f} s old; plug it in again"
            )
        if image.std() < 5:
            raise UserError(
                f"the {name} camera's image has one colour only: uncover it, or correct its exposure"
            )
        seen[name] = image
        print(f"{name} camera   {age * 1000:.0f} ms old, mean brightness {image.mean():.0f}")
    if np.array_equal(seen["front"], seen["wrist"]):
        raise UserError(
            "both cameras show the same image: set ROBOT_FRONT and ROBOT_WRIST to different cameras"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Episodes of the policy


def run_episode(env, vla, instruction: str, seed: int, std: float) -> tuple[dict, bool, str]:
    """Run one episode. An operator may take over, and the executed actions are recorded.

    std: of SACfD's exploration; 0 is greedy. Returns (images, actions and rewards, success, fault
    or "").
    """
    import torch

    from common.vector_env import NAN_ACTION
    from sacfd import tanh_gaussian

    obs, _ = env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    episode = {"image": [], "action": [], "reward": []}
    done = False
    while not done:
        with torch.no_grad():
            h, mask = vla.encode(obs[None], [instruction])
            action = vla.act(h.float(), mask).cpu()  # (1, A)
            if not torch.isfinite(action).all():
                raise UserError(NAN_ACTION)
            if std:
                noise = torch.from_numpy(rng.normal(size=action.shape)).float()
                action = tanh_gaussian(action, torch.tensor(std).log(), noise)[0]
        episode["image"].append(obs)
        obs, reward, success, truncated, info = env.step(action[0].clamp(-1, 1).numpy())
        episode["action"].append(info["executed"])
        episode["reward"].append(reward)
        done = success or truncated
    return episode, success, info.get("fault", "")


def rollouts(
    checkpoint: str, task: str, seeds: range, frames: str = "", std: float = 0.0
) -> Iterator[tuple[int, dict | None, bool]]:
    """Run one episode for each seed. Yield (seed, episode, success), or (seed, None, False) after a Fault.

    frames: a folder for the episodes' last images, sorted into success/ and failure/ to train a
    classifier.
    """
    import torch

    from common.devices import pick_device
    from model import VLA

    domain = load_domain("panda")
    vla = VLA.load(checkpoint, "panda", pick_device())
    torch.set_num_threads(1)
    print(RobotConfig.from_environment())
    env = domain.make(task, vla.config["image_size"])
    try:
        for seed in seeds:
            episode, success, fault = run_episode(env, vla, domain.INSTRUCTIONS[task], seed, std)
            if fault:
                print(f"  {seed}: discarded: {fault}", flush=True)
                yield seed, None, False
                continue
            outcome = "success" if success else "no success"
            print(f"  {seed}: {outcome} after {len(episode['reward'])} steps", flush=True)
            # Another robot's cameras are its owner's, so its protocol is not known.
            episode["protocol"] = domain.PROTOCOL if env.simulated else None
            if frames:
                with atomic_write(frame_path(frames, success, task, seed)) as tmp:
                    Image.fromarray(env.image).save(tmp, "png")
            yield seed, episode, success
    finally:
        env.close()


def frame_path(frames: str, success: bool, task: str, seed: int) -> Path:
    """Return the file of an episode's last image."""
    return Path(frames, "success" if success else "failure", f"{task}-{seed}.png")


@contextlib.contextmanager
def stop_message(kept: Callable[[], str]) -> Iterator[None]:
    """End on Ctrl-C or another signal with one sentence about the kept data, and with 128 + the signal."""
    try:
        with stop_on_signals():
            yield
    except KeyboardInterrupt:
        stop = SignalExit(signal.SIGINT)
        report_stop(stop, kept())
        raise stop from None
    except SignalExit as stop:
        report_stop(stop, kept())
        raise


def report_stop(stop: SignalExit, kept: str) -> None:
    """Print why the program ends, on a terminal that may be gone."""
    with contextlib.suppress(OSError):
        print(f"\nstopped by {stop.signal.name}: {kept}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The experiment's steps


def collect(
    checkpoint: str, task: str, out: str, successes: int = 20, frames: str = "", std: float = 0.0
) -> None:
    """Run the zero-shot policy until it has succeeded 20 times, and keep those episodes.

    Args:
        checkpoint: folder of the policy.
        task: a task of domains/panda.py.
        out: folder for the episodes, such as runs/panda/D_rl/pick-eggplant; episodes that it holds
            count.
        successes: number of successful episodes.
        frames: folder for each episode's last image, for the classifier; empty: none.
        std: std of the exploration, in units of the action range; 0: greedy. A policy that hesitates
            stands still forever unless it explores; in simulation SACfD's attempts use 0.25.
    """
    check_numbers({"successes": successes, "std": std}, ("successes",))
    domain = load_domain("panda")
    out = Path(out)
    for folder in filter(None, (out, frames)):  # before somebody's work
        check_writable(make_folder(folder), "use another folder")
    have = len(episode_ids(out))
    if have >= successes:
        print(f"{out} already holds {have} successes")
        return
    first = next_attempt(out, task, frames)
    seeds = range(ONLINE_SEED + first, ONLINE_SEED + first + 20 * successes)
    with (
        stop_message(
            lambda: f"{out} holds {have} of {successes} successes; rerun the same command to resume"
        ),
        contextlib.closing(rollouts(checkpoint, task, seeds, frames, std)) as episodes,
    ):
        for seed, episode, success in episodes:
            if success:
                info = EpisodeInfo(
                    domain="panda",
                    task=task,
                    instruction=domain.INSTRUCTIONS[task],
                    source="online",
                    seed=seed,
                    protocol=episode["protocol"],
                    executed=True,
                )
                path = out / f"{seed - ONLINE_SEED:06d}.safetensors"
                write_episode(path, episode["image"], episode["action"], episode["reward"], info)
                have += 1
                print(f"{have} of {successes} successes in {out}", flush=True)
            if have >= successes:
                return
    raise UserError(
        f"{have} successes in {len(seeds)} attempts: RL needs some to start from, so train the policy longer"
    )


def next_attempt(out: Path, task: str, frames: str) -> int:
    """Return the first attempt number that neither an episode in `out` nor an image in `frames` has used."""
    used = episode_ids(out)
    if frames:
        for path in Path(frames).glob(f"*/{task}-*.png"):
            seed = path.stem.removeprefix(f"{task}-")
            if seed.isdecimal():
                used.append(int(seed) - ONLINE_SEED)
    return max(used, default=-1) + 1


def train(checkpoint: str, task: str, out: str, env_steps: int | None = None) -> None:
    """Train with SACfD: stage 1 of stage_rl.py, in one environment, without its recording and evaluation.

    It starts from the successes that `collect` has written to D_rl/<task>, in the folder of `out`.

    Args:
        checkpoint: folder of the policy to start from.
        task: a task of domains/panda.py.
        out: folder of the new checkpoint.
        env_steps: budget in environment steps of 0.1 s; None: stage_rl.py's. When it is spent, the
            best policy is saved.
    """
    check_task(task, load_domain("panda"))
    print(RobotConfig.from_environment())
    folder = Path(out).parent / "D_rl" / task
    have = len(executed_episodes(folder))

    import stage_rl

    needed = stage_rl.SACfDArgs.num_demos
    if have < needed:
        raise UserError(
            f"{folder} holds {have} of the {needed} successes that RL starts from: collect them first"
        )
    args = stage_rl.Args(
        task=task,
        parent=checkpoint,
        out=out,
        domain="panda",
        algo="sacfd",
        envs=1,
        successes=0,
        episodes=0,
    )
    if env_steps is not None:
        args.env_steps = env_steps
    with stop_message(lambda: "rerun the same command to resume from the last saved state"):
        stage_rl.main(args)


def evaluate(checkpoint: str, task: str, episodes: int = 25, out: str = "") -> None:
    """Measure the success rate of the greedy policy. Episodes that a Fault ended are repeated, and do not count.

    Args:
        checkpoint: folder of the policy.
        task: a task of domains/panda.py.
        episodes: number of episodes that count.
        out: JSON file for the outcomes; empty: none. With a file, the same command resumes.
    """
    check_numbers({"episodes": episodes}, ("episodes",))
    if out:  # before somebody's work
        check_output(out)
    about = {"checkpoint": checkpoint, "task": task}
    outcomes = load_outcomes(out, about)
    first = max((row["seed"] + 1 for row in outcomes), default=EVAL_SEED)
    seeds = range(first, first + 3 * (episodes - len(outcomes)))
    if seeds:
        resume = (
            f"rerun the same command to resume from {out}"
            if out
            else "nothing is kept without --out"
        )
        with (
            stop_message(lambda: f"{rate(task, outcomes)}; {resume}"),
            contextlib.closing(rollouts(checkpoint, task, seeds)) as played,
        ):
            for seed, episode, success in played:
                if episode is None:
                    continue
                outcomes.append(
                    {"seed": seed, "success": int(success), "env_steps": len(episode["reward"])}
                )
                if out:
                    write_json(out, about | {"outcomes": outcomes})
                if len(outcomes) >= episodes:
                    break
    print(rate(task, outcomes))
    if len(outcomes) < episodes:
        raise UserError(
            f"faults ended all other attempts: {len(outcomes)} of {episodes} episodes were played"
        )


def load_outcomes(out: str, about: dict) -> list[dict]:
    """Return the outcomes in `out`, if it exists. Raises UserError if they belong to another evaluation."""
    if not out or not Path(out).exists():
        return []
    old = read_entries(out, {}, "choose another file, or delete it")
    outcomes = old.pop("outcomes", [])
    if old != about:
        raise UserError(
            f"{out} belongs to another evaluation ({old}): choose another file, or delete it"
        )
    return outcomes


def rate(task: str, outcomes: list[dict]) -> str:
    """Return the success rate with its 95 % interval."""
    k = sum(row["success"] for row in outcomes)
    n = len(outcomes)
    low, high = wilson(k, n)
    return f"{task}: {k / max(n, 1):.2f} [{low:.2f}, {high:.2f}] ({k}/{n})"


def classifier(frames: str, out: str, steps: int = 500) -> None:
    """Train the image classifier that can replace the operator's y key.

    Args:
        frames: folder with success/*.png and failure/*.png: a few hundred images, two thirds of them
            failures. Look through them first.
        out: file of the classifier, for ROBOT_REWARD.
        steps: optimizer steps, each on 64 images.
    """
    check_numbers({"steps": steps}, ("steps",))
    check_output(out)
    from robot.classifier import train_classifier

    n, false, missed = train_classifier(frames, out, steps)
    print(
        f"{out}: of {n} held-out images {false} are false successes, and {missed} successes are missed"
    )


if __name__ == "__main__":
    COMMAND = parse_command([check, collect, train, evaluate, classifier], __doc__)
    try:
        run_cli(lambda command: command(), COMMAND)
    finally:  # all is closed, so a second Ctrl-C has nothing to stop
        signal.signal(signal.SIGINT, signal.SIG_IGN)
