"""
The common model tests of transformers, as its source distribution ships them, on our classes and on LLaVA's own.

    pip install parameterized
    pip download --no-binary :all: --no-deps --no-build-isolation transformers==<the installed version>
    tar xf transformers-*.tar.gz
    python tests/transformers_suite.py transformers-*/tests

Prints what LLaVA passes and ours does not, and exits with 1 if there is anything. Not a part of `pytest`.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path


# what the shipped files import and the distribution leaves out
LEFT_OUT = {
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}

TESTS = '''
import sys
import unittest

sys.path.insert(0, {tests!r})
import torch
from conftest import ASPECTS, FUSION, IASM, make_inputs, tiny_config
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel

from ase_mllm import ASEConfig, ASEForConditionalGeneration, ASEModel

from ..test_configuration_common import ConfigTester
from ..test_modeling_common import ModelTesterMixin
from ..test_training_mixin import TrainingTesterMixin


class Tester:
    """A LLaVA of two layers, inside an ASE model or alone."""

    batch_size, seq_length, is_training = 2, 23, True
    hidden_size = image_size = 32
    num_hidden_layers = num_attention_heads = 2

    def __init__(self, ase):
        self.ase = ase
        base = self.base_config()
        self.text_config, self.vision_config = base.text_config.to_dict(), base.vision_config.to_dict()

    def base_config(self):
        config = tiny_config(vision_feature_layer=-1)
        config.vision_config.num_hidden_layers = 2
        return config

    def prepare_config_and_inputs_for_common(self):
        base = self.base_config()
        return ASEConfig(mllm_config=base, iasm_config=IASM, **FUSION) if self.ase else base, make_inputs()


class Common(ModelTesterMixin, TrainingTesterMixin):
    _is_composite = True

    def setUp(self):
        self.model_tester = Tester(self.ase)
        config_class = ASEConfig if self.ase else LlavaConfig
        self.config_tester = ConfigTester(self, config_class=config_class, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs, model_class, return_labels=return_labels)
        if return_labels and model_class is not self.all_model_classes[0]:
            inputs["labels"] = inputs["input_ids"]
            if self.ase:  # so that every head has something to learn
                inputs["rating_targets"] = torch.full((2, 10), 0.1)
                inputs["aspect_targets"] = torch.ones(2, len(ASPECTS))
        return inputs


class LlavaTest(Common, unittest.TestCase):
    ase = False
    all_model_classes = (LlavaModel, LlavaForConditionalGeneration)


class ASETest(Common, unittest.TestCase):
    ase = True
    all_model_classes = (ASEModel, ASEForConditionalGeneration)

    def test_reverse_loading_mapping(self):
        # the names in memory are saved, see ASEPreTrainedModel.save_pretrained
        super().test_reverse_loading_mapping(check_keys_were_modified=False, skip_base_model=True)
'''


def lay_out(shipped: Path, folder: Path):
    """A package `tests` with the shipped files and ours beside them."""
    tests = folder / "tests"
    shutil.copytree(shipped, tests)
    for name, text in {**LEFT_OUT, "ase/test_modeling_ase.py": TESTS.format(tests=str(Path(__file__).parent))}.items():
        path = tests / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    (tests / "__init__.py").touch()


def outcomes(report: Path) -> dict[str, dict[str, str]]:
    """Class and test to "passed", "skipped" or the first line of what failed."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        text = "passed" if bad is None else bad.tag if bad.tag == "skipped" else bad.get("message").splitlines()[0]
        tests = found.setdefault(case.get("classname").rsplit(".", 1)[-1], {})
        if tests.get(case.get("name"), "passed") in ("passed", "skipped"):
            tests[case.get("name")] = text
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the folder `tests` of the unpacked distribution")
    parser.add_argument("-k", help="as of pytest")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        lay_out(args.tests, Path(folder))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--disable-warnings",
            "-p",
            "no:cacheprovider",
            "--junitxml",
            "report.xml",
        ]
        command += ["tests/ase/test_modeling_ase.py", *(["-k", args.k] if args.k else [])]
        run = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
        if run.returncode not in (0, 1):  # of pytest: all passed, some failed
            raise RuntimeError(f"The tests could not run:\n{run.stdout[-3000:]}")
        found = outcomes(Path(folder) / "report.xml")
    worse = 0
    for name, outcome in found["ASETest"].items():
        expected = found["LlavaTest"].get(name)
        if outcome not in ("passed", "skipped") and expected in ("passed", "skipped"):
            worse += 1
            print(f"{name}: {outcome}")
    for name, tests in found.items():
        counts = [sum(outcome == kind for outcome in tests.values()) for kind in ("passed", "skipped")]
        print(f"{name}: {counts[0]} passed, {counts[1]} skipped, {len(tests) - sum(counts)} failed")
    print(f"{worse} fail here and not for LLaVA")
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
