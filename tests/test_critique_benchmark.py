"""examples/critique/critique_benchmark.py small: every arm starts as its base and differs as it says; figures by hand."""

import argparse
import json
import sys

import critique_benchmark as benchmark
import pytest
import torch
from critique_captions import FAULTS
from PIL import Image

from ase_mllm import ASEDataCollator, ASEForConditionalGeneration, ASEProcessor


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def processor():
    return ASEProcessor.from_pretrained(benchmark.BUNDLE)


def arm_of(name: str, processor):
    torch.manual_seed(0)
    return benchmark.graft(name, benchmark.load_base(), processor).eval()


def make_batch(processor, number: int = 2) -> dict[str, torch.Tensor]:
    row = {
        "image": Image.effect_noise((192, 192), 90).convert("RGB"),
        "caption": "The light is too dark",
        "score": [0.1] * 10,
        "aspect_labels": [0.0] * len(FAULTS),
        "saliency": torch.eye(32),
    }
    return ASEDataCollator(processor)([row] * number)


@pytest.mark.parametrize("name", benchmark.ARMS)
def test_every_arm_starts_as_the_base(name, processor):
    inputs = {key: value for key, value in make_batch(processor).items() if not key.endswith("targets")}
    with torch.inference_mode():
        expected, logits = (arm_of(one, processor)(**inputs).logits for one in ("base", name))
    assert torch.equal(expected, logits)


def test_arms_differ_as_they_say(processor):
    configs = {name: arm_of(name, processor).config for name in benchmark.ARMS if name not in benchmark.BASES}
    weights = {
        name: [getattr(config.iasm_config, f"{term}_loss_weight") for term in ("score", "aspect", "saliency")]
        for name, config in configs.items()
    }
    assert weights["ase"] == weights["fusion-last"] == [5, 3, 1] and weights["control"] == [5, 3, 0]
    assert weights["no-score-loss"] == [0, 3, 1] and weights["no-aspect-loss"] == [5, 0, 1]
    layers = {name: config.fusion_layers for name, config in configs.items()}
    assert layers["fusion-first"] == [0] and layers["fusion-middle"] == [1] and layers["fusion-last"] == [2]
    assert layers["ase"] == layers["control"] == [0, 1, 2]


def test_the_base_is_the_bundles_without_its_branch(processor):
    base = benchmark.load_base()
    bundle = ASEForConditionalGeneration.from_pretrained(benchmark.BUNDLE)
    for name, parameter in bundle.model.mllm.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name)), name
    assert not any(hook for module in base.modules() for hook in module._forward_hooks)


@pytest.mark.parametrize("name", ["base", "ase"])
def test_without_captions_the_same_is_learned_but_for_the_captions(name, processor):
    learner = benchmark.Learner(benchmark.load_base())
    learner.mllm = benchmark.graft(name, learner.mllm, processor)
    batch = make_batch(processor)
    whole = learner.eval()(**batch)
    caption = learner.mllm(**{key: value for key, value in batch.items() if not key.endswith("targets")}).loss
    alone = learner(
        **{key: value for key, value in batch.items() if key.startswith(("pixel", "score", "aspect", "sal"))}
    )
    torch.testing.assert_close(alone["aspects"], whole["aspects"])
    torch.testing.assert_close(alone["loss"], whole["loss"] - caption)
    assert alone["loss"] > 0
    alone["loss"].backward()
    assert learner.aspects.weight.grad.abs().max() > 0 and learner.scores.weight.grad.abs().max() > 0


def test_accuracies_by_hand():
    def truth(*present: str, unknown: tuple[str, ...] = ()) -> dict[str, float]:
        return {fault: 1.0 if fault in present else -1.0 if fault in unknown else 0.0 for fault in FAULTS}

    truths = [truth("underexposed"), truth("overexposed"), truth(), truth(), truth(unknown=("noisy",))]
    said = [{"underexposed"}, {"underexposed"}, set(), {"overexposed"}, {"noisy"}]
    result = benchmark.accuracies(said, truths, [False] * 5)
    assert result["exposure"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert result["noise"] == 1  # the unknown one does not count, and there is no noisy picture
    assert result["placement"] != result["placement"]  # no composites

    truths = [truth("subject_centred", "subject_blurred"), truth("subject_left_third"), truth("subject_near_edge")]
    said = [{"subject_centred"}, {"subject_centred", "subject_left_third"}, {"subject_near_edge"}]
    result = benchmark.accuracies(said, truths, [True, True, False])
    assert result["placement"] == pytest.approx(0.5) and result["depth"] == pytest.approx(0.5)
    assert result["subject sharpness"] == pytest.approx(0.5)


def test_a_head_names_one_fault_an_aspect_and_always_a_placement():
    logits = dict.fromkeys(FAULTS, -2.0) | {"underexposed": 0.5, "overexposed": 1.0, "subject_left_third": -1.0}
    assert benchmark.decide(list(logits.values())) == {"overexposed", "subject_left_third"}


def test_it_runs_small_and_does_not_run_twice(tmp_path, monkeypatch, critique_sources, capsys):
    monkeypatch.setattr(benchmark, "load_sources", lambda split, directory: critique_sources[split])
    log = tmp_path / "log.md"
    log.write_text("before\n<!-- benchmark: begin -->\nold\n<!-- benchmark: end -->\nafter\n")
    arguments = "--arms base ase --seeds 0 1 --pictures 8 --test-pictures 4 --warm-up 8 --vision-samples 4 --samples 8 --jobs 1"
    command = ["x", *arguments.split(), "--work", str(tmp_path / "work"), "--record", str(log)]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    text = log.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| placement | " in text and "| difference | ase - base |" in text and " ± " in text
    assert benchmark.base_checksum()[:12] in text and "ablation" not in text
    record = json.loads(log.with_suffix(".json").read_text())
    assert list(record["arms"]["ase"]) == ["0", "1"] and "map AUC" not in record["arms"]["base"]["0"]
    kept = json.loads((tmp_path / "work" / "ase-1.json").read_text())
    assert len(kept["gates"]) == 3 and any(kept["gates"]) and kept["saliency"]["AUC"] > 0

    monkeypatch.setattr(benchmark, "train", lambda *args: pytest.fail("trained again"))
    benchmark.main()
    assert log.read_text() == text

    monkeypatch.setattr(sys, "argv", [*command, "--samples", "24"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "other settings" in capsys.readouterr().err


def test_differences_are_those_of_the_same_seed():
    def result(accuracy: float, saliency: bool) -> dict:
        text = dict.fromkeys(("CIDEr", "BLEU-4"), 0.5)
        maps = dict.fromkeys(("AUC", "NSS", "CC", "centre bias AUC"), 0.75) if saliency else None
        accuracies = dict.fromkeys(benchmark.ASPECTS, accuracy)
        return {
            **{"accuracy": accuracies, "accuracy of the heads": accuracies, "text": text, "text, composites": text},
            **{"accuracy of the IASM": None, "wrong photo": text, "saliency": maps, "gates": [0.5, -0.25] * saliency},
            **{"parameters": 5e6, "seconds of training": 100},
        }

    values = {"base": (0.25, 0.5), "ase": (0.5, 0.75), "no-score-loss": (0.5, 0.75)}
    runs = {(arm, seed): one for arm, seeds in values.items() for seed, one in enumerate(seeds)}
    figures = {run: benchmark.figures_of(result(one, run[0] != "base")) for run, one in runs.items()}
    names = ("warm_up", "vision_samples", "samples", "pictures", "test_pictures")
    settings = {"base": "0123456789abcdef", **dict.fromkeys(names, 8)}
    about, main, differences, ablations = benchmark.as_markdown(figures, settings).split("\n\n")
    assert "Seeds 0, 1; 8 + 8 + 8 samples" in about and "SHA-256 0123456789ab." in about
    assert "| figure | base | ase |" in main and "| accuracy | 37.5 ± 17.7 | 62.5 ± 17.7 |" in main
    assert "| map AUC | - | 0.750 ± 0.000 |" in main and "| gates | - | 0.375 ± 0.000 |" in main
    assert "| difference | ase - base |" in differences and "| noise | 25.0 ± 0.0 |" in differences
    assert "wrong photo" in main and "wrong photo" not in differences
    assert ablations.splitlines()[2].startswith("| no-score-loss | 0.0 ± 0.0 | 0.0 ± 0.0 |")


def test_a_longer_base_sees_three_times_as_many_samples(tmp_path, monkeypatch):
    seen = []
    args = argparse.Namespace(work=tmp_path, warm_up=8, vision_samples=4, samples=6, batch_size=2)
    monkeypatch.setattr(benchmark, "Pictures", lambda work, split, number=0, start=0: seen.append((start, number)))
    monkeypatch.setattr(benchmark, "train", lambda *args: 0.0)
    monkeypatch.setattr(benchmark, "measure", lambda *args: {})
    for arm in ("base", "base-longer"):
        benchmark.run_arm(arm, 0, args)
    assert seen == [(0, 8), (8, 4), (12, 6), (0, 0), (0, 24), (24, 12), (36, 18), (0, 0)]
