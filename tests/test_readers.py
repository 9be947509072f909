"""Files of data sets as people have them: each form, each kind of damage, each way to mistake a picture or a scale."""

import csv
import json
import os
import struct
from pathlib import Path

import aic_data
import datasets
import numpy as np
import pytest
from conftest import tiny_processor
from data_schema import read_texts
from PIL import Image
from readers import pccd
from readers.files import listed_splits
from scales import known_scale
from test_aic_data import PCCD, _lines, _load, _pictures, _write

from ase_mllm import ASEDataCollator


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def _read(source: Path, *arguments, **options) -> tuple[dict[str, list[dict]], aic_data.Report]:
    splits, report = aic_data.load(source, *arguments, **options)
    return {name: list(split) for name, split in splits.items()}, report


def _table(file: Path, *rows: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows(rows)
    return file


def _score_list(folder: Path, name: str, scores: list[float]) -> Path:
    _pictures(folder / "images", *(f"{i}.jpg" for i in range(len(scores))))
    return _write(folder / name, [{"image": f"{i}.jpg", "gt_score": score} for i, score in enumerate(scores)])


# Conversations -------------------------------------------------------------------------------------------------------


def test_conversations_keep_their_own_questions(tmp_path):
    _pictures(tmp_path / "set", "1.jpg", "2.jpg", "3.jpg")

    def say(speaker, text):
        return {"from": speaker, "value": text}

    rows = [
        {"id": 1, "image": "set/1.jpg", "conversations": [say("human", "<image>\nSharp?"), say("gpt", "Quite.")]},
        {
            "image": "set/2.jpg",
            "gt_score": 6.5,
            "system": "You judge.",
            "conversations": [
                say("human", "Sharp?\n<|image|>"),
                say("gpt", "No."),
                say("human", "Why?"),
                say("gpt", "Camera shake."),
            ],
        },
        {"image": "set/3.jpg", "conversations": [say("human", "<image_1> Light?"), say("gpt", "See <image>.")]},
        {"image": ["set/1.jpg", "set/2.jpg"], "conversations": [say("human", "Better?"), say("gpt", "The first.")]},
        {"conversations": [say("human", "What is bokeh?"), say("gpt", "Blur.")]},
        {"image": "set/1.jpg", "conversations": [say("human", "Unanswered?")]},
        {"image": "set/1.jpg", "conversations": [say("tool", "?"), say("gpt", "!")]},
        {"image": "set/1.jpg", "conversations": "?"},
    ]
    for name, content in (("train.json", rows), ("train.jsonl", _lines(*rows))):
        file = _write(tmp_path / name, content)
        found, report = _load(file)
        assert [(row["image_id"], row["prompt"], row["captions"], row["score_mean"]) for row in found["train"]] == [
            ("set/1", "Sharp?", ["Quite."], None),
            ("set/2", "You judge.\nSharp?", ["No."], 6.5),
            ("set/2", "You judge.\nSharp?\nNo.\nWhy?", ["Camera shake."], 6.5),
        ]
        assert report.splits["train"].problems == {
            "image token in text": 1,
            "several images": 1,
            "missing image": 1,
            "unreadable row": 3,
            "nothing to learn from": 1,
        }
        assert report.splits["train"].examples["several images"] == [f"{name}:4"]
        assert not report.splits["train"].problems["repeated row"]  # one photograph, two questions


def test_messages(tmp_path):
    _pictures(tmp_path, "one.jpg", "two.jpg", "three.jpg")
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A blank sky."}]}
    parts = [{"type": "image_url", "image_url": {"url": "three.jpg"}}, {"type": "text", "text": "And this?"}]
    rows = [
        {"messages": [{"role": "user", "content": "<image>Rate it."}, answer], "images": "one.jpg"},
        {
            "messages": [{"role": "system", "content": "Judge."}, {"role": "user", "content": "Critique it."}, answer],
            "images": ["two.jpg"],
        },
        {"messages": [{"role": "user", "content": parts}, answer]},
    ]
    _write(tmp_path / "data.json", rows)
    found, report = _load(tmp_path)
    assert [(row["image_id"], row["prompt"], row["captions"]) for row in found["train"]] == [
        ("one", "Rate it.", ["A blank sky."]),
        ("two", "Judge.\nCritique it.", ["A blank sky."]),
        ("three", "And this?", ["A blank sky."]),
    ]
    assert not report.splits["train"].problems and "(questions of their own)" in str(report)


def test_a_question_of_its_own_is_what_the_model_is_trained_on(tmp_path):
    _pictures(tmp_path, "a.jpg", "b.jpg")
    rows = [
        {"file_name": "a.jpg", "caption": "blurred .", "prompt": "<image>\nWhat is wrong?"},
        {"file_name": "b.jpg", "caption": "underexposed .", "aspect": "light"},
    ]
    _write(tmp_path / "metadata.jsonl", _lines(*rows))
    found, _ = aic_data.load(tmp_path)
    processor = tiny_processor()
    examples = list(aic_data.training_rows(found["train"], processor))
    prompts = [processor.critique_prompt("What is wrong?"), aic_data.topic_prompt(processor, "light")]
    assert [example["prompt"] for example in examples] == prompts
    assert prompts[0].count(processor.image_token) == 1
    assert ASEDataCollator(processor)(examples)["labels"].shape[0] == 2


# Other forms ---------------------------------------------------------------------------------------------------------


def test_coco_annotations(tmp_path):
    _pictures(tmp_path / "val2014", "a.jpg", "b.jpg")
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": "2", "file_name": "b.jpg"}, {"file_name": "c.jpg"}]
    captions = [(1, "Soft light."), (1, "Too central."), (2, "Harsh."), (7, "Of what?")]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(captions)]
    _write(tmp_path / "captions_val2014.json", {"images": images, "annotations": annotations})
    found, report = _load(tmp_path)
    assert {row["image_id"]: row["captions"] for row in found["validation"]} == {
        "a": ["Soft light.", "Too central."],
        "b": ["Harsh."],
    }
    assert report.splits["validation"].problems == {"unreadable row": 2}


def test_pccd_as_it_was_crawled(tmp_path):
    _pictures(tmp_path / "images", "1_hill.jpg", "2_lake.jpg")
    silent = {topic: "" for topic in PCCD if topic in aic_data.PROMPTS} | {"focus": "", "depth_of_field": ""}
    rows = [{**PCCD, "title": "1_hill"}, {**PCCD, **silent, "title": "2_lake", "subject_of_photo": "N/A"}]
    _write(tmp_path / "raw.json", rows)
    found, report = _load(tmp_path)
    topics = [row["topic"] for row in found["train"] if row["image_id"] == "1_hill"]
    assert len(topics) == 6 and "depth_of_field" not in topics
    last = found["train"][-1]  # nobody wrote about it, and still it has an overall score
    assert (last["image_id"], last["topic"], last["captions"]) == ("2_lake", None, [])
    assert last["score_mean"] == pytest.approx(7.3) and not report.splits["train"].problems


def test_pccd_of_the_whole_photograph(tmp_path):
    _pictures(tmp_path, "1_hill.jpg", "2_lake.jpg")
    rows = [{**PCCD, "title": "1_hill"}, {**PCCD, "title": "2_lake", "general_impression": ""}]
    _write(tmp_path / "guru_train.json", rows)
    hill, lake = _load(tmp_path, pccd_texts="joined")[0]["train"]
    assert hill["captions"] == ["\n".join(PCCD[topic] for topic in pccd.TOPICS if PCCD[topic])]
    assert len(hill["topic_scores"]) == 6 and hill["topic"] is None and len(lake["captions"][0].split("\n")) == 5
    hill, lake = _load(tmp_path, pccd_texts="general")[0]["train"]
    assert (hill["captions"], lake["captions"]) == (["An interesting image."], []) and lake["score_mean"] is not None
    with pytest.raises(ValueError, match="aspects, joined, general, got 'all'"):
        aic_data.load(tmp_path, pccd_texts="all")


def test_files_of_aestheval(tmp_path):
    _pictures(tmp_path / "pccd" / "images" / "full", "1_hill.jpg")
    processed = {**PCCD, "im_name": "1_hill", "mean_score": 0.3, "sentiment": {}}
    for name in ("title", "overall"):
        del processed[name]
    _write(tmp_path / "pccd" / "processed_info_test.json", [processed])
    found, report = _read(tmp_path / "pccd")
    assert len(found["test"]) == 6 and not report.splits["test"].problems
    assert {row["score_mean"] for row in found["test"]} == {None}  # a model's reading of the texts is no rating
    _pictures(tmp_path / "ava" / "images", "953.jpg", "954.jpg")
    rows = [
        {"im_id": "953", "im_score": 5.25, "im_name": "953.jpg", "comments": ["Nice."], "mean_score": 0.9},
        {"im_id": "954", "im_score": 4.0, "im_path": "/media/somebody/ava/images/954.jpg", "comments": ["Dull."]},
    ]
    _write(tmp_path / "ava" / "processed_info_train.json", rows)
    found, _ = _read(tmp_path / "ava")
    assert [(row["image_id"], row["captions"], row["score_mean"]) for row in found["train"]] == [
        ("953", ["Nice."], 5.25),
        ("954", ["Dull."], 4),
    ]


def test_dpc2022(tmp_path):
    _pictures(tmp_path / "images", "11.jpg", "12.jpg", "13.jpg")
    scored = [
        {"comment": {"comment": "Lovely light.", "words": []}, "sum_score": 3.1, "norm_sum_score": 0.7},
        {"comment": {"comment": "My dog has one.", "words": []}, "sum_score": -1, "norm_sum_score": -0.2},
    ]
    shared = {"raw_comments": ["Lovely light. My dog has one."], "avg_all_users_score": 5.31}
    _write(tmp_path / "11.json", {"ID": "11", **shared, "score_comments": scored})
    _write(tmp_path / "12.json", {"ID": "12", **shared})
    _write(tmp_path / "13.json", {"ID": "13", **shared, "score_comments": [{**scored[0], "norm_sum_score": "much"}]})
    _table(tmp_path / "train.csv", ["ID", "score"], ["11", "5.3"], ["13", "5.3"])
    _table(tmp_path / "val.csv", ["ID", "score"], ["12", "5.3"])
    found, report = _load(tmp_path)
    first, third = found["train"]
    assert (first["captions"], first["caption_weights"]) == (["Lovely light.", "My dog has one."], [0.7, 0])
    assert found["validation"][0]["captions"] == shared["raw_comments"] and first["score_mean"] == pytest.approx(5.31)
    assert third["caption_weights"] is None and report.splits["train"].problems == {"unreadable caption_weight": 1}
    assert not report.notes  # the lists were read, for the splits
    _write(tmp_path / "13.json", "{")  # one of half a million
    found, report = _read(tmp_path)
    assert report.splits["train"].examples == {"unreadable row": ["13.json:1"]} and len(found["train"]) == 1


def test_ava_comments_and_tables(tmp_path):
    _pictures(tmp_path / "images", "953.jpg", "954.jpg")
    text = "1#953# Nice light # Tilted\n2#954#\nno line\n3#999#Gone\n"
    _write(tmp_path / "AVA_Comments_Full.txt", text)
    found, report = _load(tmp_path)
    assert [(row["image_id"], row["captions"]) for row in found["train"]] == [("953", ["Nice light", "Tilted"])]
    assert report.splits["train"].problems == {"nothing to learn from": 1, "unreadable row": 1, "missing image": 1}
    _write(tmp_path / "AVA.txt", "1 953 0 1 5 17 38 36 15 6 5 1 1 22 1396\n")
    _, report = _load(tmp_path)
    assert report.notes == ["Not read, name it to read it: AVA_Comments_Full.txt."]
    counts = [0, 1, 5, 17, 38, 36, 15, 6, 5, 1]
    head = ["image_id", *(f"score{i}" for i in range(2, 12)), "tag1"]
    file = _table(tmp_path / "test.csv", head, ["953", *counts, 1], ["954", *["x"] * 10, 1])
    found, report = _load(file)
    (row,) = found["test"]
    assert (
        np.allclose(row["score"], np.array(counts) / 124) and report.splits["test"].problems["unparsable score"] == 1
    )


def test_raw_rpcd(tmp_path):
    _pictures(tmp_path / "images", "aa1-image.jpg", "bb2-image.png")
    comments = [["Crop it."], ["Straighten it.", "Nice."]]
    columns = {"im_paths": ["images/aa1-image.jpg", "images/bb2-image.png"], "first_level_comments_values": comments}
    _write(tmp_path / "json" / "reddit_photocritique_image_comments.json", columns)
    _write(tmp_path / "json" / "test_ids.csv", "bb2\n")
    found, _ = _load(tmp_path / "json", tmp_path / "images")
    assert [row["captions"] for row in found["train"] + found["test"]] == comments
    table = [
        ["comment_id", "comment_parent_id", "comment_body", "submission_id"],
        ["1", "t3_aa1", "Crop it.", "aa1"],
        ["2", "t1_1", "Thanks!", "aa1"],
        ["3", "t3_bb2", "[deleted]", "bb2"],
        ["4", "t3_bb2", "Straighten it.", "bb2"],
    ]
    _table(tmp_path / "raw_reddit_photocritique_comments.csv", *table)
    found, _ = _load(tmp_path)
    assert [row["captions"] for row in found["train"]] == [["Crop it."], ["Straighten it."]]
    (tmp_path / "posts.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"posts\.pkl is a pickle"):
        aic_data.load(tmp_path / "posts.pkl")


def test_apddv2(tmp_path):
    _pictures(tmp_path / "APDDv2images", "w1.png", "w2.jpg")
    head = b"filename,Artistic Categories,Total aesthetic score,Theme and logic,Creativity,Color,Language Comment\r\n"
    rows = b'w1.png,oil,65.5,7.5,,10,"Rigid, few\nlevels."\r\nw2.jpg,oil,71,11,6,7,"Clich\xa8\xa6 tones."\r\n'
    (tmp_path / "APDDv2-10023.csv").write_bytes(head + rows)
    found, report = _load(tmp_path)
    one, two = found["train"]
    assert one["score_mean"] == pytest.approx(1 + 9 * 0.655) and one["captions"] == ["Rigid, few\nlevels."]
    assert one["topic_scores"] == [{"topic": "theme and logic", "score": 7.75}, {"topic": "color", "score": 10}]
    assert [one["topic"] for one in two["topic_scores"]] == ["creativity", "color"]
    assert report.splits["train"].problems == {"broken characters": 1, "topic score out of range": 1}
    assert report.splits["train"].figures()["with scores of topics"] == 2
    assert report.splits["train"].examples["broken characters"] == ["w2 (APDDv2-10023.csv:4)"]


def test_folders_with_the_tables_below(tmp_path):
    """As BAID's repository: `dataset/test_set.csv` and `images`."""
    root = tmp_path / "BAID"
    _pictures(root / "images", "1.jpg", "2.jpg")
    _table(root / "dataset" / "train_set.csv", ["image", "score"], ["1.jpg", "3.5"])
    _table(root / "dataset" / "test_set.csv", ["image", "score"], ["2.jpg", "9.9999"])
    found, report = _load(root)
    scores = {name: [(row["image_id"], row["score_mean"]) for row in rows] for name, rows in found.items()}
    assert scores == {"train": [("1", pytest.approx(4.15))], "test": [("2", pytest.approx(10, abs=1e-3))]}
    assert report.splits["test"].scales == {"0 to 10 by the name BAID": 1}


def test_refusals_say_what_was_tried(tmp_path):
    _pictures(tmp_path, "a.jpg")
    file = _write(tmp_path / "things.json", [{"photo": "a.jpg", "text": "Nice."}])
    with pytest.raises(
        ValueError, match=r"(?s)conversations or messages: .*COCO.*PCCD: .*found photo, text.*--columns"
    ):
        aic_data.load(file)
    assert _read(file, columns={"image": "photo", "caption": "text"})[0]["train"][0]["captions"] == ["Nice."]
    with pytest.raises(ValueError, match=r"(?s)things\.json is of no known form"):
        aic_data.load(tmp_path)  # as a folder too
    _write(tmp_path / "more.jsonl", _lines({"image": "a.jpg", "caption": "Nice."}))
    found, report = _read(tmp_path)
    assert len(found["train"]) == 1 and "things.json is of no known form" in report.notes[0]  # not without a word
    _write(tmp_path / "half.jsonl", "")
    assert "half.jsonl is empty" in _read(tmp_path)[1].notes[0]
    _write(tmp_path / "half.json", "[{")
    with pytest.raises(ValueError, match=r"half\.json is no JSON"):
        aic_data.load(tmp_path)  # a download that was cut short is not read as less data
    (tmp_path / "half.json").unlink()
    for images, message in ((tmp_path / "none", "is no folder"), (file, "is no folder")):
        with pytest.raises(ValueError, match=message):
            aic_data.load(file, images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no pictures and no \.jsonl"):
        aic_data.load(tmp_path / "empty")
    datasets.Dataset.from_list([{"x": 1}]).to_parquet(tmp_path / "empty" / "x.parquet")
    with pytest.raises(ValueError, match="leave `images` out"):
        aic_data.load(tmp_path / "empty", tmp_path)


# Pictures and splits -------------------------------------------------------------------------------------------------


def test_a_picture_is_never_another_of_the_same_name(tmp_path):
    root = tmp_path / "data"
    _pictures(root, "g0.jpg", "day1/g1.jpg", "album/a.jpg", "pictures/b.jpg")
    _pictures(tmp_path, "g1.jpg")
    names = ["g0.jpg", "day2/g0.jpg", "../g1.jpg", "g1.jpg", "./day1/../day1/g1.jpg", "day1\\g1.jpg", "g0", "g0.png"]
    _write(root / "metadata.jsonl", _lines(*({"file_name": name, "caption": f"{name}."} for name in names)))
    found, report = _load(root)
    assert [row["image_id"] for row in found["train"]] == ["g0", "day1/g1", "day1/g1"]
    assert report.splits["train"].problems == {"missing image": 4, "repeated row": 1}  # g0 and g0.png are one id
    file = _write(root / "list.json", [{"image": name, "gt_score": 6} for name in ("day2/g0.jpg", "g1", "g0.png")])
    found, report = _load(file)
    assert [row["image_id"] for row in found["train"]] == ["g1", "g0"]  # bare names are searched in lists
    assert report.splits["train"].problems == {"missing image": 1}


@pytest.mark.parametrize("folder, name", [("album", "a.jpg"), ("texts", "../album/a.jpg")])
def test_a_path_may_leave_the_folder_of_its_file_but_not_the_data(tmp_path, folder, name):
    root = tmp_path / "data"
    _pictures(root, "album/a.jpg", "pictures/b.jpg")
    _pictures(tmp_path, "c.jpg")
    names = (name, "../pictures/b.jpg", "../../c.jpg")
    _write(root / folder / "metadata.jsonl", _lines(*({"file_name": one, "caption": "x"} for one in names)))
    found, report = _load(root)
    assert [row["image_id"] for row in found["train"]] == ["album/a", "pictures/b"]
    assert report.splits["train"].problems == {"missing image": 1}


def test_names_that_begin_with_the_given_folder(tmp_path):
    _pictures(tmp_path / "images", "a.jpg", "set/b.jpg")
    names = [str(tmp_path / "images" / "a.jpg"), "images/a.jpg", "images/set/b.jpg", "other/b.jpg", "images/b.jpg"]
    file = _write(tmp_path / "data" / "list.json", [{"image": name, "gt_score": 6} for name in names])
    found, report = _load(file, tmp_path / "images")
    ids = [row["image_id"] for row in found["train"]]
    assert ids == [aic_data.photograph_id(name) for name in names[:3]]
    missing = ["other/b (list.json:4)", "images/b (list.json:5)"]
    assert report.splits["train"].examples["missing image"] == missing


def test_linked_folders_of_pictures(tmp_path):
    _pictures(tmp_path / "disk", "sub/a.jpg")
    _write(tmp_path / "data" / "metadata.jsonl", _lines({"file_name": "photos/sub/a.jpg", "caption": "x"}))
    (tmp_path / "data" / "photos").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "data")
    found, report = _read(tmp_path / "data")
    assert found["train"][0]["image_id"] == "photos/sub/a" and not report.splits["train"].problems


def test_folders_that_sound_like_splits(tmp_path):
    root = tmp_path / "test" / "data"  # a split above the data is none of it
    names = [
        "Val d'Orcia/a.jpg",
        "test shots/b.jpg",
        "lens evaluation/c.jpg",
        "trip/test/d.jpg",
        "Test/e.jpg",
        "f.jpg",
    ]
    _pictures(root, *names, "g.jpg")
    rows = [{"file_name": name, "caption": "x"} for name in names]
    _write(root / "metadata.jsonl", _lines(*rows, {"file_name": "g.jpg", "caption": "x", "split": "dev"}))
    found, report = _load(root)
    assert [row["image_id"] for row in found["test"]] == ["Test/e"] and len(found["train"]) == 5
    assert report.splits["train"].rules == {"nothing, so train": 5}
    assert report.splits["test"].rules == {"a folder's name": 1}
    assert report.splits["validation"].rules == {"a column": 1}
    assert "split told by a folder's name" in str(report)


@pytest.mark.parametrize(
    "name, split",
    [
        ("guru_test.json", "test"),
        ("captions_val2017.json", "validation"),
        ("test_set.json", "test"),
        ("TRAIN.json", "train"),
        ("test_shots.json", "train"),
        ("evaluated.json", "train"),
        ("validation/one.json", "validation"),
        ("more/validation/one.json", "train"),
    ],
)
def test_a_split_by_the_place_of_a_file(name, split):
    assert aic_data.split_of(aic_data.PurePosixPath(name), "a.jpg")[0] == split


# Scales --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",
    [
        ("KonIQ-10k", (0, 100)),
        ("koniq10k_test", (0, 100)),
        ("SPAQ", (0, 100)),
        ("ISTA-10K", (0, 100)),
        ("flickr-aes-test", (0, 1)),
        ("PARA", (1, 5)),
        ("kadid10k", (1, 5)),
        ("ArtiMuse-10K", (0, 10)),
        ("TAD66K", (1, 10)),
        ("paradise", None),
        ("flickr", None),
        ("AVA-and-PARA", None),
    ],
)
def test_known_data_sets_have_their_scale(name, expected):
    found = known_scale([name])
    assert (found and found[1]) == expected


def test_the_scale_is_that_of_the_nearest_name(tmp_path):
    scores = [1.0, 2.0, 3.0, 4.0, 5.0]
    file = _score_list(tmp_path / "PARA", "test.json", scores)
    for source in (file, tmp_path / "PARA"):
        found, report = _read(source)
        assert [row["score_mean"] for row in found["test"]] == pytest.approx([1, 3.25, 5.5, 7.75, 10])
        assert "scores read as 1 to 5 by the name PARA" in str(report)
    found, _ = _read(_score_list(tmp_path / "PARA", "AVA-test.json", scores))
    assert [row["score_mean"] for row in found["test"]] == scores
    found, _ = _read(file, score_range=(0, 5))  # what the user says is more
    assert found["test"][0]["score_mean"] == pytest.approx(2.8)


@pytest.mark.parametrize(
    "scores, told",
    [
        (
            [0.21, 0.45, 0.55, 0.63, 0.9, 1.0],
            r"6 scores from 0.21 \(list.json:1\) to 1 \(list.json:6\).*perhaps --score-range 0 1",
        ),
        ([1.4, 2.2, 2.9, 3.3, 4.8], "5 scores from 1.4 .* to 4.8 .*perhaps --score-range 1 5"),
        ([8.0, 31.0, 92.9], "3 scores from 8 .* to 92.9 .*perhaps --score-range 0 100"),
        ([0.0, 7.5], "from 0 .* to 7.5 .*perhaps --score-range 0 10"),
        ([5, 250], "from 5 .* to 250 .* --score-range WORST BEST [(]"),
    ],
)
def test_scores_of_an_untold_scale_are_an_error(tmp_path, capsys, scores, told):
    file = _score_list(tmp_path, "list.json", scores)
    with pytest.raises(ValueError, match=f"(?s){told}"):
        aic_data.load(file)
    assert aic_data.main([str(file)]) == 1 and "--score-range" in capsys.readouterr().err
    worst, best = min(scores), max(scores)
    found, _ = _read(file, score_range=(worst, best))
    assert [row["score_mean"] for row in found["train"]][:: len(scores) - 1] == [1, 10]


def test_few_scores_below_five_may_be_of_ten(tmp_path):
    found, report = _read(_score_list(tmp_path, "list.json", [1, 2, 3, 4]))
    assert [row["score_mean"] for row in found["train"]] == [1, 2, 3, 4]
    assert "scores read as 1 to 10, as no scale is given" in str(report)


def test_a_name_that_only_sounds_like_a_data_set(tmp_path):
    scores = [*np.linspace(1, 10, 20)]
    with pytest.raises(ValueError, match=r"11 of 20 scores are not within 1 to 5 by the name PARA"):
        aic_data.load(_score_list(tmp_path / "fotos para entrenar", "list.json", scores))
    _, report = _read(_score_list(tmp_path / "PARA", "list.json", [*[3.0] * 19, 50]))
    assert report.splits["train"].problems["score out of range"] == 1  # one row's mistake


# Damage --------------------------------------------------------------------------------------------------------------


def test_every_bad_line_is_one_problem_with_its_place(tmp_path):
    bad = {
        "image token in text": '"caption": "Look <image> here."',
        "broken characters": '"caption": "nice \\ud83d"',
        "unparsable score": '"caption": "x", "rating": ' + "9" * 400,
        "unreadable saliency": '"caption": "x", "saliency": [[1, -1], [0, 2]]',
        "unreadable caption_weight": '"caption": "x", "caption_weight": -5',
        "score out of range": '"caption": "x", "rating": -1',
        "unreadable aspect_labels": '"caption": "x", "aspect_labels": [0.5, 2]',
        "unreadable text": '"captions": ["a", {"b": "c"}]',
        "overlong text": f'"caption": "{"word " * 3000}"',
        "unreadable image_id": '"caption": "x", "image_id": "a\\u0000b"',
        "unreadable row": '"caption": ' + "[" * 100_000 + "]" * 100_000,
    }
    lines = [f'{{"file_name": "{i}.jpg", {line}}}' for i, line in enumerate(bad.values())]
    more = [
        '{"file_name": "0.jpg", "caption": "x", "rating": NaN}',
        '{"file_name": "0.jpg", "caption": "y", "rating": Infinity}',
        '{"file_name": "0.jpg", "caption": "z", "saliency": [[NaN]]}',
        '{"file_name": "0.jpg", "caption": "q", "caption_weight": Infinity}',
        '{"file_name": "good.jpg", "caption": "Soft light.", "rating": 7}',
        '{"file_name": "0.jpg", "caption": ' + "9" * 5000 + "}",
    ]
    _pictures(tmp_path, *(f"{i}.jpg" for i in range(len(bad))), "good.jpg")
    text = "\r\n".join([*lines, "", *more])
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + text, encoding="utf-8", newline="")
    found, report = _load(tmp_path)
    counted = report.splits["train"]
    for i, problem in enumerate(bad):
        assert f"metadata.jsonl:{i + 1}" in "".join(counted.examples[problem]), problem
        assert counted.problems[problem] >= 1
    assert counted.problems["unparsable score"] == 3 - 1  # of one photograph once
    assert (counted.problems["unreadable saliency"], counted.problems["unreadable caption_weight"]) == (2, 2)
    assert counted.examples["unreadable row"][-1] == f"metadata.jsonl:{len(bad) + 7}"
    assert counted.problems["unreadable row"] == 2 and counted.rows == len(bad) + 6
    assert found["train"][-1]["captions"] == ["Soft light."] and counted.left_out == 3
    assert "nice \ufffd" in [row["captions"][0] for row in found["train"]]
    assert len(list(aic_data.training_rows(aic_data.load(tmp_path)[0]["train"], tiny_processor()))) == counted.rows - 3


ODD = (
    *(None, "", 7, -1, True, 10**400, [], {}, [[[]]], [None], {"a": {"b": 1}}),
    *("\ud83d", "a\0b", "<image>", "../../x", "/"),
)
TURNS = [{"from": "human", "value": "Sharp?"}, {"from": "gpt", "value": "Quite."}]
ROWS_OF_FORMS = {
    "own": {"image": "a.jpg", "captions": ["Nice."], "caption_weights": [1], "score": 6, "score_range": [1, 10],
            "aspect": "light", "saliency": [[1, 0]], "aspect_labels": [1], "image_id": "a",
            "prompt": "Sharp?", "topic_scores": {"light": 3}, "topic_range": [1, 5]},
    "conversations": {"image": "a.jpg", "conversations": TURNS, "system": "Judge.", "gt_score": 6},
    "messages": {"images": ["a.jpg"], "messages": [{"role": "user", "content": [{"type": "text", "text": "Sharp?"}]},
                                                   {"role": "assistant", "content": "Quite."}]},
    "guru": {"title": "a", "overall": "7", "score": ["7"] * 7, "general_impression": "Nice.", "subject_of_photo": "Clear."},
    "rpcd": {"im_id": "a", "im_paths": "a.jpg", "mean_score": 0.5, "first_level_comments_values": ["Nice."]},
    "ava": {"im_name": "a.jpg", "im_score": 6, "comments": ["Nice."]},
    "rpcd_raw": {"submission_id": "a", "comment_parent_id": "t3_a", "comment_body": "Nice."},
    "apddv2": {"filename": "a.jpg", "Total aesthetic score": 60, "Color": 6, "Language Comment": "Nice."},
    "tanet": {"image_id": "a", **{f"score{i}": 1 for i in range(2, 12)}},
}  # fmt: skip


@pytest.mark.parametrize("form", ROWS_OF_FORMS)
def test_an_odd_value_anywhere_is_never_the_end(tmp_path, form):
    """A good row first and last, and in between the same with every value in every place."""
    _pictures(tmp_path, "a.jpg", "a-image.jpg")
    good = ROWS_OF_FORMS[form]
    odd = [{**good, name: value} for name in good for value in ODD]
    if form == "conversations":
        odd += [{**good, form: [{**TURNS[0], name: value}, TURNS[1]]} for name in TURNS[0] for value in ODD]
    file = _write(tmp_path / "rows.json", [good, *odd, "?", None, good])
    found, report = _read(file, verbose=False)
    assert sum(part.rows for part in report.splits.values()) >= (len(good) if form == "rpcd_raw" else len(odd) + 4)
    rows = [row for rows in found.values() for row in rows]
    for row in (rows[0], rows[-1]):
        assert row["captions"] or row["score"]
    examples = aic_data.training_rows(aic_data.load(file, verbose=False)[0]["train"], tiny_processor())
    assert ASEDataCollator(tiny_processor())(list(examples)[-8:])["labels"].shape[0] == min(8, len(examples))


@pytest.mark.parametrize(
    "text",
    ["<image>", "<|image|>", "a <|image_pad|> b", "<image_soft_token>", "<IMG_CONTEXT>", "[IMG]", "</img>", "<|image_1|>",
     "<|vision_start|>", "<start_of_image>", "<fake_token_around_image>", "<image_placeholder>", "<|begin_of_image|>", "<|imgpad|>",
     "<im_patch>", "<images>"],
)  # fmt: skip
def test_tokens_of_pictures_are_known(text):
    problems = []
    assert read_texts({"caption": f"See {text}."}, problems) == ([], None)
    assert problems == ["image token in text"]
    assert read_texts({"caption": "The image <3 of an <imagined> or <important> place [image 2] [img]."}, [])[0]


def test_pictures_that_cannot_be_read(tmp_path):
    whole = ("whole.jpg", "longer.jpg", "turned.jpg")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "longer.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes() + b"\0" * 5000)  # as phones do
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6
    Image.new("RGB", (8, 8)).save(tmp_path / "turned.jpg", exif=exif)
    for suffix in ("jpg", "png", "webp", "gif", "bmp", "tif"):
        file = tmp_path / f"cut-{suffix}.{suffix}"
        Image.effect_noise((64, 64), 50).save(file)
        os.truncate(file, file.stat().st_size * 2 // 3)
    exif[Image.ExifTags.Base.Make] = "A camera"
    Image.new("RGB", (8, 8)).save(tmp_path / "exif.jpg", exif=exif)
    text, number = (struct.pack(">HHI", Image.ExifTags.Base.Make, *kind) for kind in ((2, 9), (5, 1)))
    broken = (tmp_path / "exif.jpg").read_bytes().replace(text, number)  # the maker's name is a fraction
    (tmp_path / "exif.jpg").write_bytes(broken)
    (tmp_path / "text.jpg").write_text("no picture")
    os.mkfifo(tmp_path / "pipe.jpg")
    broken = [file.name for file in sorted(tmp_path.iterdir()) if file.name not in whole]
    rows = [{"file_name": name, "caption": "x"} for name in (*whole, *broken)]
    _write(tmp_path / "metadata.jsonl", _lines(*rows))
    for decode in (False, True):
        found, report = _read(tmp_path, decode_images=decode)
        assert [row["image_id"] for row in found["train"]] == ["whole", "longer", "turned"]
        assert report.splits["train"].problems == {"damaged image": 9}
        assert report.splits["train"].examples["damaged image"][0] == "cut-bmp (metadata.jsonl:4)"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-mark"])
@pytest.mark.parametrize("form", ["jsonl", "csv", "json"])
def test_encodings(tmp_path, form, encoding):
    _pictures(tmp_path, "Café.jpg")
    row = {"file_name": "Café.jpg", "caption": "Größe"}
    text = {
        "jsonl": json.dumps(row, ensure_ascii=False),
        "csv": "file_name,caption\r\nCafé.jpg,Größe\r\n",
        "json": json.dumps([row], ensure_ascii=False),
    }[form]
    mark, encoding = ("\ufeff", "utf-16-be") if encoding == "utf-16-be-mark" else ("", encoding)
    (tmp_path / f"rows.{form}").write_bytes((mark + text).encode(encoding))
    found, report = _read(tmp_path)
    assert (found["train"][0]["image_id"], found["train"][0]["captions"]) == ("Café", ["Größe"])
    assert not report.splits["train"].problems


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "latin.csv").write_bytes("file_name,caption\na.jpg,Größe\n".encode("latin-1"))
    _pictures(tmp_path, "a.jpg")
    found, report = _read(tmp_path / "latin.csv")
    assert report.splits["train"].examples["broken characters"] == ["a (latin.csv:2)"] and len(found["train"]) == 1
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "marked.jsonl").write_bytes('{"file_name": "a.jpg"}'.encode("utf-16-le"))
    _write(tmp_path / "deep.json", "[" * 100_000)
    for name, message in (
        ("pipe.jsonl", "neither a file nor a folder"),
        ("marked.jsonl", "save it as UTF-8"),
        ("deep.json", "nested too deeply"),
    ):
        with pytest.raises(ValueError, match=message):
            aic_data.load(tmp_path / name)


def test_tables_of_spreadsheets(tmp_path):
    _pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    lines = 'file_name;caption;rating\na.jpg;"Nice; light";7\n\nb.jpg;Cut; here;6\nc.jpg\nd.jpg;"12"" lens";8;;\n'
    file = _write(tmp_path / "rows.csv", lines)
    found, report = _load(file)
    assert [(row["image_id"], row["captions"]) for row in found["train"]] == [
        ("a", ["Nice; light"]),
        ("d", ['12" lens']),
    ]
    assert report.splits["train"].examples == {
        "unreadable row": ["rows.csv:4"],  # a text cut by a semicolon that nobody quoted is not half read
        "nothing to learn from": ["c (rows.csv:5)"],
    }


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("last", ["Plain.", '"Quoted."', '""'])
def test_a_quote_that_is_not_closed_takes_no_other_row(tmp_path, last, end):
    _pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg")
    lines = ["file_name,caption,rating", 'a.jpg,"Two\nlines, ""so"".",5', 'b.jpg,"Never closed,7', "c.jpg,Dull.,4"]
    lines += ['d.jpg,"Good",5', 'd.jpg,"12" lens",5', f"e.jpg,{last},6"]
    file = _write(tmp_path / "rows.csv", (end or "\n").join(lines) + end)
    found, report = _load(file)
    texts = {row["image_id"]: row["captions"] for row in found["train"]}
    assert texts["a"] == ['Two\nlines, "so".'] and texts["c"] == ["Dull."] and texts["d"] == ["Good"]
    counted = report.splits["train"]
    assert counted.rows == 6 and counted.problems["unreadable row"] == 2
    assert counted.examples["unreadable row"] == ["rows.csv:4", "rows.csv:7"]
    assert texts["e"] == ([] if last == '""' else [last.strip('"')])


def test_quotes_of_a_head_and_of_a_list_of_a_split(tmp_path):
    _pictures(tmp_path, "a.jpg")
    file = _write(tmp_path / "rows.csv", 'file_name,"caption,rating\na.jpg,Dull.,5\n')
    with pytest.raises(ValueError, match=r"rows\.csv, line 1: the names of the columns have a quote"):
        _load(file)
    _write(tmp_path / "test_ids.csv", 'image_id\n"a\nb\n')
    with pytest.raises(ValueError, match=r"test_ids\.csv, line 2: a quote that is not closed"):
        listed_splits(tmp_path, "image_id")


def test_rows_a_line_by_the_suffix_of_a_list(tmp_path):
    _pictures(tmp_path, "a.jpg", "b.jpg")
    rows = [{"image": "a.jpg", "caption": "Nice.\u2028Light."}, {"image": "b.jpg", "caption": "Dull."}]
    file = _write(tmp_path / "rows.json", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert [row["captions"] for row in _read(file)[0]["train"]] == [["Nice.\u2028Light."], ["Dull."]]
