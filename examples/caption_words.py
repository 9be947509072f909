"""
Words of captions as aspects: what the saliency module can learn where people have captions and no labels.

Whether a critique says a word is known of every photograph with a critique. A head that predicts such words from a picture
(Fang et al., "From Captions to Visual Concepts and Back", 2015) teaches the module what captions speak of, before a language
model reads it. How words are chosen is this project's own.
"""

import re
from collections import Counter


MOST_WORDS = 100
SHARES = 0.01, 0.5  # of the photographs: a rarer word has too few, a more common one tells nothing


def words_of(captions: list[str]) -> set[str]:
    """The words in all captions of one photograph, in lower case."""
    return {word for caption in captions for word in re.findall(r"[^\W\d_]{2,}", caption.lower())}


def choose_words(captions: list[list[str]], most: int = MOST_WORDS) -> list[str]:
    """The words that most photographs' captions say, the most common first; `captions` are those of each photograph."""
    counts = Counter(word for one in captions for word in words_of(one))
    least, largest = (share * len(captions) for share in SHARES)
    common = [word for word, count in counts.items() if max(2, least) <= count <= largest]
    return sorted(common, key=lambda word: (-counts[word], word))[:most]


def labels_of_words(captions: list[str], words: list[str]) -> list[float]:
    """1 for each of the words that the captions of one photograph say, 0 for the others."""
    said = words_of(captions)
    return [float(word in said) for word in words]
