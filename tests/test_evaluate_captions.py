"""Evaluation of captions: every figure against one worked out by hand or by the field's library called directly."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import evaluate_captions
import metrics
import numpy as np
import pytest
import torch
from conftest import tiny_base, tiny_processor
from evaluate_captions import Report
from metrics import Measure
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice.spice import Spice
from scipy import stats
from transformers import AutoModelForImageTextToText, AutoProcessor


ROOT = Path(__file__).parents[1]
NO_JAVA = dict.fromkeys(("METEOR", "SPICE"), "needs Java: sudo apt-get install default-jre-headless")
CAPTIONS = [
    "the light is soft and the horizon tilts",
    "a sharp subject on the left third of the frame",
    "too dark",
    "the colours are vivid and the light is harsh",
]
REFERENCES = [
    ["soft light and a tilted horizon", "the horizon tilts a little", "the light is very soft"],
    ["the subject is sharp", "a sharp bird on the left third"],
    ["the photograph is too dark to see the subject"],
    ["vivid colours and harsh light", "the light is harsh"],
]
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
needs_spice = pytest.mark.skipif("SPICE" in evaluate_captions.java_missing(), reason="needs Java and Stanford CoreNLP")


def measured(protocol: str, missing: dict[str, str] = NO_JAVA) -> dict[str, float]:
    measures = metrics.text_measures(CAPTIONS, REFERENCES, np.arange(4), protocol, missing)
    return {name: float(measure.value(measure.by_photo().rows)) for (name, _), measure in measures.items()}


def by_library(metric, captions: list[str], references: list[list[str]], **options) -> tuple:
    return metric.compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(captions)}, **options)


# Texts ---------------------------------------------------------------------------------------------------------------


def test_all_references_are_the_librarys_figures():
    found = measured("all")
    bleus, _ = by_library(Bleu(4), CAPTIONS, REFERENCES, verbose=0)
    assert [found[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == pytest.approx(bleus, rel=1e-9)
    assert found["CIDEr"] == pytest.approx(by_library(Cider(), CAPTIONS, REFERENCES)[0])
    assert found["ROUGE-L"] == pytest.approx(by_library(Rouge(), CAPTIONS, REFERENCES)[0])
    assert list(found) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]


def test_bleu_by_hand():
    rows = metrics.bleu_rows(["the light is soft"], [["the light is very soft"]])
    assert rows.tolist() == [[4, 2, 1, 0, 4, 3, 2, 1, 4, 5]]
    brevity = np.exp(1 - 5 / 4)
    assert metrics.bleu(rows, 1) == pytest.approx(brevity)
    assert metrics.bleu(rows, 2) == pytest.approx(brevity * (2 / 3) ** (1 / 2))
    assert metrics.bleu(rows, 3) == pytest.approx(brevity * (2 / 3 * 1 / 2) ** (1 / 3))
    assert metrics.bleu(rows, 4) < 1e-3


def test_rotating_takes_one_reference_a_caption():
    found = measured("rotating")
    chosen = [[REFERENCES[0][0]], [REFERENCES[1][1]], [REFERENCES[2][0]], [REFERENCES[3][1]]]
    assert found["BLEU-2"] == pytest.approx(by_library(Bleu(4), CAPTIONS, chosen, verbose=0)[0][1], rel=1e-6)
    assert found["CIDEr"] == pytest.approx(by_library(Cider(), CAPTIONS, chosen)[0])
    assert found["ROUGE-L"] == pytest.approx(by_library(Rouge(), CAPTIONS, chosen)[0])


def test_best_keeps_the_largest_of_single_references():
    found = measured("best")
    pairs = [(caption, [text]) for caption, texts in zip(CAPTIONS, REFERENCES) for text in texts]
    owners = [0, 0, 0, 1, 1, 2, 3, 3]
    _, each = by_library(Cider(), *zip(*pairs))
    assert found["CIDEr"] == pytest.approx(np.mean([max(s for s, o in zip(each, owners) if o == i) for i in range(4)]))
    single = [
        max(by_library(Rouge(), [caption], [[text]])[0] for text in texts)
        for caption, texts in zip(CAPTIONS, REFERENCES)
    ]
    assert found["ROUGE-L"] == pytest.approx(np.mean(single))
    chosen = [
        [max(texts, key=lambda text: by_library(Bleu(4), [caption], [[text]], verbose=0)[0][0])]
        for caption, texts in zip(CAPTIONS, REFERENCES)
    ]
    assert found["BLEU-1"] == pytest.approx(by_library(Bleu(4), CAPTIONS, chosen, verbose=0)[0][0], rel=1e-6)
    # one reference a photograph is no choice
    assert found["BLEU-1"] < measured("all")["BLEU-1"]


@pytest.mark.slow
@needs_java
def test_meteor_is_the_librarys_and_survives_odd_captions():
    missing = {"SPICE": "not asked for"}
    found = measured("all", missing)
    assert missing == {"SPICE": "not asked for"}
    assert found["METEOR"] == pytest.approx(by_library(metrics.meteor_program(), CAPTIONS, REFERENCES)[0])
    rows = metrics.meteor_rows(CAPTIONS, REFERENCES)
    assert metrics.meteor(np.stack([rows, rows[::-1]])) == pytest.approx([found["METEOR"]] * 2)
    perfect = ["the light is soft and warm", "the horizon tilts to the left side of the frame", "lights", "a frame"]
    others = [
        ["the light is soft and warm"],
        ["a tilted horizon and a busy left edge"],
        ["light"],
        ["frame a", "edge"],
    ]
    for captions, texts in ((perfect, others), (perfect[:2], others[:2]), (perfect[:1], others[:1])):
        rows = metrics.meteor_rows(captions, texts)
        assert metrics.meteor(rows) == pytest.approx(
            by_library(metrics.meteor_program(), captions, texts)[0], abs=1e-9
        )
    odd = metrics.meteor_rows(["", "a ||| b", "the light is soft"], [["soft"], ["|||"], ["", "the light"]])
    values = metrics.meteor(odd[:, None])
    assert values[:2].tolist() == [0, 0] and values[2] > 0.3


@needs_spice
def test_spice_is_the_librarys():
    found = measured("all", {"METEOR": "not asked for"})
    assert found["SPICE"] == pytest.approx(by_library(Spice(), CAPTIONS, REFERENCES)[0])


def test_what_java_cannot_do_is_said(monkeypatch):
    def no_answer(*arguments):
        raise ValueError("no answer")

    def stopped(*arguments):
        raise subprocess.CalledProcessError(1, "java")

    monkeypatch.setattr(metrics, "meteor_rows", no_answer)
    monkeypatch.setattr(Spice, "compute_score", stopped)
    missing = {}
    assert not {"METEOR", "SPICE"} & measured("all", missing).keys()
    assert missing["METEOR"] == "its Java program failed: no answer"
    assert missing["SPICE"].startswith("its Java program failed (it was made for Java 8)")
    monkeypatch.setenv("PATH", "")
    assert evaluate_captions.java_missing() == NO_JAVA


def test_tokenizers():
    texts = ['The light, the LIGHT: isn\'t it "soft"?', "", "two\nlines", "Café, cafe\u0301!"]
    assert metrics.tokenize(texts) == ["the light the light isn't it soft", "", "two lines", "café café"]


@needs_java
def test_ptb_tokenizer(monkeypatch):
    texts = ['The light, the LIGHT: isn\'t it "soft"?', "", "two\nlines", "caf\u00e9\u2028f/2", ""]
    assert metrics.tokenize(texts, "ptb") == [
        "the light the light is n't it soft",
        "",
        "two lines",
        "caf\u00e9 f/2",
        "",
    ]
    monkeypatch.setattr(metrics.PTBTokenizer, "tokenize", lambda self, texts: {0: [""]})  # as if Java had failed
    with pytest.raises(ValueError, match="no line for 2 of 5 texts"):
        metrics.tokenize(texts, "ptb")


@pytest.mark.slow
@needs_java
def test_the_fields_tokenizer_is_the_default_where_there_is_java(tmp_path):
    captions = write(tmp_path / "c.jsonl", [{"image_id": "a", "caption": "it isn't soft"}])
    references = write(tmp_path / "r.jsonl", [{"image_id": "a", "captions": ["it is n't soft"]}])
    arguments = ["--references", references, "--out", tmp_path / "out", "--protocols", "all"]
    for tokenizer, value in ((None, 1), ("words", 2 / 3 * np.exp(1 - 4 / 3))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate_captions, "java_missing", lambda: {"SPICE": "not asked for"})
            patch.setattr(metrics, "meteor_rows", lambda *texts: np.zeros((1, 23)))
            patch.setattr(metrics, "meteor", lambda rows: np.zeros(rows.shape[:-2]))
            given = [] if tokenizer is None else ["--tokenizer", tokenizer]
            assert evaluate_captions.main([str(one) for one in (captions, *arguments, "--resamples", 2, *given)]) == 0
        found = figures(tmp_path / "out")
        assert found["BLEU-1", "all"]["systems"]["c"]["value"] == pytest.approx(value, abs=1e-6)
        assert found["report"]["warning"] is None


def test_length_and_aspects():
    captions = ["the light is soft and the colours are warm", "a sharp subject"]
    references = [["soft light", "the horizon tilts a lot today"], ["nice"]]
    measures = metrics.word_measures(captions, references, np.arange(2))
    found = {name: float(measure.value(measure.rows)) for (name, _), measure in measures.items()}
    assert found == {
        "length ratio": 12 / (4 + 1),  # 9 + 3 words by means of 2 and 6, and 1
        "topic coverage": 1 / 2,  # light, and not composition; the second reference speaks of none
        "topics in no reference": (1 / 2 + 1) / 2,  # colour; focus
        "coverage of light": 1,
        "coverage of composition": 0,
    }


def test_distinct_by_hand():
    texts = ["a b a b", "a b c"]
    assert metrics.distinct(texts, 1) == 3 / 7
    assert metrics.distinct(texts, 2) == 3 / 5  # ab ba ab, ab bc
    assert np.isnan(metrics.distinct(["a"], 2))


def test_self_bleu_is_bleu_against_all_others():
    texts = [*CAPTIONS, CAPTIONS[0] + " and the light is soft", "the light is soft and the horizon is soft"]
    values = []
    for i, text in enumerate(texts):
        scorer = BleuScorer(text, texts[:i] + texts[i + 1 :], n=4)
        values.append(scorer.compute_score(option="closest")[0][3])
    assert metrics.self_bleu(texts) == pytest.approx(np.mean(values))
    assert metrics.self_bleu([CAPTIONS[0]] * 3) == pytest.approx(1)
    assert np.isnan(metrics.self_bleu(CAPTIONS[:1]))


# Scores --------------------------------------------------------------------------------------------------------------


def test_correlations_are_scipys():
    rows = np.random.default_rng(0).normal(5, 2, (3, 20, 2)).round()  # ties
    expected = [[of(*one.T).statistic for one in rows] for of in (stats.spearmanr, stats.pearsonr)]
    assert metrics.srcc(rows) == pytest.approx(expected[0])
    assert metrics.plcc(rows) == pytest.approx(expected[1])
    assert metrics.accuracy_at_5(np.array([[5.1, 9], [5, 1], [5, 6], [7, 3]])) == 0.5
    rows[1, :, 0] = 5
    assert np.isnan(metrics.srcc(rows)).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "value, score",
    [(7, 7), ("8.6", 8.6), ([6.5], 6.5), ({"mean": 3.2, "std": 1}, 3.2), ([0, 0, 3, 0, 0, 0, 1, 0, 0, 0], 4)]
    + [(bad, np.nan) for bad in (None, "good", "", "nan", float("inf"), [0] * 10, [1, 2], [], {"std": 1}, [[5]] * 2)],
)
def test_scores_are_numbers_or_shares(value, score):
    assert evaluate_captions.as_score(value) == pytest.approx(score, nan_ok=True)


# Saliency ------------------------------------------------------------------------------------------------------------


def maps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A prediction, a truth and fixations of 8 x 6 places."""
    y, x = np.mgrid[:6, :8]
    truth = np.exp(-((x - 5) ** 2 + (y - 2) ** 2) / 4)
    prediction = ((3 * x + 5 * y + x * y) % 11) / 10 + np.exp(-((x - 4) ** 2 + (y - 2) ** 2) / 3)
    return prediction, truth, (np.array([[5, 2], [4, 2], [5, 3], [1, 5]]) + 0.5) / (8, 6)


# Figures of pysaliency 0.2.22 on these maps: AUC_Judd(jitter=False), NSS, CC, SIM, MIT_KLDiv
PYSALIENCY = {
    0: [0.6676136363636365, 0.3647251858136361, 0.4076815532096378, 0.5976586057233889, 0.5617387687366193],
    -1: [0.6676136363636365, 0.3647251858136361, 0.4076815532096378, 0.5976446725602492, 0.5645087018470958],
    None: [0.5, 0, 0, 0.5507060338167677, 0.5942074428102712],
}


@pytest.mark.parametrize("change", PYSALIENCY)
def test_saliency_figures_are_pysaliencys(change):
    """As it stands, partly below 0, and flat."""
    prediction, truth, fixations = maps()
    prediction = np.ones_like(truth) if change is None else prediction + change
    found = metrics.saliency_figures(prediction, truth, fixations)
    assert list(found) == ["AUC-Judd", "NSS", "CC", "SIM", "KL"]
    assert list(found.values()) == pytest.approx(PYSALIENCY[change], rel=1e-7)


def test_auc_by_hand():
    saliency = np.array([[4.0, 3, 2, 1]])
    fixated = np.array([[True, False, True, False]])
    # hits over alarms: (0, 0), (0, 1/2), (1/2, 1), (1, 1)
    assert metrics.auc_judd(saliency, fixated) == pytest.approx(0.75 / 2 + 1 / 2)
    assert np.isnan(metrics.auc_judd(saliency, fixated > 1))
    assert np.isnan(metrics.auc_judd(saliency, fixated >= 0))


def test_what_cannot_be_told_is_nan():
    prediction, truth, fixations = maps()
    alone = metrics.saliency_figures(prediction, None, fixations)
    assert {name for name, value in alone.items() if np.isnan(value)} == {"CC", "SIM", "KL"}
    blank = metrics.saliency_figures(prediction, np.zeros_like(truth), None)
    assert np.isnan(list(blank.values())).all()
    unseen = metrics.saliency_figures(prediction, truth, np.zeros((0, 2)))
    assert {name for name, value in unseen.items() if np.isnan(value)} == {"AUC-Judd", "NSS"}


def test_fixations_reach_the_borders():
    counts = metrics.fixation_map(np.array([[0, 0], [1, 1], [1, 1], [0.5, 0]]), (2, 4))
    assert counts.tolist() == [[1, 0, 1, 0], [0, 0, 0, 2]]


def test_maps_are_brought_to_the_references_size():
    ramp = np.tile(np.arange(8.0), (6, 1))
    large = np.tile((np.arange(16) + 0.5) / 2 - 0.5, (12, 1)).clip(0, 7)
    assert metrics.resize_map(ramp, (12, 16)) == pytest.approx(large)
    assert metrics.cc(metrics.resize_map(ramp, (30, 40)), np.tile(np.arange(40.0), (30, 1))) > 0.99
    assert np.ptp(metrics.resize_map(np.full((3, 5), 0.1), (7, 11))) == 0


def test_centre_bias_leaves_its_own_photograph_out():
    left, right = np.zeros((64, 64)), np.zeros((64, 64))
    left[:, :32], right[:, 32:] = 1, 3
    biases = metrics.centre_biases([(left, None), (right, None), (right, None)])
    assert biases[0] == pytest.approx(right / right.sum())
    assert biases[1] == pytest.approx((left / left.sum() + right / right.sum()) / 2)
    around = metrics.centre_biases([(left, None), (None, np.array([[0.25, 0.75]]))])[0]
    assert np.unravel_index(around.argmax(), around.shape) == (48, 16)


# Statistics ----------------------------------------------------------------------------------------------------------


def measure(values: np.ndarray, photos: np.ndarray | None = None) -> Measure:
    rows = metrics.counted(np.asarray(values, dtype=float))
    return Measure(metrics.ratio, rows, np.arange(len(rows)) if photos is None else photos).by_photo()


def interval(one: Measure, resamples: int = 200) -> list[float]:
    return metrics.interval(one, resamples, seed=0)


def test_wrong_photos_are_others_of_the_same_aspect():
    aspects = ["light", "focus"] * 10 + ["colour"]
    partners = metrics.wrong_photos(aspects, seed=0)
    assert partners[20] == -1
    assert sorted(partners[:20]) == list(range(20))
    assert all(i != other and aspects[i] == aspects[other] for i, other in enumerate(partners[:20]))
    assert partners.tolist() != metrics.wrong_photos(aspects, seed=1).tolist()


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    ends = np.array([interval(measure(rng.normal(3, 1, 40))) for _ in range(300)])
    covered = ((ends[:, 0] < 3) & (ends[:, 1] > 3)).mean()
    assert 0.90 < covered < 0.98
    expected = 2 * 1.96 / np.sqrt(40)
    assert (ends[:, 1] - ends[:, 0]).mean() == pytest.approx(expected, rel=0.08)


def test_intervals_of_few_figures_are_bca_and_of_many_percentiles(monkeypatch):
    values = np.random.default_rng(1).exponential(1, 20) ** 1.5
    options = {"n_resamples": 200, "vectorized": True, "rng": 0, "batch": metrics.BATCH}
    for method, largest in (("BCa", metrics.LARGEST_BCA), ("percentile", 19)):
        monkeypatch.setattr(metrics, "LARGEST_BCA", largest)
        expected = stats.bootstrap((values,), np.mean, method=method, **options).confidence_interval
        assert interval(measure(values)) == pytest.approx(list(expected))


def test_captions_of_one_photograph_are_not_independent():
    values = np.random.default_rng(0).normal(size=30)
    once = interval(measure(values))
    assert interval(measure(np.repeat(values, 7), np.repeat(np.arange(30), 7))) == pytest.approx(once)


def test_intervals_of_almost_nothing():
    assert np.isnan(interval(measure([1.0]))).all()
    ends = metrics.bootstrap(3, lambda drawn: np.where(drawn[..., 0] == 0, np.nan, 2.0), 50, 0)
    assert ends == [2, 2]
    assert np.isnan(metrics.bootstrap(3, lambda drawn: np.full(drawn.shape[:-1], np.nan), 50, 0)).all()


def compare(first: Measure, second: Measure, resamples: int = 500) -> dict[str, Any]:
    return metrics.compare(first, second, resamples, seed=0)


def test_a_system_is_not_different_from_itself():
    one = measure(np.random.default_rng(0).normal(size=30))
    assert compare(one, one) == {"difference": 0, "interval": [0, 0], "p": 1, "photographs": 30}


def test_a_better_system_is_found_and_the_pairs_count():
    rng = np.random.default_rng(0)
    photos = rng.normal(0, 10, 30)  # photographs differ more than systems do
    first, second = measure(photos + rng.normal(0, 0.5, 30)), measure(photos + 1 + rng.normal(0, 0.5, 30))
    found = compare(first, second)
    assert found["difference"] == pytest.approx(1, abs=0.3)
    assert found["interval"][0] > 0.5
    assert found["p"] == pytest.approx(2 / 501)
    back = compare(second, first)
    assert back["difference"] == pytest.approx(-found["difference"]) and back["p"] == found["p"]


def test_p_of_few_photographs_is_exact():
    # of the 8 exchanges one is as large as three times +1, and one as small
    assert compare(measure([1, 2, 3]), measure([2, 3, 4]))["p"] == 2 / 8


def test_systems_are_compared_on_the_photographs_of_both():
    first = measure([1, 2, 3, 4], np.array([0, 1, 2, 3]))
    second = measure([9, 3, 4, 5], np.array([7, 2, 3, 1]))
    assert compare(first, second)["difference"] == pytest.approx((5 + 3 + 4) / 3 - (2 + 3 + 4) / 3)
    apart = compare(first, measure([1, 2], np.array([8, 9])))
    assert apart["photographs"] == 0 and np.isnan(apart["p"])


# Runs ----------------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict | str]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_captions, "java_missing", lambda: dict(NO_JAVA))  # it starts for seconds
        return evaluate_captions.main([*map(str, arguments), "--resamples", "60"])


def figures(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    report = json.loads((out / "report.json").read_text(), parse_constant=refuse)
    return {(row["measure"], row["protocol"]): row for row in report["table"]} | {"report": report}


def photographs(number: int) -> tuple[list[dict], list[dict], list[dict]]:
    """References, captions that see something of each photograph, and captions that see nothing."""
    rng = np.random.default_rng(0)
    things = [
        f"{adjective} {noun}" for adjective in ("soft", "harsh", "warm", "dull") for noun in ("lake", "bird", "sky")
    ]
    references, seeing, blind = [], [], []
    for i in range(number):
        truth, rating = np.zeros((6, 8)), float(rng.uniform(2, 9))
        truth[tuple(rng.integers(1, 5, 2))] = 1
        for aspect in ("light", "composition"):
            thing, key = things[rng.integers(12)], {"image_id": f"{i}.jpg", "aspect": aspect}
            texts = [f"the {thing} is fine", f"i like the light on the {thing} in this frame"]
            references.append(key | {"captions": texts, "rating": rating, "saliency": truth.tolist()})
            near = {"score": rating + rng.normal(0, 0.3), "saliency": (truth + rng.random((6, 8)) / 2).tolist()}
            seeing.append(key | near | {"caption": f"the light on the {thing} is good in this frame"})
            far = {"score": rng.uniform(4, 6), "saliency": rng.random((6, 8)).tolist()}
            blind.append(key | far | {"caption": f"the light on the {things[rng.integers(12)]} is good"})
    return references, seeing, blind


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    names = [folder / f"{name}.jsonl" for name in ("references", "seeing", "blind")]
    for path, rows in zip(names, photographs(16)):
        write(path, rows)
    assert run(names[2], names[1], "--references", names[0], "--out", folder / "out") == 0
    return folder / "out"


def test_two_systems(compared):
    found = figures(compared)
    for key in (("CIDEr", "all"), ("BLEU-2", "best"), ("ROUGE-L", "rotating"), ("SRCC", "score"), ("NSS", "saliency")):
        seeing, blind = found[key]["systems"]["seeing"], found[key]["systems"]["blind"]
        low, high = seeing["interval"]
        assert low <= seeing["value"] <= high and seeing["photographs"] == 16
        assert seeing["value"] > seeing["wrong_photo_value"] + 0.1
        assert found[key]["comparisons"]["seeing"]["difference"] == pytest.approx(seeing["value"] - blind["value"])
        assert found[key]["comparisons"]["seeing"]["p"] < 0.05
    assert found["CIDEr of light", "all"]["systems"]["seeing"]["value"] > 1
    whole = found["CIDEr", "all"]["systems"]["seeing"]["value"]
    parts = [found[f"CIDEr of {name}", "all"]["systems"]["seeing"]["value"] for name in ("light", "composition")]
    assert np.mean(parts) == pytest.approx(whole)
    assert found["AUC-Judd", "saliency"]["baseline"] < found["AUC-Judd", "saliency"]["systems"]["seeing"]["value"]
    assert found["accuracy at 5", "score"]["baseline"] >= 0.5
    ratings = [row["rating"] for row in photographs(16)[0]]
    assert found["lowest score", "score"]["baseline"] == min(ratings)
    assert found["highest score", "score"]["systems"]["seeing"]["value"] > 8
    assert found["report"]["not_computed"] == NO_JAVA


def test_report_names_everything(compared):
    text = (compared / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == (
        "| measure | protocol | blind | blind, wrong photo | seeing | seeing, wrong photo | baseline | "
        "seeing less blind | p |"
    )
    assert len(rows) == len(figures(compared)) and {row.count("|") for row in rows} == {10}
    for protocol in ("all", "best", "rotating", "words", "corpus", "score", "saliency"):
        assert f"\n- {protocol}: " in text
    assert "- **METEOR** not computed: needs Java: sudo apt-get install default-jre-headless." in text
    assert "16 photographs, 32 captions a system, 64 references" in text
    assert "lower-case words, no punctuation" in text and text.startswith(
        "**Not by the field's protocol: Java is missing"
    )
    assert figures(compared)["report"]["warning"] in text


def test_plots_show_two_systems(compared):
    colours = {}
    for name in ("topics", "scores"):
        with Image.open(compared / f"{name}.png") as image:
            colours[name] = {colour for _, colour in image.convert("RGB").getcolors(image.width * image.height)}
    assert colours["topics"] >= {(31, 119, 180), (255, 127, 14)} and len(colours["scores"]) > 20


def test_one_system_without_scores_maps_or_aspects(tmp_path, capsys):
    references = [{"file_name": f"{i}.jpg", "caption": text} for i, texts in enumerate(REFERENCES) for text in texts]
    captions = [{"path": f"somewhere/{i}.png", "caption": text} for i, text in enumerate(CAPTIONS)]
    paths = write(tmp_path / "captions.jsonl", captions), write(tmp_path / "metadata.jsonl", references)
    out = tmp_path / "out"
    assert run(paths[0], "--references", paths[1], "--out", out, "--protocols", "all") == 0
    found = figures(out)
    assert found["CIDEr", "all"]["systems"]["captions"]["value"] == pytest.approx(measured("all")["CIDEr"])
    assert found["report"]["notes"] == ["references: lines joined with another of the same photograph and topic: 4"]
    assert {protocol for _, protocol in found.keys() - {"report"}} == {"all", "words", "corpus"}
    assert not (out / "scores.png").exists() and (out / "topics.png").exists()
    assert (out / "report.md").read_text() in capsys.readouterr().out


def test_one_photograph_of_which_little_is_said(tmp_path):
    captions = write(tmp_path / "c.jsonl", [{"image_id": "a", "caption": "nice", "score": 5}])
    references = write(tmp_path / "r.jsonl", [{"image_id": "a", "captions": ["very nice"], "rating": 5}])
    assert run(captions, "--references", references, "--out", tmp_path / "out") == 0
    found = figures(tmp_path / "out")
    assert found["length ratio", "words"]["systems"]["c"] == {"value": 0.5, "interval": [None] * 2, "photographs": 1}
    assert found["self-BLEU", "corpus"]["systems"]["c"] == {"value": None}
    assert found["report"]["notes"] == ["c: captions without another photograph as control: 1"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "report.md"]


def test_odd_lines_are_counted(tmp_path, capsys):
    references = [
        {"image_id": "a", "captions": ["soft light", " ", None], "rating": "7"},
        {"image_id": "b", "captions": ["harsh light"], "rating": "good"},
        {"image_id": "c", "captions": ["the horizon tilts"], "rating": 4},
        {"image_id": "d", "captions": []},
        {"image_id": "e", "captions": ["dark"], "rating": 12},
        {"image_id": "b", "aspect": "light", "captions": ["harsh light"]},
    ]
    captions = [
        {"image_id": "a", "caption": "soft light", "score": {"mean": 6}},
        {"image_id": "a", "caption": "harsh light and haze", "score": 1},
        {"image_id": "b", "caption": "", "score": 5},
        {"image_id": "c", "caption": "the horizon", "score": "?"},
        {"image_id": "z", "caption": "nothing of this"},
    ]
    paths = write(tmp_path / "c.jsonl", captions), write(tmp_path / "r.jsonl", references)
    options = ["--out", tmp_path / "out", "--partial"]
    assert run(paths[0], "--references", paths[1], *options) == 2
    assert "The references have 3 scores from 4 (c) to 12 (e)" in capsys.readouterr().err
    assert run(paths[0], "--references", paths[1], *options, "--score-range", 1, 10) == 0
    assert figures(tmp_path / "out")["report"]["notes"] == [
        "references: empty ones left out: 2",
        "references: photographs or topics without one left out: 1",
        "reference scores outside 1 to 10 left out: 1",
        "c.jsonl: references without a caption left out: 1",
        "c.jsonl: captions without references not measured: 1",
        "c.jsonl: captions of a photograph measured by the references of a topic: 1",
        "c.jsonl: captions repeated (the first counts): 1",
        "c.jsonl: captions empty (they count): 2",
        "c: captions without another photograph as control: 1",
        "c: scores that cannot be read: 1",
        "c: reference scores that cannot be read: 1",
    ]
    assert figures(tmp_path / "out")["length ratio", "words"]["systems"]["c"]["value"] == 4 / 9


def test_scores_outside_the_scale_and_absent_maps_are_counted():
    references = [{"image_id": str(i), "rating": i, "fixations": np.array([[0.5, 0.5]])} for i in range(3)]
    captions = [{"score": 11}, {"score": 2}, {"score": 3, "saliency": np.eye(4)}]
    report = Report()
    evaluate_captions.evaluate_scores(references, captions, 0, report)
    evaluate_captions.evaluate_saliency(references, captions, 0, report)
    assert report.notes == [
        "scores outside 1 to 10 (they count): 1",
        "reference scores outside 1 to 10 (they count): 1",
        "photographs without a saliency map of the system: 2",
    ]
    assert {name for name, _ in report.own} == {
        *("SRCC", "PLCC", "accuracy at 5", "lowest score", "highest score"),
        *("AUC-Judd", "NSS"),
    }


@pytest.mark.parametrize(
    "captions, references, message",
    [
        ([{"image_id": "a", "caption": "x"}], ["{"], "references.jsonl, line 1: not a JSON object"),
        ([{"image_id": "a", "caption": "x"}], [{"captions": ["x"]}], "references.jsonl, line 1: not a JSON object"),
        ([{"image_id": "a", "caption": "x"}], ["[1]"], "references.jsonl, line 1: not a JSON object"),
        ([{"image_id": "a", "caption": "x"}], [{"image_id": "a", "captions": [""]}], "has no references"),
        ([{"image_id": "a"}], [{"image_id": "a", "captions": ["x"]}], "a has no `caption`"),
        (
            [{"image_id": "a", "caption": "x"}],
            [{"image_id": "a", "captions": ["x"]}, {"image_id": "b", "captions": ["x"]}],
            "lacks 1 of 2 captions, e.g. of b: --partial?",
        ),
    ],
)
def test_bad_files_are_refused_in_words(captions, references, message, tmp_path, capsys):
    paths = write(tmp_path / "captions.jsonl", captions), write(tmp_path / "references.jsonl", references)
    assert run(paths[0], "--references", paths[1], "--out", tmp_path / "out") == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("Cannot start: ") and message in stderr


def test_what_cannot_be_done_is_refused(tmp_path, capsys):
    references = write(tmp_path / "references.jsonl", [{"image_id": "a.jpg", "captions": ["x"]}])
    assert run("c.jsonl", "--references", references, "--tokenizer", "ptb") == 2
    assert "--tokenizer ptb needs Java: sudo apt-get install" in capsys.readouterr().err
    assert run(tmp_path / "model", "--references", references, "--out", tmp_path / "out") == 2
    assert "1 of 1 photographs are missing" in capsys.readouterr().err
    for arguments in (
        ["a.jsonl", "b/a.jsonl"],
        ["a.jsonl", "--names", "a", "b"],
        ["a.jsonl", "b.jsonl", "--against", "c"],
        ["a.jsonl", "--data", "PCCD"],
        ["a.jsonl", "--score-range", "10", "1"],
    ):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments, "--references", references)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        run("a.jsonl")


def test_names_of_photographs(tmp_path):
    rows = [
        {"image_id": 0},
        {"image_id": "Lake no. 2"},
        {"image_id": "7", "image": "x/y.jpg"},
        {"path": "/day 1/z.JPG"},
    ]
    found = evaluate_captions.read_lines(
        write(tmp_path / "a.jsonl", [*rows, '{"file_name": "a/b.tif", "t": "\u2028"}']), []
    )
    assert [row["image_id"] for row in found] == ["0", "Lake no. 2", "7", "/day 1/z", "a/b"]
    assert [row["file_name"] for row in found] == ["0", "Lake no. 2", "7", "/day 1/z.JPG", "a/b.tif"]


def test_maps_come_as_arrays_pictures_and_rows(tmp_path):
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.save(tmp_path / "map.npy", values / 2)
    Image.fromarray(values).save(tmp_path / "map.png")
    assert (evaluate_captions.read_map("map.npy", tmp_path) == values / 2).all()
    assert (evaluate_captions.read_map("map.png", tmp_path) == values).all()
    assert (evaluate_captions.read_map(values.tolist(), tmp_path) == values).all()


# Models --------------------------------------------------------------------------------------------------------------


def photograph_references(folder: Path, **columns: Any) -> Path:
    rows = []
    for name in ("coffee", "rocket"):
        with Image.open(ROOT / "examples" / "photos" / f"{name}.jpg") as image:
            image.resize((200, 150)).save(folder / f"{name}.jpg")
        rows.append({"file_name": f"{name}.jpg", "captions": ["the light is soft"], "rating": 5, **columns})
    return write(folder / "metadata.jsonl", rows)


@pytest.mark.slow
def test_ase_model_captions_now_with_score_and_map(tmp_path):
    references = photograph_references(tmp_path, fixations=[[0.4, 0.6]])
    bundle, out = ROOT / "examples" / "ase-mini", tmp_path / "out"
    assert run(bundle, "--references", references, "--out", out, "--names", "mini", "--max-new-tokens", 24) == 0
    (path,) = out.glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]

    model, processor = AutoModelForImageTextToText.from_pretrained(bundle), AutoProcessor.from_pretrained(bundle)
    images = [Image.open(tmp_path / f"{name}.jpg") for name in ("coffee", "rocket")]
    inputs = processor(images=images, text=[processor.critique_prompt()] * 2, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(ids, skip_special_tokens=True)
    with torch.no_grad():
        features = model.get_image_features(pixel_values=inputs["pixel_values"])
    scores = [score["mean"] for score in processor.post_process_scores(features)]
    assert [line["caption"] for line in lines] == [" ".join(text.split()) for text in texts]
    assert [line["score"] for line in lines] == pytest.approx(scores, rel=1e-4)
    heats = processor.post_process_saliency(features, [(64, 64)] * 2)
    assert np.load(out / lines[1]["saliency"]) == pytest.approx(heats[1].numpy(), abs=1e-4)
    found = figures(out)
    assert {"AUC-Judd", "highest score"} <= {key[0] for key in found}
    assert found["highest score", "score"]["systems"]["mini"]["value"] == pytest.approx(max(scores), rel=1e-4)


def test_any_model_captions_now_by_topic(tmp_path):
    tiny_base().save_pretrained(tmp_path / "llava")
    tiny_processor().base_processor.save_pretrained(tmp_path / "llava")
    references = photograph_references(tmp_path, aspect="light")
    arguments = ("--references", references, "--out", tmp_path / "out", "--max-new-tokens", 3, "--batch-size", 1)
    assert run(tmp_path / "llava", *arguments) == 0
    (path,) = (tmp_path / "out").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["image_id"], line["aspect"]) for line in lines] == [("coffee", "light"), ("rocket", "light")]
    assert all(line.keys() == {"image_id", "aspect", "prompt", "caption"} for line in lines)
