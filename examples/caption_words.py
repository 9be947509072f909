"""
Words of captions as aspects: what the saliency module can learn where people have captions and no labels.

Whether a critique says a word is known of every photograph with a critique. A head that predicts such words from a picture
(Fang et al., "From Captions to Visual Concepts and Back", 2015) teaches the module what captions speak of, before a language
model reads it. How words are chosen is this project's own.
"""

from collections import Counter, defaultdict

import datasets
from common import words as split_words


MOST_WORDS = 100
SHARES = 0.01, 0.5  # of the photographs: a rarer word has too few, a more common one tells nothing


def words_of(captions: list[str]) -> set[str]:
    """The words in all captions of one photograph, without numbers and single letters."""
    return {word for caption in captions for word in split_words(caption) if word.isalpha() and len(word) > 1}


def choose_words(captions: list[list[str]], most: int = MOST_WORDS) -> list[str]:
    """The words that most photographs' captions say, the most common first; `captions` are those of each photograph."""
    counts = Counter(word for one in captions for word in words_of(one))
    least, largest = (share * len(captions) for share in SHARES)
    common = [word for word, count in counts.items() if max(2, least) <= count <= largest]
    return sorted(common, key=lambda word: (-counts[word], word))[:most]


def label_by_words(
    train: datasets.Dataset, validation: datasets.Dataset
) -> tuple[list[str], datasets.Dataset, datasets.Dataset]:
    """
    Words of the captions to train on, and both parts with `aspect_labels` that say which words each photograph's have.

    Raises:
        ValueError: if rows have labels of their own, or no word is said of enough photographs.
    """
    said: dict[str, list[str]] = defaultdict(list)
    for rows in (train, validation):
        for image_id, captions, labels in zip(rows["image_id"], rows["captions"], rows["aspect_labels"]):
            said[image_id] += captions
            if labels is not None:
                raise ValueError(f"Aspects cannot be words of captions: {image_id} has `aspect_labels` of its own.")
    captioned = [said[image_id] for image_id in dict.fromkeys(train["image_id"]) if said[image_id]]
    words = choose_words(captioned)
    if not words:
        raise ValueError(
            f"Aspects cannot be words of captions: of {len(captioned)} photographs with captions no two, and at most half, "
            "share a word."
        )

    def label(image_id: str) -> dict[str, list[float] | None]:
        return {"aspect_labels": labels_of_words(said[image_id], words) if said[image_id] else None}

    parts = (rows.map(label, input_columns="image_id", features=rows.features) for rows in (train, validation))
    return words, *parts


def labels_of_words(captions: list[str], words: list[str]) -> list[float]:
    """1 for each of the words that the captions of one photograph say, 0 for the others."""
    said = words_of(captions)
    return [float(word in said) for word in words]
