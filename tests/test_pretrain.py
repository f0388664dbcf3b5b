"""The pre-training of the tiny VLM: exact labels, nothing of the domains, resumable, and a folder that loads."""

import ast

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_house import imports

from common.files import read_tensors
from domains import load_domain
from model import VLA, VLAConfig
from robot.sim.objects import CAMERAS
from tools import pretrain
from tools.pretraining import data as pretrain_data
from tools.pretraining.questions import Asker, build_tokenizer
from tools.pretraining.scenes import NOUN, VIEWS, SceneMaker, draw_scenes
from tools.pretraining.things import NOUNS

DOMAINS = ("metaworld", "kitchen", "panda", "toy")
FILES = [ROOT / "tools/pretrain.py", *(ROOT / "tools/pretraining").glob("*.py")]
PRETRAINED = ROOT / "pretrained/blip2-tiny"


@pytest.fixture(scope="module")
def scenes():
    """Forty random scenes."""
    return draw_scenes(7, 0, 40)


@pytest.fixture(scope="module")
def instructions():
    """Every instruction of every domain."""
    return {text for name in DOMAINS for text in load_domain(name).INSTRUCTIONS.values()}


def test_the_same_seed_draws_the_same_scenes(scenes):
    """Bit for bit: images and labels."""
    again = draw_scenes(7, 0, 3)
    for name, array in again.items():
        np.testing.assert_array_equal(array, scenes[name][:3])


def test_labels_are_where_the_pixels_are(scenes):
    """A round thing that shows covers the place that its row names."""
    tables = scenes["tables"].astype(float)
    checked = 0
    for b, part in zip(
        *np.nonzero(
            np.isin(tables[..., NOUN], [NOUNS.index(noun) for noun in ("ball", "egg", "dot")])
        )
    ):
        views = 2 if scenes["gripper"][b, 5] > 1 else 1
        for v in range(views):
            row, column, _, cells = tables[b, part, VIEWS + 4 * v : VIEWS + 4 * v + 4]
            if np.isnan(row) or cells < 4:
                continue
            rows, columns = np.nonzero(scenes["parts"][b] == part)
            mine = (rows >= 16) == (v == 1) if views == 2 else rows >= 0
            off = np.hypot(2 * rows[mine] + 1 - row, 2 * columns[mine] + 1 - column)
            assert off.min() < 3
            checked += 1
    assert checked > 3


def test_no_question_is_a_domain_s_instruction(scenes, instructions):
    """In no order of its words either."""
    asker = Asker(scenes, np.random.default_rng(0), 1)
    texts = {q.text for q in asker.questions(30)}
    assert len(texts) > 200
    words = {frozenset(text.split()) for text in instructions}
    assert not {text for text in texts if frozenset(text.split()) in words}


def test_no_camera_is_a_domain_s():
    """No drawn camera is within 2 cm and 2 degrees of a domain's."""
    cameras = [load_domain(name).CAMERA for name in ("metaworld", "kitchen")] + [CAMERAS["front"]]
    maker = SceneMaker([0, 0])
    tip = np.zeros(3)
    for _ in range(2000):
        for eye in maker.look(maker.maker.u(-np.pi, np.pi), tip, []):
            for other in cameras:
                turn = (eye.camera.azimuth - other["azimuth"] + 180) % 360 - 180
                tilt = eye.camera.elevation - other["elevation"]
                shift = np.linalg.norm(eye.camera.lookat - other["lookat"])
                away = abs(eye.camera.distance - other["distance"])
                assert max(abs(turn), abs(tilt)) > 2 or max(shift, away) > 0.02


def test_nothing_comes_from_the_domains():
    """No file of the pre-training imports domains/ or robot/, or reads a file of another package."""
    assert len(FILES) >= 5
    for path in FILES:
        rooms = {name.split(".")[0] for name in imports(path)}
        assert not rooms & {"domains", "robot"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.endswith((".xml", ".stl", ".obj", ".png")), path


def test_the_tokenizer_spells_what_it_does_not_know(instructions):
    """Every instruction of every domain is free of unknown tokens, and mostly a token a word."""
    tokenizer = build_tokenizer()
    assert tokenizer.unk_token_id not in tokenizer("Grab the zyxquorb_42 (now)!").input_ids
    for text in instructions:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= len(text.split()) + 6


def test_a_stopped_run_resumes_with_the_same_numbers(scenes, tmp_path, monkeypatch):
    """Both parts of the training, and the model that comes out."""
    for module in (pretrain, pretrain_data):
        monkeypatch.setattr(module, "SHARD", 20)
    monkeypatch.setattr(pretrain, "HELD_OUT", 20)
    monkeypatch.setattr(pretrain, "SAVE_STEPS", 2)
    for work in ("a", "b"):
        for shard in (0, 1):
            folder = pretrain_data.shard_folder(tmp_path / work / "scenes", shard)
            folder.mkdir(parents=True)
            for name, array in scenes.items():
                np.save(folder / f"{name}.npy", array[20 * shard : 20 * shard + 20])

    def run(work: str) -> dict:
        args = pretrain.Args(
            out=str(tmp_path / work / "out"),
            work=str(tmp_path / work),
            shards=2,
            vision_steps=4,
            language_steps=4,
            vision_batch=4,
            language_batch=4,
            nice=0,
        )
        pretrain.main(args)
        return read_tensors(tmp_path / work / "out/model.safetensors")[0]

    whole = run("a")
    save = pretrain.Part.save
    saves = []

    def save_and_stop(part):
        save(part)
        saves.append(part.name)
        if len(saves) in (1, 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrain.Part, "save", save_and_stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run("b")
    resumed = run("b")
    assert saves.count("vision") == 2 and saves.count("language") == 2
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_pretrained_folder_loads(tmp_path):
    """With LoRA everywhere and in the language model alone, in float32, from at most 6 MB."""
    assert sum(path.stat().st_size for path in PRETRAINED.iterdir()) < 6e6
    images = np.zeros((2, 64, 64, 3), np.uint8)
    for targets in ("all", "language"):
        config = VLAConfig(str(PRETRAINED), "toy", 2, 64, dtype="float32", lora_targets=targets)
        vla = VLA.create(config, [], tmp_path)
        assert vla.has_lora and next(vla.blip.parameters()).dtype == torch.float32
        h, mask = vla.encode(images, ["open the drawer", "unscrew the zyxquorb"])
        assert h.isfinite().all() and mask.shape == h.shape[:2]
