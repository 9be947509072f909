"""examples/critique/critique_benchmark.py small: every arm starts as its base and differs as it says; figures by hand."""

import argparse
import json
import sys

import critique_benchmark as benchmark
import pytest
import torch
from critique_data import FAULTS

from ase_mllm import ASEForConditionalGeneration, ASEProcessor


@pytest.fixture(scope="module")
def processor():
    return ASEProcessor.from_pretrained(benchmark.BUNDLE)


def arm_of(name: str, processor):
    torch.manual_seed(0)
    return benchmark.graft(name, benchmark.load_base(), processor).eval()


def make_batch(processor, number: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    row = {
        "image": torch.randint(0, 256, (3, 192, 192), generator=generator, dtype=torch.uint8),
        "caption": "The light is too dark",
        "score": torch.full((10,), 0.1),
        "aspect_labels": torch.zeros(len(FAULTS)),
        "saliency": torch.eye(32),
    }
    return benchmark.Collator(processor)([row] * number)


@pytest.mark.parametrize("name", benchmark.ARMS)
def test_every_arm_starts_as_the_base(name, processor):
    inputs = {key: value for key, value in make_batch(processor).items() if not key.endswith("targets")}
    with torch.inference_mode():
        expected, logits = (arm_of(one, processor)(**inputs).logits for one in ("base", name))
    assert torch.equal(expected, logits)


def test_control_has_the_parameters_of_ase_and_no_map_loss(processor):
    ase, control = (arm_of(name, processor) for name in ("ase", "control"))
    assert ase.num_parameters() == control.num_parameters()
    assert [model.config.iasm_config.saliency_loss_weight for model in (ase, control)] == [1.0, 0.0]


@pytest.mark.parametrize("name, term", [("no-score-loss", "score"), ("no-aspect-loss", "aspect"), ("ase", None)])
def test_a_loss_term_is_left_out(name, term, processor):
    config = arm_of(name, processor).config.iasm_config
    off = [one for one in ("score", "aspect", "saliency") if getattr(config, f"{one}_loss_weight") == 0]
    assert off == ([term] if term else [])


@pytest.mark.parametrize("name, layers", [("fusion-first", [0]), ("fusion-middle", [1]), ("fusion-last", [2])])
def test_one_layer_is_fused(name, layers, processor):
    assert arm_of(name, processor).config.fusion_layers == layers


def test_the_base_is_the_bundles_without_its_branch(processor):
    base = benchmark.load_base()
    bundle = ASEForConditionalGeneration.from_pretrained(benchmark.BUNDLE)
    for name, parameter in bundle.model.mllm.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name)), name
    assert not any(hook for module in base.modules() for hook in module._forward_hooks)


def test_heads_train_in_every_arm(processor):
    for name in ("base", "ase"):
        learner = benchmark.Learner(benchmark.load_base())
        learner.mllm = benchmark.graft(name, learner.mllm, processor)
        batch = make_batch(processor)
        loss = learner(**batch)["loss"]
        loss.backward()
        assert loss > learner.mllm(**{k: v for k, v in batch.items() if "targets" not in k}).loss
        assert learner.aspects.weight.grad.abs().max() > 0 and learner.scores.weight.grad.abs().max() > 0


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
    for path in (tmp_path / "work").glob("*-*.json"):  # recorded runs are enough
        path.unlink()
    benchmark.main()
    assert log.read_text() == text

    monkeypatch.setattr(sys, "argv", [*command, "--samples", "24"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "other settings" in capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(benchmark, "base_checksum", lambda: "another")
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

    values = {"base": (0.25, 0.5), "ase": (0.5, 0.75), "no-score-loss": (0.5,)}
    runs = {(arm, seed): one for arm, seeds in values.items() for seed, one in enumerate(seeds)}
    figures = {run: benchmark.figures_of(result(one, run[0] != "base")) for run, one in runs.items()}
    names = ("warm_up", "vision_samples", "samples", "pictures", "test_pictures")
    settings = {"base": "0123456789abcdef", **dict.fromkeys(names, 8)}
    about, main, differences, ablations = benchmark.as_markdown(figures, settings).split("\n\n")
    assert "Seeds 0, 1 (no-score-loss 0); 8 + 8 + 8 samples" in about and "SHA-256 0123456789ab." in about
    assert "| figure | base | ase |" in main and "| accuracy | 37.5 ± 17.7 | 62.5 ± 17.7 |" in main
    assert "| map AUC | - | 0.750 ± 0.000 |" in main and "| gates | - | 0.375 ± 0.000 |" in main
    assert "| difference | ase - base |" in differences and "| noise | 25.0 ± 0.0 |" in differences
    assert "wrong photo" in main and "wrong photo" not in differences
    assert ablations.splitlines()[2].startswith("| no-score-loss | 0.0 | 0.0 |")


def test_a_longer_base_sees_three_times_as_many_samples(tmp_path, monkeypatch):
    seen = []
    args = argparse.Namespace(work=tmp_path, warm_up=8, vision_samples=4, samples=6, batch_size=2)
    monkeypatch.setattr(benchmark, "Pictures", lambda work, split, number=0, start=0: seen.append((start, number)))
    monkeypatch.setattr(benchmark, "train", lambda *args: 0.0)
    monkeypatch.setattr(benchmark, "measure", lambda *args: {})
    for arm in ("base", "base-longer"):
        benchmark.run_arm(arm, 0, args)
    assert seen == [(0, 8), (8, 4), (12, 6), (0, 0), (0, 24), (24, 12), (36, 18), (0, 0)]


def test_arms_that_differ_behind_the_iasm_share_its_first_part(tmp_path, monkeypatch, critique_sources):
    monkeypatch.setattr(benchmark, "load_sources", lambda split, directory: critique_sources[split])
    arguments = "--seeds 0 --pictures 8 --test-pictures 4 --warm-up 8 --vision-samples 4 --samples 4 --jobs 1"
    train, trained = benchmark.train, []
    monkeypatch.setattr(
        benchmark, "train", lambda model, *args: trained.append(type(model).__name__) or train(model, *args)
    )

    def run(work: str, *arms: str) -> dict:
        trained.clear()
        monkeypatch.setattr(sys, "argv", ["x", *arguments.split(), "--work", str(tmp_path / work), "--arms", *arms])
        benchmark.main()
        result = json.loads((tmp_path / work / "fusion-last-0.json").read_text())
        return {name: value for name, value in result.items() if name != "seconds of training"}

    alone = run("alone", "fusion-last")
    assert trained == ["ImageAestheticSaliencyModule", "Learner", "Learner"]
    assert run("shared", "ase", "fusion-last") == alone
    assert trained == ["ImageAestheticSaliencyModule", "Learner", "Learner", "Learner", "Learner"]


def test_quick_is_the_main_arms(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(benchmark, "make_pictures", lambda split, number, *args: seen.update({split: number}))
    monkeypatch.setattr(benchmark, "run_arm", lambda arm, seed, args: seen.update({arm: args.samples}))
    monkeypatch.setattr(benchmark, "figures_of", lambda result: {})
    monkeypatch.setattr(benchmark, "as_markdown", lambda figures, settings: "")
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--jobs", "1", "--work", str(tmp_path)])
    benchmark.main()
    assert set(seen) == {"train", "test", *benchmark.MAIN_ARMS} and seen["train"] == benchmark.QUICK["pictures"]
