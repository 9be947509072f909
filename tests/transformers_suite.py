"""
The common tests of transformers, as its source distribution ships them, on our classes and on those of the bases inside:
LLaVA and Qwen2-VL.

    pip install parameterized==0.9.0
    python tests/transformers_suite.py

Fetches the distribution of the installed version, or takes the folder `tests` of an unpacked one, or of a clone, which
has the generation tests too. Prints what a base passes and ours fails or skips, and exits with 1 if anything fails. Not a
part of `pytest`.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import transformers


# what the shipped files import and the distribution leaves out
LEFT_OUT = {
    "exporters/test_export.py": "class ExportTesterMixin: pass\nclass ExportGenerateTesterMixin: pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "distributed_testing_utils.py": "run_distributed = None\n",
}

MODELS = '''
import sys
import unittest
from unittest.mock import patch

sys.path.insert(0, {tests!r})
import torch
from conftest import ASPECTS, FUSION, IASM, make_inputs, tiny_config
from families import FAMILIES, IMAGE
from transformers import LlavaForConditionalGeneration, LlavaModel, Qwen2VLForConditionalGeneration, Qwen2VLModel

from ase_mllm import ASEConfig, ASEForConditionalGeneration, ASEModel

from ..test_configuration_common import ConfigTester
from ..generation.test_utils import GenerationTesterMixin
from ..test_modeling_common import ModelTesterMixin
from ..test_tensor_parallel_mixin import TensorParallelTesterMixin
from ..test_training_mixin import TrainingTesterMixin


class LlavaTester:
    """A base of two layers, inside an ASE model or alone."""

    batch_size, seq_length, is_training = 2, 23, True
    hidden_size = image_size = 32
    num_hidden_layers = num_attention_heads = 2
    vocab_size = 99

    def __init__(self, ase, base_model_class):
        self.ase = ase
        self.base_model_class = ASEModel if ase else base_model_class
        base = self.base_config()
        self.text_config, self.vision_config = base.text_config.to_dict(), base.vision_config.to_dict()

    def base_config(self):
        config = tiny_config(vision_feature_layer=-1)
        config.vision_config.num_hidden_layers = 2
        return config

    def get_config(self):
        base = self.base_config()
        return ASEConfig(mllm_config=base, iasm_config=IASM, **FUSION) if self.ase else base

    def inputs(self):
        return make_inputs()

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), self.inputs()


class Qwen2VLTester(LlavaTester):
    """Images of one patch, for the tests cut every input at the batch's size."""

    def base_config(self):
        config = FAMILIES["qwen2_vl"].config()
        config.vision_config.spatial_merge_size, config.vision_config.depth = 1, 2
        return config

    def inputs(self):
        inputs = {{name: value for name, value in make_inputs().items() if name != "pixel_values"}}
        inputs["input_ids"] = torch.randint(20, 99, inputs["input_ids"].shape)
        inputs["input_ids"][:, 2] = IMAGE
        vision = self.base_config().vision_config
        return {{
            **inputs,
            "pixel_values": torch.randn(2, 3 * vision.temporal_patch_size * vision.patch_size**2),
            "image_grid_thw": torch.tensor([[1, 1, 1]] * 2),
            "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long(),
        }}


class Common(ModelTesterMixin, GenerationTesterMixin, TensorParallelTesterMixin, TrainingTesterMixin):
    _is_composite = True
    ase = False
    base_tester, model_tester = LlavaTester, None  # pytest takes names in "test" for tests

    def setUp(self):
        self.model_tester = self.base_tester(self.ase, self.all_model_classes[0])
        config_class = ASEConfig if self.ase else self.all_model_classes[0].config_class
        self.config_tester = ConfigTester(self, config_class=config_class, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs, model_class, return_labels=return_labels)
        if return_labels and model_class is not self.all_model_classes[0]:
            inputs["labels"] = inputs["input_ids"]
            if self.ase:  # so that every head has something to learn
                inputs["score_targets"] = torch.full((2, 10), 0.1)
                inputs["aspect_targets"] = torch.ones(2, len(ASPECTS))
        return inputs


class ASECommon(Common):
    ase = True
    all_model_classes = (ASEModel, ASEForConditionalGeneration)
    test_can_init_all_missing_weights_before_2023 = True  # the year is looked for in the file

    def setUp(self):
        super().setUp()
        self.enterContext(patch.object(ASEConfig, "base_model_tp_plan", {{}}))  # looked for one level deep only

    def test_reverse_loading_mapping(self):
        # the names in memory are saved, see ASEPreTrainedModel.save_pretrained
        super().test_reverse_loading_mapping(check_keys_were_modified=False, skip_base_model=True)


class LlavaTest(Common, unittest.TestCase):
    all_model_classes = (LlavaModel, LlavaForConditionalGeneration)


class ASELlavaTest(ASECommon, unittest.TestCase):
    pass


class Qwen2VLTest(Common, unittest.TestCase):
    base_tester = Qwen2VLTester
    all_model_classes = (Qwen2VLModel, Qwen2VLForConditionalGeneration)


class ASEQwen2VLTest(ASECommon, unittest.TestCase):
    base_tester = Qwen2VLTester
'''

PROCESSORS = '''
import sys
import unittest

sys.path.insert(0, {tests!r})
from conftest import ASPECTS, tiny_processor
from transformers import LlavaProcessor

from ase_mllm import ASEProcessor

from ..test_processing_common import ProcessorTesterMixin


class Common(ProcessorTesterMixin):
    image_token = "<image>"

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_processor().tokenizer

    @classmethod
    def _setup_image_processor(cls):
        return tiny_processor().image_processor

    @staticmethod
    def prepare_processor_dict():
        names = ("chat_template", "patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
        return {{name: getattr(tiny_processor(), name) for name in names}}


class FromParts(ASEProcessor):
    """Stands in where the tests build a processor of the parts of its base."""

    def __new__(cls, **parts):
        return ASEProcessor(LlavaProcessor(**parts), ASPECTS)

    @classmethod
    def get_attributes(cls):
        return LlavaProcessor.get_attributes()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return ASEProcessor.from_pretrained(*args, **kwargs)


class LlavaTest(Common, unittest.TestCase):
    processor_class = LlavaProcessor


class ASELlavaTest(Common, unittest.TestCase):
    processor_class = FromParts
'''


def fetch(folder: Path) -> Path:
    """The tests of the installed version's source distribution."""
    wanted = f"transformers=={transformers.__version__}"
    options = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation"]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options, "-d", folder, wanted], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz") / "tests"


def lay_out(shipped: Path, folder: Path):
    """A package `tests` with the shipped files and ours beside them."""
    tests = folder / "tests"
    shutil.copytree(shipped, tests)
    ours = {"ase/test_modeling_ase.py": MODELS, "ase/test_processing_ase.py": PROCESSORS}
    here = Path(__file__).parent
    ours = {name: text.format(tests=str(here)) for name, text in ours.items()}
    photo = str(next((here.parent / "examples" / "photos").glob("*.jpg")))
    fetched = {"../utils/fetch_hub_objects_for_ci.py": f"def url_to_local_path(url): return {photo!r}\n"}
    left_out = {name: text for name, text in LEFT_OUT.items() if not (tests / name).exists()}
    for name, text in {**left_out, **ours, **fetched}.items():
        path = tests / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    (tests / "__init__.py").touch()


def outcomes(report: Path) -> dict[str, dict[str, str]]:
    """Class and test to "passed", "skipped: why" or the first line of what failed."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        text = "passed" if bad is None else bad.get("message").splitlines()[0]
        text = f"skipped: {text}" if bad is not None and bad.tag == "skipped" else text
        tests = found.setdefault(case.get("classname").rsplit(".", 1)[-1], {})
        name = f"{case.get('classname').split('.')[-2]}.{case.get('name')}"
        if tests.get(name, "passed").startswith(("passed", "skipped")):  # subtests have the name of their test
            tests[name] = text
    return found


def run(folder: Path, k: str | None) -> dict[str, dict[str, str]]:
    options = ["-q", "--disable-warnings", "-p", "no:cacheprovider", "--junitxml", "report.xml"]
    command = [sys.executable, "-m", "pytest", *options, "tests/ase", *(["-k", k] if k else [])]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # of pytest: all passed, some failed
        raise RuntimeError(f"The tests could not run:\n{done.stdout[-3000:]}")
    return outcomes(folder / "report.xml")


def compare(base: dict[str, str], ours: dict[str, str], name: str) -> int:
    """Prints where an ASE model does worse than its base alone; returns how many tests fail for it only."""
    failed = 0
    for test, expected in base.items():
        outcome = ours.get(test, "missing")
        if outcome == "passed" or not expected.startswith(("passed", "skipped")):
            continue
        if not outcome.startswith("skipped"):
            failed += 1
            print(f"FAILED beside {name}: {test}: {outcome}")
        elif expected == "passed":
            print(f"{name} passes {test}, an ASE model of it is {outcome}")
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, nargs="?", help="the folder `tests` of an unpacked source distribution")
    parser.add_argument("-k", help="as of pytest")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        lay_out(args.tests or fetch(Path(folder)), Path(folder))
        found = run(Path(folder), args.k)
    failed = sum(compare(found[base], found[f"ASE{base}"], base) for base in ("LlavaTest", "Qwen2VLTest"))
    for name, tests in found.items():
        counts = [sum(outcome.startswith(kind) for outcome in tests.values()) for kind in ("passed", "skipped")]
        print(f"{name}: {counts[0]} passed, {counts[1]} skipped, {len(tests) - sum(counts)} failed")
    print(f"{failed} fail here and not for the base alone")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
