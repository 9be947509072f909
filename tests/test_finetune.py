"""`examples/finetune.py`: stages, evaluation, resuming, and two processes against one."""

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
import module_stage
import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from common import critique
from conftest import PEFT_ASKS, WORDS, graft, is_added, tiny_base, tiny_processor
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from module_stage import collate as collate_inputs
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, set_hf_deepspeed_config
from transformers.modeling_outputs import ModelOutput
from transformers.trainer import DEFAULT_CALLBACKS

from ase_mllm import ASEDataCollator, ASEForConditionalGeneration, ASEProcessor


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
CAPTIONS = ["good , blurred .", "wrong , good .", "underexposed , what .", "what is good ?", "blurred , wrong ."]


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
    """The fourth batch of one process is of text alone and has no scores."""
    change_fourth_batch({"pixel_values", "score_targets"})


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


# Fixtures ------------------------------------------------------------------------------------------------------------


def draw(folder: Path, *names: str):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name in names:
        Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / name)


def write_photographs(folder: Path, rows: list[dict]) -> Path:
    draw(folder, *(row["file_name"] for row in rows))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def speaking_base() -> LlavaForConditionalGeneration:
    """It writes words and nothing else, so that no critique is empty."""
    base = tiny_base()
    base.generation_config.suppress_tokens = [*range(5), *range(len(WORDS), 99)]
    return base


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """An ungrafted model with its processor."""
    folder = tmp_path_factory.mktemp("base")
    speaking_base().save_pretrained(folder)
    tiny_processor().base_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A grafted model with its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(7)
    graft(speaking_base()).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Eight to train on and two to validate on; captions of one length, every one rated."""
    folder = tmp_path_factory.mktemp("photographs")
    rows = [{"file_name": f"{i:02d}.png", "caption": CAPTIONS[i % len(CAPTIONS)], "score": 1.0 + i} for i in range(10)]
    write_photographs(folder / "train", rows[:8])
    write_photographs(folder / "validation", rows[8:])
    return folder


def command(model: Path, data: Path, out: Path, **options) -> list[str]:
    options = {
        "model": model,
        "data": data,
        "output_dir": out,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_new_tokens": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    if "eval_steps" in options:
        options |= {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": options["eval_steps"]}
    return [part for name, value in options.items() for part in (f"--{name}", *map(str, np.atleast_1d(value)))]


def run(*args, **options) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune.py", *command(*args, **options)])
        finetune.main()
    return args[2]


def trainer_state(out: Path) -> dict:
    """From the newest checkpoint."""
    return json.loads((Path(finetune.last_checkpoint(out)) / "trainer_state.json").read_text())


def history(out: Path, key: str = "loss") -> dict[int, float]:
    """That value by step."""
    return {entry["step"]: entry[key] for entry in trainer_state(out)["log_history"] if key in entry}


def learning_rates(out: Path) -> list[float]:
    """Of what decays, what does not, and the gates."""
    groups = torch.load(Path(finetune.last_checkpoint(out)) / "optimizer.pt")["param_groups"]
    model = ASEForConditionalGeneration.from_pretrained(out)
    assert len(groups[-1]["params"]) == sum(name.endswith("gate") for name, _ in model.named_parameters()) > 0
    return [group["initial_lr"] for group in groups]


def captions(out: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (out / "samples" / f"step-{step:06d}" / "captions.jsonl").open()]


def moved(before: dict[str, torch.Tensor], out: Path) -> set[str]:
    after = ASEForConditionalGeneration.from_pretrained(out).state_dict()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


# Parts ---------------------------------------------------------------------------------------------------------------


def test_critiques_are_compared_with_their_own_references():
    references = [["the light is soft", "soft light"], ["the horizon tilts"], ["sharp eyes , dull colours"]]
    perfect = finetune.caption_metrics([texts[0] for texts in references], references)
    shuffled = finetune.caption_metrics([references[i][0] for i in (1, 2, 0)], references)
    assert perfect["bleu4"] == pytest.approx(1, abs=1e-4) and perfect["topic_coverage"] == 1
    assert perfect["cider"] > 1 > shuffled["cider"]
    assert shuffled["bleu4"] < 0.01 and shuffled["topic_coverage"] == 0


def test_tiles_are_drawn_without_a_heat_map():
    photo = Image.new("RGB", (40, 30), "black")
    one, three = (ModelOutput(saliency_maps=torch.ones(count, 4, 4)) for count in (1, 3))
    (with_heat,) = finetune.draw_samples(tiny_processor(), one, [photo], ["good"])
    (without,) = finetune.draw_samples(tiny_processor(), three, [photo], ["good " * 200])
    assert with_heat.size[0] == without.size[0] == 960 and with_heat.size[1] < without.size[1]
    assert with_heat.getpixel((480, 10)) != (0, 0, 0) == without.getpixel((480, 10)) == with_heat.getpixel((470, 10))


def test_a_prompt_that_leaves_no_room_is_refused(checkpoint, photographs, tmp_path):
    with pytest.raises(ValueError, match="no room for a caption in 9"):
        run(checkpoint, photographs, tmp_path / "out", max_steps=1, stage="all", max_length=9)


# One process ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graft_run(base, tmp_path_factory) -> tuple[Path, list]:
    """A base is grafted, its added modules are trained by all four terms, and the result is pushed; what was pushed."""
    folder = tmp_path_factory.mktemp("graft")
    rows = [
        {"file_name": f"{i}.png", "text": CAPTIONS[i % len(CAPTIONS)], "score": i / 7, "aspect_labels": [i % 2, 0]}
        for i in range(8)
    ]
    lines = [{**row, "saliency": np.eye(4).tolist()} for row in rows] + [{"file_name": "cut.png", "text": "wrong"}]
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw(folder / "images" / "deep", *(line["file_name"] for line in lines))
    os.truncate(folder / "images" / "deep" / "cut.png", 2000)
    pushed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "create_repo", lambda api, repo_id, **kwargs: pushed.append(repo_id))
        patch.setattr(HfApi, "upload_folder", lambda api, **kwargs: pushed.append(kwargs))
        out = run(
            base,
            folder / "list.jsonl",
            folder / "out",
            images=folder / "images",
            columns="caption=text",
            score_range=[0, 1],
            decode_images=True,
            validation_share=0.4,
            stage="added",
            fusion_layers=[1],
            aspect_names=["bright", "blurred"],
            score_loss_weight=2.5,
            saliency_loss_weight=0.25,
            aspect_loss_weight=1.5,
            gate_lr_ratio=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=3,
            eval_steps=1,
            eval_photographs=2,
            num_samples=1,
            patience=0,
            report_to="tensorboard",
            push_to="someone/critic",
        )
    return out, pushed


WEIGHTS = {"caption_loss": 1, "score_loss": 2.5, "saliency_loss": 0.25, "aspect_loss": 1.5}


def test_stage_added_trains_the_added_modules_alone(graft_run, base):
    out, _ = graft_run
    model = ASEForConditionalGeneration.from_pretrained(out)
    before = ASEForConditionalGeneration.from_mllm_pretrained(base).state_dict()
    for name, tensor in model.state_dict().items():
        assert is_added(name) or torch.equal(tensor, before[name]), name
    assert [gate.item() != 0 for name, gate in model.named_parameters() if name.endswith("gate")] == [True]
    assert model.config.fusion_layers == [1]
    settings = model.config.iasm_config
    assert settings.aspect_names == ASEProcessor.from_pretrained(out).aspect_names == ["bright", "blurred"]
    assert {name: getattr(settings, f"{name}_weight") for name in WEIGHTS if name != "caption_loss"} == {
        name: weight for name, weight in WEIGHTS.items() if name != "caption_loss"
    }
    assert "EarlyStoppingCallback" not in trainer_state(out)["stateful_callbacks"]
    assert len(list(out.glob("checkpoint-*"))) == 2
    assert learning_rates(out)[-1] == pytest.approx(0.05)


def test_the_terms_of_the_loss_are_logged_and_drawn(graft_run):
    out, _ = graft_run
    for prefix in ("", "eval_"):
        terms = {name: history(out, prefix + name) for name in WEIGHTS}
        for step, loss in history(out, f"{prefix}loss").items():
            weighted = sum(weight * terms[name][step] for name, weight in WEIGHTS.items())
            assert loss == pytest.approx(weighted, rel=1e-4)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(next((out / "runs").rglob("events*")).parent), size_guidance={"images": 0})
    board.Reload()
    for name in WEIGHTS:
        drawn = [event.value for event in board.Scalars(f"train/{name}")]
        assert drawn == pytest.approx(list(history(out, name).values()))
    assert [event.step for event in board.Images("samples/000")] == [1, 2, 3]


def test_evaluation_writes_critiques_and_pictures(graft_run):
    out, _ = graft_run
    for step in (1, 2, 3):
        assert [len(line["caption"].split()) for line in captions(out, step)] == [4, 4]  # of three photographs
        (picture,) = (out / "samples" / f"step-{step:06d}").glob("*.jpg")
        assert Image.open(picture).size[0] == 960
        assert picture.stem == f"000-{captions(out, step)[0]['image_id']}"
    assert history(out, "eval_caption_words") == {1: 4, 2: 4, 3: 4}
    assert history(out, "eval_cider").keys() == history(out, "eval_bleu4").keys() == {1, 2, 3}


def test_the_card_says_what_was_done(graft_run):
    out, _ = graft_run
    card, best = ModelCard.load(out / "README.md"), trainer_state(out)["best_global_step"]
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures.keys() >= {"CIDEr", "BLEU-4"} and figures["loss"] == round(history(out, "eval_loss")[best], 4)
    for text in (
        f"Of step {best} of 3, one seed (42), on 2 validation critiques.",
        "5 rows to train on; 3 of other photographs",
        "damaged image (row left out)",
        "    python finetune.py --model",
        "| CIDEr |",
        f"transformers {finetune.transformers.__version__}",
        'model="someone/critic"',
    ):
        assert text in card.text


def test_the_result_is_uploaded_without_checkpoints(graft_run):
    out, (created, upload) = graft_run
    assert created == upload["repo_id"] == "someone/critic"
    paths = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    files = set(filter_repo_objects(paths, ignore_patterns=upload["ignore_patterns"]))
    assert any(path.startswith("checkpoint-") for path in paths)
    assert files >= {"README.md", "model.safetensors", "config.json", "modeling_ase.py", "processor_config.json"}
    assert not [file for file in files if file.startswith(("checkpoint", "samples", "runs"))]


def test_scores_alone_teach_the_scores_alone(checkpoint, tmp_path):
    """Ratings of AVA: no critique is written, and captions of weight 0 add nothing. Evaluated after the epoch."""
    draw(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    (tmp_path / "AVA.txt").write_text("".join(f"{i} {i} 0 0 0 0 1 9 {i} 0 0 0 1 2 3\n" for i in (1, 2, 3)))
    out = run(checkpoint, tmp_path, tmp_path / "out", max_steps=1, stage="all", dtype="bfloat16")
    assert history(out, "caption_loss") == {1: 0}
    weight = ASEForConditionalGeneration.from_pretrained(out).config.iasm_config.score_loss_weight
    assert history(out)[1] == pytest.approx(weight * history(out, "score_loss")[1], rel=1e-2) != 0
    assert history(out, "eval_loss").keys() == {1}
    assert not (out / "samples").exists() and "| loss |" in (out / "README.md").read_text()
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if is_added(name)} == {torch.float32}
    assert {tensor.dtype for name, tensor in tensors.items() if not is_added(name)} == {torch.bfloat16}


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
        photo, question = Image.open(images / f"{line['image_id']}.jpg"), aic_data.topic_question(line["aspect"])
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


# What goes wrong -----------------------------------------------------------------------------------------------------

SMALL = {"max_steps": 2, "eval_steps": 1, "stage": "added"}


def break_after(monkeypatch, step: int, breaking: Callable):
    """Calls `breaking(model)` before the forward pass that follows so many steps."""
    original = finetune.CritiqueTrainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        if self.state.global_step == step and model.training:
            breaking(model)
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(finetune.CritiqueTrainer, "compute_loss", compute_loss)


def test_a_loss_that_is_no_number_stops_the_run_with_its_terms(checkpoint, photographs, tmp_path, monkeypatch):
    break_after(monkeypatch, 1, lambda model: model.model.iasm.score_head.bias.data.fill_(float("nan")))
    with pytest.raises(
        ValueError, match=r"After step 1 the loss is nan \(terms: caption \d.*score nan.*--learning_rate"
    ):
        run(checkpoint, photographs, tmp_path / "out", **SMALL)
    assert finetune.last_checkpoint(tmp_path / "out").endswith("checkpoint-1")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_weights_that_are_no_numbers_are_not_saved(checkpoint, photographs, tmp_path, monkeypatch):
    original = finetune.CritiqueTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        if self.state.global_step == 1:  # the last step makes them so: no loss would tell
            model.model.iasm.score_head.bias.grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(finetune.CritiqueTrainer, "training_step", training_step)
    monkeypatch.setattr(finetune.CritiqueTrainer, "evaluate", lambda *args, **kwargs: {"eval_loss": 1.0})
    with pytest.raises(ValueError, match=r"trained tensors hold nan or infinity, e\.g\. model\.iasm\."):
        run(checkpoint, photographs, tmp_path / "out", **SMALL)
    assert finetune.last_checkpoint(tmp_path / "out").endswith("checkpoint-1")
    assert not (tmp_path / "out" / "model.safetensors").exists()


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


def test_a_run_does_not_go_on_with_other_data(checkpoint, photographs, tmp_path, capsys):
    data, out = shutil.copytree(photographs, tmp_path / "data"), tmp_path / "out"
    run(checkpoint, data, out, **SMALL)
    lines = (data / "train" / "metadata.jsonl").read_text().splitlines()
    (data / "train" / "metadata.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    options = SMALL | {"max_steps": 3}
    with pytest.raises(ValueError, match=r"train: 8 rows 8 photographs .*now 7 rows 7 photographs.*--output_dir"):
        run(checkpoint, data, out, **options)
    with pytest.raises(ValueError, match=r"model: .*now"):
        run(checkpoint, photographs, out, **{**options, "stage": "all"})
    run(checkpoint, data, out, **options, resume_from_checkpoint=out / "checkpoint-2")  # named, so it is meant
    assert trainer_state(out)["global_step"] == 3
    run(checkpoint, data, out, **options)  # and is what the run is of from now on
    assert "Goes on from" in capsys.readouterr().out


def test_a_run_without_evaluations(checkpoint, photographs, tmp_path):
    out = run(checkpoint, photographs, tmp_path / "out", max_steps=2, stage="added", eval_strategy="no", save_steps=1)
    assert not history(out, "eval_loss") and (out / "model.safetensors").exists()


def test_a_caption_of_three_thousand_words_is_cut_by_default(checkpoint, tmp_path, monkeypatch):
    rows = [{"file_name": f"{i}.png", "caption": "good " * (3000 if i == 0 else 3)} for i in range(4)]
    write_photographs(tmp_path / "data", rows)
    lengths = []
    original = finetune.CritiqueTrainer.compute_loss
    monkeypatch.setattr(
        finetune.CritiqueTrainer,
        "compute_loss",
        lambda self, model, inputs, *args, **kwargs: (
            lengths.append((inputs["labels"] != -100).sum(1).max().item())
            or original(self, model, inputs, *args, **kwargs)
        ),
    )
    run(checkpoint, tmp_path / "data", tmp_path / "out", **SMALL)
    assert max(lengths) in (4, 512)  # the long one may be held out


def test_a_budget_of_image_tokens_is_drawn_for_each_batch(checkpoint, photographs, tmp_path, monkeypatch):
    seen = []
    original = ASEForConditionalGeneration.forward

    def forward(self, *args, image_token_budget=None, **kwargs):
        seen.append((self.training, image_token_budget))
        return original(self, *args, image_token_budget=image_token_budget, **kwargs)

    monkeypatch.setattr(ASEForConditionalGeneration, "forward", forward)
    run(checkpoint, photographs, tmp_path / "out", **SMALL, image_token_budget=[0.25, 0.75])
    drawn = [budget for training, budget in seen if training]
    assert len(set(drawn)) == len(drawn) == 2 and all(0.25 <= budget <= 0.75 for budget in drawn)
    assert {budget for training, budget in seen if not training} == {None}
    with pytest.raises(ValueError, match="two shares"):
        run(checkpoint, photographs, tmp_path / "other", **SMALL, image_token_budget=[0.25, 1.5])


# The plain base ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.parametrize("stage", ["lora", "all"])
def test_the_plain_base_is_trained_by_the_same_command(stage, base, rated, tmp_path, monkeypatch):
    seen = []
    original = finetune.CritiqueTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.append(set(inputs))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(finetune.CritiqueTrainer, "compute_loss", compute_loss)
    out = run(base, rated, tmp_path / "out", stage=stage, graft="none", max_steps=2, eval_steps=1)
    assert not any(name.endswith(("_targets", "_weights")) for names in seen for name in names)
    model = LlavaForConditionalGeneration.from_pretrained(out)
    before = LlavaForConditionalGeneration.from_pretrained(base).state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and (stage == "all") == any("vision_tower" in name for name in moved)
    assert LlavaProcessor.from_pretrained(out) and not list(out.glob("modeling_ase.py"))
    assert len(captions(out, 1)) == 3 and history(out, "eval_cider").keys() == {1, 2}
    card = ModelCard.load(out / "README.md")
    assert (
        "without a saliency branch" in card.text
        and "trust_remote_code" not in card.text
        and "ase" not in card.data.tags
    )


def test_the_plain_base_needs_captions_and_no_branch(base, checkpoint, photographs, tmp_path):
    with pytest.raises(ValueError, match="which has the branch"):
        run(checkpoint, photographs, tmp_path / "out", graft="none")
    with pytest.raises(ValueError, match="got stage added"):
        run(base, photographs, tmp_path / "out", graft="none", stage="added")
    draw(tmp_path / "ava", "1.jpg", "2.jpg", "3.jpg")
    (tmp_path / "ava" / "AVA.txt").write_text("".join(f"{i} {i} 0 0 0 0 1 9 {i} 0 0 0 1 2 3\n" for i in (1, 2, 3)))
    with pytest.raises(ValueError, match="no captions"):
        run(base, tmp_path / "ava", tmp_path / "out", graft="none", stage="all")


# Stage module --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rated(tmp_path_factory) -> Path:
    """Photographs of two sizes with scores, maps and labels for some; one has two captions."""
    folder = tmp_path_factory.mktemp("rated")
    for split, numbers in (("train", range(6)), ("validation", range(6, 9))):
        rows = [
            {
                "file_name": f"{i}.png",
                "captions": CAPTIONS[: 1 + (i == 0)],
                "score": 1.0 + i,
                **({"saliency": np.eye(4).tolist()} if i % 2 else {}),
            }
            for i in numbers
        ]
        write_photographs(folder / split, rows)
    return folder


def test_stage_module_trains_the_module_alone_as_its_encoder_would_feed_it(checkpoint, rated, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(module_stage, "collate", lambda rows: seen.append(len(rows)) or collate_inputs(rows))
    out = run(checkpoint, rated, tmp_path / "out", stage="module", num_train_epochs=2, per_device_train_batch_size=3)
    assert sum(seen) == 2 * 6 + 2 * 3  # once a photograph, not once a caption
    assert not (out / "inputs").exists()
    before = ASEForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    model = ASEForConditionalGeneration.from_pretrained(out)
    assert model.config.iasm_config.encoder_layers
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(name.startswith("model.iasm.") for name in moved)
    assert {
        "model.iasm.map_head.0.weight",
        "model.iasm.score_head.weight",
        "model.iasm.encoder_norms.0.weight",
    } <= moved
    assert ASEProcessor.from_pretrained(out) and ModelCard.load(out / "README.md").data.eval_results


def test_kept_inputs_train_as_the_whole_model_does(base, rated, tmp_path):
    """The loss of the kept batch is that of the whole model, up to half precision."""
    model, processor = (
        ASEForConditionalGeneration.from_mllm_pretrained(base).eval(),
        ASEProcessor.from_pretrained(base),
    )
    splits, _ = aic_data.load(str(rated))
    rows = module_stage.first_rows(aic_data.training_rows(splits["train"], processor))
    args = TrainingArguments(output_dir=str(tmp_path), per_device_eval_batch_size=4, use_cpu=True, report_to="none")
    collator = ASEDataCollator(processor)
    module_stage.keep_inputs(model, rows, collator, args, tmp_path / "kept")
    kept = module_stage.KeptInputs(tmp_path / "kept")
    assert len(kept) == len(rows) == 6
    batch = module_stage.collate([kept[i] for i in range(6)])
    assert batch["encoder_states"][0].shape[0] == 6 and batch["encoder_states"][0].ndim == 4
    with torch.no_grad():
        whole = model(**collator([rows[i] for i in range(6)]))
        alone = model.model.iasm(**batch)
    for name in ("score_loss", "saliency_loss"):
        torch.testing.assert_close(alone[name], whole[name], rtol=2e-3, atol=1e-4)
