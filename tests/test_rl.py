"""Stage 1: the advantages are GAE's, PPO finds a known optimum, the VLM does not change, D_rl holds successes only."""

import gc
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import BEAD, command, files, make_vla, nan_checkpoint, one_sentence, randomise
from safetensors.torch import load_file

import stage_rl
from common.episode_file import (
    EVAL_SEED,
    EXPERT_SEED,
    FALLBACK_SEED,
    ONLINE_SEED,
    RL_SEED,
    episode_ids,
    open_episode,
)
from common.recording import noisy_policy
from common.rl_learner import Learner
from common.runs import optimizer_tensors
from model import VLA
from stage_rl import gae, ppo_loss


def same_tensors(one, other, names=None):
    """Whether two dicts of tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in names or one)


def lambda_return_advantage(r, v, term, trunc, gamma, lam):
    """GAE from its definition, in O(T^3): the lambda-weighted mean of an episode's n-step returns, less the value."""
    T = len(r)
    out = np.zeros(T)
    for t in range(T):
        end = next((k for k in range(t, T) if term[k] or trunc[k]), T - 1)
        steps = end - t + 1
        returns = []
        for n in range(1, steps + 1):
            future = 0 if term[t + n - 1] else v[t + n]
            returns.append(sum(gamma**i * r[t + i] for i in range(n)) + gamma**n * future)
        weights = [(1 - lam) * lam ** (n - 1) for n in range(1, steps)] + [lam ** (steps - 1)]
        out[t] = np.dot(weights, returns) - v[t]
    return out


def test_gae_equals_its_definition():
    """Many random rollouts, with successes and time-outs anywhere, also both in one column and at the edges."""
    rng = np.random.default_rng(0)
    for trial in range(30):
        T = rng.integers(1, 25)
        N = 3
        p = rng.choice([0, 0.1, 0.4])
        term = rng.random((T, N)) < p
        trunc = (rng.random((T, N)) < p) & ~term
        reward = rng.normal(size=(T, N))
        value = rng.normal(size=(T + 1, N))
        gamma = rng.choice([0.9, 0.99, 1.0])
        lam = rng.choice([0.0, 0.5, 0.95, 1.0])
        tensors = [torch.tensor(np.asarray(x, float)) for x in (reward, value, term, trunc)]
        want = [
            lambda_return_advantage(*(x[:, n] for x in (reward, value, term, trunc)), gamma, lam)
            for n in range(N)
        ]
        np.testing.assert_allclose(
            gae(*tensors, gamma, lam).numpy(), np.stack(want, 1), atol=1e-10, err_msg=str(trial)
        )


def test_success_ends_the_return_and_a_time_out_does_not():
    """After a success the next state has no value. After a time-out it has the critic's."""
    one = torch.ones(1, 1)
    zero = torch.zeros(1, 1)
    value = torch.tensor([[0.5], [10.0]])
    assert gae(one, value, one, zero, 0.9, 0.95).item() == pytest.approx(1 - 0.5)
    assert gae(zero, value, zero, one, 0.9, 0.95).item() == pytest.approx(0.9 * 10 - 0.5)


def test_ppo_does_not_push_beyond_its_clip():
    """The gradient stops once the ratio has moved past the clip in the advantage's direction, and only there."""
    log_ratio = torch.log(torch.tensor([0.5, 0.5, 1.0, 1.0, 1.5, 1.5])).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    loss, kl, clipped = ppo_loss(log_ratio, torch.zeros(6), advantage, 0.2)
    loss.backward()
    assert log_ratio.grad.sign().tolist() == [-1, 0, -1, 1, 0, 1]
    assert clipped.item() == pytest.approx(4 / 6) and kl > 0


def test_every_use_has_initial_states_of_its_own():
    """Demonstrations, D_rl, attempts, training and evaluation draw from seeds that are half a million apart or more."""
    seeds = sorted([EXPERT_SEED, ONLINE_SEED, FALLBACK_SEED, RL_SEED, EVAL_SEED])
    assert min(b - a for a, b in zip(seeds, seeds[1:])) >= 500_000


def success(folder, task):
    row = json.loads((folder / "eval.json").read_text())["tasks"][task]["success"]
    return sum(row) / len(row)


@pytest.fixture(scope="module")
def trained(project, checkpoint):
    """An untrained checkpoint and its child after stage 1 on the bead's task `blue`, both evaluated.

    (parent, child, folder of the parent's eval.json)
    """
    before = files(checkpoint)
    out = project.folder / "runs/rl/1-rl-blue"
    stage = command(
        "stage_rl.py",
        domain="bead",
        task="blue",
        parent=checkpoint,
        out=out,
        env_steps=30000,
        rollout=64,
        minibatch=256,
        lr=1e-4,
        std=0.25,
        converged=0.99,
        successes=20,
        envs=8,
        threads=1,
    )
    project.must(*stage)
    assert files(checkpoint) == before  # the parent is only read
    result = project.folder / "start"
    result.mkdir()
    evaluated = {"checkpoint": checkpoint, "tasks": "blue", "out": result / "eval.json", "envs": 8}
    project.must(*command("evaluate.py", **evaluated))
    return checkpoint, out, result


def test_ppo_solves_a_problem_with_known_optimum(trained):
    """Sparse reward, several environment steps deep, an untrained head: greedy success goes from poor to near 1."""
    _, child, before = trained
    assert success(before, "blue") < 0.5
    assert success(child, "blue") > 0.9


def test_rl_leaves_the_vlm_bit_identical(trained):
    """Stage 1 changes the head and nothing of the VLM, in memory or on disk."""
    parent, child, _ = trained
    old, new = (load_file(f / "vlm/model.safetensors") for f in (parent, child))
    assert same_tensors(old, new)
    old, new = (load_file(f / "heads.safetensors") for f in (parent, child))
    assert not torch.equal(old["head.mlp.4.weight"], new["head.mlp.4.weight"])
    assert same_tensors(old, new, ("action_mean", "action_std"))


def short_stage(parent, out, **changes):
    """Return the command of a short stage 1 of the bead."""
    flags = {
        "task": "blue",
        "parent": parent,
        "out": out,
        "envs": 2,
        "rollout": 32,
        "warmup": 0,
        "successes": 1,
    }
    return command("stage_rl.py", **{**flags, "episodes": 0, "threads": 1, **changes})


def test_rl_leaves_lora_bit_identical(project, backbone, tmp_path):
    """The same for a VLM that LoRA has adapted: its adapter is the parent's, tensor by tensor."""
    vla = make_vla(tmp_path, backbone)
    randomise(vla.theta())
    vla.save(tmp_path / "parent")
    project.must(*short_stage(tmp_path / "parent", tmp_path / "1-rl-blue", env_steps=300))
    old, new = (
        load_file(tmp_path / f / "adapter_model.safetensors") for f in ("parent", "1-rl-blue")
    )
    assert same_tensors(old, new)
    assert all(
        torch.equal(a, b)
        for a, b in zip(vla.theta(), VLA.load(tmp_path / "1-rl-blue").theta(), strict=True)
    )
    old, new = (load_file(tmp_path / f / "heads.safetensors") for f in ("parent", "1-rl-blue"))
    assert not torch.equal(
        old["head.mlp.4.weight"], new["head.mlp.4.weight"]
    )  # kept before 100 episodes have ended


def test_without_a_success_the_head_rests(project, tmp_path):
    """A task without reward teaches nothing: the head is the parent's, bit for bit, despite the critic."""
    impossible = BEAD.replace("success = abs(self.x) < 0.15", "success = False")
    impossible = impossible.replace('NAME = "bead"', 'NAME = "impossible"')
    (project.folder / "domains/impossible.py").write_text(impossible)
    make_vla(tmp_path, domain="impossible").save(tmp_path / "parent")
    out = project.must(*short_stage(tmp_path / "parent", tmp_path / "1-rl-blue", env_steps=1000))
    assert "no success in 100 episodes, nor in" in out  # other instructions were tried
    old, new = (load_file(tmp_path / f / "heads.safetensors") for f in ("parent", "1-rl-blue"))
    assert same_tensors(old, new, [k for k in old if k.startswith("head.")])


def test_the_head_rests_while_the_critic_warms_up(project, checkpoint, tmp_path):
    """Episodes succeed, but until the warm-up ends the critic alone learns: the head is the parent's, bit for bit."""
    changes = {"env_steps": 800, "envs": 4, "warmup": 1000, "std": 0.25}
    project.must(*short_stage(checkpoint, tmp_path / "1-rl-blue", **changes))
    log = [json.loads(line) for line in (tmp_path / "1-rl-blue/log.jsonl").read_text().splitlines()]
    assert log[-1]["success"] > 0
    old, new = (load_file(f / "heads.safetensors") for f in (checkpoint, tmp_path / "1-rl-blue"))
    assert same_tensors(old, new, [k for k in old if k.startswith("head.")])


def test_other_instructions_are_a_start_if_its_own_leads_nowhere(project, tmp_path):
    """A policy that solves the task by the red bead's instruction, and never by the blue one's, learns the blue one's.

    The actor rests (warm-up), so all that the blue bead's instruction does was learned from the red one's successes.
    The budget ends before 100 more episodes have, and the head that has learned is kept all the same.
    """
    vla = make_vla(tmp_path)
    x = torch.linspace(-1, 1, 64)
    image = torch.zeros(64, 32, 32, 3, dtype=torch.uint8)
    image[..., 2] = (128 + 100 * x)[:, None, None].round().byte()  # (64, 32, 32, 3)
    middle = torch.stack([(-x / 0.3).clamp(-1, 1), 0 * x], 1)  # (64, 2)
    away = torch.stack([x.sign(), 0 * x], 1)
    instructions = [f"push the {colour} bead" for colour in ("red", "green", "blue") for _ in x]
    with torch.no_grad():
        h, mask = vla.encode(torch.cat([image] * 3).numpy(), instructions)
    optimizer = torch.optim.Adam(vla.phi(), 1e-3)
    for _ in range(300):
        loss = (vla.mean(h, mask) - torch.cat([middle, away, away])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vla.save(tmp_path / "parent")
    changes = {"env_steps": 900, "envs": 4, "warmup": 1000, "successes": 10, "episodes": 25}
    out = project.must(*short_stage(tmp_path / "parent", tmp_path / "1-rl-blue", **changes))
    found = re.search(
        r"no success in 100 episodes, but (\d+) in 24 with other instructions: (.*)", out
    )
    assert int(found[1]) >= 20 and found[2] == f"'push the red bead' {found[1]}"
    assert success(tmp_path / "1-rl-blue", "blue") > 0.8
    old, new = (load_file(tmp_path / f / "vlm/model.safetensors") for f in ("parent", "1-rl-blue"))
    assert same_tensors(old, new)


def test_rl_resumes_with_all_that_it_had(checkpoint, bead, tmp_path, monkeypatch):
    """Stopped after a saved state, stage 1 gets the same weights, critic, moments, counters and recent episodes back.

    Its checkpoint holds the best head, not the last, even if it is stopped again when training has ended.
    """
    starts = []  # (tensors, counters, recent) when training begins
    best = []
    learners = []

    class KeptLearner(Learner):
        def __init__(self, *args):
            super().__init__(*args)
            learners.append(self)

        def finish_training(self):
            super().finish_training()
            raise KeyboardInterrupt

    class ByHand:
        """Stands in for Rollout: the first `collect` trains by hand and saves, and then the stage is stopped."""

        threads = 1
        valid = torch.zeros(1)

        def __init__(self, args, vla, domain, iteration):
            self.budget = args.env_steps

        def close(self):
            pass

        def collect(self, generator):
            (learner,) = learners
            stopped = not starts
            if stopped:
                for outcomes, change in (([1] * 100, 0.1), ([0] * 99 + [1], 0.2)):
                    for p in learner.actor_params:
                        p.data.add_(change)
                    learner.recent.extend(outcomes)
                    learner.track_best()
                    best.append([p.detach().clone() for p in learner.vla.phi()])
                sum(
                    p.square().sum() for p in [*learner.actor_params, *learner.critic_params]
                ).backward()
                learner.optimizer.step()
                learner.counters.update(iteration=3, env_steps=77)
                learner.save()
            tensors = {
                **learner.vla.state_dict(),
                **{f"critic.{k}": v for k, v in learner.critic.state_dict().items()},
            }
            tensors = {
                k: v.clone() for k, v in (tensors | optimizer_tensors(learner.optimizer)).items()
            }
            counters = {k: learner.counters[k] for k in ("iteration", "env_steps", "best")}
            starts.append((tensors, counters, list(learner.recent)))
            if stopped:
                raise KeyboardInterrupt
            learner.counters["env_steps"] = self.budget  # it ends
            return []

    monkeypatch.setattr(stage_rl, "load_domain", lambda name: bead)
    monkeypatch.setattr(stage_rl, "Rollout", ByHand)
    monkeypatch.setattr(stage_rl, "Learner", KeptLearner)
    monkeypatch.setattr(stage_rl, "update", lambda *args: {"kl": 0.0})
    more = {"env_steps": 1000, "converged": 2.0, "successes": 0, "episodes": 0}
    args = stage_rl.Args("blue", str(checkpoint), str(tmp_path / "1-rl-blue"), **more)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stage_rl.main(args)
        learners.clear()
        gc.collect()  # this frees the stage, and with it the lock on its folder
    stage_rl.main(args)
    (tensors, *rest), (again, *rest_again) = starts
    assert (
        rest == rest_again
        and same_tensors(tensors, again)
        and any(k.startswith("opt.") for k in tensors)
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(best[0], VLA.load(tmp_path / "1-rl-blue").phi(), strict=True)
    )


def test_ppo_through_the_whole_vla_moves_theta(project, checkpoint, tmp_path):
    """The baseline, `--train-vlm`: the VLM changes."""
    more = {"env_steps": 400, "envs": 4, "rollout": 16, "minibatch": 32, "train_vlm": True}
    project.must(*short_stage(checkpoint, tmp_path / "1-rl-blue", **more), SAVE_INTERVAL="0")
    old, new = (
        load_file(f / "vlm/model.safetensors") for f in (checkpoint, tmp_path / "1-rl-blue")
    )
    moved = [k for k in old if not torch.equal(old[k], new[k])]
    assert any("vision" in k for k in moved) and any("language_model" in k for k in moved)
    sentence = one_sentence(
        project.run(*short_stage(checkpoint, tmp_path / "other", algo="sacfd", **more))
    )
    assert "--train-vlm needs --algo ppo" in sentence
    more |= {"train_vlm": False, "theta": "lora"}
    sentence = one_sentence(project.run(*short_stage(checkpoint, tmp_path / "other", **more)))
    assert "--theta lora needs --train-vlm" in sentence


def test_labels_of_d_rl_are_the_policy_s_own(checkpoint):
    """The executed action is the label plus noise that depends on (seed, step) alone. The gripper gets no noise."""
    vla = VLA.load(checkpoint)
    ids = [("blue", 5, 0), ("blue", 5, 1), ("blue", 5, 0)]
    with torch.no_grad():
        h, mask = vla.encode(np.full((3, 32, 32, 3), 100, np.uint8), ["push the blue bead"] * 3)
        executed, label = noisy_policy(vla, 0.2)(h, mask, ids)
        assert torch.equal(label, vla.act(h, mask))
    noise = executed - label
    assert (
        torch.equal(noise[0], noise[2])
        and noise[0, 0] != noise[1, 0]
        and 0 < noise[:, 0].abs().max() < 1
    )
    assert not noise[:, -1].any()


def test_d_rl_holds_successes_only(trained, bead):
    """Each recorded episode ends with the success that its header claims, and its labels are possible actions."""
    folder = trained[1].parent / "D_rl/blue"
    assert len(episode_ids(folder)) >= 20
    for k in episode_ids(folder):
        handle, header = open_episode(folder / f"{k:06d}.safetensors")
        reward = handle.get_tensor("reward")
        action = handle.get_tensor("action")
        assert (
            header["success"] == "1"
            and header["source"] == "online"
            and header["seed"] == str(ONLINE_SEED + k)
        )
        assert reward[-1] == 1 and not reward[:-1].any() and len(reward) <= bead.PROTOCOL["horizon"]
        assert np.abs(action).max() <= 1 and action.dtype == np.float32
        first = bead.make("blue", 32).reset(seed=ONLINE_SEED + k)[0]
        assert np.array_equal(handle.get_slice("image")[0], first)  # the initial state of its seed


def test_nan_policy_stops_stage_1(project, checkpoint, tmp_path):
    """A head of NaN ends RL with one sentence before an action reaches the robot, and leaves no finished stage."""
    nan_checkpoint(checkpoint, tmp_path / "parent")
    for algo in ("ppo", "sacfd"):
        stage = short_stage(tmp_path / "parent", tmp_path / "1-rl-blue", algo=algo)
        assert "NaN" in one_sentence(project.run(*stage))
        assert not (tmp_path / "1-rl-blue").exists()
        shutil.rmtree(tmp_path / ".1-rl-blue.partial", ignore_errors=True)
