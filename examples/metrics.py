"""The figures that captions, scores and saliency maps are measured by, their intervals, and the test of two systems."""

import functools
import subprocess
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import TOPIC_STEMS, topics_of, words
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.bleu.bleu_scorer import BleuScorer, cook_test, precook
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice import spice
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from scipy import stats
from scipy.integrate import trapezoid
from scipy.ndimage import gaussian_filter


MAP_SIDE = 64  # of the centre bias, and of maps that a model is asked for
LARGEST_BCA = 1000  # photographs
BATCH = 100  # resamples at a time, for the sake of memory
EPSILON = np.finfo(float).eps


@dataclass
class Measure:
    """A figure: `value` maps rows (..., number, columns) to (...); row i belongs to the photograph `photos[i]`."""

    value: Callable[[np.ndarray], np.ndarray]
    rows: np.ndarray
    photos: np.ndarray

    def by_photo(self) -> "Measure":
        """With one row a photograph, the sum of its rows."""
        photos, groups = np.unique(self.photos, return_inverse=True)
        rows = np.zeros((len(photos), self.rows.shape[1]))
        np.add.at(rows, groups, self.rows)
        return Measure(self.value, rows, photos)


Measures = dict[tuple[str, str], Measure]  # by name and protocol


# Texts ---------------------------------------------------------------------------------------------------------------


def tokenize(texts: list[str], tokenizer: str = "words") -> list[str]:
    """Texts as words with spaces between them."""
    if tokenizer == "ptb":  # the program that published figures were made with, so as it is
        found = PTBTokenizer().tokenize({i: [{"caption": " ".join(text.split())}] for i, text in enumerate(texts)})
        if lost := sum(bool(text.strip()) and i not in found for i, text in enumerate(texts)):
            raise ValueError(
                f"The PTB tokenizer gave no line for {lost} of {len(texts)} texts: does `java -version` work?"
            )
        return [found.get(i, [""])[0] for i in range(len(texts))]
    return [" ".join(words(text)) for text in texts]


def caption_scores(captions: list[str], references: list[list[str]]) -> dict[str, float]:
    """CIDEr, BLEU-4 and ROUGE-L against all references at once."""
    answers = {i: tokenize([text]) for i, text in enumerate(captions)}
    truths = {i: tokenize(texts) for i, texts in enumerate(references)}
    return {
        "CIDEr": float(Cider().compute_score(truths, answers)[0]),
        "BLEU-4": float(Bleu(4).compute_score(truths, answers, verbose=0)[0][3]),
        "ROUGE-L": float(Rouge().compute_score(truths, answers)[0]),
    }


def topic_coverage(captions: list[str], references: list[list[str]]) -> np.ndarray:
    """Rows for `ratio`: the share of the topics in the references that each caption speaks of too."""
    pairs = [(topics_of(text), topics_of(" ".join(texts))) for text, texts in zip(captions, references)]
    return np.array([(len(a & b) / len(b), 1) if b else (0, 0) for a, b in pairs], dtype=float)


def ratio(rows: np.ndarray) -> np.ndarray:
    """Sum of the first column over that of the second: a mean where the second counts."""
    above, below = np.moveaxis(rows.sum(axis=-2), -1, 0)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)


def counted(values: np.ndarray) -> np.ndarray:
    """Rows for `ratio` that make the mean of the values that are not nan."""
    valid = ~np.isnan(values)
    return np.stack([np.where(valid, values, 0), valid], axis=1).astype(float)


def bleu(rows: np.ndarray, order: int) -> np.ndarray:
    """Corpus BLEU of `bleu_rows`, with the small constants of pycocoevalcap."""
    total = rows.sum(axis=-2)
    matches, n_grams, length, closest = total[..., :order], total[..., 4 : 4 + order], total[..., 8], total[..., 9]
    score = np.prod((matches + 1e-15) / (n_grams + 1e-9), axis=-1) ** (1 / order)
    return score * np.exp(np.minimum(0, 1 - (closest + 1e-9) / (length + 1e-15)))


def bleu_rows(captions: list[str], references: list[list[str]]) -> np.ndarray:
    """Of each caption: matches of 1 to 4 words, n-grams of 1 to 4 words, its length, the closest reference's length."""
    scorer = BleuScorer(n=4)
    for caption, texts in zip(captions, references):
        scorer += (caption, texts)
    rows = []
    for one in scorer.ctest:
        length = one["testlen"]
        closest = min(one["reflen"], key=lambda other: (abs(other - length), other))
        rows.append([*one["correct"], *one["guess"], length, closest])
    return np.array(rows, dtype=float)


@functools.cache
def meteor_program() -> Meteor:
    return Meteor()  # one for all: it reads a table of paraphrases for seconds


def meteor_rows(captions: list[str], references: list[list[str]]) -> np.ndarray:
    """The counts of each caption; `compute_score` keeps them to itself."""
    lines = []
    for caption, texts in zip(captions, references):
        caption, *texts = (text.replace("|", " ").strip() or "." for text in (caption, *texts))  # "|||" separates
        lines.append(meteor_program()._stat(caption, texts).split())
    rows = np.array(lines, dtype=float)
    # words of the caption and of its reference, how many of each are matched, and in how many pieces
    words, known, pieces, matched, met = rows[:, [0, 1, 20, 21, 22]].T
    # the program adds no piece of a caption that matches wholly, but does so only when it adds captions up itself
    rows[(matched == words) & (met == known) & (pieces == 1), 20] = 0
    return rows


def meteor(rows: np.ndarray) -> np.ndarray:
    """METEOR of summed counts, by its own program."""
    totals = rows.sum(axis=-2)
    lines = [" ".join(map(str, total)) for total in totals.reshape(-1, totals.shape[-1]).tolist()]
    program = meteor_program().meteor_p
    program.stdin.write(" ||| ".join(["EVAL", *lines]).encode() + b"\n")
    program.stdin.flush()
    values = [float(program.stdout.readline()) for _ in [*lines, "all together"]]
    return np.array(values[:-1]).reshape(totals.shape[:-1])


def java_missing() -> dict[str, str]:
    """Metrics that cannot be computed here, with the reason."""
    try:
        subprocess.run(["java", "-version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return dict.fromkeys(("METEOR", "SPICE"), "needs Java: sudo apt-get install default-jre-headless")
    if not list(Path(spice.__file__).parent.glob("lib/stanford-corenlp-*-models.jar")):
        how = "python -m pycocoevalcap.spice.get_stanford_models"
        return {"SPICE": f"needs Stanford CoreNLP: {how}"}  # a download of 400 MB, so never without being asked
    return {}


def text_measures(
    captions: list[str], references: list[list[str]], photos: np.ndarray, protocol: str, missing: dict[str, str]
) -> Measures:
    """BLEU-1..4, METEOR, ROUGE-L, CIDEr and SPICE of tokenized texts by one of `PROTOCOLS`."""
    if protocol == "rotating":
        references = [[texts[i % len(texts)]] for i, texts in enumerate(references)]
    measures = {}
    if "METEOR" not in missing:
        try:
            measures["METEOR"] = meteor, meteor_rows(captions, references)
        except (OSError, ValueError) as error:
            missing["METEOR"] = f"its Java program failed: {error}"
    owners = np.arange(len(captions))
    if protocol == "best":
        owners = np.repeat(owners, [len(texts) for texts in references])
        captions, references = [captions[i] for i in owners], [[text] for texts in references for text in texts]
    rows, bleus = bleu_rows(captions, references), {}
    for order in (1, 2, 3, 4):
        value = functools.partial(bleu, order=order)
        bleus[f"BLEU-{order}"] = value, rows[largest(value(rows[:, None]), owners)]
    answers, truths = {i: [text] for i, text in enumerate(captions)}, dict(enumerate(references))
    scores = {"ROUGE-L": Rouge().compute_score(truths, answers)[1], "CIDEr": Cider().compute_score(truths, answers)[1]}
    if "SPICE" not in missing:
        try:
            scores["SPICE"] = [one["All"]["f"] for one in spice.Spice().compute_score(truths, answers)[1]]
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            missing["SPICE"] = f"its Java program failed (it was made for Java 8): {error}"
    measures = bleus | measures
    for name, values in scores.items():
        values = np.array(values, dtype=float)
        measures[name] = ratio, counted(values[largest(values, owners)])
    return {(name, protocol): Measure(value, rows, photos) for name, (value, rows) in measures.items()}


def largest(scores: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Position of the largest score of each owner; owners are sorted."""
    order = np.lexsort((np.nan_to_num(scores), owners))
    return order[np.append(owners[1:] != owners[:-1], True)]


def word_measures(captions: list[str], references: list[list[str]], photos: np.ndarray) -> Measures:
    """Length, and which of the references' topics a caption speaks of."""
    lengths = [
        (len(text.split()), np.mean([len(one.split()) for one in texts])) for text, texts in zip(captions, references)
    ]
    pairs = [(topics_of(text), topics_of(" ".join(texts))) for text, texts in zip(captions, references)]
    tables = {
        "length ratio": lengths,
        "topic coverage": topic_coverage(captions, references),
        "topics in no reference": [(len(a - b) / len(a), 1) if a else (0, 0) for a, b in pairs],
    } | {f"coverage of {name}": [(name in a and name in b, name in b) for a, b in pairs] for name in TOPIC_STEMS}
    return as_measures({name: np.array(table, dtype=float) for name, table in tables.items()}, "words", photos)


def as_measures(tables: dict[str, np.ndarray], protocol: str, photos: np.ndarray) -> Measures:
    """Means, where there is anything to take the mean of."""
    return {(name, protocol): Measure(ratio, rows, photos) for name, rows in tables.items() if rows[:, 1].any()}


def distinct(texts: list[str], order: int) -> float:
    """Different n-grams over n-grams of all texts together."""
    words = [text.split() for text in texts]
    n_grams = [tuple(one[i : i + order]) for one in words for i in range(len(one) - order + 1)]
    return len(set(n_grams)) / len(n_grams) if n_grams else float("nan")


def self_bleu(texts: list[str]) -> float:
    """Mean over the texts of BLEU-4 against all others: 1 where all are the same."""
    if len(texts) < 2:
        return float("nan")
    lengths, counts = Counter(), defaultdict(lambda: [0, 0])
    for length, n_grams in map(precook, texts):
        lengths[length] += 1
        for n_gram, count in n_grams.items():
            counts[n_gram] = sorted([*counts[n_gram], count])[1:]
    # a text with the largest count of an n-gram meets the second in the others, any other text has no more than that
    others = {n_gram: second for n_gram, (second, _) in counts.items()}
    scorer = BleuScorer(n=4)
    for text in texts:
        own = len(text.split())
        scorer.ctest.append(cook_test(text, ([n for n, k in lengths.items() if n != own or k > 1], others)))
    return float(np.mean(scorer.compute_score(option="closest")[1][3]))


def diversity(texts: list[str]) -> dict[tuple[str, str], float]:
    figures = {"distinct-1": distinct(texts, 1), "distinct-2": distinct(texts, 2), "self-BLEU": self_bleu(texts)}
    return {(name, "corpus"): value for name, value in figures.items()}


# Scores --------------------------------------------------------------------------------------------------------------


def plcc(rows: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():  # of equal scores it is nan
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return stats.pearsonr(rows[..., 0], rows[..., 1], axis=-1).statistic


def srcc(rows: np.ndarray) -> np.ndarray:
    return plcc(stats.rankdata(rows, axis=-2))


def accuracy_at_5(rows: np.ndarray) -> np.ndarray:
    return ((rows[..., 0] > 5) == (rows[..., 1] > 5)).mean(axis=-1)


def score_measures(rows: np.ndarray, photos: np.ndarray) -> Measures:
    values = {"SRCC": srcc, "PLCC": plcc, "accuracy at 5": accuracy_at_5}
    return {(name, "score"): Measure(value, rows, photos) for name, value in values.items()}


# Saliency ------------------------------------------------------------------------------------------------------------


def auc_judd(saliency: np.ndarray, fixated: np.ndarray) -> float:
    """
    Area under the curve of fixated places found over other places taken, as the threshold goes down the saliency
    values of the fixated places (Judd et al. 2009), without the random tie-breaking: equal values fall together.
    """
    looked_at, others = np.sort(saliency[fixated]), np.sort(saliency[~fixated])
    if not looked_at.size or not others.size:
        return float("nan")
    thresholds = np.unique(looked_at)[::-1]
    hits = 1 - np.searchsorted(looked_at, thresholds) / looked_at.size
    alarms = 1 - np.searchsorted(others, thresholds) / others.size
    return float(trapezoid([0, *hits, 1], [0, *alarms, 1]))


def nss(saliency: np.ndarray, fixated: np.ndarray) -> float:
    """Mean at the fixated places of the map brought to mean 0 and deviation 1 (Peters et al. 2005)."""
    if not fixated.any():
        return float("nan")
    if np.ptp(saliency) == 0:
        return 0.0
    return float((saliency[fixated].mean() - saliency.mean()) / saliency.std())


def cc(saliency: np.ndarray, truth: np.ndarray) -> float:
    """Pearson's correlation of the two maps."""
    if np.ptp(truth) == 0:
        return float("nan")
    return 0.0 if np.ptp(saliency) == 0 else float(np.corrcoef(saliency.ravel(), truth.ravel())[0, 1])


def sim(saliency: np.ndarray, truth: np.ndarray) -> float:
    """Sum of the smaller of the two densities (Judd et al. 2012)."""
    return float(np.minimum(density(saliency), density(truth)).sum())


def kl(saliency: np.ndarray, truth: np.ndarray) -> float:
    """Divergence of the truth's density from the prediction's, regularised as by Bylinskii et al. (2019)."""
    predicted, true = density(saliency), density(truth)
    return float((true * np.log(EPSILON + true / (EPSILON + predicted))).sum())


def density(saliency: np.ndarray) -> np.ndarray:
    """A map of the sum 1; nothing below 0, and one without any mass is even."""
    saliency = saliency - min(0.0, saliency.min())
    total = saliency.sum()
    return saliency / total if total > 0 else np.full(saliency.shape, 1 / saliency.size)


def resize_map(saliency: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    if saliency.shape == shape:
        return saliency
    if np.ptp(saliency) == 0:  # NOTE: rounding in the interpolation would make a flat map uneven
        return np.full(shape, saliency.flat[0])
    image = Image.fromarray(saliency.astype(np.float32)).resize(shape[::-1], Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=float)


def fixation_map(fixations: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Fixations `[x, y]`, in shares of width and height, as a count at each place."""
    counts, limits = np.zeros(shape), np.array(shape)
    rows, columns = np.minimum((fixations[:, ::-1] * limits).astype(int), limits - 1).T
    np.add.at(counts, (rows, columns), 1)
    return counts


def saliency_figures(saliency: np.ndarray, truth: np.ndarray | None, fixations: np.ndarray | None) -> dict[str, float]:
    """Nan for what cannot be told: without a map CC, SIM and KL, without a fixated place AUC and NSS."""
    saliency = saliency if truth is None else resize_map(saliency, truth.shape)
    fixated = truth > truth.max() / 2 if fixations is None else fixation_map(fixations, saliency.shape) > 0
    figures = {"AUC-Judd": auc_judd(saliency, fixated), "NSS": nss(saliency, fixated)}
    known = truth is not None and truth.max() > 0
    maps = {"CC": cc, "SIM": sim, "KL": kl}
    return figures | {name: metric(saliency, truth) if known else float("nan") for name, metric in maps.items()}


def centre_biases(truths: list[tuple[np.ndarray | None, np.ndarray | None]]) -> list[np.ndarray]:
    """For each of two or more photographs the mean map of all others; fixations alone are spread by a Gaussian."""
    side = (MAP_SIDE, MAP_SIDE)
    spread = [
        resize_map(truth, side) if truth is not None else gaussian_filter(fixation_map(places, side), MAP_SIDE / 16)
        for truth, places in truths
    ]
    densities = [density(one) for one in spread]
    total = np.sum(densities, axis=0)
    return [(total - one) / (len(densities) - 1) for one in densities]


def saliency_measures(maps: list[np.ndarray], truths: list[tuple], photos: np.ndarray) -> Measures:
    figures = [saliency_figures(one, *truth) for one, truth in zip(maps, truths)]
    tables = {name: counted(np.array([one[name] for one in figures])) for name in figures[0]}
    return as_measures(tables, "saliency", photos)


# Statistics ----------------------------------------------------------------------------------------------------------


def wrong_photos(topics: list[str | None], seed: int) -> np.ndarray:
    """For each row another row (so another photograph) of the same topic, each taken once; -1 where there is none."""
    partners, rng = np.full(len(topics), -1), np.random.default_rng(seed)
    for topic in dict.fromkeys(topics):
        rows = rng.permutation([i for i, one in enumerate(topics) if one == topic])
        if len(rows) > 1:
            partners[rows] = np.roll(rows, 1)
    return partners


def bootstrap(number: int, statistic: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int) -> list[float]:
    """
    95 % interval of a statistic of photographs, drawn with replacement as positions (..., number).

    BCa (Efron, 1987), because percentiles of few skewed figures hold the truth too rarely (of 20 exponential ones in 89 %
    of cases, BCa in 91 %); percentiles where that cannot be computed (all figures equal, a sample without one, fewer than
    five photographs), and of so many photographs that both are the same.
    """
    if number < 2:
        return [float("nan")] * 2
    method = "BCa" if 5 <= number <= LARGEST_BCA else "percentile"
    options = {"n_resamples": resamples, "batch": BATCH, "vectorized": True, "method": method, "rng": seed}
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        # a sample of equal scores has no correlation; such samples are left out
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap((np.arange(number),), lambda drawn, axis: statistic(drawn), **options)
    ends = [float(end) for end in found.confidence_interval]
    values = found.bootstrap_distribution[~np.isnan(found.bootstrap_distribution)]
    if np.isnan(ends).any():
        ends = np.percentile(values, [2.5, 97.5]).tolist() if len(values) else [float("nan")] * 2
    return ends


def interval(measure: Measure, resamples: int, seed: int) -> list[float]:
    return bootstrap(len(measure.rows), lambda drawn: measure.value(measure.rows[drawn]), resamples, seed)


def compare(first: Measure, second: Measure, resamples: int, seed: int) -> dict[str, Any]:
    """
    Second less first over the photographs of both: 95 % interval by the paired bootstrap, and the two-sided p-value of
    the permutation test that exchanges the two systems' photographs (approximate randomisation, Noreen 1989).
    """
    _, ours, theirs = np.intersect1d(first.photos, second.photos, return_indices=True)
    number, value = len(ours), first.value
    rows = np.concatenate([first.rows[ours], second.rows[theirs]])

    def difference(one: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
        return value(rows[other]) - value(rows[one])

    one, other = np.arange(number), np.arange(number) + number
    result = {"difference": float("nan"), "interval": [float("nan")] * 2, "p": float("nan"), "photographs": number}
    if number:
        result["difference"] = float(difference(one, other))
    if number > 1 and not np.isnan(result["difference"]):
        result["interval"] = bootstrap(number, lambda drawn: difference(drawn, drawn + number), resamples, seed)
        options = {"n_resamples": resamples, "batch": BATCH, "vectorized": True, "rng": seed}
        test = stats.permutation_test((one, other), difference, permutation_type="samples", **options)
        result["p"] = float(test.pvalue)
    return result
