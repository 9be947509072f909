"""
Measures captions and scores of photographs against references, of one system or of several side by side.

    python examples/evaluate_captions.py ours.jsonl --references references.jsonl
    python examples/evaluate_captions.py ours.jsonl theirs.jsonl base.jsonl --against base --references references.jsonl
    python examples/evaluate_captions.py examples/ase-mini --data PCCD --split test --images PCCD/images

A system is a file of captions or a model (folder or Hub id, any image-text-to-text model) that captions now. Lines of
    captions     {"image_id", "caption", "aspect"?, "prompt"?, "score"?, "aspects"?, "saliency"?}; captions.jsonl of
                 caption_photos.py will do
    references   {"image_id", "captions": [...], "aspect"?, "prompt"?, "rating"?, "topic_scores"?, "saliency"?,
                 "fixations"?}; metadata.jsonl of a folder of photographs will do
`aspect` is the topic of a text, where a photograph has one text for each, `prompt` the question that it answers, where it
has one of its own; `aspects` and `topic_scores` are numbers by the names of topics; `score` and `rating` are numbers of 1 to 10
(of people: or ten shares; `--score-range` names another scale of the references'); either side may have scores alone.
`saliency` is a map: a .npy file, a picture, or rows of numbers; `fixations` are [x, y] in shares of width and height.
`path` or `file_name` may stand for `image_id`: the path below the references' folder, whose suffix (.jpg, ...) does not
count. A shorter or longer path will do where only one photograph can be meant. Paths are relative to the file that names
them. Instead of such a file `--data` takes whatever aic_data.py reads, of it the split `test`, which finetune.py leaves alone:
what a model was trained on measures its memory. Lines and values that cannot be read are left out
and counted with their numbers. Exit status: 0 measured, 2 could not start.

Written to --out: report.md and report.json (the table), topics.png, scores.png, and what a model said. Beside each
figure stand its 95 % interval and the wrong-photo control: the same captions against another photograph's references.
With two systems, or with `--against NAME`, the table ends with differences and p-values. METEOR, SPICE and the field's
PTB tokenizer, the default, need Java: `sudo apt-get install default-jre-headless`, and for SPICE once `python -m
pycocoevalcap.spice.get_stanford_models` (400 MB). Without, texts are taken apart as lower-case words, the table begins
with a warning, and what cannot be computed is named with the reason. Needs the extra `evaluation`.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from aic_data import PROMPTS, load, row_question
from common import critique
from picture_files import photograph_id
from PIL import Image
from readers import pccd
from readers.files import parse_lines, read_text
from scales import misfit
from tqdm import tqdm
from transformers import pipeline

from ase_mllm import read_photograph


try:
    from metrics import (
        MAP_SIDE,
        Measure,
        Measures,
        centre_biases,
        compare,
        diversity,
        interval,
        java_missing,
        ratio,
        saliency_measures,
        score_measures,
        text_measures,
        tokenize,
        word_measures,
        wrong_photos,
    )
    from report_table import as_markdown, plot_scores, plot_topics
except ModuleNotFoundError as error:
    sys.exit(f"evaluate_captions.py needs {error.name}: pip install -e '.[evaluation]'")


PROTOCOLS = {
    "all": "a caption against all references of its photograph at once (CIDEr: their mean)",
    "best": "a caption against each reference alone, the largest figure kept (BLEU-n: the reference of the largest "
    "BLEU-n of the single caption, pooled over captions; CIDEr: each reference is a document; METEOR chooses its best "
    "reference by itself, so it is that of `all`)",
    "rotating": "caption number i against one reference, number i modulo their count",
}
OTHER_PROTOCOLS = {
    "words": "by all references, whose mean length counts; topics are read from words",
    "corpus": "over all captions of the system, so it has no interval; distinct-n: different n-grams / n-grams; "
    "self-BLEU: mean BLEU-4 of each caption against all others; baseline: one (rotating) reference a photograph",
    "score": "no fitting before PLCC; of a topic: the aspect of that name; accuracy at 5: both above 5 or both not; baselines: always the more frequent "
    "side, and the references' own range",
    "saliency": "fixations (a place counts once), or where the reference map is above half its largest value; maps in "
    "the reference's size; less KL is better; flat predictions give AUC 0.5, NSS 0 and CC 0; baseline: centre bias, the "
    "mean map of all other photographs",
}
TOKENIZERS = {"ptb": "the field's PTB tokenizer", "words": "lower-case words, no punctuation"}
NO_PTB = (
    "**Not by the field's protocol: Java is missing, so texts are taken apart as lower-case words and not by the PTB "
    "tokenizer, and METEOR and SPICE are missing. These figures are not comparable with published ones. "
    "`sudo apt-get install default-jre-headless` mends it.**"
)
NAMES = ("image_id", "file_name", "path", "image")
SCORES = ("rating", "score", "gt_score", "score_mean")  # whichever a line of references has
DIFFERENT = "scores of one photograph that differ from its first one, which counts"

Rows = list[dict[str, Any]]


@dataclass
class Report:
    """Of one system: its figures (a plain number has no interval), and the same with wrong photographs."""

    own: dict[tuple[str, str], Measure | float] = field(default_factory=dict)
    wrong: Measures = field(default_factory=dict)
    baselines: dict[tuple[str, str], float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    scores: np.ndarray | None = None  # (photographs, 2): the system's and the reference's


# Lines ---------------------------------------------------------------------------------------------------------------


def read_lines(path: Path, notes: list[str]) -> Rows:
    """Rows with an `image_id`, and maps and fixations as arrays; what cannot be read is counted in `notes` by its lines."""
    rows, unread = [], defaultdict(list)
    for number, row in parse_lines(read_text(path)):
        names = [str(row[key]) for key in NAMES if row.get(key) is not None] if row else []
        if not names:
            unread[f"not a JSON object with {' or '.join(NAMES)}"].append(number)
            continue
        row |= {"image_id": photograph_id(str(row.get("image_id", names[0]))), "file_name": names[0]}
        for name, read in (("saliency", partial(read_map, folder=path.parent)), ("fixations", read_fixations)):
            try:
                row[name] = None if row.get(name) is None else read(row[name])
            except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
                row[name] = None
                unread[f"no {name} ({error})"].append(number)
        rows.append(row)
    for what, numbers in unread.items():
        lines = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        notes.append(f"{path.name}, line {lines}: {what}: {len(numbers)}")
    if not rows:
        raise ValueError(f"{path} has no line that can be read: {'; '.join(notes[-len(unread) :]) or 'it is empty'}.")
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


def key_of(row: dict[str, Any]) -> tuple[str | None, ...]:
    """What makes two lines answer one question about one photograph."""
    return row["image_id"], row.get("aspect"), row.get("prompt")


def read_references(path: Path, notes: list[str]) -> Rows:
    """One row for each photograph and topic, in the file's order; what is left out or joined is counted in `notes`."""
    rows, empty, joined, conflicts = {}, 0, 0, 0
    for row in read_lines(path, notes):
        texts = row.get("captions") or row.get("caption") or []
        texts = texts if isinstance(texts, list) else [texts]
        row["captions"] = [text for text in texts if isinstance(text, str) and text.strip()]
        empty += len(texts) - len(row["captions"])
        key = key_of(row)
        joined += key in rows
        if key in rows:
            rows[key]["captions"] += row.pop("captions")
            conflicts += fill(rows[key], row)
        else:
            rows[key] = row
    kept = [row for row in rows.values() if row["captions"] or given_score(row) is not None]
    if not kept:
        raise ValueError(f"{path} has no references: neither captions nor scores.")
    counts = {
        "references: empty ones left out": empty,
        "references: lines joined with another of the same photograph and topic": joined,
        "references: photographs or topics without one left out": len(rows) - len(kept),
        DIFFERENT: conflicts,
    }
    notes += as_notes(counts)
    return kept


def fill(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Adds to a row what it does not say and another one of the same photograph does; whether their scores differ."""
    scores = given_score(row), given_score(other)
    for name, value in other.items():
        known = row.get(name)
        unsaid = known is None or (isinstance(known, str | list | dict) and not known)
        if unsaid and not (name in SCORES and scores[0] is not None):
            row[name] = value
    return None not in scores and scores[0] != scores[1]


def by_photograph(rows: Rows, photos: np.ndarray, report: Report) -> Rows:
    """One row a photograph, in the order of their numbers: scores and maps belong to it, and not to one of its topics."""
    whole, conflicts = {}, 0
    for photo, row in zip(photos.tolist(), rows):
        if photo in whole:
            conflicts += fill(whole[photo], row)
        else:
            whole[photo] = dict(row)
    report.notes += as_notes({DIFFERENT: conflicts})
    return [whole[photo] for photo in sorted(whole)]


def load_references(args: argparse.Namespace) -> Rows:
    """References from any data set that aic_data.py reads; pictures by their paths."""
    splits, report = load(args.data, args.images, score_range=args.score_range, pccd_texts=args.pccd, verbose=False)
    if args.split not in splits:
        raise ValueError(
            f"{args.data} has no split {args.split!r}, only {', '.join(splits)}. What is measured should not have been trained "
            f"on: name the split of its rows by a column `split`, or put it into a folder {args.split}.\n{report}"
        )
    print(report)
    args.score_range = None  # they are on the scale 1 to 10 by now
    return [
        {
            "image_id": photograph_id(row["image_id"]),
            "file_name": row["image"]["path"],
            "captions": row["captions"],
            "aspect": row["topic"],
            "prompt": row["prompt"],
            "score_mean": row["score_mean"],
            "topic_scores": {one["topic"]: one["score"] for one in row["topic_scores"] or []},
        }
        for row in splits[args.split].cast_column("image", datasets.Image(decode=False))
    ]


def given_score(row: dict[str, Any]) -> Any:
    return next((row[name] for name in SCORES if row.get(name) is not None), None)


def rescale(references: Rows, score_range: list[float] | None, notes: list[str]):
    """
    Brings single scores of the references to the scale 1 to 10.

    Raises:
        ValueError: if nobody says the scale and they are not from 1 to 10.
    """
    single = {
        i: as_score(given_score(row)) for i, row in enumerate(references) if not isinstance(given_score(row), list)
    }
    single = {i: value for i, value in single.items() if not np.isnan(value)}
    if score_range is None:
        if reason := misfit([(value, references[i]["image_id"]) for i, value in single.items()]):
            raise ValueError(f"The references have {reason}")
        return
    worst, best = score_range
    outside = [i for i, value in single.items() if not worst <= value <= best]
    for i, value in single.items():
        references[i] |= dict.fromkeys(SCORES)
        references[i]["rating"] = None if i in outside else 1 + 9 * (value - worst) / (best - worst)
    notes += as_notes({f"reference scores outside {worst:g} to {best:g} left out": len(outside)})


def as_notes(counts: dict[str, int]) -> list[str]:
    return [f"{what}: {count}" for what, count in counts.items() if count]


def same_photographs(rows: Rows, references: Rows, path: Path):
    """
    Gives rows the ids of the references that they mean: equal ones, or one that begins in a folder above or below.

    Raises:
        ValueError: if a shorter path may mean several photographs.
    """
    known, ends = {row["image_id"] for row in references}, defaultdict(set)
    for name in known:
        parts = name.split("/")
        for start in range(1, len(parts)):
            ends["/".join(parts[start:])].add(name)
    for row in rows:
        name, parts = row["image_id"], row["image_id"].strip("/").split("/")
        longer = ["/".join(parts[start:]) for start in range(1, len(parts))]
        if name in known:
            continue
        if len(ends.get(name, ())) > 1:
            raise ValueError(
                f"{path}: {name} may be {' or '.join(sorted(ends[name])[:2])}: write the path below the references' folder."
            )
        row["image_id"] = next((one for one in (*ends.get(name, ()), *longer) if one in known), name)


def read_captions(path: Path, references: Rows, partial: bool, notes: list[str]) -> list[dict[str, Any] | None]:
    """What a system says of each reference row; None where that is nothing, which only `partial` allows."""
    rows, repeated = {}, 0
    given = read_lines(path, notes)
    same_photographs(given, references, path)
    asked = any(row.get("prompt") is not None for row in references)
    writes = any(isinstance(row.get("caption"), str) for row in given)
    for row in given:
        if not isinstance(row.get("caption"), str):
            if writes or row.get("score") is None:
                raise ValueError(f"{path}: {row['image_id']} has no `caption`.")
            row["caption"] = None
        key = key_of(row if asked else row | {"prompt": None})
        repeated += key in rows
        rows.setdefault(key, row)
    keys = [key_of(row) for row in references]
    # one caption of the whole photograph answers for each of its topics and questions
    found = [rows.get(key) or rows.get((key[0], None, None)) for key in keys]
    absent = [key for key, row in zip(keys, found) if row is None]
    if (absent and not partial) or len(absent) == len(keys):
        raise ValueError(
            f"{path} lacks {len(absent)} of {len(keys)} captions, e.g. of {' '.join(filter(None, absent[0]))}: --partial?"
        )
    there = [(key, row) for key, row in zip(keys, found) if row is not None]
    counts = {
        "references without a caption left out": len(absent),
        "captions without references not measured": len(
            rows.keys() - set(keys) - {(key[0], None, None) for key in keys}
        ),
        "captions of a photograph measured by the references of a topic": sum(key not in rows for key, _ in there),
        "captions repeated (the first counts)": repeated,
        "captions empty (they count)": sum(
            row["caption"] is not None and not row["caption"].strip() for _, row in there
        ),
        "photographs with a score alone": sum(row["caption"] is None for _, row in there),
    }
    notes += [f"{path.name}: {note}" for note in as_notes(counts)]
    return found


def as_score(value: Any) -> float:
    """A number, ten shares or counts of the scores 1 to 10, or {"mean": number}; nan if it is none."""
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
    folder = args.images or (args.references.parent if args.references else Path())
    photos = [folder / row["file_name"] for row in references]
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
            questions = [
                row.get("prompt") or (row_question(row["aspect"]) if row.get("aspect") else args.prompt)
                for row in batch
            ]
            if critic.model.config.model_type == "ase":
                sizes, options = [(MAP_SIDE, MAP_SIDE)] * len(images), {"max_new_tokens": args.max_new_tokens}
                answers = critique(critic.model, critic.processor, images, sizes, questions, **options)
                maps.mkdir(exist_ok=True)
                for number, answer in enumerate(answers, start):
                    np.save(maps / f"{number}.npy", answer.pop("heat").cpu().numpy())
                    answer |= {"score": answer["score"]["mean"], "saliency": f"{maps.name}/{number}.npy"}
            else:
                answers = [{"caption": text} for text in caption_batch(critic, images, questions, args.max_new_tokens)]
            for row, answer in zip(batch, answers):
                asked = {name: row.get(name) for name in ("image_id", "aspect", "prompt")}
                file.write(json.dumps(asked | answer) + "\n")
    return path


def caption_batch(critic, images: list[Image.Image], questions: list[str], max_new_tokens: int) -> list[str]:
    options = {"return_full_text": False, "batch_size": len(images)}
    options["generate_kwargs"] = {"max_new_tokens": max_new_tokens, "do_sample": False}
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


# Evaluation ----------------------------------------------------------------------------------------------------------


def evaluate(references: Rows, captions: Rows, args: argparse.Namespace, missing: dict[str, str]) -> Report:
    """All figures of one system; `captions` are those of the references' rows."""
    report = Report()
    photos = np.unique([row["image_id"] for row in references], return_inverse=True)[1]
    texts = [i for i, row in enumerate(references) if row["captions"] and captions[i]["caption"] is not None]
    if texts:
        pairs = [references[i] for i in texts], [captions[i] for i in texts]
        evaluate_texts(*pairs, photos[texts], args, missing, report)
    references, captions = (by_photograph(rows, photos, report) for rows in (references, captions))
    evaluate_scores(references, captions, args.seed, report)
    evaluate_topic_scores(references, captions, args.seed, report)
    evaluate_saliency(references, captions, args.seed, report)
    return report


def evaluate_texts(references: Rows, captions: Rows, photos, args, missing: dict[str, str], report: Report):
    written = tokenize([row["caption"] for row in captions], args.tokenizer)
    flat = iter(tokenize([text for row in references for text in row["captions"]], args.tokenizer))
    given = [[next(flat) for _ in row["captions"]] for row in references]
    topics = np.array([row.get("aspect") or "" for row in references])
    partners = wrong_photos(topics.tolist(), args.seed)
    kept = np.flatnonzero(partners >= 0)
    report.notes += as_notes({"captions without another photograph as control": len(partners) - len(kept)})
    everything = np.arange(len(written))
    for measures, rows, others in ((report.own, everything, everything), (report.wrong, kept, partners[kept])):
        if not len(rows):
            continue
        texts, truths = [written[i] for i in rows], [given[i] for i in others]
        for protocol in args.protocols:
            measures |= text_measures(texts, truths, photos[rows], protocol, missing)
        # NOTE: the document frequencies of a topic's CIDEr are those of all topics together
        whole = measures["CIDEr", args.protocols[0]]
        for topic in filter(None, dict.fromkeys(topics[rows].tolist())):
            chosen = topics[rows] == topic
            measure = Measure(ratio, whole.rows[chosen], whole.photos[chosen])
            measures[f"CIDEr of {topic}", args.protocols[0]] = measure
        measures |= word_measures(texts, truths, photos[rows])
    report.own |= diversity(written)
    report.baselines |= diversity([texts[i % len(texts)] for i, texts in enumerate(given)])


def evaluate_scores(references: Rows, captions: Rows, seed: int, report: Report):
    given = [given_score(row) for row in references]
    said = [row.get("score") for row in captions]
    pairs = np.array([(as_score(one), as_score(other)) for one, other in zip(said, given)])
    for name, raw, values in (("scores", said, pairs[:, 0]), ("reference scores", given, pairs[:, 1])):
        unread = sum(one is not None and np.isnan(value) for one, value in zip(raw, values))
        outside = int(((values < 1) | (values > 10)).sum())
        report.notes += as_notes(
            {f"{name} that cannot be read": unread, f"{name} outside 1 to 10 (they count)": outside}
        )
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


def evaluate_topic_scores(references: Rows, captions: Rows, seed: int, report: Report):
    """Correlations of a system's aspects with the scores of the topics that are called so."""
    said, given = (
        [row.get(name) or {} for row in rows] for name, rows in (("aspects", captions), ("topic_scores", references))
    )
    for topic in dict.fromkeys(topic for one in given for topic in one):
        pairs = np.array([(as_score(one.get(topic)), as_score(other.get(topic))) for one, other in zip(said, given)])
        photos = np.flatnonzero(~np.isnan(pairs).any(axis=1))
        if len(photos) < 2:
            continue
        moved = np.stack([pairs[photos, 0], pairs[photos[wrong_photos([None] * len(photos), seed)], 1]], axis=1)
        for measures, rows in ((report.own, pairs[photos]), (report.wrong, moved)):
            found = score_measures(rows, photos)
            measures |= {(f"{name} of {topic}", "score"): found[name, "score"] for name in ("SRCC", "PLCC")}


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


def make_table(reports: dict[str, Report], against: str | None, resamples: int, seed: int) -> Rows:
    """One row for each figure: of every system, with a wrong photograph, the baseline, and differences to one system."""
    rows, baselines = [], dict(item for report in reports.values() for item in report.baselines.items())
    for key in dict.fromkeys(key for report in reports.values() for key in report.own):
        row = {"measure": key[0], "protocol": key[1], "baseline": baselines.get(key), "systems": {}}
        compared: dict[str, Measure] = {}
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
                    if measures is report.own:
                        compared[name] = measure
        if against in compared:
            others = {name: measure for name, measure in compared.items() if name != against}
            row["comparisons"] = {
                name: compare(compared[against], measure, resamples, seed) for name, measure in others.items()
            }
        rows.append(row)
    return rows


def describe(reports: dict[str, Report], table: Rows, references: Rows, args, missing) -> dict[str, Any]:
    """What the figures were made of."""
    used = {row["protocol"] for row in table}
    photos = len({row["image_id"] for row in references})
    texts = sum(len(row["captions"]) for row in references)
    statistics = [
        f"{photos} photographs, {len(references)} captions a system, {texts} references; CIDEr weighs words by their "
        "rarity in these references, so compare it on the same photographs only",
        f"text: {TOKENIZERS[args.tokenizer]}; pycocoevalcap",
        f"in brackets: 95 % intervals (BCa) from {args.resamples} bootstrap samples of photographs",
        "wrong photo: captions, scores and maps measured by the references of another photograph (same topic), seed "
        f"{args.seed}: what remains was not seen in the photograph",
    ]
    if args.against is not None:
        compared = sum(len(row.get("comparisons", ())) for row in table)
        test = (
            f"p: two-sided paired permutation test, {args.resamples} rounds, not corrected for {compared} comparisons"
        )
        statistics.append(f"differences: paired bootstrap over the photographs that both systems have; {test}")
    return {
        "systems": list(reports),
        "against": args.against,
        "warning": args.warning,
        "not_computed": missing,
        "protocols": {name: meaning for name, meaning in (PROTOCOLS | OTHER_PROTOCOLS).items() if name in used},
        "notes": args.notes + [f"{name}: {note}" for name, report in reports.items() for note in report.notes],
        "statistics": statistics,
    }


# Run -----------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description, _, details = __doc__.strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("systems", nargs="+", help="captions (.jsonl), or models that caption now")
    parser.add_argument("--references", type=Path)
    parser.add_argument("--data", help="in place of --references: a data set in one of the forms of aic_data.py")
    parser.add_argument("--split", default="test", help="of --data (default: %(default)s)")
    parser.add_argument("--pccd", choices=pccd.TEXTS, default=pccd.TEXTS[0], help="which texts of PCCD are a row")
    parser.add_argument("--score-range", nargs=2, type=float, metavar=("WORST", "BEST"), help="of the references")
    parser.add_argument("--against", help="the system to which the others' differences are measured")
    parser.add_argument("--names", nargs="+", help="of the systems in the table")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="where results go (default: %(default)s)")
    parser.add_argument(
        "--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS), help="default: all three"
    )
    parser.add_argument(
        "--tokenizer", choices=TOKENIZERS, help="default: ptb, the field's, where there is Java, else words"
    )
    parser.add_argument("--resamples", type=int, default=1000, help="of bootstrap and permutation test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--partial", action="store_true", help="measure what has captions of all systems")
    parser.add_argument("--images", type=Path, help="folder of the photographs (default: beside the references)")
    parser.add_argument("--prompt", default=PROMPTS["critique"], help="for photographs without a topic")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with a checkpoint")
    args = parser.parse_args(argv)
    args.names = args.names or [Path(system).stem if system.endswith(".jsonl") else system for system in args.systems]
    if len(args.names) != len(args.systems) or len(set(args.names)) != len(args.systems):
        parser.error("give to each system a name of its own (--names)")
    if args.against is None and len(args.names) == 2:
        args.against = args.names[0]
    if args.against not in (None, *args.names):
        parser.error(f"--against {args.against} is none of the systems, which are {', '.join(args.names)}")
    if (args.references is None) == (args.data is None):
        parser.error("give either --references or --data")
    if args.score_range and not args.score_range[0] < args.score_range[1]:
        parser.error(f"--score-range is the worst and the best, got {args.score_range}")
    if args.resamples < 1:
        parser.error(f"--resamples is {args.resamples}, it must be above 0")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.notes = []
    missing = java_missing()
    no_java = "METEOR" in missing
    args.warning = NO_PTB if no_java else None
    args.tokenizer = args.tokenizer or ("words" if no_java else "ptb")
    if args.tokenizer == "ptb" and no_java:
        print(f"Cannot start: --tokenizer ptb {missing['METEOR']}.", file=sys.stderr)
        return 2

    # Data
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        references = load_references(args) if args.data else read_references(args.references, args.notes)
        rescale(references, args.score_range, args.notes)
        files = [Path(one) if one.endswith(".jsonl") else make_captions(one, references, args) for one in args.systems]
        captions = [read_captions(file, references, args.partial, args.notes) for file in files]
    except (OSError, ValueError) as error:
        print(f"Cannot start: {error}", file=sys.stderr)
        return 2
    kept = [i for i in range(len(references)) if all(rows[i] is not None for rows in captions)]
    references, captions = [references[i] for i in kept], [[rows[i] for i in kept] for rows in captions]

    # Run
    reports = {name: evaluate(references, rows, args, missing) for name, rows in zip(args.names, captions)}
    table = make_table(reports, args.against, args.resamples, args.seed)
    facts = describe(reports, table, references, args, missing)
    text = as_markdown(table, facts)
    print(text)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    report = json.loads(json.dumps(facts | {"table": table}), parse_constant=lambda nan: None)  # nan is not JSON
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot_topics(table, args.out / "topics.png")
    if any(report.scores is not None for report in reports.values()):
        plot_scores({name: report.scores for name, report in reports.items()}, args.out / "scores.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
