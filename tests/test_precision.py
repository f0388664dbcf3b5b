"""A VLM's precision, path and saves, where libraries surprise: torch, PEFT, the hub."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import make_vla, refused

import evaluate
from common import backbone, processes
from common.errors import UserError
from common.vector_env import is_over
from model import VLA


@pytest.mark.parametrize(
    "gpu, amx, units, free, vlm, dtype",
    [
        (True, False, False, 1, "big", "bfloat16"),
        (False, True, True, 1, "tiny", "bfloat16"),
        (False, False, True, 1, "tiny", "float32"),
        (False, False, True, 1e12, "big", "bfloat16"),
        (False, False, False, 1e12, "big", "float32"),
        (False, False, False, 1e9, "big", "bfloat16"),
    ],
)
def test_precision_asks_the_machine(monkeypatch, gpu, amx, units, free, vlm, dtype):
    """bfloat16 is for machines with units for it, or for weights that do not fit otherwise. The reason is named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(backbone, "has_bfloat16_units", lambda: units)
    monkeypatch.setattr(backbone, "count_parameters", lambda name: 4_000_000_000)
    monkeypatch.setattr(backbone, "free_memory", lambda device: free)
    found, reason = backbone.pick_dtype(vlm)
    assert found == dtype and reason


def test_a_local_vlm_is_found_from_any_folder(backbone, tmp_path, monkeypatch):
    """A checkpoint keeps the resolved path of its VLM. If that has moved, the error names the entry of config.json."""
    shutil.copytree(backbone, tmp_path / "models/vlm")
    monkeypatch.chdir(tmp_path)
    vla = make_vla(tmp_path / "run", "models/vlm")
    vla.save(tmp_path / "checkpoint")
    monkeypatch.chdir("/")
    assert VLA.load(tmp_path / "checkpoint").has_lora
    config = json.loads((tmp_path / "checkpoint/config.json").read_text())
    assert config["weights"] == str(tmp_path / "models/vlm")
    shutil.rmtree(tmp_path / "models/vlm")
    message = refused(VLA.load, tmp_path / "checkpoint")
    assert "config.json names as its weights" in message and "--vlm" not in message


def test_a_vlm_of_the_project_moves_with_it(backbone, tmp_path, monkeypatch):
    """Its path in the project is recorded, so a checkpoint loads in another clone. `whole` keeps its own weights."""
    for clone in ("here", "there"):
        shutil.copytree(backbone, tmp_path / clone / "pretrained/vlm")
    monkeypatch.setattr("common.backbone.ROOT", tmp_path / "here")
    lora = make_vla(tmp_path / "run", "pretrained/vlm")
    lora.save(tmp_path / "lora")
    whole = make_vla(tmp_path / "run2", "pretrained/vlm", theta="whole")
    whole.save(tmp_path / "whole")
    shutil.rmtree(tmp_path / "here")
    monkeypatch.setattr("common.backbone.ROOT", tmp_path / "there")
    assert lora.has_lora and VLA.load(tmp_path / "lora").config["weights"] == "pretrained/vlm"
    loaded = VLA.load(tmp_path / "whole")
    assert not loaded.has_lora and len(loaded.theta()) == len(list(loaded.vlm.parameters()))


def test_a_save_does_not_ask_the_hub(backbone, tmp_path, monkeypatch):
    """PEFT asks it for the VLM's vocabulary unless it is told what to save."""
    vla = make_vla(tmp_path / "run", backbone)
    vla.vlm.peft_config["default"].base_model_name_or_path = "someone/model"
    vla.blip.config.name_or_path = vla.blip.name_or_path = "someone/model"
    asked = []

    def ask(self, *args, **kwargs):
        asked.append(args)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", ask)
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", ask)
    vla.save(tmp_path / "checkpoint")
    assert not asked
    assert (tmp_path / "checkpoint/adapter_model.safetensors").exists()


def test_a_compiled_vla_is_compiled_once(tmp_path):
    """torch.compile recompiles whenever a Python number in the model changes. The count of forwards is a tensor."""
    vla = make_vla(tmp_path)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(vla, backend=count)
    images = np.zeros((2, 32, 32, 3), np.uint8)
    compiled(images, ["push", "push"])
    first = len(graphs)
    for _ in range(3):
        compiled(images, ["push", "push"])
    assert len(graphs) == first and int(vla.num_forwards) == 8


def test_evaluate_takes_a_hub_name(checkpoint, tmp_path, monkeypatch, capsys):
    """`evaluate.py --checkpoint user/name` downloads the checkpoint, as VLA.load does."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(checkpoint))
    args = evaluate.Args("someone/policy", tasks=("no-such-task",))
    with pytest.raises(UserError, match="unknown domain 'bead'|unknown task 'no-such-task'"):
        evaluate.main(args)


def test_a_result_that_cannot_be_written_is_refused_before_the_work(checkpoint, monkeypatch):
    """An evaluation takes minutes, so its folder is tried first."""

    def read_only(folder, remedy):
        raise UserError(f"{folder} is not writable: {remedy}")

    monkeypatch.setattr(evaluate, "check_writable", read_only)
    monkeypatch.setattr(evaluate, "load_domain", lambda name: evaluate.load_domain_for_tests)
    monkeypatch.setattr(
        evaluate,
        "load_domain_for_tests",
        type("D", (), {"EXPERT_TASKS": ["red"], "RL_TASKS": [], "UNSEEN_TASKS": []}),
        raising=False,
    )
    monkeypatch.setattr(evaluate.VLA, "load", lambda *args, **kwargs: pytest.fail("loaded first"))
    assert "--out" in refused(evaluate.main, evaluate.Args(str(checkpoint)))


def test_held_successes_are_counted_after_the_first():
    """The first success decides the rate. `hold` steps later the reward tells whether it still holds."""
    for rewards, success, held in (([0, 1, 1, 1], 1, 1), ([0, 1, 1, 0], 1, 0), ([1, 0, 1], 1, 1)):
        episode = {}
        ends = [is_over(episode, bool(r), False, float(r), hold=2) for r in rewards]
        assert ends == [False] * (len(rewards) - 1) + [True]
        assert (episode["success"], episode["held"]) == (success, held)
    episode = {}
    assert is_over(episode, False, True, 0.0, hold=2) and episode["success"] == 0


def test_shared_memory_is_not_called_the_disk():
    """A full or read-only /dev/shm is named as such."""
    for number in processes.SHARED_MEMORY_ERRORS:
        with pytest.raises(UserError, match="/dev/shm"), processes.starting_workers():
            raise OSError(number, "no room")
