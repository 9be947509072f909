"""What the demo's button does, without Gradio."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import demo
import numpy as np
import photo_files
import pytest
from caption_photos import load_model
from common import critique
from photo_files import read_photo
from PIL import Image


PHOTOS = Path(__file__).parents[1] / "examples" / "photos"


@pytest.fixture(scope="module")
def critic() -> tuple:
    return load_model(str(demo.HERE / "ase-mini"), trust_remote_code=False)


def test_a_photograph_gets_critique_score_and_map(critic):
    said, (photo, heat) = demo.judge(*critic, str(PHOTOS / "petra.jpg"))
    (answer,) = critique(*critic, [read_photo(PHOTOS / "petra.jpg").image], [(8, 8)], max_new_tokens=160)
    text, score = said.split("\n\n")
    assert text.lower() == answer["caption"].strip().lower() and text[0].isupper()
    mean, std = answer["score"]["mean"], answer["score"]["std"]
    assert score == f"**{mean:.1f}** of 10, give or take {std:.1f} from person to person"
    assert photo.size == heat.size and np.asarray(photo).shape == np.asarray(heat).shape
    assert np.abs(np.asarray(photo, dtype=int) - np.asarray(heat)).max() > 50


def test_what_was_done_to_the_photograph_is_said(critic, tmp_path):
    framed = Image.new("RGB", (640, 640))
    framed.paste(Image.open(PHOTOS / "petra.jpg").resize((640, 480)), (0, 80))
    framed.save(tmp_path / "framed.png")
    assert demo.judge(*critic, str(tmp_path / "framed.png"))[0].endswith("black borders cut away before judging")


def test_a_bad_file_is_named_with_the_reason(critic, tmp_path, monkeypatch):
    cut = tmp_path / "holiday.jpg"
    cut.write_bytes((PHOTOS / "petra.jpg").read_bytes()[:9000])
    said, shown = demo.judge(*critic, str(cut))
    assert said.startswith("**holiday.jpg cannot be judged:** damaged") and shown is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert "too large" in demo.judge(*critic, str(PHOTOS / "petra.jpg"))[0]


def test_no_file_is_asked_for(critic):
    assert demo.judge(*critic, None) == (demo.WAITING, None)


def test_a_model_that_fails_says_so(critic, monkeypatch):
    def out_of_memory(*args, **options):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(demo, "critique", out_of_memory)
    assert demo.judge(*critic, str(PHOTOS / "petra.jpg")) == ("**The model failed:** CUDA out of memory.", None)


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match="Cannot start: nowhere"):
        demo.main(["--model", "nowhere"])


def test_a_missing_gradio_is_named(monkeypatch):
    monkeypatch.setattr(demo, "start_model", lambda args: (None, None))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="needs gradio, in an environment of its own"):
        demo.main([])


def test_every_format_that_is_read_is_named():
    assert all(form in demo.WAITING for form in photo_files.FORMATS)


def test_the_page_is_where_it_was_told(monkeypatch):
    given = {}
    monkeypatch.setattr(demo, "start_model", lambda args: given.update(vars(args)) or (None, None))
    monkeypatch.setattr(demo, "make_page", lambda model, processor: SimpleNamespace(launch=given.update))
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    monkeypatch.setitem(sys.modules, "gradio.themes", SimpleNamespace(Default=dict))
    options = "--model some/model --host 0.0.0.0 --port 5 --threads 3 --trust-remote-code"
    demo.main(options.split())
    assert (given["model"], given["threads"], given["trust_remote_code"]) == ("some/model", 3, True)
    assert (given["server_name"], given["server_port"]) == ("0.0.0.0", 5)
    assert "sans-serif" in given["theme"]["font"], "fonts of the system: Gradio's come from the network"
