"""What `examples/evaluate_captions.py` takes: ids of photographs, broken lines, scores alone, several systems, data sets."""

import json
import os

import evaluate_captions
import numpy as np
import pytest
from conftest import tiny_base, tiny_processor
from PIL import Image
from scipy.stats import spearmanr
from test_evaluate_captions import figures, run, write


ALBUMS = [{"file_name": f"{year}/IMG_1.jpg", "caption": f"the light of {year}"} for year in (2023, 2024)]


@pytest.mark.parametrize("form", ["{}/IMG_1", "{}/IMG_1.jpg", "/home/somebody/photos/{}/IMG_1.jpg", "photos/{}/IMG_1"])
def test_photographs_of_one_name_stay_two(form, tmp_path):
    captions = [{"path": form.format(year), "caption": f"the light of {year}"} for year in (2024, 2023)]
    paths = write(tmp_path / "c.jsonl", captions), write(tmp_path / "metadata.jsonl", ALBUMS)
    assert run(paths[0], "--references", paths[1], "--out", tmp_path / "out") == 0
    found = figures(tmp_path / "out")
    assert found["BLEU-4", "all"]["systems"]["c"]["value"] == pytest.approx(1, abs=1e-6)
    assert found["BLEU-1", "all"]["systems"]["c"]["wrong_photo_value"] < 1
    assert found["BLEU-4", "all"]["systems"]["c"]["photographs"] == 2


def test_bare_names_will_do_where_one_photograph_is_meant(tmp_path, capsys):
    references = write(
        tmp_path / "metadata.jsonl", [*ALBUMS, {"file_name": "2023/IMG_2.jpg", "caption": "soft light"}]
    )
    good = write(tmp_path / "good.jsonl", [{"image_id": "IMG_2", "caption": "soft light"}])
    assert run(good, "--references", references, "--out", tmp_path / "out", "--partial") == 0
    bad = write(tmp_path / "bad.jsonl", [{"image_id": "IMG_1", "caption": "soft light"}])
    assert run(bad, "--references", references, "--out", tmp_path / "out", "--partial") == 2
    assert "IMG_1 may be 2023/IMG_1 or 2024/IMG_1" in capsys.readouterr().err


def test_what_cannot_be_read_is_counted_with_its_lines(tmp_path):
    lines = [
        {"image_id": "a", "caption": "soft light", "saliency": "lost.npy"},
        {"image_id": "b", "caption": "hard light", "saliency": [1, 2], "score": "9" * 400},
        "[1]",
        '{"image_id": "c", "caption": ' + "[" * 3000 + "]" * 3000 + "}",
        {"image_id": "c", "caption": "no light", "score": float("nan")},
        {"caption": "of what"},
    ]
    captions, encoded = write(tmp_path / "c.jsonl", lines), tmp_path / "encoded.jsonl"
    encoded.write_bytes(captions.read_text().encode("utf-16"))
    truths = [{"image_id": name, "captions": ["soft light"], "rating": 6} for name in "abc"]
    truths[0]["fixations"] = [[200, 0.5]]
    references = tmp_path / "r.jsonl"
    references.write_text("\ufeff" + "".join(json.dumps(row) + "\r\n" for row in truths))
    for file in (captions, encoded):
        assert run(file, "--references", references, "--out", tmp_path / "out") == 0
        notes = figures(tmp_path / "out")["report"]["notes"]
        assert any(note.startswith("r.jsonl, line 1: no fixations (A fixation is") for note in notes)
        assert any(note.startswith(f"{file.name}, line 3, 4, 6: not a JSON object with image_id") for note in notes)
        assert any(note.startswith(f"{file.name}, line 1: no saliency") for note in notes)
        assert any("got one of shape (2,)" in note for note in notes)
        assert f"{file.stem}: scores that cannot be read: 2" in notes
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert run(tmp_path / "pipe.jsonl", "--references", references, "--out", tmp_path / "out") == 2


def test_scores_alone_are_measured(tmp_path):
    said, true = (4.1, 5.0, 6.2, 7.7), (3.9, 5.5, 5.9, 8.0)
    captions = write(tmp_path / "c.jsonl", [{"image_id": str(i), "score": one} for i, one in enumerate(said)])
    references = write(tmp_path / "r.jsonl", [{"image_id": str(i), "rating": one} for i, one in enumerate(true)])
    assert run(captions, "--references", references, "--out", tmp_path / "out") == 0
    found = figures(tmp_path / "out")
    assert found["SRCC", "score"]["systems"]["c"]["value"] == pytest.approx(1)
    assert found["PLCC", "score"]["systems"]["c"]["value"] == pytest.approx(np.corrcoef(said, true)[0, 1])
    assert not any(key[0].startswith("BLEU") for key in found if isinstance(key, tuple))
    scaled = write(tmp_path / "s.jsonl", [{"image_id": str(i), "rating": one * 10} for i, one in enumerate(true)])
    assert run(captions, "--references", scaled, "--out", tmp_path / "out", "--score-range", 10, 100) == 0
    assert figures(tmp_path / "out")["PLCC", "score"]["systems"]["c"]["value"] == pytest.approx(
        np.corrcoef(said, true)[0, 1]
    )


@pytest.mark.parametrize("order", ["captions first", "ratings first", "by topic"])
def test_ratings_count_whichever_line_they_stand_on(order, tmp_path):
    """Lines of captions and lines of ratings, as when two tables are put one after the other."""
    names = [f"{letter}.jpg" for letter in "abcdef"]
    captions = [{"image_id": name, "captions": [f"it is {name}"]} for name in names]
    ratings = [{"image_id": name, "rating": 3 + i} for i, name in enumerate(names)]
    if order == "by topic":
        ratings = [{**row, "aspect": "light", "captions": ["the light is soft"]} for row in ratings]
    lines = [*ratings, *captions] if order == "ratings first" else [*captions, *ratings]
    references = write(tmp_path / "r.jsonl", [*lines, {"image_id": "a.jpg", "rating": 9}])
    said = [{"image_id": name, "caption": "soft", "score": i + 1.5} for i, name in enumerate(names)]
    said += [{**row, "aspect": "light"} for row in said] if order == "by topic" else []
    assert run(write(tmp_path / "c.jsonl", said), "--references", references, "--out", tmp_path / "out") == 0
    srcc = figures(tmp_path / "out")["SRCC", "score"]["systems"]["c"]["value"]
    other = 9 if order == "by topic" else 3  # of the photograph's first line that has one
    assert srcc == pytest.approx(spearmanr([other, 4, 5, 6, 7, 8], range(6)).statistic)
    assert (
        "scores of one photograph that differ from its first one, which counts: 1"
        in (tmp_path / "out" / "report.md").read_text()
    )


def test_several_systems_against_one(tmp_path):
    texts = ["soft light on the lake", "harsh shadows", "the horizon tilts", "a busy background"]
    references = write(tmp_path / "r.jsonl", [{"image_id": str(i), "captions": [t]} for i, t in enumerate(texts)])
    files = [
        write(tmp_path / f"{name}.jsonl", [{"image_id": str(i), "caption": say(t)} for i, t in enumerate(texts)])
        for name, say in (("base", lambda t: "nice"), ("ours", str), ("theirs", lambda t: t.split()[0]))
    ]
    arguments = ["--references", references, "--out", tmp_path / "out"]
    assert run(*files, *arguments, "--against", "base") == 0
    row = figures(tmp_path / "out")["BLEU-1", "all"]
    values = {name: cell["value"] for name, cell in row["systems"].items()}
    assert set(row["comparisons"]) == {"ours", "theirs"}
    for name, one in row["comparisons"].items():
        assert one["difference"] == pytest.approx(values[name] - values["base"])
    assert "theirs less base | p |" in (tmp_path / "out" / "report.md").read_text()
    assert run(*files, *arguments) == 0
    assert "comparisons" not in figures(tmp_path / "out")["BLEU-1", "all"]


def test_references_of_any_data_set(tmp_path, capsys):
    texts = {"general_impression": "Soft light.", "focus": "Sharp."}
    rows = [{"title": f"{i}_hill", "overall": "7", "score": ["7"] * 7, **texts} for i in range(3)]
    (tmp_path / "guru_test.json").write_text(json.dumps(rows))
    for i in range(3):
        Image.new("RGB", (40, 30), (i * 50, 80, 90)).save(tmp_path / f"{i}_hill.jpg")
    said = [
        {"image_id": f"{i}_hill", "aspect": name, "caption": text} for i in range(3) for name, text in texts.items()
    ]
    captions = write(tmp_path / "c.jsonl", said)
    assert run(captions, "--data", tmp_path, "--out", tmp_path / "out") == 0
    found = figures(tmp_path / "out")
    assert found["BLEU-1", "all"]["systems"]["c"]["value"] == pytest.approx(1) and ("CIDEr of focus", "all") in found
    assert run(captions, "--data", tmp_path, "--split", "validation", "--out", tmp_path / "out") == 2
    assert (
        "no split 'validation', only test. What is measured should not have been trained on" in capsys.readouterr().err
    )


def test_a_photograph_of_several_questions(tmp_path):
    """Each has its own answer and its own references; a caption of no question answers all."""
    asked = {"How is the light?": "it is soft", "And the framing?": "too tight by far"}
    truths = [{"image_id": "a", "prompt": question, "captions": [text]} for question, text in asked.items()]
    references = write(tmp_path / "r.jsonl", truths)
    said = [{"image_id": "a", "prompt": question, "caption": text} for question, text in reversed(asked.items())]
    captions = write(tmp_path / "c.jsonl", said)
    arguments = ["--references", references, "--out", tmp_path / "out"]
    assert run(captions, *arguments) == 0
    assert figures(tmp_path / "out")["BLEU-1", "all"]["systems"]["c"]["value"] == pytest.approx(1)
    whole = write(tmp_path / "c.jsonl", [{"image_id": "a", "caption": "it is soft"}])
    assert run(whole, *arguments) == 0
    assert figures(tmp_path / "out")["BLEU-1", "all"]["systems"]["c"]["value"] == pytest.approx(np.exp(1 - 7 / 6) / 2)
    general = write(tmp_path / "general.jsonl", [{"image_id": "a", "captions": ["it is soft"]}])
    assert run(write(tmp_path / "c.jsonl", said[1:]), "--references", general, "--out", tmp_path / "out") == 0


@pytest.mark.parametrize(("texts", "number"), [("joined", 3), ("aspects", 6), ("general", 3)])
def test_texts_and_topic_scores_of_pccd(texts, number, tmp_path):
    scores = [["7", "N", "2"], ["3", "4", "5"], ["9", "6", "4"]]
    rows = [
        {"title": str(i), "overall": "7", "score": one, "general_impression": f"good {i}", "composition": "level"}
        for i, one in enumerate(scores)
    ]
    (tmp_path / "guru_test.json").write_text(json.dumps(rows))
    for i in range(3):
        Image.new("RGB", (40, 30), (i * 50, 80, 90)).save(tmp_path / f"{i}.jpg")
    aspects = [{"composition": 0.1}, {"composition": 0.9, "focus": 0.2}, {"composition": 0.5}]
    said = [{"image_id": str(i), "caption": f"good {i}", "aspects": one} for i, one in enumerate(aspects)]
    captions = write(tmp_path / "c.jsonl", said)
    assert run(captions, "--data", tmp_path, "--out", tmp_path / "out", "--pccd", texts) == 0
    found = figures(tmp_path / "out")
    assert f"3 photographs, {number} captions" in " ".join(found["report"]["statistics"])
    assert found["SRCC of composition", "score"]["systems"]["c"]["value"] == pytest.approx(1)
    expected = np.corrcoef([0.1, 0.9, 0.5], [2, 5, 4])[0, 1]
    assert found["PLCC of composition", "score"]["systems"]["c"]["value"] == pytest.approx(expected)
    assert "wrong_photo_value" in found["SRCC of composition", "score"]["systems"]["c"]
    assert not any("of general_impression" in key[0] and key[1] == "score" for key in found if isinstance(key, tuple))


def test_models_are_asked_the_rows_own_questions(tmp_path, monkeypatch):
    tiny_base().save_pretrained(tmp_path / "llava")
    tiny_processor().base_processor.save_pretrained(tmp_path / "llava")
    Image.new("RGB", (40, 30), (50, 80, 90)).save(tmp_path / "a.jpg")
    asked = [{"prompt": "what is good ?"}, {"aspect": "light"}, {}]
    references = write(tmp_path / "r.jsonl", [{"file_name": "a.jpg", "captions": ["good"], **one} for one in asked])
    seen = []

    def remember(critic, images, questions, max_new_tokens):
        seen.extend(questions)
        return ["good"] * len(images)

    monkeypatch.setattr(evaluate_captions, "caption_batch", remember)
    arguments = ["--references", references, "--out", tmp_path / "out", "--prompt", "help ?"]
    assert run(tmp_path / "llava", *arguments) == 0
    assert seen == ["what is good ?", evaluate_captions.row_question("light"), "help ?"]
    assert not any("measured by" in note for note in figures(tmp_path / "out")["report"]["notes"])
