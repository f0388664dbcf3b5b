"""A small image classifier that decides success: it is trained by `train_classifier` and used by HumanOperator.

This is the only file of robot/ that imports torch.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from common.errors import UserError
from common.files import atomic_write, read_tensors

CONFIDENT = 0.9  # least probability of a success
HEIGHT = 0.05  # m, least height of the TCP above the floor of the robot's box


def build_network() -> torch.nn.Sequential:
    """Return the network: (B, 3, H, W) in [0, 1] to a logit (B, 1)."""
    layers = []
    for i, o in ((3, 16), (16, 32), (32, 64)):
        layers += [
            torch.nn.Conv2d(i, o, 3, stride=2, padding=1),
            torch.nn.GroupNorm(4, o),
            torch.nn.ReLU(),
        ]
    return torch.nn.Sequential(
        *layers, torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(1024, 1)
    )


class SuccessClassifier:
    """Success by a trained network: two confident images in a row, with the end effector off the table."""

    def __init__(self, path: str | Path):
        tensors, _ = read_tensors(path, remedy="set ROBOT_REWARD to another classifier, or to keys")
        self.network = build_network().eval()
        self.confident_before = False
        try:
            self.network.load_state_dict(tensors)
        except RuntimeError as error:
            raise UserError(
                f"{path} is not a classifier of real_robot.py: set ROBOT_REWARD to one, or to keys"
            ) from error

    def restart(self) -> None:
        """Forget the last episode."""
        self.confident_before = False

    @torch.no_grad()
    def success(self, robot, image: np.ndarray) -> bool:
        logit = self.network(torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255.0)
        lifted = robot.state.position[2] > robot.limits.low[2] + HEIGHT
        confident = bool(logit.sigmoid() > CONFIDENT) and lifted
        success = confident and self.confident_before
        self.confident_before = confident
        return bool(success)


def load_frames(folder: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, 3, H, W) in [0, 1] and labels (N, 1) of <folder>/failure/*.png and <folder>/success/*.png."""
    images = []
    labels = []
    for label, name in enumerate(("failure", "success")):
        paths = sorted(Path(folder, name).glob("*.png"))
        if len(paths) < 5:
            raise UserError(
                f"{Path(folder, name)} holds {len(paths)} images: collect a few hundred"
            )
        for path in paths:
            images.append(np.asarray(Image.open(path).convert("RGB")))
            labels.append(label)
            if images[-1].shape != images[0].shape:
                raise UserError(
                    f"{path} differs in size from the other images: use images that `collect --frames` has saved"
                )
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255.0
    return x, torch.tensor(labels, dtype=torch.float32)[:, None]


def train_classifier(folder: str | Path, out: str | Path, steps: int) -> tuple[int, int, int]:
    """Train a classifier and save it to `out`. Return (held-out images, false successes, missed successes)."""
    x, y = load_frames(folder)
    torch.manual_seed(0)
    held_out = torch.randperm(len(x)) % 5 == 0
    train_x = x[~held_out]
    train_y = y[~held_out]
    network = build_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(steps):
        # 32 images of each label, shifted and with another brightness
        rows = [
            torch.multinomial((train_y[:, 0] == label).float(), 32, replacement=True)
            for label in (0, 1)
        ]
        batch = torch.cat(rows)
        dy, dx = torch.randint(-4, 5, (2,)).tolist()
        images = torch.roll(train_x[batch], (dy, dx), (2, 3)) * (
            0.7 + 0.6 * torch.rand(len(batch), 1, 1, 1)
        )
        loss = F.binary_cross_entropy_with_logits(network(images), train_y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        confident = network.eval()(x[held_out]).sigmoid() > CONFIDENT
    truth = y[held_out] > 0
    with atomic_write(out) as tmp:
        save_file(network.state_dict(), tmp)
    return len(truth), int((confident & ~truth).sum()), int((~confident & truth).sum())
