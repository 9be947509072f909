"""Several sources as one: weights, shared photographs, ids that mean two photographs."""

from pathlib import Path

import aic_data
import datasets
import numpy as np
import pytest
from mixtures import load_mixture, picture_paths
from PIL import Image
from test_aic_data import _lines, _write


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def _photograph(number: int, side: int = 96) -> Image.Image:
    blocks = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.BICUBIC)


def _source(folder: Path, rows: dict[str, int], split: str = "train", side: int = 96, quality: int = 90) -> str:
    """A folder whose pictures are photographs by their numbers."""
    for name, number in rows.items():
        (folder / split / name).parent.mkdir(parents=True, exist_ok=True)
        _photograph(number, side).save(folder / split / name, quality=quality)
    lines = _lines(*({"file_name": name, "caption": f"{folder.name} {name}."} for name in rows))
    _write(folder / split / "metadata.jsonl", lines)
    return str(folder)


def test_sources_are_joined_by_their_weights(tmp_path):
    one = _source(tmp_path / "one", {f"a{i}.jpg": i for i in range(4)})
    two = _source(tmp_path / "two", {f"b{i}.jpg": 10 + i for i in range(6)})
    _source(tmp_path / "two", {"t.jpg": 20}, split="test")
    splits, reports = load_mixture([one, two])
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 10, "test": 1}
    assert [report.source for report in reports] == [one, two]
    splits, _ = load_mixture([one, two], [2, 0.5], seed=3)
    ids = splits["train"]["image_id"]
    assert sorted(ids[:8]) == sorted(["a0", "a1", "a2", "a3"] * 2)
    assert len(ids) == 11 and len(set(ids[8:])) == 3 and len(splits["test"]) == 1
    assert load_mixture([one, two], [2, 0.5], seed=3)[0]["train"]["image_id"] == ids
    assert splits["train"][0]["image"].size == (96, 96)
    for weights, message in (([1], "2 sources take as many weights, got 1"), ([1, 0], "larger than 0, got 0")):
        with pytest.raises(ValueError, match=message):
            load_mixture([one, two], weights)


@pytest.mark.parametrize("order", [1, -1])
def test_a_photograph_of_one_test_is_not_trained_on_in_another(tmp_path, order):
    one = _source(tmp_path / "scores", {"953.jpg": 1, "954.jpg": 2})
    # smaller and saved anew, as the next laboratory has it
    two = _source(tmp_path / "captions", {"954.jpg": 2, "955.jpg": 3}, split="test", side=64, quality=60)
    message = f"1 photographs of test in {two} are in train of {one}: 954."
    with pytest.raises(ValueError, match=message):
        load_mixture([one, two][::order])


@pytest.mark.parametrize("order", [1, -1])
def test_a_photograph_of_one_test_is_not_trained_on_under_another_name(tmp_path, order):
    one = _source(tmp_path / "scores", {"953.jpg": 1, "954.jpg": 2})
    two = _source(tmp_path / "captions", {"hill.jpg": 2, "lake.jpg": 3}, split="test")
    with pytest.raises(ValueError, match=f"1 photographs of test in {two} are in train of {one}: hill is 954\\. Take"):
        load_mixture([one, two][::order])
    three = _source(tmp_path / "smaller", {"hill.jpg": 2}, split="test", side=64)  # saved anew: only a name would tell
    assert set(load_mixture([one, three][::order])[0]) == {"train", "test"}


def test_pictures_inside_of_a_table_are_not_taken_for_files(tmp_path):
    source = _source(tmp_path / "scores", {"953.jpg": 1})
    rows = aic_data.load(source)[0]["train"]
    file = str(tmp_path / "scores" / "train" / "953.jpg")
    assert picture_paths(rows) == {file: "953"}
    content = Path(file).read_bytes()
    later = tmp_path / "later.jpg"  # of the name that the table's picture has, as it may lie where somebody works
    features = rows.select_columns(["image", "image_id"]).features
    image = {"path": str(later), "bytes": content}
    inside = datasets.Dataset.from_dict({"image": [image], "image_id": ["953"]}, features=features)
    later.write_bytes(content)
    assert picture_paths(inside) == {} == picture_paths(rows.select([]))


def test_what_is_set_aside_goes_out_of_all_sources(tmp_path):
    scores = _source(tmp_path / "scores", {f"{i}.jpg": i for i in range(6)})
    texts = _source(tmp_path / "captions", {f"{i}.jpg": i for i in range(3, 9)})
    splits, _ = load_mixture([scores, texts], [2, 1], validation_share=0.5)
    held_out, trained = splits["validation"]["image_id"], splits["train"]["image_id"]
    assert not set(held_out) & set(trained) and len(set(held_out)) == 4 and len(set(trained)) == 5
    assert (
        len(held_out) + len(trained)
        == 12 + sum(captions[0].startswith("scores") for captions in splits["train"]["captions"]) / 2
    )
    same = load_mixture([scores], validation_share=0.5, seed=5)[0]
    alone = aic_data.split_off_validation(aic_data.load(scores)[0], 0.5, 5)
    assert [same["train"]["image_id"], same["validation"]["image_id"]] == [rows["image_id"] for rows in alone]
    _source(tmp_path / "scores", {"v.jpg": 20}, split="validation")
    assert load_mixture([scores, texts], validation_share=0.5)[0]["validation"]["image_id"] == ["v"]


def test_one_id_of_two_photographs(tmp_path):
    one = _source(tmp_path / "berlin", {"1.jpg": 1, "2.jpg": 2})
    two = _source(tmp_path / "paris", {"1.jpg": 3, "2.jpg": 2}, split="train")
    _source(tmp_path / "paris", {"3.jpg": 4}, split="test")
    splits, _ = load_mixture([one, two])
    assert splits["train"]["image_id"] == ["1", "2", "paris/1", "2"]  # the second is the same photograph
    three = _source(tmp_path / "rome", {"2.jpg": 5}, split="test")
    assert load_mixture([one, three])[0]["test"]["image_id"] == ["rome/2"]
