"""`transformers serve` and pipelines, without the package too: they write what `generate()` writes."""

import base64
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import APIStatusError, OpenAI
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import Modality

from ase_mllm import ASEForConditionalGeneration, ASEProcessor
from ase_mllm.processing_ase import AESTHETIC_PROMPTS


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "examples/ase-mini"
PHOTOS = [ROOT / "examples" / "photos" / f"{name}.jpg" for name in ("petra", "hedgehog", "coffee")]
PIPELINE = """
import json, sys
try:
    import ase_mllm
except ModuleNotFoundError:
    from transformers import pipeline
else:
    sys.exit("`ase_mllm` can be imported here, so this process proves nothing.")

folder, *chats = map(json.loads, sys.stdin)
critic = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
assert type(critic.model).__module__.startswith("transformers_modules.")
answers = critic(text=chats, return_full_text=False)
print(json.dumps([answer["generated_text"] for (answer,) in answers]))
"""


def data_url(photo: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(photo.read_bytes()).decode()}"


def openai_chat(photo: Path) -> list[dict]:
    image = {"type": "image_url", "image_url": {"url": data_url(photo)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": AESTHETIC_PROMPTS["critique"]}]}]


def pipeline_chat(photo: Path) -> list[dict]:
    image = {"type": "image", "url": data_url(photo)}
    return [{"role": "user", "content": [image, {"type": "text", "text": AESTHETIC_PROMPTS["critique"]}]}]


@pytest.fixture(scope="module")
def critiques() -> list[str]:
    """What the installed model writes of each photograph."""
    processor = AutoProcessor.from_pretrained(ROOT / MODEL)
    model = AutoModelForImageTextToText.from_pretrained(ROOT / MODEL)
    texts = []
    for photo in PHOTOS:
        inputs = processor(images=Image.open(photo), text=processor.critique_prompt(), return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.decode(tokens, skip_special_tokens=True))
    assert len(set(texts)) == len(texts), "a server that mixes the photographs up would not be noticed"
    return texts


@pytest.fixture(scope="module")
def without_package(tmp_path_factory) -> dict[str, str]:
    """The environment of a process that cannot import `ase_mllm`, though it is installed, and has no cached code."""
    folder = tmp_path_factory.mktemp("without_package")
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['ase_mllm'] = None\n")
    offline = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    return {**os.environ, **offline, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


# The server ---------------------------------------------------------------------------------------------------------


def wait_for_url(process: subprocess.Popen, log: Path, seconds: float = 120) -> str:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if ready := re.search(r"Uvicorn running on (http://\S+)", log.read_text()):
            return ready[1]
        time.sleep(0.1)
    raise AssertionError(f"The server does not answer (exit status {process.poll()}):\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def server(without_package, tmp_path_factory):
    """The README's command, on a free port; yields the address."""
    name, *arguments = shlex.split(re.search(r"^transformers serve .*$", README, re.MULTILINE)[0], comments=True)
    command = [Path(sys.executable).with_name(name), *arguments, "--host", "127.0.0.1", "--port", "0"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=without_package, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield wait_for_url(process, log)
        process.terminate()
        process.wait(timeout=30)
        assert "Application shutdown complete" in log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def client(server):
    with OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client.chat.completions


def test_the_readmes_client_prints_what_generate_writes(server, critiques, monkeypatch, capsys):
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import OpenAI" in block]
    assert "http://localhost:8000" in block, "the server's own default address"
    monkeypatch.chdir(ROOT)
    exec(block.replace("http://localhost:8000", server), {})
    assert capsys.readouterr().out.strip() == critiques[0].strip()


@pytest.mark.parametrize("photo", sorted((ROOT / "examples" / "photos").glob("*.jpg")), ids=lambda photo: photo.stem)
def test_the_order_of_text_and_image_is_all_the_same(client, photo):
    ((user,), question) = openai_chat(photo), "Describe this image"
    image, text = user["content"]
    asked = {
        "image first": [user],
        "text first": [{**user, "content": [text, image]}],
        "a question of its own": [{**user, "content": [{"type": "text", "text": question}, image]}],
        "a system message": [{"role": "system", "content": "You are helpful."}, user],
        "image alone": [{**user, "content": [image]}],
    }
    answers = {
        name: client.create(model=MODEL, messages=chat).choices[0].message.content for name, chat in asked.items()
    }
    assert len(answers["image first"].split()) > 5
    assert len(set(answers.values())) == 1, answers


def test_a_chat_that_goes_on_gets_the_critique_again(client, critiques):
    chat = openai_chat(PHOTOS[0]) + [
        {"role": "assistant", "content": "Hm."},
        {"role": "user", "content": "And the sky?"},
    ]
    assert client.create(model=MODEL, messages=chat).choices[0].message.content == critiques[0]


def test_a_chat_without_a_photograph_is_no_critique(server, critiques):
    with OpenAI(base_url=f"{server}/v1", api_key="none") as client:  # tries again: after an error the server hangs up
        with pytest.raises(APIStatusError):
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Critique my photograph"}]
            )
        answer = client.chat.completions.create(model=MODEL, messages=openai_chat(PHOTOS[0]))
    assert answer.choices[0].message.content == critiques[0]


def test_an_answer_is_streamed_token_by_token(client, critiques):
    chunks = list(client.create(model=MODEL, messages=openai_chat(PHOTOS[1]), stream=True))
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(parts) == critiques[1]
    assert len(parts) > 10
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_clients_at_the_same_time_get_each_their_own_answer(client, critiques):
    with ThreadPoolExecutor(len(PHOTOS)) as threads:
        answers = list(threads.map(lambda photo: client.create(model=MODEL, messages=openai_chat(photo)), PHOTOS))
    assert [answer.choices[0].message.content for answer in answers] == critiques
    assert {answer.choices[0].finish_reason for answer in answers} == {"stop"}


def test_a_limit_on_tokens_cuts_the_answer(client, critiques):
    answer = client.create(model=MODEL, messages=openai_chat(PHOTOS[0]), max_completion_tokens=5)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 5
    assert critiques[0].startswith(answer.choices[0].message.content)
    assert answer.choices[0].message.content != critiques[0]


def test_the_installed_package_is_served_without_trusting_code():
    """The server's own loading, once something has imported the package."""
    manager = ModelManager(device="cpu", force_model=str(ROOT / MODEL))
    (loaded,) = manager.loaded_models.values()
    assert type(loaded.model) is ASEForConditionalGeneration and type(loaded.processor) is ASEProcessor
    assert manager.get_model_modality(loaded.model, loaded.processor) is Modality.MULTIMODAL
    manager.shutdown()


# Pipelines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "batch_size"), [("folder", 1), ("objects", 2)])
def test_the_pipeline_of_the_installed_package(given, batch_size, critiques, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    if given == "folder":
        critic = pipeline("image-text-to-text", model=str(ROOT / MODEL))
    else:
        model, processor = (one.from_pretrained(ROOT / MODEL) for one in (ASEForConditionalGeneration, ASEProcessor))
        critic = pipeline("image-text-to-text", model=model, processor=processor)
    assert type(critic.model) is ASEForConditionalGeneration and type(critic.processor) is ASEProcessor
    answers = critic(text=[pipeline_chat(photo) for photo in PHOTOS], return_full_text=False, batch_size=batch_size)
    assert [answer["generated_text"] for (answer,) in answers] == critiques
    plain = critic(images=str(PHOTOS[0]), text=critic.processor.critique_prompt(), return_full_text=False)
    assert plain[0]["generated_text"] == critiques[0]
    assert "not supported" not in caplog.text


def test_the_pipeline_of_a_process_without_the_package(without_package, critiques, tmp_path):
    lines = "\n".join(map(json.dumps, [str(ROOT / MODEL), *map(pipeline_chat, PHOTOS)]))
    command = [sys.executable, "-c", PIPELINE]
    process = subprocess.run(command, input=lines, cwd=tmp_path, env=without_package, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    assert json.loads(process.stdout) == critiques
    assert "not supported" not in process.stderr
