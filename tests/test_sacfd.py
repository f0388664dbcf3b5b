"""SACfD: the actor starts as the SFT policy, returns and sampling are what they are defined to be, and it learns."""

import json
import time
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import files, kill, make_vla, warm_python
from safetensors.torch import load_file

import sacfd
import stage_rl
from data import attempts, open_episode
from model import VLA
from sacfd import RANGE, Critics, Replay, actor_loss, critic_loss, executed, squashed


def test_without_noise_the_actor_is_the_sft_policy(tmp_path):
    """Its greedy action is VLA.act's, also where the head asks for more than the range, and gradients pass there."""
    vla = make_vla(tmp_path)
    h, mask = vla.encode(np.random.default_rng(0).integers(0, 255, (64, 32, 32, 3), np.uint8), ["push"] * 64)
    vla.action_std.mul_(2 / vla.mean(h, mask).abs().median().item())  # many means lie beyond the range
    mean = vla.mean(h, mask)
    action, _ = squashed(mean, vla.log_std, torch.zeros_like(mean))
    assert (mean.abs() > 1).any()
    torch.testing.assert_close(action, vla.act(h, mask), atol=1e-5, rtol=0)
    (grad,) = torch.autograd.grad(action.sum(), mean)
    torch.testing.assert_close(grad, torch.ones_like(grad), atol=1e-3, rtol=0)


def test_the_squashed_density_is_one():
    """exp(log-probability) integrates to 1 over the actions, and it is where the samples are."""
    for mean, log_std in ((0.0, -1.0), (0.7, -1.4), (1.3, -0.5)):
        noise = torch.linspace(-9, 9, 200_001)[:, None]
        action, log_prob = squashed(torch.full_like(noise, mean), torch.tensor([log_std]), noise)
        assert torch.trapezoid(log_prob.exp(), action[:, 0]).item() == pytest.approx(1, abs=1e-3)
        assert action.abs().max() <= RANGE


def filled(rng, T=40, N=3, p=0.15):
    """A Replay of random rows laid out as the simulators' are: the row after an episode's end only resets."""
    replay = Replay(T, N, 2, 4, 2, "cpu")
    replay.h[0] = torch.randn(N, 2, 4)
    over = torch.zeros(N)
    for _ in range(T):
        valid = over == 0
        term = (torch.tensor(rng.random(N) < p) & valid).float()
        trunc = (torch.tensor(rng.random(N) < p) & valid).float() * (1 - term)
        reward = torch.tensor(rng.normal(size=N)).float() * valid
        replay.add(torch.randn(N, 2), reward, term, trunc, valid, torch.randn(N, 2, 4))
        over = torch.maximum(term, trunc)
    return replay


def test_n_step_returns_equal_their_definition():
    """Reward sum, discount and the state that the critic is asked about, for each row drawn, by walking the episode."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    for n_step in (1, 3, 7):
        replay = filled(rng)
        i, (h, action, ret, discount, after, _) = replay.sample(500, n_step, 0.9, 0.6, 0.4, generator)
        for k, index in enumerate(i.tolist()):
            t, n = divmod(index, 3)
            want, g, alive = 0.0, 1.0, True
            for step in range(n_step):
                want, g = want + g * replay.reward[t + step, n].item(), g * 0.9
                if replay.term[t + step, n]:
                    g, alive = 0.0, False
                if not alive or replay.trunc[t + step, n] or t + step + 1 == replay.t:
                    break
            assert ret[k].item() == pytest.approx(want, abs=1e-5) and discount[k].item() == pytest.approx(g, abs=1e-6)
            assert torch.equal(h[k], replay.h[t, n].float()) and torch.equal(action[k], replay.action[t, n])
            if g:
                assert torch.equal(after[k], replay.h[t + step + 1, n].float())


@pytest.mark.parametrize("exponent", [0.6, 0.0])
def test_priorities_decide_what_is_drawn_and_weights_undo_it(exponent):
    """Rows are drawn as often as priority^exponent says, resets never, and weight x frequency is the same for all."""
    replay = filled(np.random.default_rng(1))
    drawable = replay.priority > 0
    assert 0 < (~drawable).sum() < drawable.sum()
    replay.priority[drawable] = torch.rand(int(drawable.sum())) + 0.1
    generator = torch.Generator().manual_seed(0)
    i, rows = replay.sample(400_000, 1, 0.9, exponent, 1.0, generator)
    counts = torch.bincount(i, minlength=drawable.numel()).view_as(replay.priority)
    assert not counts[~drawable].any()
    share = replay.priority**exponent * drawable
    torch.testing.assert_close(counts / counts.sum(), share / share.sum(), atol=5e-4, rtol=0.1)
    unbiased = torch.zeros(drawable.numel()).index_add_(0, i, rows[5]).view_as(share)[drawable]
    assert (unbiased / unbiased.mean() - 1).abs().max() < 0.1


def test_a_replay_read_again_is_the_one_written(tmp_path):
    """Row by row, priorities too; the rows of a state that was not saved are dropped, and what was going on is over."""
    written, again = filled(np.random.default_rng(2)), Replay(40, 3, 2, 4, 2, "cpu")
    rows = Replay(40, 3, 2, 4, 2, "cpu")
    rows.h[0] = written.h[0]
    for t in range(40):
        if t in (15, 30):
            rows.write(tmp_path)
        row = [getattr(written, name)[t] for name in ("action", "reward", "term", "trunc")]
        rows.add(*row, written.priority[t] > 0, written.h[t + 1])
    rows.priority[:] = written.priority * torch.rand(40, 3)
    rows.write(tmp_path)
    again.read(tmp_path, 40)
    assert again.t == again.written == 40
    for name in ("h", "action", "reward", "term", "priority"):
        assert torch.equal(getattr(again, name), getattr(rows, name)), name
    assert torch.equal(again.trunc[:39], rows.trunc[:39]) and torch.equal(again.trunc[39], 1 - rows.term[39])
    again.read(tmp_path, 30)
    assert again.t == 30 and len(list(tmp_path.glob("replay-*"))) == 2


def test_faults_are_not_learned_from_and_a_person_s_action_is_stored(checkpoint, toy, tmp_path, monkeypatch):
    """An episode that a fault ended is never drawn; the action of every row is the one that was executed."""

    class Robot(gym.Wrapper):
        episodes = 0

        def step(self, action):
            obs, _, _, over, _ = self.env.step(action)
            self.episodes += over
            fault = {"fault": "the link is lost"} if over and self.episodes == 1 else {}
            return obs, 0.0, False, over, {"executed": np.full(2, 0.5, np.float32), **fault}

    class Here(gym.vector.SyncVectorEnv):  # in this process
        def step_async(self, actions):
            self.asked = actions

        def step_wait(self):
            return self.step(self.asked)

    made = []
    monkeypatch.setattr(sacfd, "Replay", lambda *args: made.append(Replay(*args)) or made[-1])
    robot = lambda fns, vla, mode: Here([lambda: Robot(toy.make("blue", 32))], autoreset_mode=mode)  # noqa: E731
    monkeypatch.setattr(sacfd, "simulators", robot)
    vla, critics = VLA.load(checkpoint), Critics(128, 2, 0.01)
    args = stage_rl.Args("blue", "", str(tmp_path / "1-rl"), envs=1, sacfd=sacfd.SACfD(utd=0))
    optimizer = torch.optim.Adam(vla.phi())
    stage = SimpleNamespace(folder=tmp_path, log=lambda *_, **__: None, due=bool)
    counters = {"env_steps": 0, "iteration": 0, "best": -1.0}
    next(sacfd.train_sacfd(args, 24, toy, vla, critics, optimizer, stage, counters, [], lambda: 0.0))
    (replay,) = made
    drawable = (replay.priority[: replay.t, 0] > 0).tolist()  # three episodes of 8, a reset after each
    assert drawable == [False] * 9 + [True] * 8 + [False] + [True] * 8
    assert (replay.action[: replay.t, 0][drawable] == 0.5).all()


def test_a_mean_beyond_the_range_is_pulled_back(tmp_path):
    """Where the critics ask for ever more, the head's output must not run away: the clip would hide that."""
    vla, critics, mask = make_vla(tmp_path), Critics(128, 2, 0.01), torch.ones(8, 2, dtype=torch.bool)
    critics.q.forward = lambda h, mask, action: action.sum(-1).expand(2, -1)  # Q grows with the action
    batch = [torch.randn(8, 2, 128), torch.zeros(8, 2)]
    optimizer = torch.optim.Adam(vla.phi(), 3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        actor_loss(vla, critics, mask, batch, torch.zeros(8, 2), 0, 0.0, -1.0)[0].backward()
        optimizer.step()
    mean = vla.mean(batch[0], mask)
    assert (mean > 0.8).all() and (mean < 2).all()


def test_losses_move_what_they_should(tmp_path):
    """The critics' loss leaves the head alone, the actor's leaves the critics alone and clones demonstrations only; the
    slow critics follow, and remember no gradient's way."""
    vla, critics = make_vla(tmp_path), Critics(128, 2, 0.01)
    mask, noise = torch.ones(8, 2, dtype=torch.bool), torch.randn(8, 2)
    h, action, one, h_after = torch.randn(8, 2, 128), torch.rand(8, 2), torch.ones(8), torch.randn(8, 2, 128)
    batch = [h, action, 0.5 * one, 0.9 * one, h_after, one]
    loss, error = critic_loss(vla, critics, mask, batch, noise)
    loss.backward()
    assert all(p.grad is None for p in [*vla.parameters(), *critics.slow.parameters()]) and error.shape == (8,)
    assert all(p.grad is not None for p in critics.q.parameters())
    critics.zero_grad()
    first, _, _ = actor_loss(vla, critics, mask, batch, noise, 4, 1.0, -1.0)
    first.backward()
    assert all(p.grad is None for p in critics.q.parameters()) and all(p.grad is not None for p in vla.phi())
    batch[1] = torch.cat([batch[1][:4], torch.rand(4, 2)])  # other actions, but not in demonstrations
    second, _, _ = actor_loss(vla, critics, mask, batch, noise, 4, 1.0, -1.0)
    assert second.item() == pytest.approx(first.item(), abs=1e-6)
    old, new = (next(c.parameters()).detach().clone() for c in (critics.slow, critics.q))
    critics.q.token_learner.load_state_dict({k: v + 1 for k, v in critics.q.token_learner.state_dict().items()})
    critics.follow(0.25)
    torch.testing.assert_close(next(critics.slow.parameters()), old + 0.25 * (new + 1 - old))
    assert all(p.grad_fn is None for p in critics.slow.parameters())


@pytest.fixture(scope="module")
def weak(project, checkpoint, toy):
    """A checkpoint whose policy pushes the right way, but a quarter as far as it should: it reaches the near beads."""
    vla, env, xs = VLA.load(checkpoint), toy.make("blue", 32), np.linspace(-1.2, 1.2, 64)
    pictures = []
    for env.x in xs:
        pictures.append(env.picture())
    with torch.no_grad():
        h, mask = vla.encode(np.stack(pictures), [toy.INSTRUCTIONS["blue"]] * len(xs))
    label = torch.tensor(np.stack([0.25 * np.clip(-xs / 0.3, -1, 1), 0 * xs], 1), dtype=torch.float32)
    optimizer = torch.optim.Adam(vla.phi(), 1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        (vla.mean(h, mask) - label).square().mean().backward()
        optimizer.step()
    vla.save(folder := project.folder / "runs/weak")
    return folder


def command(parent, out, *more):
    return (
        "python", "stage_rl.py", "--domain", "toy", "--task", "blue", "--algo", "sacfd", "--parent", parent, "--out",
        out, "--envs", "4", "--std", "0.1", "--successes", "5", "--threads", "1", "--sacfd.warmup", "300",
        "--converged", "2", *more,
    )  # fmt: skip


def test_sacfd_solves_a_problem_with_known_optimum(project, weak):
    """From a policy that succeeds half the time to always; the VLM stays bit-identical, the head's outputs within the
    actions, and the demonstrations are zero-shot successes of the exploring policy."""
    before, out, zero_shot = files(weak), project.folder / "runs/sac/1-rl-blue", project.folder / "weak.json"
    project.must("python", "evaluate.py", "--checkpoint", weak, "--tasks", "blue", "--out", zero_shot, "--envs", "4")
    assert 0.1 < np.mean(json.loads(zero_shot.read_text())["tasks"]["blue"]["success"]) < 0.8
    project.must(*command(weak, out, "--env-steps", "800"))
    assert files(weak) == before
    tasks = json.loads((out / "eval.json").read_text())["tasks"]
    assert np.mean(tasks["blue"]["success"]) > 0.9
    old, new = (load_file(f / "vlm/model.safetensors") for f in (weak, out))
    assert all(torch.equal(old[k], new[k]) for k in old)
    folder, start, after = out.parent / "D_rl/blue", VLA.load(weak), VLA.load(out)
    assert len(executed(folder)) == 20 < len(attempts(folder))  # what the stage records at its end has other actions
    demo, header = open_episode(folder / f"{attempts(folder)[0]:06d}.safetensors")
    h, mask = start.encode(demo.get_tensor("image"), [header["instruction"]] * len(demo.get_tensor("reward")))
    drawn = np.stack([np.random.default_rng((int(header["seed"]), t)).normal(size=2) for t in range(len(h))])
    drawn, log_std = torch.tensor(drawn, dtype=torch.float32), torch.full((2,), 0.1).log()
    explored = squashed(start.mean(h, mask), log_std, drawn)[0].clamp(-1, 1).detach()
    np.testing.assert_allclose(explored, demo.get_tensor("action"), atol=0.05)
    assert after.mean(h, mask).abs().max() < 1.5


def test_the_buffer_survives_a_kill(project, weak):
    """Killed at any instant, the same command goes on with the rows it had: none lost up to the saved state."""
    out = project.folder / "runs/sac-kill/1-rl-blue"
    partial = out.with_name(".1-rl-blue.partial")
    go = command(weak, out, "--env-steps", "2400", "--episodes", "0", "--sacfd.utd", "0.25")
    process = project.start(*go, python=warm_python(), STATE_EVERY="0")
    while len(list(partial.glob("replay-*.safetensors"))) < 3 and process.poll() is None:
        time.sleep(0.1)  # with the third the state of the second is saved
    kill(process, 9)
    process.communicate()
    kept = {p.name: p.read_bytes() for p in sorted(partial.glob("replay-*.safetensors"))[:2]}
    assert len(kept) == 2
    process = project.start(*go, python=warm_python(), STATE_EVERY="0")
    while len(list(partial.glob("replay-*.safetensors"))) < 4 and process.poll() is None:
        time.sleep(0.1)
    assert {name: (partial / name).read_bytes() for name in kept} == kept
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-2000:]
    assert not [name for name in files(out) if "replay" in name or "priority" in name]
    log = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert log == sorted(set(log)) and log[-1] >= 2400
