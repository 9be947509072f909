"""
What the bundled model says of a photograph is what it said when it was recorded, so that a change of it is seen.

    python tests/test_stored_outputs.py --record    # after a change that is meant, as of the weights
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from ase_mllm import read_photograph


EXAMPLES = Path(__file__).parents[1] / "examples"
PHOTO = EXAMPLES / "photos" / "petra.jpg"
STORED = Path(__file__).with_name("stored_outputs.json")


def outputs() -> dict:
    """Tokens of greedy decoding, and rounded: the mean score, the faults' probabilities, shares of 6 x 6 fields."""
    model, processor = (
        one.from_pretrained(EXAMPLES / "ase-mini") for one in (AutoModelForImageTextToText, AutoProcessor)
    )
    inputs = processor(images=read_photograph(PHOTO), text=processor.critique_prompt(), return_tensors="pt")
    said = model.generate(**inputs, do_sample=False, max_new_tokens=160, return_dict_in_generate=True)
    tokens = said.sequences[0, inputs["input_ids"].shape[1] :]
    fields = F.adaptive_avg_pool2d(said.saliency_maps, 6)[0]
    (score,), (aspects,) = processor.post_process_scores(said), processor.post_process_aspects(said)
    return {
        "text": processor.decode(tokens, skip_special_tokens=True),
        "tokens": tokens.tolist(),
        "mean_score": round(score["mean"], 4),
        "aspects": {name: round(probability, 4) for name, probability in aspects.items()},
        "saliency": [[round(share, 5) for share in row] for row in (fields / fields.sum()).tolist()],
    }


def test_the_bundled_model_says_what_it_said():
    found, stored = outputs(), json.loads(STORED.read_text(encoding="utf-8"))
    assert found["text"] == stored["text"] and found["tokens"] == stored["tokens"]
    assert found["mean_score"] == pytest.approx(stored["mean_score"], abs=1e-3)
    assert found["aspects"] == pytest.approx(stored["aspects"], abs=1e-3)
    torch.testing.assert_close(torch.tensor(found["saliency"]), torch.tensor(stored["saliency"]), rtol=0, atol=5e-4)


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(__doc__)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in outputs().items())
    STORED.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
