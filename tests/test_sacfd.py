"""SACfD: the actor starts as the SFT policy, returns and sampling equal their definitions, and it learns."""

import json
import time
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import command, files, kill, make_vla, warm_python
from safetensors.torch import load_file, save_file

import sacfd
import stage_rl
from common.episode_file import episode_ids, executed_episodes, open_episode
from common.errors import UserError
from common.files import read_tensors
from common.replay import Batch, Replay
from common.rl_learner import Learner
from common.runs import Stage
from model import VLA
from sacfd import ACTION_LIMIT, Actor, SACCritics, actor_loss, critic_loss, tanh_gaussian
from stage_rl import SACfDArgs


def test_without_noise_the_actor_is_the_sft_policy(tmp_path):
    """Its greedy action is VLA.act's, also if the head exceeds the action range, and gradients pass there."""
    vla = make_vla(tmp_path)
    h, mask = vla.encode(
        np.random.default_rng(0).integers(0, 255, (64, 32, 32, 3), np.uint8), ["push"] * 64
    )
    vla.action_std.mul_(2 / vla.mean(h, mask).abs().median().item())  # many means exceed the range
    mean = vla.mean(h, mask)
    action, _ = tanh_gaussian(mean, vla.log_std, torch.zeros_like(mean))
    assert (mean.abs() > 1).any()
    torch.testing.assert_close(action, vla.act(h, mask), atol=1e-5, rtol=0)
    (grad,) = torch.autograd.grad(action.sum(), mean)
    torch.testing.assert_close(grad, torch.ones_like(grad), atol=1e-3, rtol=0)


def test_the_density_integrates_to_one():
    """exp(log-probability) integrates to 1 over the actions, along the samples."""
    for mean, log_std in ((0.0, -1.0), (0.7, -1.4), (1.3, -0.5)):
        noise = torch.linspace(-9, 9, 200_001)[:, None]
        action, log_prob = tanh_gaussian(
            torch.full_like(noise, mean), torch.tensor([log_std]), noise
        )
        assert torch.trapezoid(log_prob.exp(), action[:, 0]).item() == pytest.approx(1, abs=1e-3)
        assert action.abs().max() <= ACTION_LIMIT


def filled(rng, T=40, N=3, p=0.15):
    """Return a Replay of random rows, laid out as the environments' are: the row after an episode's end only resets."""
    replay = Replay(T, N, (2, 4), 2, torch.device("cpu"))
    replay.h[0] = torch.randn(N, 2, 4)
    done = torch.zeros(N)
    for _ in range(T):
        valid = done == 0
        term = (torch.tensor(rng.random(N) < p) & valid).float()
        trunc = (torch.tensor(rng.random(N) < p) & valid).float() * (1 - term)
        reward = torch.tensor(rng.normal(size=N)).float() * valid
        replay.add(torch.randn(N, 2), reward, term, trunc, valid, torch.randn(N, 2, 4))
        done = torch.maximum(term, trunc)
    return replay


def test_n_step_returns_equal_their_definition():
    """Sum of rewards, discount and next latents of each row drawn, compared with a walk through the episode."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    for n_step in (1, 3, 7):
        replay = filled(rng)
        i, rows = replay.sample(500, 0.9, SACfDArgs(n_step=n_step), generator)
        for k, index in enumerate(i.tolist()):
            t, n = divmod(index, 3)
            want = 0.0
            g = 1.0
            for step in range(n_step):
                want += g * replay.reward[t + step, n].item()
                g *= 0.9 * (1 - replay.term[t + step, n].item())
                if not g or replay.trunc[t + step, n] or t + step + 1 == replay.t:
                    break
            assert rows.ret[k].item() == pytest.approx(want, abs=1e-5)
            assert rows.discount[k].item() == pytest.approx(g, abs=1e-6)
            assert torch.equal(rows.h[k], replay.h[t, n].float())
            assert torch.equal(rows.action[k], replay.action[t, n])
            if g:
                assert torch.equal(rows.h_next[k], replay.h[t + step + 1, n].float())


@pytest.mark.parametrize("exponent", [0.6, 0.0])
def test_priorities_set_the_frequency_and_weights_undo_it(exponent):
    """Rows are drawn in proportion to priority^exponent, resets never, and weight x frequency is the same for all."""
    replay = filled(np.random.default_rng(1))
    drawable = replay.priority > 0
    assert 0 < (~drawable).sum() < drawable.sum()
    replay.priority[drawable] = torch.rand(int(drawable.sum())) + 0.1
    generator = torch.Generator().manual_seed(0)
    how = SACfDArgs(n_step=1, per_alpha=exponent, per_beta=1.0)
    i, rows = replay.sample(400_000, 0.9, how, generator)
    counts = torch.bincount(i, minlength=drawable.numel()).view_as(replay.priority)
    assert not counts[~drawable].any()
    share = replay.priority**exponent * drawable
    torch.testing.assert_close(counts / counts.sum(), share / share.sum(), atol=5e-4, rtol=0.1)
    unbiased = torch.zeros(drawable.numel()).index_add_(0, i, rows.weight).view_as(share)[drawable]
    assert (unbiased / unbiased.mean() - 1).abs().max() < 0.1


def test_a_replay_read_again_is_the_one_written(tmp_path):
    """Row by row, priorities too. Rows of a state that was not saved are dropped, and running episodes end."""
    written = filled(np.random.default_rng(2))
    again = Replay(40, 3, (2, 4), 2, torch.device("cpu"))
    rows = Replay(40, 3, (2, 4), 2, torch.device("cpu"))
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
    assert torch.equal(again.trunc[:39], rows.trunc[:39]) and torch.equal(
        again.trunc[39], 1 - rows.term[39]
    )
    again.read(tmp_path, 30)
    assert again.t == 30 and len(list(tmp_path.glob("replay-*"))) == 2


def test_an_interrupted_episode_never_gets_the_reward_of_the_next(tmp_path):
    """Stopped in the middle of an episode and resumed twice: the n-step return of its last rows ends with them."""
    rows = 0
    for success in (False, True, True):
        replay = Replay(40, 1, (2, 4), 2, torch.device("cpu"))
        replay.read(tmp_path, rows)
        replay.begin(torch.randn(1, 2, 4))
        for step in range(8):
            end = torch.tensor([float(success and step == 7)])
            replay.add(torch.randn(1, 2), end, end, 0, torch.ones(1), torch.randn(1, 2, 4))
        replay.write(tmp_path)
        rows = replay.t
    replay = Replay(40, 1, (2, 4), 2, torch.device("cpu"))
    replay.read(tmp_path, rows)
    generator = torch.Generator().manual_seed(0)
    i, drawn = replay.sample(500, 0.9, SACfDArgs(n_step=20), generator)
    interrupted = i < 8
    assert (drawn.ret[~interrupted] > 0).all() and not drawn.ret[interrupted].any()
    assert (drawn.discount[interrupted] > 0).all()
    assert torch.equal(drawn.h_next[i == 7][0], replay.h[8, 0].float())


class InProcess(gym.vector.SyncVectorEnv):
    """Environments in this process, with the two halves of a step."""

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        return self.step(self.actions)


def test_faults_are_not_learned_from_and_a_person_s_action_is_stored(
    checkpoint, bead, tmp_path, monkeypatch
):
    """An episode that a fault ended is never drawn. The action of every row is the executed one."""

    class Robot(gym.Wrapper):
        episodes = 0

        def step(self, action):
            obs, _, _, over, _ = self.env.step(action)
            self.episodes += over
            fault = {"fault": "the link is lost"} if over and self.episodes == 1 else {}
            return obs, 0.0, False, over, {"executed": np.full(2, 0.5, np.float32), **fault}

    def robot(fns, vla, autoreset):
        return InProcess([lambda: Robot(bead.make("blue", 32))], autoreset_mode=autoreset)

    monkeypatch.setattr(sacfd, "make_policy_envs", robot)
    args = stage_rl.Args(
        "blue", str(checkpoint), str(tmp_path / "1-rl"), envs=1, sacfd=SACfDArgs(utd=0)
    )
    vla = VLA.load(checkpoint)
    learner = Learner(Stage(args), vla, SACCritics(128, 2, 0.01), 1e-4, 1e-4)
    actor = Actor(args, learner, bead, budget=24)
    sacfd.train(args, learner, actor, budget=24, save_episodes=False)
    replay = actor.replay
    drawable = (
        replay.priority[: replay.t, 0] > 0
    ).tolist()  # three episodes of 8, a reset after each
    assert drawable == [False] * 9 + [True] * 8 + [False] + [True] * 8
    assert (replay.action[: replay.t, 0][drawable] == 0.5).all()
    assert list(learner.recent) == [0, 0]  # a fault is not an outcome


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, UserError])
def test_a_person_s_work_is_saved_when_the_stage_is_stopped(
    stop, checkpoint, bead, tmp_path, monkeypatch
):
    """Stopped between two saved states, SACfD saves its rows. On a robot it saves after each episode as well."""
    steps = []

    class Stopped(gym.Wrapper):
        def step(self, action):
            steps.append(action)
            if len(steps) == 13:
                saved.append(rows_saved())
                raise stop("stopped")
            return self.env.step(action)

    def rows_saved():
        path = tmp_path / ".1-rl.partial/state.safetensors"
        return json.loads(read_tensors(path)[1]["counters"]).get("rows", 0)

    def envs(fns, vla, autoreset):
        return InProcess([lambda: Stopped(bead.make("blue", 32))], autoreset_mode=autoreset)

    saved = []
    monkeypatch.setattr(sacfd, "make_policy_envs", envs)
    monkeypatch.setattr(sacfd, "load_domain", lambda name: bead)
    monkeypatch.setattr(stage_rl, "load_domain", lambda name: bead)
    monkeypatch.setattr(bead, "real_robot", lambda: "a robot is here", raising=False)
    how = SACfDArgs(utd=0, num_demos=0)
    args = stage_rl.Args(
        "blue",
        str(checkpoint),
        str(tmp_path / "1-rl"),
        algo="sacfd",
        envs=1,
        episodes=0,
        sacfd=how,
        successes=0,
    )
    with pytest.raises(stop):
        stage_rl.main(args)
    assert 1 <= saved[0] < 13  # at the end of an episode
    assert rows_saved() >= 12  # all rows but the one that was interrupted


def test_a_mean_beyond_the_range_is_pulled_back(tmp_path):
    """If the critics ask for ever larger actions, the head's output must not run away: the clip would hide that."""
    vla = make_vla(tmp_path)
    critics = SACCritics(128, 2, 0.01)
    mask = torch.ones(8, 2, dtype=torch.bool)
    # Q grows with the action.
    critics.q.values = lambda h_pooled, action: action.sum(-1).expand(2, -1)
    batch = random_batch(torch.zeros(8, 2))
    h_pooled = torch.zeros(8, 128)
    how = SACfDArgs(bc_weight=0.0)
    optimizer = torch.optim.Adam(vla.phi(), 3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss, _, _ = actor_loss(vla, critics, mask, batch, h_pooled, torch.zeros(8, 2), 0, how)
        loss.backward()
        optimizer.step()
    mean = vla.mean(batch.h, mask)
    assert (mean > 0.8).all() and (mean < 2).all()


def random_batch(action):
    """Return a batch of 8 rows with random latents of 2 tokens."""
    one = torch.ones(8)
    return Batch(torch.randn(8, 2, 128), action, 0.5 * one, 0.9 * one, torch.randn(8, 2, 128), one)


def test_each_loss_trains_its_own_weights(tmp_path):
    """The critics' loss leaves the head alone. The actor's leaves the critics alone, and clones demonstrations only.

    The target critics follow the critics, and keep no graph.
    """
    vla = make_vla(tmp_path)
    critics = SACCritics(128, 2, 0.01)
    mask = torch.ones(8, 2, dtype=torch.bool)
    noise = torch.randn(8, 2)
    batch = random_batch(torch.rand(8, 2))
    how = SACfDArgs(bc_weight=1.0)
    loss, error, h_pooled = critic_loss(vla, critics, mask, batch, noise)
    loss.backward()
    assert all(
        p.grad is None for p in [*vla.parameters(), *critics.target.parameters()]
    ) and error.shape == (8,)
    assert all(p.grad is not None for p in critics.q.parameters())
    critics.zero_grad()
    first, _, _ = actor_loss(vla, critics, mask, batch, h_pooled, noise, 4, how)
    first.backward()
    assert all(p.grad is None for p in critics.q.parameters()) and all(
        p.grad is not None for p in vla.phi()
    )
    other = torch.cat(
        [batch.action[:4], torch.rand(4, 2)]
    )  # other actions, but not in demonstrations
    changed = replace(batch, action=other)
    second, _, _ = actor_loss(vla, critics, mask, changed, h_pooled, noise, 4, how)
    assert second.item() == pytest.approx(first.item(), abs=1e-6)
    old, new = (next(c.parameters()).detach().clone() for c in (critics.target, critics.q))
    critics.q.token_learner.load_state_dict(
        {k: v + 1 for k, v in critics.q.token_learner.state_dict().items()}
    )
    critics.soft_update(0.25)
    torch.testing.assert_close(next(critics.target.parameters()), old + 0.25 * (new + 1 - old))
    assert all(p.grad_fn is None for p in critics.target.parameters())


def test_a_state_of_an_older_version_resumes(checkpoint, tmp_path):
    """A state whose target critics are called `critic.slow` resumes with the same weights and moments."""
    args = stage_rl.Args("blue", str(checkpoint), str(tmp_path / "1-rl"), algo="sacfd")
    stage = Stage(args)
    learner = Learner(stage, VLA.load(checkpoint), SACCritics(128, 2, 0.01), 1e-4, 1e-4)
    sum(p.square().sum() for p in [*learner.actor_params, *learner.critic_params]).backward()
    learner.optimizer.step()
    learner.critic.soft_update(0.5)
    learner.save()
    path = stage.folder / "state.safetensors"
    tensors, about = read_tensors(path)
    older = {name.replace("critic.target.", "critic.slow."): x for name, x in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, path, about)
    again = Learner(stage, VLA.load(checkpoint), SACCritics(128, 2, 0.01), 1e-4, 1e-4)
    again.save()
    tensors_again, _ = read_tensors(path)
    assert tensors_again.keys() == tensors.keys()
    assert all(torch.equal(tensors[k], tensors_again[k]) for k in tensors)


@pytest.fixture(scope="module")
def weak(project, checkpoint, bead):
    """A checkpoint whose policy pushes the right way, but a quarter as far as it should: it solves the near beads."""
    vla = VLA.load(checkpoint)
    env = bead.make("blue", 32)
    xs = np.linspace(-1.2, 1.2, 64)
    images = []
    for env.x in xs:
        images.append(env.render())
    with torch.no_grad():
        h, mask = vla.encode(np.stack(images), [bead.INSTRUCTIONS["blue"]] * len(xs))
    label = torch.tensor(
        np.stack([0.25 * np.clip(-xs / 0.3, -1, 1), 0 * xs], 1), dtype=torch.float32
    )
    optimizer = torch.optim.Adam(vla.phi(), 1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        (vla.mean(h, mask) - label).square().mean().backward()
        optimizer.step()
    folder = project.folder / "runs/weak"
    vla.save(folder)
    return folder


def stage(parent, out, *more, **changes):
    """Return the command of a short stage 1 of the bead by SACfD."""
    flags = {
        "task": "blue",
        "algo": "sacfd",
        "parent": parent,
        "out": out,
        "envs": 4,
        "std": 0.1,
        "successes": 5,
    }
    return command(
        "stage_rl.py",
        "--sacfd.warmup",
        300,
        *more,
        **{**flags, "threads": 1, "converged": 2, **changes},
    )


def test_sacfd_solves_a_problem_with_known_optimum(project, weak):
    """From a policy that succeeds half the time to always.

    The VLM stays bit-identical, the head's outputs stay within the actions, and the demonstrations are zero-shot
    successes of the exploring policy.
    """
    before = files(weak)
    out = project.folder / "runs/sac/1-rl-blue"
    zero_shot = project.folder / "weak.json"
    project.must(*command("evaluate.py", checkpoint=weak, tasks="blue", out=zero_shot, envs=4))
    assert 0.1 < np.mean(json.loads(zero_shot.read_text())["tasks"]["blue"]["success"]) < 0.8
    project.must(*stage(weak, out, "--sacfd.utd", 2, env_steps=800))
    assert files(weak) == before
    tasks = json.loads((out / "eval.json").read_text())["tasks"]
    assert np.mean(tasks["blue"]["success"]) > 0.9
    old, new = (load_file(f / "vlm/model.safetensors") for f in (weak, out))
    assert all(torch.equal(old[k], new[k]) for k in old)
    folder = out.parent / "D_rl/blue"
    start = VLA.load(weak)
    assert (
        len(executed_episodes(folder)) == 20 < len(episode_ids(folder))
    )  # D_rl of the stage's end holds the mean
    demo, header = open_episode(folder / f"{episode_ids(folder)[0]:06d}.safetensors")
    h, mask = start.encode(
        demo.get_tensor("image"), [header["instruction"]] * len(demo.get_tensor("reward"))
    )
    drawn = np.stack(
        [np.random.default_rng((int(header["seed"]), t)).normal(size=2) for t in range(len(h))]
    )
    log_std = torch.full((2,), 0.1).log()
    explored = (
        tanh_gaussian(start.mean(h, mask), log_std, torch.tensor(drawn, dtype=torch.float32))[0]
        .clamp(-1, 1)
        .detach()
    )
    np.testing.assert_allclose(explored, demo.get_tensor("action"), atol=0.05)
    assert VLA.load(out).mean(h, mask).abs().max() < 1.5


def test_the_buffer_survives_a_kill(project, weak):
    """Killed at any instant, the same command resumes with its rows. None is lost up to the saved state."""
    out = project.folder / "runs/sac-kill/1-rl-blue"
    partial = out.with_name(".1-rl-blue.partial")
    go = stage(weak, out, "--sacfd.utd", 0.5, envs=2, env_steps=800, episodes=0)
    process = project.start(*go, python=warm_python(), SAVE_INTERVAL="0")
    while len(list(partial.glob("replay-*.safetensors"))) < 3 and process.poll() is None:
        time.sleep(0.1)  # with the third the state of the second is saved
    kill(process, 9)
    process.communicate()
    kept = {p.name: p.read_bytes() for p in sorted(partial.glob("replay-*.safetensors"))[:2]}
    assert len(kept) == 2
    process = project.start(*go, python=warm_python(), SAVE_INTERVAL="0")
    while len(list(partial.glob("replay-*.safetensors"))) < 4 and process.poll() is None:
        time.sleep(0.1)
    assert {name: (partial / name).read_bytes() for name in kept} == kept
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-2000:]
    assert not [name for name in files(out) if "replay" in name or "priority" in name]
    log = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert log == sorted(set(log)) and log[-1] >= 800
