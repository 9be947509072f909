"""
Measures captions of photographs against references, one system alone or two side by side.

    python examples/evaluate_captions.py ours.jsonl --references references.jsonl
    python examples/evaluate_captions.py ours.jsonl theirs.jsonl --references references.jsonl --out comparison
    python examples/evaluate_captions.py examples/ase-mini --references my-photographs/metadata.jsonl

A system is a file of captions or a model (folder or Hub id, any image-text-to-text model) that captions now. Lines of
    captions     {"image_id", "caption", "aspect"?, "score"?, "saliency"?}; captions.jsonl of caption_photos.py will do
    references   {"image_id", "captions": [...], "aspect"?, "rating"?, "saliency"?, "fixations"?}; metadata.jsonl of a
                 folder of photographs will do
`aspect` is what a text is about, where a photograph has one text for each; `score` and `rating` are numbers of 1 to 10
(a rating may be ten shares); `saliency` is a map: a .npy file, a picture, or rows of numbers; `fixations` are [x, y] in
shares of width and height. `path` or `file_name` may stand for `image_id`, whose suffix (.jpg, ...) does not count.
Paths are relative to the file that names them.

Written to --out: report.md and report.json (the table), aspects.png, scores.png, and what a model said. Beside each
figure stand its 95 % interval and the wrong-photo control: the same captions against another photograph's references.
With two systems the table ends with difference and p-value. METEOR, SPICE and `--tokenizer ptb` need Java; what cannot
be computed is named with the reason. Needs the extra `evaluation`.
"""

import argparse
import functools
import json
import re
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aic_data import PROMPTS, without_suffix
from finetune import ASPECT_STEMS, aspects_of
from matplotlib.figure import Figure
from PIL import Image
from pycocoevalcap.bleu.bleu_scorer import BleuScorer, cook_test, precook
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice import spice
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from scipy import stats
from scipy.integrate import trapezoid
from scipy.ndimage import gaussian_filter
from tqdm import tqdm
from transformers import pipeline

from ase_mllm import read_photograph


PROTOCOLS = {
    "all": "a caption against all references of its photograph at once (CIDEr: their mean)",
    "best": "a caption against each reference alone, the largest figure kept (BLEU-n: the reference of the largest "
    "BLEU-n of the single caption, pooled over captions; CIDEr: each reference is a document; METEOR chooses its best "
    "reference by itself, so it is that of `all`)",
    "rotating": "caption number i against one reference, number i modulo their count",
}
OTHER_PROTOCOLS = {
    "words": "by all references, whose mean length counts; aspects are read from words",
    "corpus": "over all captions of the system, so it has no interval; distinct-n: different n-grams / n-grams; "
    "self-BLEU: mean BLEU-4 of each caption against all others; baseline: one (rotating) reference a photograph",
    "score": "no fitting before PLCC; accuracy at 5: both above 5 or both not; baselines: always the more frequent "
    "side, and the ratings' own range",
    "saliency": "fixations (a place counts once), or where the reference map is above half its largest value; maps in "
    "the reference's size; less KL is better; flat predictions give AUC 0.5, NSS 0 and CC 0; baseline: centre bias, the "
    "mean map of all other photographs",
}
PANELS = {"CIDEr": "CIDEr of each aspect", "coverage": "aspect coverage"}
TOKENIZERS = {"words": "lower-case words, no punctuation", "ptb": "the field's PTB tokenizer"}
RATINGS = ("rating", "score", "gt_score", "score_mean")  # whichever a line of references has
MAP_SIDE = 64  # of the centre bias, and of maps that a model is asked for
BATCH = 100  # resamples at a time, for the sake of memory
EPSILON = np.finfo(float).eps

Rows = list[dict[str, Any]]


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


@dataclass
class Report:
    """Of one system: its figures (a plain number has no interval), and the same with wrong photographs."""

    own: dict[tuple[str, str], Measure | float] = field(default_factory=dict)
    wrong: Measures = field(default_factory=dict)
    baselines: dict[tuple[str, str], float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    scores: np.ndarray | None = None  # (photographs, 2): score and rating


# Lines ---------------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> Rows:
    """Rows with a string `image_id`, and maps and fixations as arrays."""
    with open(path, encoding="utf-8") as file:
        lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
            names = [str(row[key]) for key in ("file_name", "path", "image", "image_id") if row.get(key) is not None]
            name = Path(names[0]).name if row.get("image_id") is None else str(row["image_id"])
            row |= {"image_id": without_suffix(name), "file_name": names[0]}
        except (ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object with an `image_id`.") from error
        try:
            if row.get("saliency") is not None:
                row["saliency"] = read_map(row["saliency"], path.parent)
            if row.get("fixations") is not None:
                row["fixations"] = read_fixations(row["fixations"])
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        rows.append(row)
    return rows


def read_map(value: str | list, folder: Path) -> np.ndarray:
    if isinstance(value, list):
        saliency = np.array(value, dtype=float)
    elif value.endswith(".npy"):
        saliency = np.load(folder / value, allow_pickle=False).astype(float)
    else:
        with Image.open(folder / value) as image:
            saliency = np.array(image.convert("L"), dtype=float)
    if saliency.ndim != 2 or not saliency.size or not np.isfinite(saliency).all():
        raise ValueError(f"A saliency map is rows of finite numbers, got one of shape {saliency.shape}.")
    return saliency


def read_fixations(value: list[list[float]]) -> np.ndarray:
    fixations = np.array(value, dtype=float).reshape(-1, 2)
    if not ((fixations >= 0) & (fixations <= 1)).all():
        raise ValueError("A fixation is [x, y] in shares of width and height, between 0 and 1.")
    return fixations


def read_references(path: Path, notes: list[str]) -> Rows:
    """One row for each photograph and aspect, in the file's order; what is left out or joined is counted in `notes`."""
    rows, empty, joined = {}, 0, 0
    for row in read_lines(path):
        texts = row.get("captions") or [row.get("caption")]
        texts = [texts] if isinstance(texts, str) else texts
        row["captions"] = [text for text in texts if isinstance(text, str) and text.strip()]
        empty += len(texts) - len(row["captions"])
        key = row["image_id"], row.get("aspect")
        joined += key in rows
        if key in rows:
            rows[key]["captions"] += row["captions"]
        else:
            rows[key] = row
    kept = [row for row in rows.values() if row["captions"]]
    if not kept:
        raise ValueError(f"{path} has no references.")
    counts = {
        "references: empty ones left out": empty,
        "references: lines joined with another of the same photograph and aspect": joined,
        "references: photographs or aspects without one left out": len(rows) - len(kept),
    }
    notes += as_notes(counts)
    return kept


def as_notes(counts: dict[str, int]) -> list[str]:
    return [f"{what}: {count}" for what, count in counts.items() if count]


def read_captions(path: Path, references: Rows, partial: bool, notes: list[str]) -> list[dict[str, Any] | None]:
    """The caption of each reference row; None where there is none, which only `partial` allows."""
    rows, repeated = {}, 0
    for row in read_lines(path):
        if not isinstance(row.get("caption"), str):
            raise ValueError(f"{path}: {row['image_id']} has no `caption`.")
        key = row["image_id"], row.get("aspect")
        repeated += key in rows
        rows.setdefault(key, row)
    keys = [(row["image_id"], row.get("aspect")) for row in references]
    # one caption of the whole photograph answers for each of its aspects
    found = [rows.get(key) or rows.get((key[0], None)) for key in keys]
    absent = [key for key, row in zip(keys, found) if row is None]
    if (absent and not partial) or len(absent) == len(keys):
        raise ValueError(f"{path} lacks {len(absent)} of {len(keys)} captions, e.g. of {absent[0]}: --partial?")
    there = [(key, row) for key, row in zip(keys, found) if row is not None]
    counts = {
        "references without a caption left out": len(absent),
        "captions without references not measured": len(rows.keys() - set(keys) - {(name, None) for name, _ in keys}),
        "captions of a photograph measured by the references of an aspect": sum(key not in rows for key, _ in there),
        "captions repeated (the first counts)": repeated,
        "captions empty (they count)": sum(not row["caption"].strip() for _, row in there),
    }
    notes += [f"{path.name}: {note}" for note in as_notes(counts)]
    return found


def as_rating(value: Any) -> float:
    """A number, ten shares or counts of the ratings 1 to 10, or {"mean": number}; nan if it is none."""
    try:
        numbers = np.array(value["mean"] if isinstance(value, dict) else value, dtype=float)
        mean = (
            numbers @ np.arange(1, 11) / numbers.sum() if numbers.shape == (10,) and numbers.any() else numbers.item()
        )
        return float(mean) if np.isfinite(mean) else float("nan")
    except (KeyError, TypeError, ValueError):
        return float("nan")


# Captions made now ---------------------------------------------------------------------------------------------------


def make_captions(model: str, references: Rows, args: argparse.Namespace) -> Path:
    """Captions the photographs of the references and writes a file of captions; an ASE model gives score and map too."""
    photos = [(args.images or args.references.parent) / row["file_name"] for row in references]
    absent = [path for path in photos if not path.is_file()]
    if absent:
        raise ValueError(f"{len(absent)} of {len(photos)} photographs are missing, e.g. {absent[0]}: --images?")
    critic = pipeline("image-text-to-text", model, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    critic.tokenizer.padding_side = "left"  # what is generated continues the end of each row
    name = re.sub(r"[^\w.-]+", "-", model.strip("/"))
    path, maps = args.out / f"{name}.jsonl", args.out / f"{name}-maps"
    with open(path, "w", encoding="utf-8") as file:
        for start in tqdm(range(0, len(references), args.batch_size), desc=f"Captioning by {model}"):
            batch = references[start : start + args.batch_size]
            images = [read_photograph(path) for path in photos[start : start + args.batch_size]]
            answers = [{"caption": text} for text in caption_batch(critic, images, batch, args)]
            if critic.model.config.model_type == "ase":
                maps.mkdir(exist_ok=True)
                for number, (answer, (score, heat)) in enumerate(zip(answers, judge_batch(critic, images)), start):
                    np.save(maps / f"{number}.npy", heat)
                    answer |= {"score": score, "saliency": f"{maps.name}/{number}.npy"}
            for row, answer in zip(batch, answers):
                file.write(json.dumps({"image_id": row["image_id"], "aspect": row.get("aspect")} | answer) + "\n")
    return path


def caption_batch(critic, images: list[Image.Image], rows: Rows, args: argparse.Namespace) -> list[str]:
    options = {"return_full_text": False, "batch_size": len(images)}
    options["generate_kwargs"] = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    aspects = [row.get("aspect") for row in rows]
    named = "Critique the {} of this photograph."
    questions = [PROMPTS.get(one, named.format(one.replace("_", " "))) if one else args.prompt for one in aspects]
    if critic.processor.chat_template is None:
        answers = critic(images=images, text=[f"{critic.processor.image_token}\n{q}\n" for q in questions], **options)
    else:
        contents = [
            [{"type": "image", "image": image}, {"type": "text", "text": text}]
            for image, text in zip(images, questions)
        ]
        answers = critic(text=[[{"role": "user", "content": content}] for content in contents], **options)
    texts = [(one[0] if isinstance(one, list) else one)["generated_text"] for one in answers]
    return [" ".join(text.split()) for text in texts]


@torch.inference_mode()
def judge_batch(critic, images: list[Image.Image]) -> list[tuple[float, np.ndarray]]:
    """Score and saliency map of each photograph by an ASE model."""
    processor, names = critic.processor, critic.processor.image_processor.model_input_names
    texts = [processor.critique_prompt()] * len(images)
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    inputs = inputs.to(critic.model.device, dtype=critic.model.dtype)
    features = critic.model.get_image_features(**{name: inputs[name] for name in names if name in inputs})
    heats = processor.post_process_saliency(features, [(MAP_SIDE, MAP_SIDE)] * len(images))
    scores = processor.post_process_scores(features)
    return [(score["mean"], heat.cpu().numpy()) for score, heat in zip(scores, heats)]


# Texts ---------------------------------------------------------------------------------------------------------------


def tokenize(texts: list[str], tokenizer: str) -> list[str]:
    """Texts as words with spaces between them."""
    if tokenizer == "ptb":
        found = PTBTokenizer().tokenize({i: [{"caption": " ".join(text.split())}] for i, text in enumerate(texts)})
        return [found.get(i, [""])[0] for i in range(len(texts))]
    return [" ".join(re.findall(r"[\w'-]+", text.lower())) for text in texts]


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
    return np.array(lines, dtype=float)


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
        return dict.fromkeys(("METEOR", "SPICE"), "needs Java")
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
    """Length, and which of the references' aspects a caption speaks of."""
    lengths = [
        (len(text.split()), np.mean([len(one.split()) for one in texts])) for text, texts in zip(captions, references)
    ]
    pairs = [(aspects_of(text), aspects_of(" ".join(texts))) for text, texts in zip(captions, references)]
    tables = {
        "length ratio": lengths,
        "aspect coverage": [(len(a & b) / len(b), 1) if b else (0, 0) for a, b in pairs],
        "aspects in no reference": [(len(a - b) / len(a), 1) if a else (0, 0) for a, b in pairs],
    } | {f"coverage of {name}": [(name in a and name in b, name in b) for a, b in pairs] for name in ASPECT_STEMS}
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


def wrong_photos(aspects: list[str | None], seed: int) -> np.ndarray:
    """For each row another row (so another photograph) of the same aspect, each taken once; -1 where there is none."""
    partners, rng = np.full(len(aspects), -1), np.random.default_rng(seed)
    for aspect in dict.fromkeys(aspects):
        rows = rng.permutation([i for i, one in enumerate(aspects) if one == aspect])
        if len(rows) > 1:
            partners[rows] = np.roll(rows, 1)
    return partners


def bootstrap(number: int, statistic: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int) -> list[float]:
    """95 % percentile interval of a statistic of photographs, drawn with replacement as positions (..., number)."""
    if number < 2:
        return [float("nan")] * 2
    options = {"n_resamples": resamples, "batch": BATCH, "vectorized": True, "method": "percentile", "rng": seed}
    with warnings.catch_warnings():  # a sample of equal scores has no correlation; such samples are left out
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap((np.arange(number),), lambda drawn, axis: statistic(drawn), **options)
    values = found.bootstrap_distribution[~np.isnan(found.bootstrap_distribution)]
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else [float("nan")] * 2


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


# Evaluation ----------------------------------------------------------------------------------------------------------


def evaluate(references: Rows, captions: Rows, args: argparse.Namespace, missing: dict[str, str]) -> Report:
    """All figures of one system; `captions` are those of the references' rows."""
    report = Report()
    photos = np.unique([row["image_id"] for row in references], return_inverse=True)[1]
    evaluate_texts(references, captions, photos, args, missing, report)
    firsts = np.unique(photos, return_index=True)[1]  # scores and maps belong to a photograph, not to an aspect
    references, captions = [references[i] for i in firsts], [captions[i] for i in firsts]
    evaluate_scores(references, captions, args.seed, report)
    evaluate_saliency(references, captions, args.seed, report)
    return report


def evaluate_texts(references: Rows, captions: Rows, photos, args, missing: dict[str, str], report: Report):
    written = tokenize([row["caption"] for row in captions], args.tokenizer)
    flat = iter(tokenize([text for row in references for text in row["captions"]], args.tokenizer))
    given = [[next(flat) for _ in row["captions"]] for row in references]
    aspects = np.array([row.get("aspect") or "" for row in references])
    partners = wrong_photos(aspects.tolist(), args.seed)
    kept = np.flatnonzero(partners >= 0)
    report.notes += as_notes({"captions without another photograph as control": len(partners) - len(kept)})
    everything = np.arange(len(written))
    for measures, rows, others in ((report.own, everything, everything), (report.wrong, kept, partners[kept])):
        if not len(rows):
            continue
        texts, truths = [written[i] for i in rows], [given[i] for i in others]
        for protocol in args.protocols:
            measures |= text_measures(texts, truths, photos[rows], protocol, missing)
        # NOTE: the document frequencies of an aspect's CIDEr are those of all aspects together
        whole = measures["CIDEr", args.protocols[0]]
        for aspect in filter(None, dict.fromkeys(aspects[rows].tolist())):
            chosen = aspects[rows] == aspect
            measure = Measure(ratio, whole.rows[chosen], whole.photos[chosen])
            measures[f"CIDEr of {aspect}", args.protocols[0]] = measure
        measures |= word_measures(texts, truths, photos[rows])
    report.own |= diversity(written)
    report.baselines |= diversity([texts[i % len(texts)] for i, texts in enumerate(given)])


def evaluate_scores(references: Rows, captions: Rows, seed: int, report: Report):
    given = [next((row[name] for name in RATINGS if row.get(name) is not None), None) for row in references]
    said = [row.get("score") for row in captions]
    pairs = np.array([(as_rating(score), as_rating(rating)) for score, rating in zip(said, given)])
    for name, raw, values in (("score", said, pairs[:, 0]), ("rating", given, pairs[:, 1])):
        unread = sum(one is not None and np.isnan(value) for one, value in zip(raw, values))
        outside = int(((values < 1) | (values > 10)).sum())
        counts = {f"{name}s that cannot be read": unread, f"{name}s outside 1 to 10 (they count)": outside}
        report.notes += as_notes(counts)
    photos = np.flatnonzero(~np.isnan(pairs).any(axis=1))
    pairs = pairs[photos]
    if len(pairs) < 2:
        return
    moved = pairs[wrong_photos([None] * len(photos), seed), 1]
    report.scores = pairs
    report.own |= score_measures(pairs, photos)
    report.wrong |= score_measures(np.stack([pairs[:, 0], moved], axis=1), photos)
    above = float((pairs[:, 1] > 5).mean())
    report.baselines["accuracy at 5", "score"] = max(above, 1 - above)
    for name, of in (("lowest score", np.min), ("highest score", np.max)):
        report.own[name, "score"], report.baselines[name, "score"] = of(pairs, axis=0).tolist()


def evaluate_saliency(references: Rows, captions: Rows, seed: int, report: Report):
    truths = [(row.get("saliency"), row.get("fixations")) for row in references]
    known = [i for i, truth in enumerate(truths) if any(one is not None for one in truth)]
    photos = np.array([i for i in known if captions[i].get("saliency") is not None], dtype=int)
    if not len(photos):
        return
    report.notes += as_notes({"photographs without a saliency map of the system": len(known) - len(photos)})
    maps, truths = [captions[i]["saliency"] for i in photos], [truths[i] for i in photos]
    measures = saliency_measures(maps, truths, photos)
    blind = {name: int((measure.rows[:, 1] == 0).sum()) for (name, _), measure in measures.items()}
    report.notes += as_notes(
        {f"photographs not in {name} (no fixated place, nothing else, or no map)": n for name, n in blind.items()}
    )
    report.own |= measures
    if len(photos) > 1:
        moved = [maps[i] for i in wrong_photos([None] * len(photos), seed)]
        report.wrong |= saliency_measures(moved, truths, photos)
        biases = saliency_measures(centre_biases(truths), truths, photos)
        report.baselines |= {key: float(measure.value(measure.rows)) for key, measure in biases.items()}


# Report --------------------------------------------------------------------------------------------------------------


def make_table(reports: dict[str, Report], resamples: int, seed: int) -> Rows:
    """One row for each figure: of every system, with a wrong photograph, the baseline, and two systems' difference."""
    rows, baselines = [], dict(item for report in reports.values() for item in report.baselines.items())
    for key in dict.fromkeys(key for report in reports.values() for key in report.own):
        row = {"measure": key[0], "protocol": key[1], "baseline": baselines.get(key), "systems": {}}
        compared = []
        for name, report in reports.items():
            cell = row["systems"][name] = {}
            for prefix, measures in (("", report.own), ("wrong_photo_", report.wrong)):
                measure = measures.get(key)
                if isinstance(measure, float):
                    cell[f"{prefix}value"] = measure
                elif measure is not None:
                    measure = measure.by_photo()
                    cell[f"{prefix}value"] = float(measure.value(measure.rows))
                    cell[f"{prefix}interval"] = interval(measure, resamples, seed)
                    cell[f"{prefix}photographs"] = len(measure.rows)
                    compared += [measure] if measures is report.own else []
        if len(compared) == 2:
            row["comparison"] = compare(*compared, resamples, seed)
        rows.append(row)
    return rows


def show(value: float | None, ends: list[float] | None = None) -> str:
    if value is None or np.isnan(value):
        return "-"
    return f"{value:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends and not np.isnan(ends).any() else "")


def as_markdown(table: Rows, facts: dict[str, Any]) -> str:
    """The table, and below it what its words mean."""
    systems = facts["systems"]
    heads = ["measure", "protocol", *(head for name in systems for head in (name, f"{name}, wrong photo")), "baseline"]
    heads += ["{1} less {0}".format(*systems), "p"] if len(systems) == 2 else []
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in table:
        cells = [row["measure"], row["protocol"]]
        for cell in row["systems"].values():
            cells.append(show(cell.get("value"), cell.get("interval")))
            cells.append(show(cell.get("wrong_photo_value"), cell.get("wrong_photo_interval")))
        cells.append(show(row["baseline"]))
        if len(systems) == 2:
            difference = row.get("comparison", {})
            cells += [show(difference.get("difference"), difference.get("interval")), show(difference.get("p"))]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- **{name}** not computed: {reason}." for name, reason in facts["not_computed"].items())]
    lines += [f"- {name}: {meaning}." for name, meaning in facts["protocols"].items()]
    lines += [f"- {note}." for note in (*facts["notes"], *facts["statistics"])]
    return "\n".join(lines) + "\n"


def describe(reports: dict[str, Report], table: Rows, references: Rows, args, missing) -> dict[str, Any]:
    """What the figures were made of."""
    used = {row["protocol"] for row in table}
    photos = len({row["image_id"] for row in references})
    texts = sum(len(row["captions"]) for row in references)
    statistics = [
        f"{photos} photographs, {len(references)} captions a system, {texts} references; CIDEr weighs words by their "
        "rarity in these references, so compare it on the same photographs only",
        f"text: {TOKENIZERS[args.tokenizer]}; pycocoevalcap",
        f"in brackets: 95 % intervals from {args.resamples} bootstrap samples of photographs",
        "wrong photo: captions, scores and maps measured by the references of another photograph (same aspect), seed "
        f"{args.seed}: what remains was not seen in the photograph",
    ]
    if len(reports) == 2:
        compared = sum("comparison" in row for row in table)
        test = (
            f"p: two-sided paired permutation test, {args.resamples} rounds, not corrected for {compared} comparisons"
        )
        statistics.append(f"differences: paired bootstrap over the photographs that both systems have; {test}")
    return {
        "systems": list(reports),
        "not_computed": missing,
        "protocols": {name: meaning for name, meaning in (PROTOCOLS | OTHER_PROTOCOLS).items() if name in used},
        "notes": args.notes + [f"{name}: {note}" for name, report in reports.items() for note in report.notes],
        "statistics": statistics,
    }


def plot_aspects(table: Rows, path: Path):
    """Bars with 95 % intervals and wrong-photo marks: CIDEr of each aspect of the references, and aspect coverage."""
    groups = {title: [row for row in table if row["measure"].startswith(f"{title} of ")] for title in PANELS}
    groups = {title: rows for title, rows in groups.items() if rows}
    if not groups:  # no aspects are given, and none of those that are read from words is spoken of
        return
    figure = Figure(figsize=(5.5 * len(groups), 3.8), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items()):
        names = list(rows[0]["systems"])
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            cells = [row["systems"][name] for row in rows]
            values = np.array([cell.get("value", np.nan) for cell in cells])
            ends = np.array([cell.get("interval", [np.nan] * 2) for cell in cells])
            places = np.arange(len(rows)) + (number - (len(names) - 1) / 2) * width
            # rounding may put a value a hair outside its own interval
            errors = np.maximum([values - ends[:, 0], ends[:, 1] - values], 0)
            axes.bar(places, values, width * 0.94, yerr=errors, capsize=3, label=name)
            marks = [cell.get("wrong_photo_value", np.nan) for cell in cells]
            axes.plot(places, marks, "wD", markeredgecolor="k", label="wrong photo" if name == names[-1] else None)
        labels = [row["measure"].removeprefix(f"{title} of ").replace("_", " ") for row in rows]
        axes.set_xticks(range(len(rows)), labels, rotation=30 if len(rows) > 4 else 0)
        axes.set_title(PANELS[title])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(names) + 1)
    figure.savefig(path, dpi=150)


def plot_scores(reports: dict[str, Report], path: Path):
    """Score over rating, one panel a system."""
    scored = {name: report.scores for name, report in reports.items() if report.scores is not None}
    figure = Figure(figsize=(4 * len(scored), 4.2), layout="constrained")
    panels = figure.subplots(1, len(scored), squeeze=False, sharex=True, sharey=True)[0]
    values = np.concatenate(list(scored.values()))
    ends = [min(values.min(), 1), max(values.max(), 10)]
    for axes, (name, pairs) in zip(panels, scored.items()):
        axes.plot(ends, ends, color="grey", linewidth=1)
        axes.scatter(pairs[:, 1], pairs[:, 0], s=9, alpha=0.5)
        axes.set(title=f"{name}\nSRCC {show(float(srcc(pairs)))}", xlabel="rating", aspect="equal")
    panels[0].set_ylabel("score")
    figure.savefig(path, dpi=150)


# Run -----------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description, _, details = __doc__.strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("systems", nargs="+", help="one or two: captions (.jsonl) or a model that captions now")
    parser.add_argument("--references", type=Path, required=True)
    parser.add_argument("--names", nargs="+", help="of the systems in the table")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="where results go (default: %(default)s)")
    parser.add_argument(
        "--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS), help="default: all three"
    )
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="words", help="ptb needs Java")
    parser.add_argument("--resamples", type=int, default=1000, help="of bootstrap and permutation test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--partial", action="store_true", help="measure what has captions of all systems")
    parser.add_argument("--images", type=Path, help="folder of the photographs (default: beside the references)")
    parser.add_argument("--prompt", default=PROMPTS["critique"], help="for photographs without an aspect")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with a checkpoint")
    args = parser.parse_args(argv)
    args.names = args.names or [Path(system).stem if system.endswith(".jsonl") else system for system in args.systems]
    if len(args.systems) > 2 or len(set(args.names)) != len(args.systems):
        parser.error("give one or two systems, and to each a name of its own (--names)")
    if args.resamples < 1:
        parser.error(f"--resamples is {args.resamples}, it must be above 0")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.notes = []
    missing = java_missing()
    if args.tokenizer == "ptb" and "METEOR" in missing:
        print("Cannot start: --tokenizer ptb needs Java.", file=sys.stderr)
        return 2

    # Data
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        references = read_references(args.references, args.notes)
        files = [Path(one) if one.endswith(".jsonl") else make_captions(one, references, args) for one in args.systems]
        captions = [read_captions(file, references, args.partial, args.notes) for file in files]
    except (OSError, ValueError) as error:
        print(f"Cannot start: {error}", file=sys.stderr)
        return 2
    kept = [i for i in range(len(references)) if all(rows[i] is not None for rows in captions)]
    references, captions = [references[i] for i in kept], [[rows[i] for i in kept] for rows in captions]

    # Run
    reports = {name: evaluate(references, rows, args, missing) for name, rows in zip(args.names, captions)}
    table = make_table(reports, args.resamples, args.seed)
    facts = describe(reports, table, references, args, missing)
    text = as_markdown(table, facts)
    print(text)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    report = json.loads(json.dumps(facts | {"table": table}), parse_constant=lambda nan: None)  # nan is not JSON
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot_aspects(table, args.out / "aspects.png")
    if any(report.scores is not None for report in reports.values()):
        plot_scores(reports, args.out / "scores.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
