"""`examples/finetune.py` killed and going on, and in two processes against one."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import aic_data
import finetune
import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from common import critique
from conftest import PEFT_ASKS, is_added
from finetuning import (
    CAPTIONS,
    captions,
    command,
    draw,
    history,
    learning_rates,
    moved,
    run,
    trainer_state,
    write_base,
    write_checkpoint,
    write_ten,
)
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, set_hf_deepspeed_config
from transformers.trainer import DEFAULT_CALLBACKS

from ase_mllm import ASEForConditionalGeneration, ASEProcessor


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


# Processes -----------------------------------------------------------------------------------------------------------

# NOTE: forked from a server that has imported what takes long, not from this process, which has threads
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["ase_mllm", "datasets", "peft", "transformers.trainer", "pycocoevalcap.cider.cider"])


def finetune_in_process(arguments: list[str], variables: dict[str, str], *preparations: Callable):
    """What a process does; `preparations` are called first."""
    torch.set_num_threads(1)
    os.environ.update(variables)
    for prepare in preparations:
        prepare()
    sys.argv = ["finetune.py", *arguments]
    finetune.main()


def start(arguments: list[str], variables: dict[str, str], *preparations: Callable) -> multiprocessing.Process:
    process = PROCESSES.Process(target=finetune_in_process, args=(arguments, variables, *preparations), daemon=True)
    process.start()
    return process


def launch(config: str, arguments: list[str], *preparations: Callable):
    """Two processes, told by their environment what `accelerate launch` tells them."""
    path = str(ROOT / "examples" / "accelerate" / config)
    options = launch_command_parser().parse_args(["--config_file", path, "--num_processes", "2", "finetune.py"])
    variables = prepare_multi_gpu_env(_validate_launch_command(options)[0])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    variables |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [variables | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    processes = [start([*arguments, "--ddp_backend", "gloo"], variables, *preparations) for variables in ranks]
    for process in processes:
        process.join(timeout=60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]  # -9: they waited for each other


def kill_after_five_steps():
    """With SIGKILL: nothing is tidied up."""

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    DEFAULT_CALLBACKS.append(Kill)


def shard_on_cpus():
    """accelerate leaves FSDP out where the processes compute on CPUs; PyTorch and gloo can do it."""
    plain = AcceleratorState.__init__

    def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_plugin


def drop_images():
    """The fourth batch of one process is of text alone and has no scores or labels."""
    change_fourth_batch({"pixel_values", "score_targets", "aspect_targets"})


def drop_scores():
    """The fourth batch of one process has no scores."""
    change_fourth_batch({"score_targets"})


def change_fourth_batch(dropped: set[str]):
    collate, count = finetune.ASEDataCollator.__call__, itertools.count(1)

    def changed(self, examples):
        batch = collate(self, examples)
        if next(count) == 4 and os.environ["RANK"] == "1":
            for name in dropped:
                del batch[name]
            if "pixel_values" in dropped:
                batch["input_ids"][batch["input_ids"] == self.processor.image_token_id] = 5
        return batch

    finetune.ASEDataCollator.__call__ = changed


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return write_ten(tmp_path_factory.mktemp("photographs"))


# Interrupted ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pccd(tmp_path_factory) -> Path:
    """PCCD's form: texts about aspects, whose prompts differ in length."""
    folder = tmp_path_factory.mktemp("pccd")
    draw(folder / "images", *(f"{i}.jpg" for i in range(8)))
    for split, numbers in (("train", range(6)), ("validation", (6, 7))):
        entries = [
            {"title": str(i), "overall": "6", "score": [], "general_impression": CAPTIONS[i % 5], "focus": CAPTIONS[0]}
            for i in numbers
        ]
        (folder / f"guru_{split}.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.filterwarnings(PEFT_ASKS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(checkpoint, pccd, tmp_path, capsys):
    """
    Killed between checkpoints, and again while writing one. The largest loss is the best here, so that it stops after
    two evaluations that are worse than the first: one before and one after the kill.
    """
    options = {"lora_rank": 3, "lora_alpha": 7, "learning_rate": 0.02, "greater_is_better": True}
    options |= {"max_steps": 20, "eval_steps": 2, "patience": 2}
    whole = run(checkpoint, pccd, tmp_path / "whole", **options)
    killed = start(command(checkpoint, pccd, tmp_path / "killed", **options), {}, kill_after_five_steps)
    killed.join(timeout=120)
    assert killed.exitcode == -signal.SIGKILL
    assert finetune.last_checkpoint(tmp_path / "killed").endswith("checkpoint-4")
    shutil.copytree(tmp_path / "killed" / "checkpoint-4", tmp_path / "killed" / "checkpoint-6")
    (tmp_path / "killed" / "checkpoint-6" / "trainer_state.json").unlink()
    resumed = run(checkpoint, pccd, tmp_path / "killed", **options)
    assert f"Goes on from {tmp_path / 'killed' / 'checkpoint-4'}." in capsys.readouterr().out
    assert len(history(whole)) == 6 == len(set(history(whole).values()))
    for key in ("loss", "caption_loss", "grad_norm", "eval_loss", "eval_score_loss", "eval_bleu4"):
        assert history(resumed, key) == history(whole, key)
    weights = ASEForConditionalGeneration.from_pretrained(whole).state_dict()
    assert not moved(weights, resumed)

    # stage lora, and the best is kept
    assert trainer_state(whole)["best_global_step"] == 2
    settings = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 7)
    names = moved(ASEForConditionalGeneration.from_pretrained(checkpoint).state_dict(), whole)
    theirs = {name for name in names if not is_added(name)}
    assert any(name.endswith("gate") for name in names) and any(".iasm." in name for name in names)
    assert theirs and all(".language_model." in name and name.endswith("proj.weight") for name in theirs)
    check_critiques(whole, pccd / "images", 2)


def check_critiques(out: Path, images: Path, step: int):
    """Those that were scored, in batches and by the adapter, are those of the merged model one by one."""
    processor, model = ASEProcessor.from_pretrained(out), ASEForConditionalGeneration.from_pretrained(out)
    lines = captions(out, step)
    assert [line["aspect"] for line in lines] == ["general_impression", "focus"] * 2
    for line in lines:
        photo, question = Image.open(images / f"{line['image_id']}.jpg"), aic_data.row_question(line["aspect"])
        (answer,) = critique(model, processor, [photo], [(8, 8)], [question], max_new_tokens=4)
        assert line["caption"] and line["caption"] == answer["caption"]


# Two processes -------------------------------------------------------------------------------------------------------

STEPS = {"max_steps": 4, "eval_steps": 3, "stage": "all"}


@pytest.fixture(scope="module")
def one_process(checkpoint, photographs, tmp_path_factory) -> Path:
    return run(checkpoint, photographs, tmp_path_factory.mktemp("one"), **STEPS)


def test_stage_all_trains_everything(one_process, checkpoint):
    before = ASEForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    names = moved(before, one_process)
    for part in ("vision_tower", "multi_modal_projector", "language_model", "lm_head", "iasm", "fusions"):
        assert any(part in name for name in names), part
    assert learning_rates(one_process) == [1e-2, 1e-2, 0.2]


@pytest.mark.parametrize(("config", "drop"), [("ddp.yaml", drop_images), ("fsdp2.yaml", drop_scores)])
def test_two_processes_train_as_one(config, drop, one_process, checkpoint, photographs, tmp_path):
    """For three steps. In the fourth one has a batch without images or scores, for which the other must not wait."""
    two = tmp_path / "two"
    launch(config, command(checkpoint, photographs, two, per_device_train_batch_size=2, **STEPS), shard_on_cpus, drop)
    for key in ("loss", "caption_loss", "score_loss", "grad_norm"):
        found, expected = history(two, key), history(one_process, key)
        assert found.keys() == {1, 2, 3, 4} and np.isfinite(found.pop(4))
        assert found == pytest.approx({step: expected[step] for step in (1, 2, 3)}, rel=1e-3), key
    for key in ("eval_loss", "eval_caption_loss", "eval_score_loss", "eval_bleu4"):
        assert history(two, key)[3] == pytest.approx(history(one_process, key)[3], rel=1e-3), key
    assert captions(two, 3) == captions(one_process, 3) and all(line["caption"] for line in captions(two, 3))
    weights = ASEForConditionalGeneration.from_pretrained(one_process / "checkpoint-3").state_dict()
    loaded = ASEForConditionalGeneration.from_pretrained(two / "checkpoint-3").state_dict()
    for name, tensor in weights.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-2, atol=2e-3, msg=name)
    best = ASEForConditionalGeneration.from_pretrained(trainer_state(two)["best_model_checkpoint"]).state_dict()
    assert not moved(best, two)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(name, one_process, tmp_path, capsys):
    shutil.copytree(one_process, tmp_path / "out")
    newest, before = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))[
        :2
    ]
    path = newest / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert finetune.last_checkpoint(tmp_path / "out", verbose=True) == str(before)
    said = capsys.readouterr().out
    assert f"{newest} is damaged" in said and name in said


# DeepSpeed, which is not installed here ------------------------------------------------------------------------------


class ZeRO3:
    def is_zero3(self) -> bool:
        return True


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.parametrize(("zero3", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_what_zero3_trains_has_one_dtype(base, zero3, dtype, monkeypatch):
    """It keeps float32 copies itself, and refuses parameters of two dtypes."""
    monkeypatch.setattr(finetune, "is_deepspeed_zero3_enabled", lambda: zero3)
    args = finetune.ScriptArguments(str(base), "data", dtype="bfloat16", aspect_names=[])
    model = finetune.prepare_stage(finetune.load_model(args), args)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {dtype}


@pytest.mark.filterwarnings(PEFT_ASKS)
def test_the_result_of_zero3_is_loaded_whole(checkpoint, photographs, tmp_path, monkeypatch):
    """While a configuration of ZeRO-3 lives, models are loaded in pieces, by all processes together."""
    config, train = ZeRO3(), finetune.CritiqueTrainer.train

    def train_with_zero3(self, **kwargs):
        train(self, **kwargs)
        set_hf_deepspeed_config(config)

    monkeypatch.setattr(finetune.CritiqueTrainer, "train", train_with_zero3)
    run(checkpoint, photographs, tmp_path / "out", max_steps=1)
    assert not is_deepspeed_zero3_enabled()
