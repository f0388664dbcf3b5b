"""Stage 1: the advantages are GAE's, PPO finds a known optimum, the VLM stays as it is, D_rl holds successes only."""

import gc
import json
import re

import numpy as np
import pytest
import torch
from conftest import TOY, files, make_vla
from safetensors.torch import load_file, save_file

import stage_rl
from data import BORROW_SEED, EVAL_SEED, EXPERT_SEED, ONLINE_SEED, RL_SEED, attempts, open_episode
from model import VLA
from run import optimizer_tensors
from stage_rl import gae, ppo_losses, shaken


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
        T, N, p = rng.integers(1, 25), 3, rng.choice([0, 0.1, 0.4])
        term = rng.random((T, N)) < p
        trunc = (rng.random((T, N)) < p) & ~term
        reward, value = rng.normal(size=(T, N)), rng.normal(size=(T + 1, N))
        gamma, lam = rng.choice([0.9, 0.99, 1.0]), rng.choice([0.0, 0.5, 0.95, 1.0])
        tensors = [torch.tensor(np.asarray(x, float)) for x in (reward, value, term, trunc)]
        want = [lambda_return_advantage(*(x[:, n] for x in (reward, value, term, trunc)), gamma, lam) for n in range(N)]
        np.testing.assert_allclose(gae(*tensors, gamma, lam).numpy(), np.stack(want, 1), atol=1e-10, err_msg=str(trial))


def test_success_ends_the_return_and_a_time_out_does_not():
    """After a success the next state's value is nothing; after a time-out it is still worth what the critic says."""
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    value = torch.tensor([[0.5], [10.0]])
    assert gae(one, value, one, zero, 0.9, 0.95).item() == pytest.approx(1 - 0.5)
    assert gae(zero, value, zero, one, 0.9, 0.95).item() == pytest.approx(0.9 * 10 - 0.5)


def test_ppo_does_not_push_beyond_its_clip():
    """The gradient stops where the ratio has moved past the clip in the advantage's direction, and only there."""
    log_ratio = torch.log(torch.tensor([0.5, 0.5, 1.0, 1.0, 1.5, 1.5])).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    policy, value_loss, kl, clipped = ppo_losses(
        log_ratio, torch.zeros(6), advantage, torch.zeros(6), torch.full((6,), 2.0), 0.2
    )
    policy.backward()
    assert log_ratio.grad.sign().tolist() == [-1, 0, -1, 1, 0, 1]
    assert (value_loss.item(), clipped.item()) == (4.0, pytest.approx(4 / 6)) and kl > 0


def test_every_use_has_initial_states_of_its_own():
    """Demonstrations, D_rl, attempts, training and evaluation draw from seeds that are half a million apart or more."""
    seeds = sorted([EXPERT_SEED, ONLINE_SEED, BORROW_SEED, RL_SEED, EVAL_SEED])
    assert min(b - a for a, b in zip(seeds, seeds[1:])) >= 500_000


def success(folder, task):
    row = json.loads((folder / "eval.json").read_text())["tasks"][task]["success"]
    return sum(row) / len(row)


@pytest.fixture(scope="module")
def trained(project, checkpoint):
    """The child of an untrained checkpoint after stage 1 on the toy task `blue`, both evaluated: (parent, child)."""
    before, out = files(checkpoint), project.folder / "runs/rl/1-rl-blue"
    project.must(
        "python", "stage_rl.py", "--domain", "toy", "--task", "blue", "--parent", checkpoint, "--out", out,
        "--env-steps", "30000", "--rollout", "64", "--minibatch", "256", "--lr", "1e-4", "--std", "0.25",
        "--converged", "0.99", "--successes", "20", "--envs", "8", "--threads", "1",
    )  # fmt: skip
    assert files(checkpoint) == before  # the parent is only read
    result = project.folder / "start"
    result.mkdir()
    evaluated = ["--checkpoint", checkpoint, "--tasks", "blue", "--out", result / "eval.json", "--envs", "8"]
    project.must("python", "evaluate.py", *evaluated)
    return checkpoint, out, result


def test_ppo_solves_a_problem_with_known_optimum(trained):
    """Sparse reward, several decisions deep, an untrained head: greedy success goes from poor to near 1."""
    _, child, before = trained
    assert success(before, "blue") < 0.5
    assert success(child, "blue") > 0.9


def test_rl_leaves_the_vlm_bit_identical(trained):
    """Stage 1 changes the head and nothing of the VLM, in memory or on disk."""
    parent, child, _ = trained
    old, new = (load_file(f / "vlm/model.safetensors") for f in (parent, child))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    old, new = (load_file(f / "heads.safetensors") for f in (parent, child))
    assert not torch.equal(old["head.mlp.4.weight"], new["head.mlp.4.weight"])
    assert all(torch.equal(old[k], new[k]) for k in ("action_mean", "action_std"))


def test_rl_leaves_lora_bit_identical(project, backbone, tmp_path):
    """The same for a VLM that LoRA has adapted: its adapter is the parent's, tensor by tensor."""
    vla = make_vla(tmp_path, backbone)
    for p in vla.theta():
        p.data.add_(0.1 * torch.randn_like(p))
    vla.save(tmp_path / "parent")
    project.must(
        "python", "stage_rl.py", "--domain", "toy", "--task", "blue", "--parent", tmp_path / "parent", "--out",
        tmp_path / "1-rl-blue", "--env-steps", "300", "--envs", "2", "--rollout", "32", "--warmup", "0",
        "--successes", "1", "--episodes", "0", "--threads", "1",
    )  # fmt: skip
    old, new = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("parent", "1-rl-blue"))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    assert all(torch.equal(a, b) for a, b in zip(vla.theta(), VLA.load(tmp_path / "1-rl-blue").theta(), strict=True))
    old, new = (load_file(tmp_path / f / "heads.safetensors") for f in ("parent", "1-rl-blue"))
    assert not torch.equal(old["head.mlp.4.weight"], new["head.mlp.4.weight"])  # kept, though 100 episodes are not over


def test_without_a_success_the_head_rests(project, tmp_path):
    """A task that gives no reward teaches nothing: the head is the parent's, bit for bit, whatever the critic says."""
    impossible = TOY.replace("success = abs(self.x) < 0.15", "success = False")
    (project.folder / "domains/impossible.py").write_text(impossible)
    make_vla(tmp_path, domain="impossible").save(tmp_path / "parent")
    out = project.must(
        "python", "stage_rl.py", "--task", "blue", "--parent", tmp_path / "parent", "--out", tmp_path / "1-rl-blue",
        "--env-steps", "1000", "--envs", "2", "--rollout", "32", "--warmup", "0", "--successes", "1", "--episodes", "0",
        "--threads", "1",
    )  # fmt: skip
    assert "no success in 100 episodes, nor in" in out  # other sentences were tried
    old, new = (load_file(tmp_path / f / "heads.safetensors") for f in ("parent", "1-rl-blue"))
    assert all(torch.equal(old[k], new[k]) for k in old if k.startswith("head."))


def test_other_sentences_are_a_start_where_the_own_leads_nowhere(project, tmp_path):
    """A policy that pushes the bead to the middle when told to push the red one, and away when told the blue: the
    actor rests (warm-up), so that what blue's sentence then does was learned from red's successes."""
    vla = make_vla(tmp_path)
    x = torch.linspace(-1, 1, 64)
    image = torch.zeros(64, 32, 32, 3, dtype=torch.uint8)
    image[..., 2] = (128 + 100 * x)[:, None, None].round().byte()  # (64, 32, 32, 3)
    middle, away = torch.stack([(-x / 0.3).clamp(-1, 1), 0 * x], 1), torch.stack([x.sign(), 0 * x], 1)  # (64, 2)
    with torch.no_grad():
        h, mask = vla.encode(
            torch.cat([image] * 3).numpy(), [f"push the {c} bead" for c in ("red", "green", "blue") for _ in x]
        )
    optimizer = torch.optim.Adam(vla.phi(), 1e-3)
    for _ in range(300):
        loss = (vla.mean(h, mask) - torch.cat([middle, away, away])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vla.save(tmp_path / "parent")
    out = project.must(
        "python", "stage_rl.py", "--task", "blue", "--parent", tmp_path / "parent", "--out", tmp_path / "1-rl-blue",
        "--env-steps", "2500", "--envs", "4", "--rollout", "32", "--warmup", "1000", "--successes", "10", "--threads",
        "1",
    )  # fmt: skip
    said = re.search(r"no success in 100 episodes, but (\d+) in 24 under other sentences: (.*)", out)
    assert int(said[1]) >= 20 and said[2] == f"'push the red bead' {said[1]}"
    assert success(tmp_path / "1-rl-blue", "blue") > 0.8
    old, new = (load_file(tmp_path / f / "vlm/model.safetensors") for f in ("parent", "1-rl-blue"))
    assert all(torch.equal(old[k], new[k]) for k in old)


def test_rl_goes_on_with_all_that_it_had(checkpoint, toy, tmp_path, monkeypatch):
    """Stopped after a saved state, stage 1 is handed the same weights, critic, moments, counters and recent episodes;
    what it ends with is the best head, not the last."""
    sittings = []

    def train(args, budget, domain, vla, critic, optimizer, stage, counters, recent, keep_best):
        first = not sittings
        if first:
            for success, by in ((1, 0.1), (0, 0.2)):
                for p in vla.phi():
                    p.data.add_(by)
                recent.extend([success] * 100)
                keep_best()
                if success:
                    sittings.append([p.detach().clone() for p in vla.phi()])
            sum(p.square().sum() for p in [*vla.phi(), *critic.parameters()]).backward()
            optimizer.step()
            counters.update(iteration=3, env_steps=77)
        tensors = {**vla.state_dict(), **{f"critic.{k}": v for k, v in critic.state_dict().items()}}
        tensors = {k: v.clone() for k, v in (tensors | optimizer_tensors(optimizer)).items()}
        sittings.append((tensors, {k: counters[k] for k in ("iteration", "env_steps", "best")}, list(recent)))
        yield
        if first:
            raise KeyboardInterrupt

    monkeypatch.setattr(stage_rl, "load_domain", lambda name: toy)
    monkeypatch.setattr(stage_rl, "train", train)
    monkeypatch.setattr("run.STATE_EVERY", -1)
    args = stage_rl.Args("blue", str(checkpoint), str(tmp_path / "1-rl-blue"), successes=0, episodes=0)
    with pytest.raises(KeyboardInterrupt):
        stage_rl.story(args)
    gc.collect()  # with it goes the stage, and the lock on its folder
    stage_rl.story(args)
    best, (tensors, *rest), (again, *rest_again) = sittings
    assert rest == rest_again and tensors.keys() == again.keys() and any(k.startswith("opt.") for k in tensors)
    assert all(torch.equal(tensors[k], again[k]) for k in tensors)
    assert all(torch.equal(a, b) for a, b in zip(best, VLA.load(tmp_path / "1-rl-blue").phi(), strict=True))


def test_ppo_through_the_whole_vla_moves_theta(project, checkpoint, tmp_path):
    """The baseline, `--train-vlm`: the VLM changes."""
    command = (
        "python", "stage_rl.py", "--domain", "toy", "--task", "blue", "--parent", checkpoint, "--envs", "4",
        "--rollout", "16", "--minibatch", "32", "--warmup", "0", "--successes", "1", "--episodes", "0", "--threads",
        "1", "--train-vlm", "--out", tmp_path / "1-rl-blue",
    )  # fmt: skip
    project.must(*command, "--env-steps", "400", STATE_EVERY="0")
    old, new = (load_file(f / "vlm/model.safetensors") for f in (checkpoint, tmp_path / "1-rl-blue"))
    moved = [k for k in old if not torch.equal(old[k], new[k])]
    assert any("vision" in k for k in moved) and any("language_model" in k for k in moved)
    code, _, err = project.run(*command, "--algo", "sacfd", "--out", tmp_path / "other")
    assert code == 1 and "--train-vlm goes with --algo ppo" in err


def test_d_rl_s_labels_are_the_policy_s_own(checkpoint):
    """What is executed is the label and noise, the same for an episode and decision; the gripper is not shaken."""
    vla, ids = VLA.load(checkpoint), [("blue", 5, 0), ("blue", 5, 1), ("blue", 5, 0)]
    with torch.no_grad():
        h, mask = vla.encode(np.full((3, 32, 32, 3), 100, np.uint8), ["push the blue bead"] * 3)
        executed, label = shaken(vla, 0.2)(h, mask, ids)
        assert torch.equal(label, vla.act(h, mask))
    noise = executed - label
    assert torch.equal(noise[0], noise[2]) and noise[0, 0] != noise[1, 0] and 0 < noise[:, 0].abs().max() < 1
    assert not noise[:, -1].any()


def test_d_rl_holds_successes_only(trained, toy):
    """Each recorded episode ends with the success that its header claims, and its labels are possible actions."""
    folder = trained[1].parent / "D_rl/blue"
    assert len(attempts(folder)) >= 20
    for k in attempts(folder):
        handle, header = open_episode(folder / f"{k:06d}.safetensors")
        reward, action = handle.get_tensor("reward"), handle.get_tensor("action")
        assert header["success"] == "1" and header["source"] == "online" and header["seed"] == str(ONLINE_SEED + k)
        assert reward[-1] == 1 and not reward[:-1].any() and len(reward) <= toy.PROTOCOL["horizon"]
        assert np.abs(action).max() <= 1 and action.dtype == np.float32
        first = toy.make("blue", 32).reset(seed=ONLINE_SEED + k)[0]
        assert np.array_equal(handle.get_slice("image")[0], first)  # the state that its seed gives


def test_nan_policy_stops_stage_1(project, checkpoint, tmp_path):
    """A head of NaN ends RL with one sentence before an action reaches the robot, and leaves no finished stage."""
    VLA.load(checkpoint).save(tmp_path / "parent")
    heads = load_file(tmp_path / "parent/heads.safetensors")
    save_file({**heads, "head.mlp.0.bias": heads["head.mlp.0.bias"] * np.nan}, tmp_path / "parent/heads.safetensors")
    code, _, err = project.run(
        "python", "stage_rl.py", "--domain", "toy", "--task", "blue", "--parent", tmp_path / "parent", "--out",
        tmp_path / "1-rl-blue", "--envs", "2",
    )  # fmt: skip
    assert code == 1 and "NaN" in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "1-rl-blue").exists()
