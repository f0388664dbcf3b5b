"""
Episodes on disk, and the data set that the SFT stages draw from.

An episode is one safetensors file. It is the whole interface between recording, RL and SFT, in
simulation and on a robot:

    image  (T, H, W, 3) uint8     what the policy saw before each environment step
    action (T, A) float32         the label, in [-1, 1]: in D_e the expert's action, in D_rl the policy's mean.
                                  The executed action may have had noise on top (stage0_sft.py, stage_rl.py).
    reward (T,) float32           1 for the step that succeeded, else 0
    header, strings               format, domain, task, instruction, source (expert or online), success, seed,
                                  executed ("1": `action` is what was executed, as SACfD and a robot store it),
                                  protocol (the domain's, JSON; null if it is not known), versions (JSON),
                                  noise (a scripted expert's action_noise_std and random_burst_prob, JSON)

Frames are read on access, so a data set of any size needs memory only for one batch.
common/episode_file.py reads and writes the file. `python -m tools.convert` imports and exports
LeRobot data sets.
"""

import common.environment  # noqa: F401  variables that torch reads when it is imported

# isort: split
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from common.episode_file import FrameReader, episode_files, open_episode
from common.errors import UserError
from common.files import check_links


class EpisodeDataset:
    """The frames of some folders of episodes, drawn at random: D_e, or D_e + D_rl.

    folders: {folder: weight}. The probability of a frame is its folder's weight over the folder's
        number of frames, so a task with long episodes counts no more than one with short episodes.
    domain: the domain's module. image_size: height and width in pixels. Raises UserError for an
    empty folder and for an episode that does not fit the domain or the other episodes.
    """

    def __init__(self, folders: dict[Path, float], domain: ModuleType, image_size: int):
        self.num_views = domain.NUM_VIEWS
        # One entry for each episode.
        self.paths: list[Path] = []
        # Or, once the token cache is used, the slices of its files.
        self.images: list[FrameReader] = []
        self.actions: list[np.ndarray] = []  # (T, A) each
        self.instructions: list[str] = []
        # One entry for each frame.
        episode: list[int] = []
        frame: list[int] = []
        probability: list[float] = []
        for folder, weight in folders.items():
            before = len(frame)
            for path in episode_files(folder):
                length = self.add(path, domain, image_size)
                frame += range(length)
                episode += [len(self.paths) - 1] * length
            added = len(frame) - before
            if not added:
                check_links(folder)
                raise UserError(f"{folder} holds no episodes: rerun the command that collects them")
            probability += [weight / added] * added
        self.frame = np.array(frame)
        self.episode = np.array(episode)
        self.cumulative = np.cumsum(probability) / np.sum(probability)

    def add(self, path: Path, domain: ModuleType, image_size: int) -> int:
        """Add one episode file and return its number of frames."""
        handle, header = open_episode(path)
        protocol = json.loads(json.dumps(domain.PROTOCOL))
        for key, found, expected in (
            ("domain", header["domain"], domain.NAME),
            ("protocol", json.loads(header["protocol"]), protocol),
        ):
            if found not in (expected, None):  # None: imported, and nobody knows
                raise UserError(
                    f"{path} was recorded with {key} {found}, but this is {expected}: "
                    f"delete its folder and rerun the command to collect it again"
                )
        folder = path.parent.name
        if folder in domain.INSTRUCTIONS and header["task"] != folder:
            raise UserError(
                f"{path} is an episode of the task {header['task']}, but its folder is another task's: "
                f"move it to its own, or delete it"
            )
        if header.get("success") == "0":
            raise UserError(
                f"{path} is an episode that did not succeed, which SFT would imitate: delete it"
            )
        if not header["instruction"].strip():
            raise UserError(
                f"{path} has no instruction, which the VLM needs: delete it and collect again"
            )
        images = FrameReader(path, handle.get_slice("image").get_shape())
        T, H, W, _ = images.shape
        if (image_size, image_size) != (H, W):
            raise UserError(
                f"{path} holds {H}x{W} images, but --image-size is {image_size}: "
                f"use that size, or delete its folder to collect again"
            )
        action = handle.get_tensor("action")
        if not (np.abs(action) <= 1).all():
            raise UserError(
                f"{path} holds actions that are not in [-1, 1] or not finite: delete it and collect again"
            )
        if self.actions and action.shape[1] != self.actions[0].shape[1]:
            raise UserError(
                f"{path} holds actions of {action.shape[1]} dimensions, but {self.paths[0]} of "
                f"{self.actions[0].shape[1]}: delete it and collect again"
            )
        self.paths.append(path)
        self.images.append(images)
        self.actions.append(action)
        self.instructions.append(header["instruction"])
        return T

    def __len__(self) -> int:
        return len(self.frame)

    def batch(
        self, rng: np.random.Generator, n: int, rank: int = 0, world: int = 1
    ) -> tuple[np.ndarray | torch.Tensor, list[str], np.ndarray]:
        """Draw n frames: (image, n instructions, action (n, A) float32).

        image is (n, H, W, 3) uint8 or, with the token cache, image tokens (n, Q, D) bfloat16. Of
        `world` processes that draw the same n frames, this one gets every `world`-th from `rank`
        on.
        """
        index = np.searchsorted(self.cumulative, rng.random(n))
        # Read neighbours on disk together.
        index = index[np.lexsort((self.frame[index], self.episode[index]))]
        index = index[rank::world]
        drawn = list(zip(self.episode[index], self.frame[index]))
        image = [self.images[e][int(t)] for e, t in drawn]
        image = torch.stack(image) if torch.is_tensor(image[0]) else np.stack(image)
        action = np.stack([self.actions[e][t] for e, t in drawn])
        return image, [self.instructions[e] for e, _ in drawn], action
