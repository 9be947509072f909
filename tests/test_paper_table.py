"""`examples/paper_table.py` from nothing to the table, on fewer pictures and steps than it makes by itself."""

import itertools
import json
import sys
from pathlib import Path

import evaluate_captions
import finetune
import paper_table
import pytest
import small_pccd
from aic_data import load
from report_table import as_wide
from test_evaluate_captions import NO_JAVA
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from ase_mllm import ASEForConditionalGeneration


FEW = {"train": (2, 8), "validation": (1, 2), "test": (2, 6)}


def cell(value: float, ends: tuple, wrong: float) -> dict:
    return {"value": value, "interval": ends, "wrong_photo_value": wrong, "wrong_photo_interval": [None, None]}


def test_the_wide_table():
    difference = {"difference": 0.2, "interval": [0.1, 0.3], "p": 0.012}
    cider = {"base": cell(0.5, (0.4, 0.6), 0.1), "ase": cell(0.7, (0.6, 0.8), 0.2)}
    rows = [
        {"measure": "CIDEr", "protocol": "all", "systems": cider, "comparisons": {"ase": difference}},
        {"measure": "CIDEr", "protocol": "best", "systems": {"base": {"value": 9.0}}},
        {"measure": "length ratio", "protocol": "words", "systems": {"base": {"value": 1.5}, "ase": {"value": None}}},
        {"measure": "SRCC", "protocol": "score", "systems": {"base": {}, "ase": {"value": 0.25}}},
        {"measure": "accuracy at 5", "protocol": "score", "systems": {"ase": {"value": 0.75}}, "baseline": 0.625},
    ]
    report = {"table": rows, "systems": ["base", "ase"], "against": "base", "warning": None, "not_computed": NO_JAVA}
    report |= {"protocols": {"all": "every one", "best": "the best"}, "statistics": ["many photographs"]}
    head, _, *lines = [line[2:-2].split(" | ") for line in as_wide(report).splitlines() if line[0:1] == "|"]
    named = [dict(zip(head, line)) for line in lines]
    assert [row["system"] for row in named] == [
        "base",
        "base, wrong photo",
        "ase",
        "ase, wrong photo",
        "baseline",
        "ase less base",
    ]
    assert [row["CIDEr"] for row in named] == [
        *("0.500 [0.400, 0.600]", "0.100", "0.700 [0.600, 0.800]", "0.200", "-", "0.200 [0.100, 0.300], p 0.012")
    ]
    assert [row["length ratio"] for row in named] == ["1.500", "-", "-", "-", "-", "-"]
    assert [row["SRCC"] for row in named] == ["-", "-", "0.250", "-", "-", "-"]
    assert [row["accuracy at 5"] for row in named] == ["-", "-", "0.750", "-", "0.625", "-"]
    assert {row["METEOR"] for row in named} == {"-"} and "- **METEOR** is missing: needs Java" in as_wide(report)
    assert "- all: every one.\n- many photographs.\n" in as_wide(report) and "the best" not in as_wide(report)
    assert "9.000" in as_wide(report, "best")
    assert as_wide(report | {"warning": "**Not so.**"}).startswith("**Not so.**\n\n| system |")


def test_the_small_data_have_faults_that_their_texts_name(tmp_path, monkeypatch):
    monkeypatch.setattr(small_pccd, "SPLITS", FEW)
    data, base = small_pccd.write_small(tmp_path)
    splits, report = load(data, pccd_texts="joined", verbose=False)
    assert {name: len(rows) for name, rows in splits.items()} == {name: pieces for name, (_, pieces) in FEW.items()}
    photos = {name: {image_id.rsplit("_", 1)[0] for image_id in rows["image_id"]} for name, rows in splits.items()}
    assert not photos["train"] & photos["test"] and not photos["validation"] & photos["test"]
    assert report.splits["train"].with_topic_scores == 8 and not report.splits["train"].problems
    entries = json.loads((data / "guru_train.json").read_text())
    for topic, kinds in small_pccd.FAULTS.items():
        assert {entry[topic] for entry in entries} <= {text for texts in kinds.values() for text in texts}
    assert LlavaForConditionalGeneration.from_pretrained(base) and LlavaProcessor.from_pretrained(base)
    small_pccd.main([str(tmp_path / "again")])
    again = tmp_path / "again" / "pccd"
    assert (again / "guru_test.json").read_bytes() == (data / "guru_test.json").read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_from_nothing_to_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small_pccd, "SPLITS", FEW)
    monkeypatch.setattr(evaluate_captions, "java_missing", lambda: dict(NO_JAVA))
    commands = []

    def run_here(script: str, *arguments: object) -> str:
        commands.append([str(one) for one in arguments])
        if script == "evaluate_captions.py":
            assert evaluate_captions.main(commands[-1]) == 0
        else:
            monkeypatch.setattr(sys, "argv", [script, *commands[-1]])
            finetune.main()
        return f"python examples/{script}"

    monkeypatch.setattr(paper_table, "run", run_here)
    options = ["--aspects", "--resamples", "10", "--max-new-tokens", "5", "--seed", "3", "--against", "zero-shot"]
    few = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm", "true"]
    paper_table.main(["--out", str(tmp_path / "out"), *options, *few])
    plain, grafted = (
        [part.replace("/base", "/X").replace("/ase", "/X") for part in command] for command in commands[:2]
    )
    assert [(one, other) for one, other in zip(plain, grafted) if one != other] == [("none", "ase")]
    assert plain[-len(few) :] == few and "topics" in plain and plain[plain.index("--seed") + 1] == "3"
    out = tmp_path / "out"
    assert LlavaForConditionalGeneration.from_pretrained(out / "base")
    assert len(ASEForConditionalGeneration.from_pretrained(out / "ase").config.iasm_config.aspect_names) == 7
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out and table.startswith("**Not by the field's protocol")
    for line in (
        "| zero-shot |",
        "| base, wrong photo |",
        "| ase less zero-shot |",
        "one training run each, seed 3",
        "nothing about photographs",
    ):
        assert line in table
    assert "6 photographs, 6 captions a system, 6 references" in table  # the texts of each joined
    report = json.loads((out / "evaluation" / "report.json").read_text())
    assert {"SRCC", "SRCC of focus", "CIDEr"} <= {row["measure"] for row in report["table"]}


def test_how_a_script_is_run(monkeypatch, capfd):
    ran = []
    monkeypatch.setattr(paper_table.subprocess, "run", lambda command, check: ran.append((command, check)))
    said = paper_table.run("finetune.py", "--data", Path("my photographs"))
    assert said == "python examples/finetune.py --data 'my photographs'" and said in capfd.readouterr().out
    assert ran == [
        ([sys.executable, Path(paper_table.__file__).with_name("finetune.py"), "--data", "my photographs"], True)
    ]
    with pytest.raises(SystemExit):
        paper_table.main(["--base", "somewhere"])
    assert "give both --base and --data" in capfd.readouterr().err


def test_a_base_and_data_of_your_own(tmp_path, monkeypatch):
    commands = []

    def remember(script: str, *arguments: object) -> str:
        commands.append([str(one) for one in arguments])
        if script == "evaluate_captions.py":
            report = {
                "table": [],
                "systems": [],
                "warning": None,
                "not_computed": {},
                "protocols": {},
                "statistics": [],
            }
            (tmp_path / "evaluation").mkdir()
            (tmp_path / "evaluation" / "report.json").write_text(json.dumps(report))
        return script

    monkeypatch.setattr(paper_table, "run", remember)
    source = ["--data", "PCCD", "--images", "PCCD/images", "--pccd", "general"]
    options = ["--out", str(tmp_path), "--resamples", "9", "--max-new-tokens", "7", "--seed", "5"]
    paper_table.main(["--base", "a/base", *source, *options, "--stage", "lora"])
    for command in commands:
        chosen = dict(itertools.pairwise(command))
        assert (chosen["--data"], chosen["--images"], chosen["--pccd"]) == ("PCCD", "PCCD/images", "general")
        assert chosen["--seed"] == "5" and "--aspect_names" not in command and "--max_steps" not in command
    for command in commands[:2]:
        chosen = dict(itertools.pairwise(command))
        assert (chosen["--model"], chosen["--eval_strategy"], chosen["--patience"]) == ("a/base", "no", "0")
        assert command[-2:] == ["--stage", "lora"]
    chosen = dict(itertools.pairwise(commands[2]))
    assert commands[2][0] == "a/base" and (chosen["--resamples"], chosen["--max-new-tokens"]) == ("9", "7")
    assert (chosen["--against"], chosen["--split"]) == ("base", "test")
    assert "nothing about photographs" not in (tmp_path / "table.md").read_text()
