"""The readers of data sets, on small files of each exact form."""

import csv
import json
import os
from pathlib import Path

import aic_data
import datasets
import numpy as np
import pandas
import pytest
import torch
from conftest import tiny_model, tiny_processor
from PIL import Image
from readers import pccd
from torch.utils.data import DataLoader

from ase_mllm import ASEDataCollator


PCCD = {  # an entry as it is published, without photographer, reviewer and links
    "category": "food-photography",
    "title": "12_cutters-point",
    "description": "A cup of coffee.",
    "overall": "7",
    "score": ["7", "8", "6", "7", "N", "7", "7"],
    "general_impression": "An interesting image.",
    "subject_of_photo": "The subject is clear.",
    "composition": "The straw is distracting.",
    "use_of_camera": "Exposure is fine.",
    "depth_of_field": "",
    "color_lighting": "The colours are pleasant.",
    "focus": "The focus is ok.",
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def _pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (number * 20, 100, len(name))).save(folder / name)


def _write(file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def _lines(*rows: object) -> str:
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


def _load(source: Path, *arguments, **options) -> tuple[dict[str, list[dict]], aic_data.Report]:
    """All rows of each split; they and the report must be the same with streaming."""
    splits, report = aic_data.load(source, *arguments, **options)
    streamed, report_of_stream = aic_data.load(source, *arguments, streaming=True, **options)
    assert isinstance(splits, datasets.DatasetDict) and isinstance(streamed, datasets.IterableDatasetDict)
    assert report == report_of_stream
    rows = {name: list(split) for name, split in splits.items()}
    assert list(streamed) == list(rows)
    for name, split in streamed.items():
        assert splits[name].features == split.features == aic_data.FEATURES
        for row, other in zip(rows[name], split, strict=True):
            assert row["image"].tobytes() == other["image"].tobytes()
            assert {**row, "image": None} == {**other, "image": None}
            assert row["split"] == name
    return rows, report


@pytest.mark.parametrize(
    "names, expected",
    [
        (
            ["2023/IMG_1.jpg", "./2023/IMG_1.JPEG", "2023//x/../IMG_1.tif", "2023\\IMG_1.png", "2023/IMG_1"],
            "2023/IMG_1",
        ),
        (["2024/IMG_1.cr3", "2024/IMG_1.heic"], "2024/IMG_1"),
        (["3_mr.smith", "3_mr.smith.jpg"], "3_mr.smith"),
        (["../a.jpg"], "../a"),
        (["cafe\u0301.jpg", "caf\u00e9.webp"], "caf\u00e9"),
        ([""], ""),
    ],
)
def test_a_photograph_has_one_id(names, expected):
    assert {aic_data.photograph_id(name) for name in names} == {expected}


# Forms ---------------------------------------------------------------------------------------------------------------


def test_pccd(tmp_path):
    _pictures(tmp_path / "images" / "full", "12_cutters-point.jpg", "3_mr.smith.jpg", "4_no-score.jpg")
    _write(tmp_path / "guru_train.json", [PCCD, {**PCCD, "title": "3_mr.smith", "overall": "8.6"}])
    _write(tmp_path / "guru_validation.json", [{**PCCD, "title": "4_no-score", "overall": "N/A", "score": []}])
    _write(tmp_path / "guru_test.json", [{**PCCD, "title": "5_not-here"}])
    rows, report = _load(tmp_path, tmp_path / "images" / "full")
    assert list(rows) == ["train", "validation", "test"]
    assert [row["topic"] for row in rows["train"][:6]] == [name for name in pccd.TOPICS if PCCD[name]]
    seven = 1 + 9 * 0.7  # of 10, on the scale 1 to 10
    assert [row["topic_score"] for row in rows["train"][:6]] == pytest.approx([seven, 8.2, 6.4, seven, seven, seven])
    told = {one["topic"]: one["score"] for one in rows["train"][0]["topic_scores"]}
    assert list(told) == [topic for topic in pccd.TOPICS if topic != "depth_of_field"] and told["composition"] == 6.4
    assert rows["train"][2]["captions"] == ["The straw is distracting."]
    scores = {row["image_id"]: row["score_mean"] for row in rows["train"]}
    assert scores == {"12_cutters-point": pytest.approx(seven), "3_mr.smith": pytest.approx(8.74)}
    assert all(row["score"] is None for row in rows["train"])
    assert {row["score_mean"] for row in rows["validation"]} == {None} and rows["test"] == []
    train, validation, test = report.splits.values()
    assert not train.problems and not validation.problems  # what a reviewer did not write is absent, not wrong
    assert (train.rows, train.left_out, len(train.words)) == (12, 0, 12)
    assert train.scores == pytest.approx([seven, 8.74])
    assert (
        test.examples == {"missing image": ["5_not-here (guru_test.json:1)"]} and test.problems["missing image"] == 1
    )


def test_ava_captions(tmp_path):
    _pictures(tmp_path / "images", "1001.jpg", "1002.jpg", "1003.jpg")
    images = [
        {"filename": f"{1001 + i}.jpg", "split": split, "imgid": i, "sentids": [0], "sentences": sentences}
        for i, (split, sentences) in enumerate(
            (
                ("restval", [{"raw": "Lovely light.", "clean": "lovely light", "tokens": ["lovely", "light"]}]),
                ("val", [{"raw": "Too dark", "clean": "too dark", "tokens": []}, {"raw": " ", "tokens": []}]),
                ("test", [{"raw": "Wow", "clean": "wow", "tokens": ["wow"]}] * 2),
                ("train", []),
            )
        )
    ]
    file = _write(tmp_path / "CLEAN_AVA_FULL.json", {"images": images})
    rows, report = _load(file, tmp_path / "images")
    assert {name: [(row["image_id"], row["captions"]) for row in split] for name, split in rows.items()} == {
        "train": [("1001", ["Lovely light."])],
        "validation": [("1002", ["Too dark"])],
        "test": [("1003", ["Wow", "Wow"])],
    }
    problems = {name: dict(part.problems) for name, part in report.splits.items()}
    assert problems == {
        "train": {"missing image": 1, "nothing to learn from": 1},
        "validation": {"empty text": 1},
        "test": {"repeated text": 1},
    }


def test_dpc_captions(tmp_path):
    _pictures(tmp_path / "ava", "11170.jpg", "11171.jpg")
    _write(tmp_path / "dpc" / "composition.json", {"11170.jpg": ["Nice crop.", "Tilted."], "11171.jpg": ["Good."]})
    _write(tmp_path / "dpc" / "use_of_camera.json", {"11170.jpg": ["Good shutter speed."]})
    _write(tmp_path / "dpc" / "readme.json", {"not": ["data"]})
    rows, report = _load(tmp_path / "dpc", tmp_path / "ava")
    assert [(row["image_id"], row["topic"], row["captions"]) for row in rows["train"]] == [
        ("11170", "composition", ["Nice crop.", "Tilted."]),
        ("11171", "composition", ["Good."]),
        ("11170", "use_of_camera", ["Good shutter speed."]),
    ]
    assert len(report.splits["train"].image_ids) == 2 and not report.splits["train"].problems
    assert "rows about use_of_camera" in str(report)


def test_rpcd(tmp_path):
    _pictures(tmp_path / "images", "abc-first.jpg", "def-second.jpg")
    entry = {"im_id": "abc", "im_paths": "images/abc-first.jpg", "mean_score": 0.5, "num_comments": 2}
    entry["first_level_comments_values"] = ["I like it.", "Crop it."]
    _write(tmp_path / "processed_info_train.json", [entry])
    other = {**entry, "im_id": "def", "im_paths": "images/def-second.jpg", "mean_score": None}
    _write(tmp_path / "processed_info_test.json", [other])
    rows, report = _load(tmp_path)
    (train,), (test,) = rows["train"], rows["test"]
    assert (train["image_id"], train["captions"]) == ("abc", ["I like it.", "Crop it."])
    assert (train["score_mean"], test["score_mean"]) == (5.5, None)
    assert not report.splits["test"].problems  # nothing was said, nothing is wrong


def test_ava_scores(tmp_path):
    _pictures(tmp_path / "images", "953619.jpg", "953958.jpg")
    counts = [0, 1, 5, 17, 38, 36, 15, 6, 5, 1]
    lines = [
        f"1 953619 {' '.join(map(str, counts))} 1 22 1396",
        "2 953958 10 7 15 26 26 21 10 8 1 2 1 21 1396",
        "3 954184 0 0 4 8 41 56 10 3 4 0 0 0 1396",
        "4 953841 0 0 4",
    ]
    rows, report = _load(_write(tmp_path / "AVA.txt", "\n".join(lines)), tmp_path / "images")
    row = rows["train"][0]
    assert row["captions"] == [] and np.allclose(row["score"], np.array(counts) / 124)
    assert row["score_mean"] == pytest.approx(np.repeat(np.arange(1, 11), counts).mean())
    assert report.splits["train"].problems == {"missing image": 1, "unreadable row": 1}
    assert report.splits["train"].with_distribution == 2


def test_score_lists(tmp_path):
    _pictures(tmp_path / "images", "953980.jpg", "2.jpg", "3.jpg")
    entries = [
        {"image": "953980.jpg", "gt_score": 0.5},
        {"image": "2.jpg", "gt_score": "much"},
        {"image": "3.jpg", "gt_score": 5.21},
        "no row",
    ]
    file = _write(tmp_path / "pictures_test.json", entries)
    rows, report = _load(file, tmp_path / "images", score_range=(0, 1))
    assert [(row["image_id"], row["score_mean"]) for row in rows["test"]] == [("953980", 5.5)]
    problems = {"unparsable score": 1, "score out of range": 1, "nothing to learn from": 2, "unreadable row": 1}
    assert report.splits["test"].problems == problems
    rows, _ = _load(file, tmp_path / "images", score_range=(1, 10))
    assert [row["score_mean"] for row in rows["test"]] == [pytest.approx(5.21)]
    with pytest.raises(ValueError, match="worst and best"):
        aic_data.load(file, tmp_path / "images", score_range=(1, 0))


# Your own ------------------------------------------------------------------------------------------------------------


def test_a_folder_with_everything_that_can_be_wrong(tmp_path):
    _pictures(tmp_path / "train", "a.jpg", "more/b.png", "c.jpg")
    _pictures(tmp_path / "test", "z.jpg")
    (tmp_path / "train" / "broken.jpg").write_bytes(b"no picture")
    Image.effect_noise((64, 64), 50).save(tmp_path / "train" / "cut.jpg")
    os.truncate(tmp_path / "train" / "cut.jpg", 1500)
    weighted = {"file_name": "more/b.png", "captions": ["One.", " ", "One.", 7], "caption_weight": [1, 2, 0.5, 3]}
    lines = _lines(
        {"file_name": "a.jpg", "caption": "Nice light.", "score": 6.5, "aspect": "light"},
        {**weighted, "score": "n/a", "aspect_labels": [1, "x"], "saliency": [[0, 1], [1, 0]]},
        {"file_name": "c.jpg", "score": [0, 0, 0, 0, 0, 1, 1, 0, 0, 0]},
        {"file_name": "c.jpg", "score": 99, "caption": "x " * 301, "caption_weight": [1, 1]},
        {"file_name": "c.jpg", "score": float("nan"), "captions": None},
        {"file_name": "nowhere.jpg", "caption": "Gone."},
        {"file_name": "z.jpg", "caption": "Beside the test's metadata only."},
        {"file_name": "broken.jpg", "caption": "Damaged."},
        {"file_name": "cut.jpg", "caption": "Damaged."},
        {"caption": "Of what?"},
        '{"file_name": ',
        "[1]",
    )
    _write(tmp_path / "train" / "metadata.jsonl", "\ufeff" + lines)
    (tmp_path / "test" / "metadata.jsonl").write_bytes('{"file_name": "z.jpg", "caption": "Café"}'.encode("latin-1"))
    rows, report = _load(tmp_path, decode_images=True, score_range=(1, 10))
    one, two, three, four = rows["train"]
    assert (one["image_id"], one["captions"], one["topic"]) == ("a", ["Nice light."], "light")
    assert (one["score_mean"], one["score"]) == (6.5, None)
    assert (two["image_id"], two["captions"], two["caption_weights"]) == ("more/b", ["One.", "One."], [1, 0.5])
    assert (two["score_mean"], two["aspect_labels"], two["saliency"]) == (None, None, [[0, 1], [1, 0]])
    assert (three["score_mean"], three["score"][5]) == (6.5, 0.5)
    assert (four["image_id"], four["score_mean"], four["caption_weights"]) == ("c", None, None)
    assert report.splits["train"].problems == {
        "empty text": 1,
        "unreadable text": 1,
        "repeated text": 1,
        "unparsable score": 2,
        "unreadable aspect_labels": 1,
        "unreadable caption_weight": 1,
        "overlong text": 1,
        "score out of range": 1,
        "repeated row": 1,
        "missing image": 3,
        "damaged image": 2,
        "nothing to learn from": 1,
        "unreadable row": 2,
    }
    assert report.splits["train"].examples["missing image"] == [
        "nowhere (train/metadata.jsonl:6)",
        "z (train/metadata.jsonl:7)",
        "train/metadata.jsonl:10",
    ]
    assert report.splits["test"].problems == {"broken characters": 1}
    figures = report.splits["train"].figures()
    assert (figures["rows"], figures["rows left out"], figures["photographs"], figures["captions"]) == (12, 8, 3, 4)
    assert (figures["words a caption"], figures["words at most"]) == ("76.2", 301)
    assert (figures["photographs with a score"], figures["range of scores"]) == (2, "6.50-6.50")
    lines = dict(line.rsplit(maxsplit=2)[:2] for line in str(report).splitlines() if " left out) " in line)
    assert lines["damaged image (row left out)"] == "2" and lines["empty text (value left out)"] == "1"
    report = aic_data.load(tmp_path, score_range=(1, 10))[1]
    assert report.splits["train"].problems["damaged image"] == 2  # undecoded too: its end is missing


def test_csv_with_columns_of_other_names(tmp_path):
    _pictures(tmp_path / "pictures", "a.jpg", "b.jpg")
    with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(
            [
                ["photo", "text", "score", "caption_weight"],
                ["pictures/a.jpg", 'Soft, "painterly"\nlight.', "6", "0.5"],
                ["pictures/b.jpg", "", "", ""],
                ["pictures/a.jpg", "Tilted.", "six", ""],
            ]
        )
    rows, report = _load(tmp_path, columns={"image": "photo", "caption": "text"})
    assert [
        (row["image_id"], row["captions"], row["score_mean"], row["caption_weights"]) for row in rows["train"]
    ] == [
        ("pictures/a", ['Soft, "painterly"\nlight.'], 6, [0.5]),
        ("pictures/a", ["Tilted."], None, None),
    ]
    assert report.splits["train"].problems == {
        "empty text": 1,
        "nothing to learn from": 1,
        "repeated row": 1,
        "unparsable score": 1,
    }
    with pytest.raises(
        ValueError, match=r"(?s)metadata\.csv is of no known form.*found caption_weight, photo, score, text"
    ):
        aic_data.load(tmp_path)


def test_pictures_in_folders_of_the_splits_below_one_metadata_file(tmp_path):
    _pictures(tmp_path, "train/a.jpg", "val/more/test-shot.jpg")
    names = ("train/a.jpg", "val/more/test-shot.jpg")
    _write(tmp_path / "metadata.jsonl", _lines(*({"file_name": name, "aspect_labels": [1]} for name in names)))
    rows, report = _load(tmp_path)
    assert {name: [row["image_id"] for row in part] for name, part in rows.items()} == {
        "train": ["train/a"],
        "validation": ["val/more/test-shot"],
    }
    assert not any(part.problems for part in report.splits.values())  # labels alone are something to learn from


def test_an_ambiguous_name_is_no_picture(tmp_path):
    _pictures(tmp_path / "images", "one/1.jpg", "two/1.jpg", "2.png")
    file = _write(tmp_path / "list.json", [{"image": name, "gt_score": 5} for name in ("1.jpg", "one/1.jpg", "2.jpg")])
    rows, report = _load(file, tmp_path / "images")
    assert [row["image_id"] for row in rows["train"]] == ["one/1", "2"]
    assert report.splits["train"].examples["missing image"] == ["1 (list.json:1)"]


def _hub_like(folder: Path, **splits: list[dict]) -> Path:
    """A data set as the Hub has them: Parquet files with the pictures inside."""
    features = datasets.Features(
        {"photo": datasets.Image(), "text": datasets.Value("string"), "score": datasets.Value("float32")}
    )
    (folder / "data").mkdir(parents=True)
    for name, rows in splits.items():
        part = datasets.Dataset.from_list(rows, features=features)
        part.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


def test_a_hub_data_set(tmp_path):
    black, white, grey = (Image.new("L", (8, 8), value) for value in (0, 255, 128))
    train = [{"photo": black, "text": "Too dark.", "score": 2.0}, {"photo": None, "text": "None.", "score": 2.0}]
    test = [{"photo": white, "text": "", "score": None}, {"photo": grey, "text": "Flat.", "score": None}]
    source = _hub_like(tmp_path / "hub", train=train, test=test)
    columns = {"image": "photo", "captions": "text"}
    rows, report = _load(source, columns=columns)
    assert [(row["captions"], row["score_mean"]) for row in rows["train"]] == [(["Too dark."], 2)]
    assert [row["captions"] for row in rows["test"]] == [["Flat."]]
    assert rows["train"][0]["image"].getpixel((0, 0)) == 0
    assert report.splits["train"].problems == {"missing image": 1}
    assert report.splits["test"].problems == {"empty text": 1, "nothing to learn from": 1}
    _, report = aic_data.load(source, columns=columns, streaming=True, check=1)
    assert [part.rows for part in report.splits.values()] == [1, 1] and "first 1 rows" in str(report)
    with pytest.raises(ValueError, match="'photo', 'text', 'score'"):
        aic_data.load(source)


# Overlap -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["test", "validation"])
def test_photographs_of_train_and_test_are_refused(tmp_path, split):
    for name in ("train", split):
        _pictures(tmp_path / name, "a.jpg", f"{name}.jpg")
        _write(tmp_path / name / "metadata.jsonl", _lines({"file_name": "a.jpg", "caption": "x"}))
    with pytest.raises(ValueError, match=rf"1 photographs of {split} are in train as well: a\."):
        aic_data.load(tmp_path)
    row = {"file_name": f"{split}.jpg", "caption": "x"}
    _write(tmp_path / split / "metadata.jsonl", _lines(row, {"file_name": "a.jpg", "caption": "x", "image_id": "a2"}))
    splits, _ = aic_data.load(tmp_path)
    assert [row["image_id"] for row in splits[split]] == [split, "a2"]


def test_the_same_picture_in_two_splits_of_a_hub_data_set_is_refused(tmp_path):
    rows = [{"photo": Image.new("L", (8, 8), 7), "text": "x", "score": None}]
    source = _hub_like(tmp_path / "hub", train=rows, test=rows)
    with pytest.raises(ValueError, match="1 photographs of test are in train as well"):
        aic_data.load(source, columns={"image": "photo", "caption": "text"})


def test_a_validation_part_is_split_off_by_photograph(tmp_path):
    _pictures(tmp_path, *(f"{i}.jpg" for i in range(6)))
    rows = [{"file_name": f"{i // 2}.jpg", "caption": f"{i}."} for i in range(12)]
    _write(tmp_path / "metadata.jsonl", _lines(*rows))
    splits, _ = aic_data.load(tmp_path)
    train, validation = aic_data.split_off_validation(splits, 0.3, seed=1)
    assert len(train) == 8 and len(validation) == 4
    assert not set(train["image_id"]) & set(validation["image_id"])
    assert list(aic_data.split_off_validation(splits, 0.01, seed=1)[1]["image_id"]) in ([str(i)] * 2 for i in range(6))
    given = datasets.DatasetDict(train=train, validation=validation)
    assert aic_data.split_off_validation(given, 0.3, seed=1) == (train, validation)
    with pytest.raises(ValueError, match=r"one photograph alone \(0\), and training needs two"):
        aic_data.split_off_validation(datasets.DatasetDict(train=splits["train"].select([0, 1])), 0.3, seed=1)
    with pytest.raises(ValueError, match=r"nothing to train on, only \['test'\]"):
        aic_data.split_off_validation(datasets.DatasetDict(test=train), 0.3, seed=1)


# Training rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [1, 5, 5.21, 10])
def test_a_mean_becomes_a_distribution_with_that_mean(mean):
    shares = np.array(aic_data.score_of_mean(mean))
    assert shares.min() >= 0 and shares.sum() == pytest.approx(1) and (shares > 0).sum() <= 2
    assert shares @ np.arange(1, 11) == pytest.approx(mean)
    assert aic_data.score_of_mean(None) is None


@pytest.mark.parametrize("streaming", [False, True])
def test_training_rows_train(tmp_path, streaming):
    _pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    rows = _lines(
        {"file_name": "a.jpg", "captions": ["blurred .", "underexposed ."], "caption_weight": [1, 0.5], "score": 6.5},
        {"file_name": "b.jpg", "caption": "wrong .", "aspect": "use_of_camera", "aspect_labels": [0, 1, -1]},
        {"file_name": "c.jpg", "score": [1] * 10, "saliency": np.eye(4).tolist()},
    )
    _write(tmp_path / "metadata.jsonl", rows)
    splits, _ = aic_data.load(tmp_path, streaming=streaming)
    processor = tiny_processor()
    rows = aic_data.training_rows(splits["train"], processor)
    examples = list(rows)
    assert [example["caption"] for example in examples] == ["blurred .", "underexposed .", "wrong .", ""]
    assert [example["caption_weight"] for example in examples] == [1, 0.5, 1, 0]
    assert [example["image_id"] for example in examples] == ["a", "a", "b", "c"]
    assert [example["length"] for example in examples] == [2, 2, 2, 0]
    assert examples[0]["prompt"] == processor.critique_prompt()
    assert examples[2]["prompt"] == processor.critique_prompt(aic_data.PROMPTS["use_of_camera"])
    assert examples[0]["score"][5:7] == [0.5, 0.5] and examples[2]["score"] is None
    assert aic_data.topic_prompt(processor, "fine_detail").count("Critique the fine detail of this photograph.") == 1
    if streaming:
        batches = list(DataLoader(rows, batch_size=4, collate_fn=ASEDataCollator(processor)))
    else:
        batches = [ASEDataCollator(processor)(examples)]
    assert len(batches) == 1 and batches[0]["score_targets"].sum(-1).tolist() == pytest.approx([1, 1, 0, 1])
    assert batches[0]["caption_weights"].tolist() == [1, 0.5, 1, 0]
    assert batches[0]["aspect_targets"].tolist() == [[-1] * 3, [-1] * 3, [0, 1, -1], [-1] * 3]
    outputs = tiny_model()(**batches[0])
    for name in ("loss", "caption_loss", "score_loss", "saliency_loss", "aspect_loss"):
        assert torch.isfinite(outputs[name]) and outputs[name] != 0


def test_a_photograph_without_a_caption_teaches_its_score_only(tmp_path):
    _pictures(tmp_path, "a.jpg")
    _write(tmp_path / "metadata.jsonl", _lines({"file_name": "a.jpg", "score": 3}))
    splits, _ = aic_data.load(tmp_path)
    processor = tiny_processor()
    batch = ASEDataCollator(processor)(list(aic_data.training_rows(splits["train"], processor)))
    outputs = tiny_model()(**batch)
    assert outputs["caption_loss"] == 0 and outputs["score_loss"] > 0 and outputs["loss"] > 0


# Command line --------------------------------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys):
    _pictures(tmp_path, "a.jpg")
    _write(tmp_path / "metadata.jsonl", _lines({"file_name": "a.jpg", "text": "Nice light.", "score": 3}))
    assert aic_data.main([str(tmp_path), "--columns", "caption=text", "--score-range", "1", "5"]) == 0
    lines = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])
    assert (lines["photographs"], lines["captions"], lines["mean score"]) == ("1", "1", "5.50")
    for arguments, message in (
        ([str(tmp_path), "--columns", "caption"], "caption=text"),
        ([str(tmp_path / "nowhere.json")], "nowhere"),
        ([str(_write(tmp_path / "half.json", "[{"))], "half.json"),
        ([str(_write(tmp_path / "half.xml", "<"))], "half.xml"),
    ):
        assert aic_data.main(arguments) == 1
        assert message in capsys.readouterr().err


def test_lists_in_the_cells_of_a_table_are_lists(tmp_path):
    """As pandas writes them, and `json.dumps`; a text that only begins like one stays a text."""
    names = [f"{letter}.jpg" for letter in "abcd"]
    _pictures(tmp_path, *names)
    captions = ["The light is soft.", "It's 'too' 'dark' by \"far\" \"too\"."]
    rows = {
        "file_name": names,
        "captions": [captions, json.dumps(captions), np.array(captions), "[sic] It's soft."],
        "score": [[0, 0, 1, 3, 4, 2, 0, 0, 0, 0], "6.5", json.dumps([1] * 10), ""],
        "aspect_labels": [[1.0, -1, 0], "", "[0, 1, 1]", None],
    }
    pandas.DataFrame(rows).to_csv(tmp_path / "metadata.csv", index=False)
    (read,), report = _load(tmp_path)[0].values(), _load(tmp_path)[1]
    assert [row["captions"] for row in read] == [captions] * 3 + [["[sic] It's soft."]]
    assert read[0]["score"][4] == pytest.approx(0.4) and read[1]["score_mean"] == pytest.approx(6.5)
    assert read[2]["score"] == pytest.approx([0.1] * 10) and read[3]["score_mean"] is None
    assert [row["aspect_labels"] for row in read] == [[1, -1, 0], None, [0, 1, 1], None]
    assert not report.splits["train"].problems


def test_heads_of_tables_in_capitals_are_read_and_misspelt_ones_told(tmp_path):
    _pictures(tmp_path, "a.jpg")
    head, row = "File_Name,Caption,Score,aspect_lables", 'a.jpg,The light is soft.,6.5,"[1, 0]"'
    (tmp_path / "metadata.csv").write_text(f"{head}\n{row}\n")
    ((read,),), report = _load(tmp_path)[0].values(), _load(tmp_path)[1]
    assert read["captions"] == ["The light is soft."] and read["score_mean"] == pytest.approx(6.5)
    assert report.notes == ["metadata.csv: the column 'aspect_lables' is not read: 'aspect_labels' would be"]
