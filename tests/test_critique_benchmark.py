"""examples/critique/critique_benchmark.py small: every arm starts as its base and differs as it says; figures by hand."""

import argparse
import json
import random
import shutil
import sys

import critique_benchmark as benchmark
import critique_tables
import pytest
import token_benchmark as tokens
import torch
from critique_captions import FAULTS
from failing_runs import failing_run
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from ase_mllm import ASEDataCollator, ASEForConditionalGeneration, image_tokens


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def args(tmp_path_factory, critique_sources):
    """A small encoder of twelve layers with random weights, and pictures with what it gives for them."""
    folder = tmp_path_factory.mktemp("benchmark")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 12, "num_attention_heads": 4, "mlp_ratio": 2}
    encoder = Dinov2Model(Dinov2Config(**sizes, image_size=168, patch_size=14, layerscale_value=0.5))
    encoder.save_pretrained(folder / "encoder")
    args = argparse.Namespace(
        encoder=folder / "encoder",
        language_model=benchmark.BUNDLE,
        work=folder,
        layer=8,
        train_encoder=False,
        labels="truth",
        learning_rate=1e-3,
        batch_size=4,
        workers=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "load_sources", lambda split, directory: critique_sources[split])
        for split, number in (("train", 32), ("test", 4), ("foreign", 4)):
            data = benchmark.make_pictures(split, number, benchmark.IMAGE_SIZE, None)
            benchmark.save_file(data, folder / f"{split}.safetensors")
            benchmark.keep_states(args, split, {6, 8, 12})
    return args


def make_processor():
    return benchmark.make_processor(benchmark.BUNDLE)


def learner_of(arm: str, args, scaled: bool = False, **changes) -> benchmark.Learner:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if not scaled:  # the bundled model need not look at pictures for every learner
            patch.setattr(benchmark, "match_scale", lambda *_: None)
        learner = benchmark.build(arm, argparse.Namespace(**{**vars(args), **changes}), make_processor()).eval()
        learner.kept.open("train")
    return learner


def batch_of(args, number: int = 3) -> dict[str, torch.Tensor]:
    pictures = benchmark.Pictures(args.work, "train")
    return benchmark.Collator(pictures, make_processor())([pictures[i] for i in range(number)])


def logits_of(learner, batch) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "rows" and not name.endswith("targets")}
    with torch.inference_mode():
        learner.kept.choose(batch["rows"])
        return learner.mllm(**inputs).logits


def test_batches_are_those_of_the_collator_for_files(args):
    pictures = benchmark.Pictures(args.work, "train", 40, start=3)
    rows = [pictures[i] for i in (0, 28, 29, 39)]
    assert rows == [3, 31, 0, 10]  # after the last picture comes the first again
    columns = pictures.columns
    examples = [
        {
            "image": Image.fromarray(columns["image"][i].permute(1, 2, 0).numpy()),
            "caption": benchmark.plain_caption(columns["aspect_labels"][i].tolist()),
            **{name: columns[name][i] for name in ("score", "saliency", "aspect_labels")},
        }
        for i in rows
    ]
    processor = make_processor()
    expected = ASEDataCollator(processor)(examples)
    batch = benchmark.Collator(pictures, processor)(rows)
    assert batch.pop("rows").tolist() == rows and set(batch) == set(expected)
    for name, values in batch.items():
        torch.testing.assert_close(values, expected[name], atol=1e-5, rtol=1e-5, msg=name)
    without = benchmark.Collator(pictures, processor, captions=False)(rows)
    assert set(without) == {"rows", "pixel_values", *benchmark.TARGETS}
    prompt = processor(text=[processor.critique_prompt()], images=[examples[0]["image"]], return_tensors="pt")
    assert set(prompt) == {"input_ids", "attention_mask", "pixel_values"} and prompt["attention_mask"].all()
    assert torch.equal(prompt["input_ids"][0], benchmark.prompt_tokens(processor))


def test_pictures_and_states_are_the_same_from_several_processes(args, tmp_path, critique_sources):
    """Spawned, so that what crosses from one process to another is there, too."""
    shutil.copy(args.work / "train.safetensors", tmp_path)
    both = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "PART", 20)
        for workers in (1, 2):
            changed = argparse.Namespace(**{**vars(args), "work": tmp_path, "workers": workers})
            benchmark.keep_states(changed, "train", {6, 8})
            both[workers] = [benchmark.load_file(tmp_path / f"train-layer-{n}.safetensors")["states"] for n in (6, 8)]
            for path in tmp_path.glob("*-layer-*"):
                path.unlink()
    assert len(both[1][0]) == 32
    for alone, together, kept in zip(both[1], both[2], (6, 8)):
        assert torch.equal(alone, together)
        before = benchmark.load_file(args.work / f"train-layer-{kept}.safetensors")["states"]
        torch.testing.assert_close(alone, before, atol=1e-2, rtol=1e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "load_sources", lambda split, directory: critique_sources[split])
        patch.setattr(benchmark, "PART", 3)
        changed = argparse.Namespace(
            **{
                **vars(args),
                "work": tmp_path,
                "pictures": 7,
                "test_pictures": 4,
                "tests": ["foreign"],
                "sources": None,
            }
        )
        (tmp_path / "train.safetensors").unlink()
        benchmark.make_data(changed, {"layer-8"})
        for split, number in (("train", 7), ("foreign", 4)):
            made = benchmark.load_file(tmp_path / f"{split}.safetensors")
            expected = benchmark.load_file(args.work / f"{split}.safetensors")
            for name, values in made.items():
                assert torch.equal(values, expected[name][:number]), (split, name)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("arm", benchmark.GRAFTS)
def test_every_arm_starts_as_the_base(arm, args):
    batch = batch_of(args)
    torch.testing.assert_close(
        logits_of(learner_of(arm, args), batch), logits_of(learner_of("layer-8", args), batch), atol=2e-2, rtol=1e-3
    )  # the seventh and eighth layer start from half precision


@pytest.mark.parametrize("arm", ["layer-8", "layer-12", "ase"])
def test_kept_states_are_what_the_encoder_gives(arm, args):
    """The whole encoder, pixels first, says what the one says that begins after the kept layer."""
    batch, learner = batch_of(args), learner_of(arm, args)
    with torch.no_grad():
        for name, parameter in learner.mllm.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(1.0)
    base = benchmark.load_base(args.encoder, benchmark.base_layer(arm, args), benchmark.BUNDLE)
    whole = benchmark.graft(arm, base, make_processor()).eval()
    whole.load_state_dict(learner.mllm.state_dict())
    inputs = {name: value for name, value in batch.items() if name != "rows" and not name.endswith("targets")}
    with torch.inference_mode():
        expected = whole(**inputs)
    torch.testing.assert_close(logits_of(learner, batch), expected.logits, atol=2e-2, rtol=1e-3)
    if arm == "ase":
        learner.kept.choose(batch["rows"])
        seen = learner.mllm.get_image_features(batch["pixel_values"])
        torch.testing.assert_close(seen.saliency_maps, expected.saliency_maps, atol=1e-5, rtol=1e-2)


def test_arms_differ_as_they_say(args):
    learners = {arm: learner_of(arm, args) for arm in ("layer-8", "layer-12", *benchmark.GRAFTS)}
    configs = {arm: learners[arm].mllm.config for arm in benchmark.GRAFTS}
    weights = {
        arm: [getattr(config.iasm_config, f"{term}_loss_weight") for term in ("score", "aspect", "saliency")]
        for arm, config in configs.items()
    }
    assert weights == {"control": [5, 3, 0], **{arm: [5, 3, 1] for arm in ("photometry", "ase", "probe")}}
    read = {arm: config.iasm_config.encoder_layers for arm, config in configs.items()}
    assert read == {"photometry": [], **{arm: [5] for arm in ("control", "ase", "probe")}}
    assert [arm for arm, config in configs.items() if config.iasm_config.probe_tokens] == ["probe"]
    assert {tuple(config.fusion_layers) for config in configs.values()} == {(5, 6, 7)}
    sizes = {arm: sum(p.numel() for p in learner.mllm.parameters()) for arm, learner in learners.items()}
    assert sizes["ase"] == sizes["control"] > sizes["photometry"] > sizes["layer-8"]
    layers = {arm: len(learners[arm].mllm.model.vision_tower.encoder.layer) for arm in ("layer-8", "layer-12")}
    assert layers == {"layer-8": 8, "layer-12": 12}


@pytest.mark.parametrize("arm", ["layer-8", "ase"])
def test_a_frozen_encoder_is_not_trained_and_a_trained_one_is_above_what_is_read(arm, args):
    def moving(**changes) -> set[int]:
        learner = learner_of(arm, args, **changes)
        learner(**batch_of(args))["loss"].backward()
        names = [name for name, p in learner.named_parameters() if "vision_tower" in name and p.grad is not None]
        return {int(name.split("encoder.layer.")[1].split(".")[0]) for name in names}

    assert moving() == set() and moving(train_encoder=True) == {6, 7}


@pytest.mark.parametrize("arm", ["layer-8", "ase"])
def test_without_captions_the_same_is_learned_but_for_the_captions(arm, args):
    learner, batch = learner_of(arm, args), batch_of(args)
    whole = learner(**batch)
    inputs = {name: value for name, value in batch.items() if name != "rows" and not name.endswith("targets")}
    caption = learner.mllm(**inputs).loss
    alone = learner(**{name: batch[name] for name in ("rows", "pixel_values", *benchmark.TARGETS)})
    torch.testing.assert_close(alone["aspects"], whole["aspects"])
    torch.testing.assert_close(alone["loss"], whole["loss"] - caption)
    alone["loss"].backward()
    assert learner.aspects.weight.grad.abs().max() > 0 and learner.scores.weight.grad.abs().max() > 0


def test_the_module_alone_reads_what_it_reads_in_the_encoder(args):
    learner, batch = learner_of("ase", args), batch_of(args)
    batch = {name: batch[name] for name in ("rows", "pixel_values", *benchmark.TARGETS)}
    learner.kept.choose(batch["rows"])
    seen = learner.mllm.get_image_features(batch["pixel_values"])
    targets = {name: batch[name] for name in benchmark.TARGETS}
    expected = benchmark.saliency_losses(learner.mllm.config.iasm_config, seen, **targets)["loss"]
    torch.testing.assert_close(benchmark.ModuleAlone(learner)(**batch)["loss"], expected)


def test_a_fresh_projector_is_as_loud_as_the_bundles(args):
    learner, batch = learner_of("layer-8", args, scaled=True), batch_of(args, 16)
    learner.kept.choose(batch["rows"])
    features = torch.cat(list(learner.mllm.model.get_image_features(batch["pixel_values"]).pooler_output))
    bundle = benchmark.load_bundle(args.language_model)
    processor = benchmark.ASEProcessor.from_pretrained(args.language_model)
    images = list(benchmark.load_file(args.work / "train.safetensors")["image"][batch["rows"].cpu()])
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    known = torch.cat(list(bundle.get_image_features(pixels).pooler_output))
    assert features.std().item() == pytest.approx(known.std().item(), rel=0.25)


def test_foreign_edits_say_what_was_done(critique_sources):
    samples = [benchmark.make_foreign_sample(i, "test", 0, critique_sources["test"]) for i in range(60)]
    labels = torch.tensor([sample["aspect_labels"] for sample in samples])
    assert set(labels.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert ((labels == 1).sum(0) > 0).float().mean() > 0.7  # nearly every fault is there in so few
    for sample, row in zip(samples, labels.tolist()):
        named = dict(zip(FAULTS, row))
        placements = [named[fault] for fault in FAULTS if fault.startswith("subject_") and fault != "subject_blurred"]
        assert (sum(value == 1 for value in placements) == 1) == sample["composite"]
        assert sample["saliency"].any() == sample["composite"]
    again = benchmark.make_foreign_sample(5, "test", 0, critique_sources["test"])
    assert again["image"].tobytes() == samples[5]["image"].tobytes()
    centred = next(s for s in samples if s["aspect_labels"][FAULTS.index("subject_centred")] == 1)
    columns = centred["saliency"].sum(0)
    assert abs((columns * range(32)).sum() / columns.sum() - 15.5) < 3


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
    nothing = benchmark.accuracies([], truths, [True] * 3)  # of arms without a module
    assert all(value != value for value in nothing.values()) and len(nothing) == len(result)


def test_a_head_names_one_fault_an_aspect_and_always_a_placement():
    logits = dict.fromkeys(FAULTS, -2.0) | {"underexposed": 0.5, "overexposed": 1.0, "subject_left_third": -1.0}
    assert benchmark.decide(list(logits.values())) == {"overexposed", "subject_left_third"}


@pytest.fixture
def without_the_bundles_eyes(monkeypatch):
    """How loud features are, without running the bundled model on pictures, which takes longer than a small run."""
    monkeypatch.setattr(benchmark, "known_scale", lambda *_: torch.tensor(17.0))


@pytest.mark.usefixtures("without_the_bundles_eyes")
def test_it_runs_small_and_does_not_run_twice(args, tmp_path, monkeypatch, critique_sources, capsys):
    monkeypatch.setattr(benchmark, "load_sources", lambda split, directory: critique_sources[split])
    write = benchmark.write_captions
    monkeypatch.setattr(benchmark, "write_captions", lambda *args, **_: write(*args, max_new_tokens=4))
    log = tmp_path / "log.md"
    log.write_text("before\n<!-- benchmark: begin -->\nold\n<!-- benchmark: end -->\nafter\n")
    arguments = (
        "--arms layer-8 ase --seeds 0 1 --pictures 32 --test-pictures 4 --warm-up 8 --vision-samples 4 --samples 8"
    )
    arguments += f" --curve 4 --curve-arms layer-8 --batch-size 4 --jobs 1 --workers 1 --encoder {args.encoder}"
    command = ["x", *arguments.split(), "--work", str(tmp_path / "work"), "--record", str(log)]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    text = log.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| captions: placed | " in text and "| difference (foreign) | ase - layer-8 |" in text and " ± " in text
    assert "| captions to learn from (test) | 4 | 8 |" in text and "| ase, captions: placed" not in text
    assert benchmark.base_checksum(benchmark.BUNDLE)[:12] in text and "4 at a time" in text
    record = json.loads(log.with_suffix(".json").read_text())
    runs = {(run["arm"], run["captions"], run["seed"]): run for run in record["runs"]}
    assert len(runs) == 6 and "map AUC" not in runs["layer-8", 4, 0]["test"] and "map AUC" in runs["ase", 8, 1]["test"]
    kept = json.loads((tmp_path / "work" / "ase-8-1.json").read_text())
    assert len(kept["gates"]) == 3 and any(kept["gates"])

    monkeypatch.setattr(benchmark, "train", lambda *args: pytest.fail("trained again"))
    benchmark.main()
    assert log.read_text() == text

    # elsewhere, with the files of finished runs alone: neither pictures nor the encoder are there
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in (tmp_path / "work").glob("*.json"):
        if path.name != "layer-8-4-1.json":
            shutil.copy(path, bare)
    monkeypatch.setattr(benchmark, "make_data", lambda *args: pytest.fail("made pictures again"))
    moved, fresh = (
        [*command, "--work", str(bare), "--encoder", "nowhere", "--language-model", "nowhere"],
        tmp_path / "x.md",
    )
    fresh.write_text("<!-- benchmark: begin -->\n<!-- benchmark: end -->\n")
    monkeypatch.setattr(sys, "argv", [*moved, "--finished", "--record", str(fresh)])
    assert benchmark.main() == 1  # one is missing
    record = json.loads(fresh.with_suffix(".json").read_text())
    assert len(record["runs"]) == 5 and record["settings"]["encoder"] == "encoder"
    monkeypatch.setattr(sys, "argv", [*moved, "--finished"])
    assert benchmark.main() == 1 and log.read_text() == text  # a record keeps what it has
    other = {**record, "settings": {**record["settings"], "warm_up": 9}}
    fresh.with_suffix(".json").write_text(json.dumps(other))  # but not what was made otherwise
    assert benchmark.read_record(fresh, record["settings"]) == {}
    monkeypatch.setattr(sys, "argv", [*moved, "--finished", "--seeds", "7"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "of 3 runs none is finished" in capsys.readouterr().err
    (bare / "settings.json").unlink()
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "settings.json is not there" in capsys.readouterr().err

    assert "labels" not in record["settings"]  # records of before it was an option have none
    for changed in (["--vision-samples", "24"], ["--labels", "none"]):
        monkeypatch.setattr(sys, "argv", [*command, *changed])
        with pytest.raises(SystemExit):
            benchmark.main()
        assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_takes_no_other_with_it(jobs, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "run_arm", failing_run)
    runs = [("longer", 8, 0), ("ase", 8, 0), ("layer-8", 8, 0), *[("control", 8, 0)] * (jobs > 1)]
    results = benchmark.run_all(argparse.Namespace(jobs=jobs), runs)
    assert results[("ase", 8, 0)] == {"arm": "ase"} and results[("layer-8", 8, 0)] == {"arm": "layer-8"}
    assert len(results) == 2
    said = capsys.readouterr().err
    assert "failed: longer 8 0 ValueError: no luck" in said and ("failed: control 8 0" in said) == (jobs > 1)


def what_is_learned_from(labels: str, args, monkeypatch) -> list[dict]:
    """A batch of each part of a run of `ase` with these labels of aspects, and whether its fusion layers learn."""
    seen = []

    def look(model, pictures, collator, seed, args):
        fusions = [p.requires_grad for name, p in model.named_parameters() if ".fusions." in name]
        seen.append({**collator([pictures[0], pictures[1]]), "fuses": all(fusions) if fusions else None})
        assert not fusions or any(fusions) == all(fusions)
        return 1.0

    monkeypatch.setattr(benchmark, "train", look)
    monkeypatch.setattr(benchmark, "measure", lambda *args: {"labels": args[-1]})
    monkeypatch.setattr(benchmark, "figures_of", lambda *args: {})
    given = {"warm_up": 8, "vision_samples": 4, "samples": 4, "labels": labels, "tests": ["test"]}
    seed = {"truth": 12, "none": 13, "words": 14}[labels]
    result = benchmark.run_arm(argparse.Namespace(**{**vars(args), **given}), ("ase", 4, seed))
    assert result["test"]["labels"] == labels
    assert [b.get("labels") is not None for b in seen] == [False, False, False, True]
    return seen


@pytest.mark.usefixtures("without_the_bundles_eyes")
def test_with_labels_fusions_learn_from_the_start(args, monkeypatch):
    seen = what_is_learned_from("truth", args, monkeypatch)
    assert [b["fuses"] for b in seen] == [None, True, True, True]  # the module alone has none
    truth = benchmark.read_columns(args.work, "train")["aspect_labels"]
    assert all(torch.equal(b["aspect_targets"], truth[b["rows"]]) for b in seen)


@pytest.mark.usefixtures("without_the_bundles_eyes")
def test_without_labels_aspects_are_learned_from_captions_alone(args, monkeypatch):
    seen = what_is_learned_from("none", args, monkeypatch)
    assert all((b["aspect_targets"] == -1).all() for b in seen)
    assert [b.pop("fuses") for b in seen] == [None, False, False, True]
    learner = learner_of("ase", args)
    learner.kept.open("train")
    learner(**seen[3])["loss"].backward()
    heads = (learner.aspects, learner.mllm.model.iasm.aspect_head)
    assert not any(p.grad is not None and p.grad.any() for head in heads for p in head.parameters())
    assert learner.mllm.model.iasm.score_head.weight.grad.any() and learner.mllm.lm_head.weight.grad.any()


@pytest.mark.usefixtures("without_the_bundles_eyes")
def test_words_of_captions_are_labels_where_there_are_captions(args, monkeypatch):
    seen = what_is_learned_from("words", args, monkeypatch)
    assert [b.pop("fuses") for b in seen] == [None, False, False, True]
    words, _ = benchmark.word_labels(args.work, range(12, 16))  # 8 + 4 samples come before those with captions
    captions = benchmark.Pictures(args.work, "train").captions()
    for batch in seen:
        for row, labels in zip(batch["rows"].tolist(), batch["aspect_targets"].tolist()):
            said = captions[row].lower().replace(".", " ").replace(",", " ").split()
            assert labels == [float(word in said) if row in range(12, 16) else -1.0 for word in words]
    assert seen[3]["rows"].tolist() == [12, 13] and seen[1]["rows"].tolist() == [0, 1] and len(words) > 3
    learner = learner_of("ase", args, labels="words", warm_up=8, vision_samples=4, samples=4)
    assert learner.mllm.config.iasm_config.aspect_names == words
    learner.kept.open("train")
    learner(**seen[3])["loss"].backward()
    assert learner.aspects.weight.grad.any() and learner.mllm.model.iasm.aspect_head.weight.grad.any()


def test_heads_that_did_not_learn_have_no_figures(args):
    pictures, given = benchmark.Pictures(args.work, "test"), {"warm_up": 8, "vision_samples": 4, "samples": 8}
    for labels in ("truth", "none", "words"):
        learner = learner_of("ase", args, labels=labels, **given).eval()
        measured = benchmark.measure(learner, "test", pictures, make_processor(), False, labels)
        known = {
            name for name in ("heads", "IASM") if any(v == v for v in measured[f"accuracy of the {name}"].values())
        }
        assert known == ({"heads", "IASM"} if labels == "truth" else set()) and measured["saliency"]


def test_what_was_trained_without_captions_is_found_again(args, tmp_path, monkeypatch):
    changed = argparse.Namespace(**{**vars(args), "warm_up": 8, "vision_samples": 4})
    first, _ = benchmark.see("ase", 7, changed, make_processor())
    monkeypatch.setattr(benchmark, "train", lambda *args: pytest.fail("trained again"))
    second, _ = benchmark.see("ase", 7, changed, make_processor())
    batch = batch_of(args)
    for learner in (first.eval(), second.eval()):
        learner.kept.open("train")
    torch.testing.assert_close(logits_of(first, batch), logits_of(second, batch))
    assert isinstance(second.mllm, ASEForConditionalGeneration)


def test_differences_are_those_of_the_same_seed():
    def result(accuracy: float, saliency: bool) -> dict:
        text = dict.fromkeys(("CIDEr", "BLEU-4"), 0.5)
        maps = dict.fromkeys(("AUC", "NSS", "CC", "centre bias AUC"), 0.75) if saliency else None
        accuracies = dict.fromkeys(critique_tables.ASPECTS, accuracy)
        test = {"accuracy": accuracies, "accuracy of the heads": accuracies, "text": text, "text, composites": text}
        test |= {"accuracy of the IASM": {}, "wrong photo": text, "saliency": maps}
        return {"test": test, "gates": [0.5, -0.25] * saliency, "parameters": 5e6, "seconds of training": 100}

    values = {("layer-8", 8): (0.25, 0.5), ("ase", 8): (0.5, 0.75), ("ase", 2): (0.25, 0.25)}
    runs = {(*run, seed): one for run, seeds in values.items() for seed, one in enumerate(seeds)}
    figures = {run: {"test": benchmark.figures_of(result(one, run[0] == "ase"), "test")} for run, one in runs.items()}
    names = ("warm_up", "vision_samples", "samples", "pictures", "test_pictures", "layer", "encoder", "batch_size")
    settings = {"base": "0123456789abcdef", "train_encoder": False, **dict.fromkeys(names, 8)}
    about, main, differences, curve = benchmark.as_markdown(figures, 8, settings, benchmark.ARMS).split("\n\n")
    assert "Seeds 0, 1; 8 + 8 + 8 samples" in about and "SHA-256 0123456789ab." in about and "frozen" in about
    assert "| figure (test) | layer-8 | ase |" in main and "| captions: all | 37.5 ± 17.7 | 62.5 ± 17.7 |" in main
    assert "| map AUC | - | 0.750 ± 0.000 |" in main and "| gates | - | 0.375 ± 0.000 |" in main
    assert "| difference (test) | ase - layer-8 |" in differences and "| noise | 25.0 ± 0.0 |" in differences
    assert "wrong photo" in main and "wrong photo" not in differences
    assert "| ase, captions: placed | 25.0 ± 0.0 | 62.5 ± 17.7 |" in curve and "layer-8" not in curve


def test_a_longer_base_sees_twice_as_many_samples(args, tmp_path, monkeypatch):
    seen = []
    given = argparse.Namespace(**{**vars(args), "work": tmp_path, "warm_up": 8, "vision_samples": 4, "tests": []})
    monkeypatch.setattr(benchmark, "build", lambda *_: torch.nn.Linear(2, 2))
    monkeypatch.setattr(benchmark, "Pictures", lambda work, split, number=0, start=0: seen.append((start, number)))
    monkeypatch.setattr(benchmark, "Collator", lambda *_, **__: None)
    monkeypatch.setattr(benchmark, "train", lambda *args: 0.0)
    monkeypatch.setattr(torch.nn.Linear, "kept", argparse.Namespace(open=lambda split: None), raising=False)
    monkeypatch.setattr(torch.nn.Linear, "mllm", property(lambda self: torch.nn.Identity()), raising=False)
    monkeypatch.setattr(benchmark, "figures_of", lambda *_: {})
    given.tests = []
    for arm in ("layer-8", "longer"):
        benchmark.see(arm, 0, given, make_processor())
    assert seen == [(0, 8), (8, 4), (0, 16), (16, 8)]


@pytest.mark.parametrize("arm, parts", [("ase", ["ModuleAlone", "Learner", "Learner"]), ("layer-8", ["Learner"] * 2)])
def test_a_module_learns_alone_before_all_learn_from_the_same_samples(arm, parts, args, monkeypatch):
    learner, trained, seen = learner_of(arm, args), [], []
    monkeypatch.setattr(benchmark, "build", lambda *_: learner)
    monkeypatch.setattr(benchmark, "save_whole", lambda *_, **__: None)

    def listen(model, pictures, *_):
        trained.append(type(model).__name__)
        seen.append([pictures[i] for i in range(len(pictures))])
        return 1.0

    monkeypatch.setattr(benchmark, "train", listen)
    changed = argparse.Namespace(**{**vars(args), "warm_up": 8, "vision_samples": 4})
    _, seconds = benchmark.see(arm, 11, changed, make_processor())
    assert trained == parts and seconds == len(parts)
    assert seen[-2:] == [list(range(8)), list(range(8, 12))] and all(one == seen[-2] for one in seen[:-2])


# What a budget of image tokens costs ---------------------------------------------------------------------------------


def test_pooled_tokens_are_the_means_of_their_blocks():
    features = torch.randn(2, 36, 5)
    projector = torch.nn.Identity()
    hooked = tokens.PooledFeatures(projector, (2, 2))
    pooled = projector(features)
    hooked.handle.remove()
    chosen = tokens.choose_blocks(features, torch.ones(2, 36), 9)
    assert torch.equal(chosen[0], chosen[1]) and len(set(chosen[0].tolist())) == 9
    blocks = features.view(2, 3, 2, 3, 2, 5).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(pooled[:, chosen[0]], blocks)
    assert torch.equal(projector(features), features)
    assert [tokens.choose_blocks(features, torch.ones(1, 36), n).shape[1] for n in (18, 9, 4)] == [18, 9, 4]


def test_the_class_tokens_attention_is_that_of_the_encoder(args):
    encoder = Dinov2Model.from_pretrained(args.encoder, attn_implementation="eager").eval()
    hooked = tokens.ClassAttention(encoder.encoder.layer[-1])
    with torch.inference_mode():
        seen = encoder(torch.randn(2, 3, 168, 168), output_attentions=True).attentions[-1]
        chosen = hooked.choose(None, torch.ones(2, 36), 7)
    weights = seen[:, :, 0, 1:].mean(1).view(2, 6, 2, 6, 2).mean((2, 4)).flatten(1)
    assert torch.equal(chosen, weights.topk(7, dim=1).indices)


def test_a_choice_without_saliency_does_not_look_at_it():
    features, quality = torch.randn(3, 36, 16), torch.rand(3, 36) + 0.1
    chosen = tokens.choose_unweighted(features, quality, 9)
    assert torch.equal(chosen, tokens.choose_unweighted(features, quality.flip(1), 9))
    assert not torch.equal(chosen, image_tokens._SELECT["diverse"](features, quality**8, 9))


def test_resampled_points_are_accuracies_of_the_pictures_drawn(args):
    judge = tokens.Judge(benchmark.Pictures(args.work, "train"))
    captions = benchmark.Pictures(args.work, "train").captions()[:24] + ["Nothing is wrong."] * 8
    points = judge.points(captions)
    named = [benchmark.named_faults(caption) for caption in captions]

    def points_of(rows: list[int]) -> dict[str, float]:
        found = benchmark.accuracies(
            [named[i] for i in rows], [judge.truths[i] for i in rows], [judge.composite[i] for i in rows]
        )
        return {name: 100 * sum(found[one] for one in group) / len(group) for name, group in tokens.FIGURES.items()}

    assert {name: one[0] for name, one in points.items()} == pytest.approx(points_of(range(32)), nan_ok=True)
    drawn = [i for i, times in enumerate(judge.weights[5].tolist()) for _ in range(int(times))]
    assert len(drawn) == 32 and {name: one[5] for name, one in points.items()} == pytest.approx(
        points_of(drawn), nan_ok=True
    )


def test_budgets_are_drawn_for_each_batch(args):
    learner = learner_of("ase", args)
    given, forward = [], learner.mllm.forward
    learner.mllm.forward = lambda **inputs: given.append(inputs["image_token_budget"]) or forward(**inputs)
    batch = batch_of(args)
    for budgets in (None, random.Random(0)):
        lesson = tokens.CaptionLesson(learner, budgets)
        for _ in range(2):
            lesson(**batch)["loss"].backward()
    assert given[:2] == [None, None] and given[2] != given[3] and all(0.11 <= one <= 1 for one in given[2:])


@pytest.mark.usefixtures("without_the_bundles_eyes")
def test_the_cost_of_budgets_is_measured_small(args, tmp_path, monkeypatch, critique_sources, capsys):
    work, record = tmp_path / "work", tmp_path / "TOKENS.md"
    command = ["x", "--encoder", str(args.encoder), "--work", str(work)]
    with pytest.raises(SystemExit):
        tokens.main([*command[1:], "--seeds", "0"])
    assert "settings.json is not there" in capsys.readouterr().err
    monkeypatch.setattr(benchmark, "load_sources", lambda split, directory: critique_sources[split])
    made = "--arms ase --seeds 0 --pictures 32 --test-pictures 4 --warm-up 8 --vision-samples 4 --samples 0 --batch-size 4"
    monkeypatch.setattr(sys, "argv", [*command, *made.split(), "--jobs", "1", "--workers", "1", "--train-encoder"])
    benchmark.main()
    write = benchmark.write_captions
    shorter = lambda *args, max_new_tokens, **options: write(*args, max_new_tokens=3, **options)  # noqa: E731
    monkeypatch.setattr(benchmark, "write_captions", shorter)
    record.write_text("before\n{}\nold\n{}\nafter\n".format(*tokens.MARKS))
    arguments = [*command[1:], "--seeds", "0", "--samples", "8", "--jobs", "1", "--record", str(record)]
    tokens.main(arguments)
    text = record.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| all |" in text and "| 50%, attention |" in text and "| 11%, smaller picture |" in text
    assert "50%, smaller picture" not in text and "trained along above its layer 6" in text
    figures = json.loads(record.with_suffix(".json").read_text())
    assert list(figures) == ["all tokens, seed 0", "within budgets, seed 0"]
    assert len(figures["within budgets, seed 0"]) == 1 + 3 * len(tokens.SELECTIONS) - 1
    monkeypatch.setattr(tokens, "train", lambda *args: pytest.fail("trained again"))
    tokens.main(arguments)
    assert record.read_text() == text
    tokens.main([*arguments, "--trainings", "all tokens"])
    assert list(json.loads(record.with_suffix(".json").read_text())) == ["all tokens, seed 0"]
    assert "within budgets" not in record.read_text() and "| 50%, attention |" in record.read_text()
