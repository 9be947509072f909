"""Saved folders: the same weights again, the frozen names of what is added, and loading where nothing is installed."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import graft, is_added, make_inputs, read_config, tiny_base, tiny_model, tiny_processor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

import ase_mllm
from ase_mllm import ASEConfig, ASEForConditionalGeneration, ASEModel, ASEProcessor, ImageAestheticSaliencyModule


TESTS = Path(__file__).parent
CODE = sorted(path.name for path in TESTS.parent.glob("*.py") if path.name != "__init__.py")
AUTO_MAP = {
    "AutoConfig": "configuration_ase.ASEConfig",
    "AutoModel": "modeling_ase.ASEModel",
    "AutoModelForImageTextToText": "modeling_ase.ASEForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_ase.ASEForConditionalGeneration",
    "AutoProcessor": "processing_ase.ASEProcessor",
}


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert sorted(first) == sorted(second)
    return all(first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
def test_saved_keys_are_those_of_the_base_and_ours(encoder, tmp_path):
    """A rename breaks every saved checkpoint: then either undo it, or map the old names and say so."""
    base = tiny_base(encoder)
    expected = [f"model.mllm.{key}" for key in base.state_dict()]
    graft(base).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = sorted(file.keys())
    assert [key for key in keys if not is_added(key)] == sorted(expected)
    frozen = json.loads((TESTS / "state_dict_keys.json").read_text())
    assert [key for key in keys if is_added(key)] == frozen


def test_the_names_of_the_base_s_own_files_load_too(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, save_original_format=True)
    assert "model.mllm.language_model.lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert same_tensors(model.state_dict(), ASEForConditionalGeneration.from_pretrained(tmp_path).state_dict())


def test_sharded_folders_load(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same_tensors(model.state_dict(), ASEForConditionalGeneration.from_pretrained(tmp_path).state_dict())


def test_loading_reports_nothing_missing_or_unexpected(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for auto_class in (ASEForConditionalGeneration, ASEModel):
        _, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        assert {key.split(".")[-2] for key in report["unexpected_keys"]} <= {"lm_head"}


def test_the_body_alone(tmp_path):
    """`AutoModel` reads a whole checkpoint, and a checkpoint of the body starts a whole model."""
    inputs = make_inputs()
    model = tiny_model()
    model.save_pretrained(tmp_path / "whole")
    body = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(body) is ASEModel
    assert torch.equal(body(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    whole = ASEForConditionalGeneration.from_pretrained(tmp_path / "body")
    assert torch.equal(whole.model(**inputs).last_hidden_state, body(**inputs).last_hidden_state)


def test_the_saliency_module_alone(tmp_path):
    inputs = {"pixel_values": make_inputs()["pixel_values"], "encoder_states": [torch.randn(2, 32, 4, 4)]}
    iasm = tiny_model().model.iasm
    iasm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"AutoConfig": "configuration_ase.IASMConfig", "AutoModel": "modeling_iasm.ImageAestheticSaliencyModule"}
    assert config["auto_map"] == names
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is ImageAestheticSaliencyModule
    assert same_tensors(iasm.state_dict(), loaded.state_dict())
    outputs, expected = loaded(**inputs), iasm(**inputs)
    assert all(torch.equal(outputs[name], expected[name]) for name in expected)


# The folder is a Hub repository -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["model", "body", "config"])
def test_a_folder_names_all_classes_and_carries_their_code(part, tmp_path):
    model = tiny_model()
    {"model": model, "body": model.model, "config": model.config}[part].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    for name in CODE if part != "config" else ["configuration_ase.py"]:
        assert (tmp_path / name).read_bytes() == (Path(ase_mllm.__file__).parent / name).read_bytes()


def test_names_that_point_to_the_hub_are_replaced(tmp_path):
    """A model loaded from the Hub and saved here must not go on running the code that lies there."""
    config = tiny_model().config
    config.auto_map = {name: f"someone/something--{reference}" for name, reference in AUTO_MAP.items()}
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.parametrize("trust", [None, True, False])
def test_the_installed_classes_need_no_trust(trust, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    expected = {
        AutoConfig: ASEConfig,
        AutoProcessor: ASEProcessor,
        AutoModel: ASEModel,
        AutoModelForImageTextToText: ASEForConditionalGeneration,
        AutoModelForMultimodalLM: ASEForConditionalGeneration,
    }
    for auto_class, own_class in expected.items():
        assert type(auto_class.from_pretrained(tmp_path, trust_remote_code=trust)) is own_class
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(AutoModelForImageTextToText.from_config(config)) is ASEForConditionalGeneration


@pytest.fixture(scope="module")
def fresh_folders(tmp_path_factory) -> list[Path]:
    """A folder saved here, loaded and saved by a process without the package, then that one by another process."""
    root = tmp_path_factory.mktemp("fresh")
    folders = [root / name for name in ("first", "second", "third")]
    tiny_model().save_pretrained(folders[0])
    tiny_processor().save_pretrained(folders[0])
    save_file(make_inputs(), folders[0] / "inputs.safetensors")
    (root / "elsewhere").mkdir()
    environment = {**os.environ, "HF_HOME": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    for folder, following in pairwise(folders):
        # -I: neither the folder of the script nor PYTHONPATH may bring the package in
        command = [sys.executable, "-I", str(TESTS / "fresh_process.py"), str(folder), str(following)]
        process = subprocess.run(
            command, cwd=root / "elsewhere", env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr[-3000:]
        assert "eprecat" not in process.stderr, process.stderr
    return folders


@pytest.mark.slow
def test_a_process_without_the_package_computes_the_same(fresh_folders):
    inputs = make_inputs()
    prompt = tiny_processor().tokenizer(tiny_processor().critique_prompt(), return_tensors="pt")["input_ids"]
    for folder in fresh_folders[:2]:
        outputs = load_file(folder / "outputs.safetensors")
        expected = ASEForConditionalGeneration.from_pretrained(folder)
        assert torch.equal(outputs["logits"], expected(**inputs).logits)
        assert torch.equal(outputs["saliency_maps"], expected(**inputs).saliency_maps)
        assert torch.equal(outputs["last_hidden_state"], expected.model(**inputs).last_hidden_state)
        tokens = expected.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert torch.equal(outputs["tokens"], tokens)
        assert torch.equal(outputs["prompt"], prompt)


@pytest.mark.slow
def test_a_process_without_the_package_saves_the_same_folder(fresh_folders):
    first, second, third = fresh_folders
    for folder in (second, third):
        for name in [*CODE, "generation_config.json", "processor_config.json", "chat_template.jinja"]:
            assert (folder / name).read_bytes() == (first / name).read_bytes(), name
        assert read_config(folder) == read_config(first)
        assert same_tensors(*(load_file(one / "model.safetensors") for one in (first, folder)))
        iasm = ["configuration_ase.py", "modeling_iasm.py", "photometry.py"]
        for part, code in (("config_alone", iasm[:1]), ("iasm_alone", iasm), ("body_alone", CODE)):
            assert sorted(path.name for path in (folder / part).glob("*.py")) == code, part
