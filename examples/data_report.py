"""What a source of data holds and what is wrong with it, counted split by split."""

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from common import words
from scales import MISFITS


PROBLEMS = {  # what is done about them
    "missing image": "row left out",
    "several images": "row left out",
    "damaged image": "row left out",
    "unreadable row": "row left out",
    "nothing to learn from": "row left out",
    "empty text": "value left out",
    "unreadable text": "value left out",
    "image token in text": "value left out",
    "unparsable score": "value left out",
    "score out of range": "value left out",
    "unparsable topic score": "value left out",
    "topic score out of range": "value left out",
    "unreadable caption_weight": "value left out",
    "unreadable aspect_labels": "value left out",
    "unreadable saliency": "value left out",
    "unreadable image_id": "value left out",
    "repeated row": "kept",
    "repeated text": "kept",
    "overlong text": "kept",
    "broken characters": "kept",
}
OF_PHOTOGRAPHS = ("missing image", "damaged image", "unparsable score", "score out of range")  # counted once each
EXAMPLES = 5  # of each problem


def is_kept(problems: list[str]) -> bool:
    return not any(PROBLEMS[problem] == "row left out" for problem in problems)


@dataclass
class SplitReport:
    """Counts of one split. Texts, topics and scores are those of the rows that are kept."""

    rows: int = 0
    left_out: int = 0
    words: list[int] = field(default_factory=list, repr=False)  # of each caption
    scores: list[float] = field(default_factory=list, repr=False)  # of each photograph that has one
    with_distribution: int = 0
    with_topic_scores: int = 0
    topics: Counter = field(default_factory=Counter)
    rules: Counter = field(default_factory=Counter)  # how the split of rows was told
    scales: Counter = field(default_factory=Counter)  # rows by what their score was read as
    # scores as given, where no scale was told, and their places
    unscaled: list[tuple[float, str | None]] = field(default_factory=list, repr=False)
    problems: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    image_ids: set[str] = field(default_factory=set, repr=False)
    _misfits: Counter = field(default_factory=Counter)  # rows outside of their scale, by scale
    _seen: set[int] = field(default_factory=set, repr=False)  # hashes, millions of texts do not fit otherwise

    def add(self, row: dict[str, Any]):
        """Counts a row of `RAW_FEATURES`; its image is not looked at."""
        self.rows += 1
        image_id, topic, prompt = row["image_id"], row["topic"], row["prompt"]
        self.rules[row["split_rule"]] += 1
        if row["unscaled"] is not None:
            self.unscaled.append((row["unscaled"], row["place"]))
        if row["scale"] is not None:
            self.scales[row["scale"]] += 1
            self._misfits[row["scale"]] += "score out of range" in row["problems"]
        # what is wrong with a photograph is counted once, what is wrong with a row or its texts each time
        for problem in row["problems"]:
            if problem not in OF_PHOTOGRAPHS or self._is_new(problem, image_id):
                self._note(problem, row)
        if not is_kept(row["problems"]):
            self.left_out += 1
            return
        if not self._is_new("row", image_id, topic, prompt):
            self._note("repeated row", row)
        for text in row["captions"]:
            if not self._is_new("text", image_id, topic, prompt, text):
                self._note("repeated text", row)
            self.words.append(len(words(text)))
        self.topics[topic or ("(questions of their own)" if prompt else "(everything)")] += 1
        if image_id not in self.image_ids:
            self.with_topic_scores += row["topic_scores"] is not None
            if row["score_mean"] is not None:
                self.scores.append(row["score_mean"])
                self.with_distribution += row["score"] is not None
        self.image_ids.add(image_id)

    def _is_new(self, *key: str | None) -> bool:
        known = len(self._seen)
        self._seen.add(hash(key))
        return len(self._seen) > known

    def _note(self, problem: str, row: dict[str, Any]):
        self.problems[problem] += 1
        place = row["place"]
        example = row["image_id"] if place in (None, row["image_id"]) else f"{row['image_id']} ({place})"
        if len(self.examples[problem]) < EXAMPLES and example not in self.examples[problem]:
            self.examples[problem].append(example)

    def scale_misfit(self) -> str | None:
        """Why a data set's known scale is not that of these scores."""
        for scale, count in self._misfits.items():
            if "by the name" in scale and count >= MISFITS * self.scales[scale]:
                return (
                    f"{count} of {self.scales[scale]} scores are not within {scale}: say what they are by "
                    "--score-range WORST BEST."
                )
        return None

    def figures(self) -> dict[str, int | str]:
        figures: dict[str, int | str] = {
            "rows": self.rows,
            "rows left out": self.left_out,
            "photographs": len(self.image_ids),
            "captions": len(self.words),
        }
        if self.words:
            figures |= {"words a caption": f"{np.mean(self.words):.1f}", "words at most": max(self.words)}
        figures |= {"photographs with a score": len(self.scores), "with a distribution": self.with_distribution}
        if self.with_topic_scores:
            figures["with scores of topics"] = self.with_topic_scores
        if self.scores:
            figures["mean score"] = f"{np.mean(self.scores):.2f}"
            figures["range of scores"] = f"{min(self.scores):.2f}-{max(self.scores):.2f}"
        return figures


@dataclass
class Report:
    """
    What a source holds, split by split; `str(report)` is a table.

    An example of a problem is a photograph's id and where it stands: the file, and the line of a .jsonl, .csv or .txt
    or the number of the entry of a .json.
    """

    source: str
    splits: dict[str, SplitReport] = field(default_factory=dict)
    rows_checked: int | None = None  # of each split; None: all
    notes: list[str] = field(default_factory=list)  # e.g. files that were not read

    def __str__(self) -> str:
        parts = self.splits.values()
        columns = [part.figures() for part in parts]
        lines = [("", *self.splits)]
        for name in dict.fromkeys(itertools.chain(*columns)):
            lines.append((name, *(column.get(name, "") for column in columns)))
        lines += self._counts("split told by {}", [part.rules for part in parts])
        lines += self._counts("scores read as {}", [part.scales for part in parts])
        topics = [part.topics for part in parts]
        if set(itertools.chain(*topics)) != {"(everything)"}:
            lines += self._counts("rows about {}", topics)
        examples = []
        for problem, consequence in PROBLEMS.items():
            if any(part.problems[problem] for part in parts):
                lines.append((f"{problem} ({consequence})", *(part.problems[problem] for part in parts)))
                found = itertools.chain(*(part.examples.get(problem, []) for part in parts))
                examples.append(f"{problem}: {', '.join(itertools.islice(found, EXAMPLES))}")
        width = max(len(line[0]) for line in lines)
        table = [line[0].ljust(width) + "".join(str(cell).rjust(12) for cell in line[1:]) for line in lines]
        checked = [] if self.rows_checked is None else [f"Of the first {self.rows_checked} rows of each split."]
        examples = ["For example:", *examples] if examples else []
        return "\n".join([self.source, *table, *checked, *self.notes, *examples])

    def first_problem(self) -> str:
        """What most rows were left out for, with an example."""
        parts = self.splits.values()
        counts = Counter({one: sum(part.problems[one] for part in parts) for one in PROBLEMS if not is_kept([one])})
        problem, count = counts.most_common(1)[0]
        examples = [one for part in parts for one in part.examples.get(problem, [])]
        return f"{count} × {problem}, e.g. {examples[0]}" if examples else "there are none"

    @staticmethod
    def _counts(title: str, counters: list[Counter]) -> list[tuple]:
        names = dict.fromkeys(itertools.chain(*counters))
        return [(title.format(name), *(counter[name] for counter in counters)) for name in names]
