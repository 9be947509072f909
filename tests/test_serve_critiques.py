"""Photo managers get critiques in the form that they know, and refusals in words."""

import base64
import json
import re
import socket
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from io import BytesIO
from pathlib import Path

import pytest
import serve_critiques
import torch
from common import critique
from fastapi.testclient import TestClient
from openai import OpenAI
from photo_files import read_photo
from PIL import Image
from serve_critiques import Critic, make_app


ROOT = Path(__file__).parents[1]
PHOTOS = [ROOT / "examples" / "photos" / f"{name}.jpg" for name in ("petra", "hedgehog", "coffee")]
MAX_BYTES = 2_000_000


@pytest.fixture(scope="module")
def critic() -> Critic:
    args = serve_critiques.parse_arguments(["--max-new-tokens", "100"])
    threads = torch.get_num_threads()
    model, processor = serve_critiques.start_model(args)
    torch.set_num_threads(threads)
    return Critic(model, processor, "ase-mini", args.max_new_tokens)


@pytest.fixture(scope="module")
def client(critic) -> TestClient:
    return TestClient(make_app(critic, MAX_BYTES))


@pytest.fixture(scope="module")
def critiques(critic) -> list[dict]:
    """What caption_photos.py would write of the same files, and their scores."""
    images = [read_photo(photo).image for photo in PHOTOS]
    answers = [critique(critic.model, critic.processor, [image], [(8, 8)], max_new_tokens=100)[0] for image in images]
    assert len({answer["caption"] for answer in answers}) == len(PHOTOS)
    return answers


def in_base64(photo: Path) -> str:
    return base64.b64encode(photo.read_bytes()).decode()


def photoprisms_openai(image: str) -> dict:
    """What PhotoPrism sends to an `Engine: openai`, for captions: text first, no `stream`."""
    prompt = "Create a caption with exactly one sentence in the active voice that describes the main visual content."
    content = [
        {"type": "input_text", "text": prompt},
        {"type": "input_image", "image_url": image, "detail": "low"},
    ]
    return {
        "model": "ase-mini",
        "input": [
            {"role": "system", "type": "message", "content": [{"type": "input_text", "text": "You write captions."}]},
            {"role": "user", "type": "message", "content": content},
        ],
        "max_output_tokens": 512,
        "temperature": 0.1,
        "top_p": 0.9,
    }


def photoprisms_ollama(image: str) -> dict:
    """What PhotoPrism sends to an `Engine: ollama`, for captions."""
    return {
        "id": "b9f0bc5e-1f0a-4a1f-8f6e-2f8f0f7a8f10",
        "model": "ase-mini:latest",
        "prompt": "Create a caption with exactly one sentence in the active voice that describes the main visual content.",
        "suffix": "",
        "options": {"temperature": 0.1},
        "stream": False,
        "images": [image],
    }


def openais_chat(image: str) -> dict:
    content = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}}]
    return {"model": "ase-mini", "messages": [{"role": "user", "content": content}]}


def ollama_chat(*images: str) -> dict:
    message = {"role": "user", "content": "What do you think?", "images": list(images)}
    return {"model": "ase-mini", "messages": [message], "stream": False}


# Answers -------------------------------------------------------------------------------------------------------------


def test_photoprism_gets_a_critique_in_openais_form(client, critiques):
    image = f"data:image/jpeg;base64,{in_base64(PHOTOS[0])}"
    answer = client.post("/v1/responses", json=photoprisms_openai(image), headers={"Authorization": "Bearer x"})
    assert answer.status_code == 200
    said = answer.json()
    (message,) = said["output"]
    assert message["role"] == "assistant"
    assert [part["text"] for part in message["content"] if part["type"] == "output_text"] == [critiques[0]["caption"]]
    assert said["error"] is None and said["model"] == "ase-mini" and said["status"] == "completed"
    assert said["score"] == pytest.approx(critiques[0]["score"], abs=1e-4)
    assert said["usage"]["total_tokens"] == said["usage"]["input_tokens"] + said["usage"]["output_tokens"]


def test_openais_own_client_reads_it(client, critiques):
    with OpenAI(base_url="http://testserver/v1", api_key="none", http_client=TestClient(client.app)) as openai:
        assert [model.id for model in openai.models.list()] == ["ase-mini"]
        image = {
            "type": "input_image",
            "image_url": f"data:image/jpeg;base64,{in_base64(PHOTOS[1])}",
            "detail": "auto",
        }
        response = openai.responses.create(model="ase-mini", input=[{"role": "user", "content": [image]}])
        content = [
            {"type": "text", "text": "What do you think?"},
            {"type": "image_url", "image_url": {"url": image["image_url"]}},
        ]
        asked = {"model": "ase-mini", "messages": [{"role": "user", "content": content}]}
        whole = openai.chat.completions.create(**asked)
        (cut,) = openai.chat.completions.create(**asked, max_tokens=5).choices
        pieces = [piece.choices[0].delta.content for piece in openai.chat.completions.create(**asked, stream=True)]
    assert response.output_text == critiques[1]["caption"]
    assert whole.choices[0].message.content == "".join(pieces) == critiques[1]["caption"]
    assert (whole.choices[0].finish_reason, cut.finish_reason) == ("stop", "length")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.score == pytest.approx(critiques[1]["score"], abs=1e-4)


def test_photoprism_gets_a_critique_in_ollamas_form(client, critiques):
    answer = client.post("/api/generate", json=photoprisms_ollama(in_base64(PHOTOS[0])))
    assert answer.status_code == 200
    said = answer.json()
    assert said["response"] == critiques[0]["caption"] and said["model"] == "ase-mini:latest"
    assert said["done"] is True and said["done_reason"] == "stop"
    assert datetime.fromisoformat(said["created_at"]).tzinfo is not None
    assert said["score"] == pytest.approx(critiques[0]["score"], abs=1e-4)


@pytest.mark.parametrize("stream", [{"stream": True}, {}])
def test_a_stream_is_one_line(client, critiques, stream):
    body = {"model": "ase-mini", "prompt": "", "images": [in_base64(PHOTOS[0])], **stream}
    answer = client.post("/api/generate", json=body)
    assert answer.headers["content-type"] == "application/x-ndjson"
    (line,) = answer.text.splitlines()
    assert json.loads(line)["response"] == critiques[0]["caption"] and json.loads(line)["done"] is True


def test_a_chat_is_about_its_last_photograph(client, critiques):
    body = ollama_chat(in_base64(PHOTOS[0]))
    later = {"role": "user", "content": "And this one?", "images": [in_base64(PHOTOS[2])]}
    words = [{"role": "assistant", "content": "Hm."}, {"role": "user", "content": "More."}]
    body["messages"] = [{"role": "system", "content": "Be kind."}, *body["messages"], words[0], later, *words]
    said = client.post("/api/chat", json=body).json()
    assert said["message"] == {"role": "assistant", "content": critiques[2]["caption"]} and said["done"]


def test_who_asks_at_the_same_time_gets_his_own_answer(client, critiques):
    with ThreadPoolExecutor(6) as threads:
        bodies = [photoprisms_ollama(in_base64(photo)) for photo in PHOTOS * 2]
        answers = list(threads.map(lambda body: client.post("/api/generate", json=body).json()["response"], bodies))
    assert answers == [one["caption"] for one in critiques] * 2


@pytest.mark.parametrize("limit", [5, 1000, -1, None])
def test_an_answer_is_as_long_as_it_may_be(client, critiques, limit):
    body = photoprisms_ollama(in_base64(PHOTOS[0])) | {"options": {"num_predict": limit}}
    said = client.post("/api/generate", json=body).json()
    image = f"data:image/jpeg;base64,{in_base64(PHOTOS[0])}"
    other = client.post("/v1/responses", json=photoprisms_openai(image) | {"max_output_tokens": limit}).json()
    cut = limit == 5
    assert (said["eval_count"] == 5) == cut and said["done_reason"] == ("length" if cut else "stop")
    assert (other["usage"]["output_tokens"] == 5) == cut and other["status"] == ("incomplete" if cut else "completed")
    assert (said["response"] == critiques[0]["caption"]) != cut
    assert other["output"][0]["content"][0]["text"] == said["response"]


def test_the_servers_own_limit_holds(critic):
    short = TestClient(make_app(Critic(critic.model, critic.processor, "ase-mini", 4), MAX_BYTES))
    body = photoprisms_ollama(in_base64(PHOTOS[0])) | {"options": {"num_predict": 50}}
    assert short.post("/api/generate", json=body).json()["eval_count"] == 4


def test_what_is_there(client, critic):
    (model,) = client.get("/api/tags").json()["models"]
    assert model["name"] == "ase-mini:latest" and model["size"] > critic.model.num_parameters()
    assert client.get("/api/version").json()["version"]
    assert client.get("/docs").status_code == 404


@pytest.mark.parametrize("name", ["ase-mini", "ase-mini:latest", "ASE_mini"])
def test_a_model_is_known_by_the_names_that_clients_write(critic, name):
    assert critic.goes_by(name) and not critic.goes_by(f"{name}-2")


def test_a_photograph_is_read_as_from_disk(client, critiques):
    """Turned by its EXIF, as PNG, with black bars: the photograph is the same."""
    photo = Image.open(PHOTOS[0])
    framed = Image.new("RGB", (photo.width, photo.height + 80))
    framed.paste(photo, (0, 40))
    content = BytesIO()
    framed.rotate(90, expand=True).save(
        content, "PNG", exif=bytes.fromhex("4d4d002a00000008000101120003000000010006000000000000")
    )
    image = base64.b64encode(content.getvalue()).decode()
    assert client.post("/api/generate", json=photoprisms_ollama(image)).json()["response"] == critiques[0]["caption"]


# Refusals ------------------------------------------------------------------------------------------------------------


def the_words(answer, url: str) -> str:
    error = answer.json()["error"]
    return error["message"] if url.startswith("/v1/") else error


FORMS = {
    "/v1/responses": lambda image: photoprisms_openai(f"data:image/jpeg;base64,{image}"),
    "/v1/chat/completions": openais_chat,
    "/api/generate": photoprisms_ollama,
    "/api/chat": ollama_chat,
}


@pytest.mark.parametrize("url", FORMS)
@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (lambda: in_base64(PHOTOS[0])[:-3] + "$$$", "not valid base64"),
        (lambda: base64.b64encode(PHOTOS[0].read_bytes()[:20_000]).decode(), "truncated"),
        (lambda: base64.b64encode(b"no picture at all").decode(), "not a JPEG"),
        (lambda: "", "0 bytes"),
    ],
)
def test_a_broken_photograph_is_refused_in_words(client, url, image, reason):
    answer = client.post(url, json=FORMS[url](image()))
    assert answer.status_code == 400
    assert re.search(reason, the_words(answer, url)), the_words(answer, url)


@pytest.mark.parametrize(
    ("url", "change", "status", "reason"),
    [
        ("/v1/responses", {"input": []}, 400, "no image"),
        ("/v1/responses", {"input": "Describe"}, 400, "no image"),
        ("/v1/responses", {"input": [{"role": "user", "content": "Describe"}]}, 400, "no image"),
        ("/v1/responses", {"input": [1]}, 400, "not a list of objects"),
        ("/v1/responses", {"stream": True}, 400, "not streamed"),
        ("/v1/responses", {"text": {"format": {"type": "json_object"}}}, 400, "plain words"),
        ("/v1/responses", {"text": 1}, 400, "`text` is not an object"),
        ("/v1/responses", {"model": "gpt-5-mini"}, 404, "'gpt-5-mini' here, only 'ase-mini'"),
        ("/v1/responses", {"max_output_tokens": "many"}, 400, "not 'many'"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Describe"}]}, 400, "no image"),
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, 400, "plain words"),
        ("/v1/chat/completions", {"response_format": "text"}, 400, "`response_format` is not an object"),
        ("/v1/chat/completions", {"max_tokens": "many"}, 400, "not 'many'"),
        ("/api/generate", {"images": [None]}, 400, "no text"),
        ("/api/generate", {"images": []}, 400, "0 images"),
        ("/api/generate", {"images": ["", ""]}, 400, "2 images"),
        ("/api/generate", {"images": "abc"}, 400, "not a list"),
        ("/api/generate", {"images": ["https://example.org/a.jpg"]}, 400, "not fetched"),
        ("/api/generate", {"images": ["data:image/jpeg,abc"]}, 400, "not in base64"),
        ("/api/generate", {"format": "json"}, 400, "plain words"),
        ("/api/generate", {"model": None}, 404, "only 'ase-mini'"),
        ("/api/generate", {"options": 3}, 400, "`options` is not an object"),
        ("/api/chat", {"messages": [{"role": "user", "content": "Describe"}]}, 400, "no image"),
        ("/api/chat", {"messages": None}, 400, "`messages` is not a list"),
        ("/api/chat", {"format": {"type": "object"}}, 400, "plain words"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_words(client, url, change, status, reason):
    answer = client.post(url, json=FORMS[url](in_base64(PHOTOS[0])) | change)
    assert answer.status_code == status
    assert reason in the_words(answer, url)


@pytest.mark.parametrize("url", FORMS)
@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [(b"{", 400, "not JSON"), (b"[]", 400, "not a JSON object"), (b" " * (MAX_BYTES + 1), 413, "larger than 2 MB")],
)
def test_a_body_that_is_none_or_too_large_is_refused_in_words(client, url, content, status, reason):
    answer = client.post(url, content=content)
    assert answer.status_code == status and reason in the_words(answer, url)


def test_a_decompression_bomb_is_refused_in_words(client, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = client.post("/api/generate", json=photoprisms_ollama(in_base64(PHOTOS[0])))
    assert answer.status_code == 400 and "0.01 megapixels" in answer.json()["error"]


def test_a_model_that_fails_says_so(critic, monkeypatch):
    def out_of_memory(*args, **options):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(serve_critiques, "write_captions", out_of_memory)
    client = TestClient(make_app(critic, MAX_BYTES))
    answer = client.post("/api/generate", json=photoprisms_ollama(in_base64(PHOTOS[0])))
    assert answer.status_code == 500 and answer.json()["error"] == "the model failed: CUDA out of memory."


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_serves_what_it_was_told(critic, monkeypatch):
    started = {}
    monkeypatch.setattr(
        serve_critiques, "start_model", lambda args: started.update(vars(args)) or (critic.model, None)
    )
    monkeypatch.setattr(serve_critiques.uvicorn, "run", lambda app, **options: started.update(app=app, **options))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    options = "--model runs/My_critic --host 0.0.0.0 --port 51434 --max-megabytes 0.5 --max-megapixels 2 --threads 3"
    serve_critiques.main([*options.split(), "--trust-remote-code"])
    assert (started["model"], started["trust_remote_code"], started["threads"]) == ("runs/My_critic", True, 3)
    assert (started["host"], started["port"], Image.MAX_IMAGE_PIXELS) == ("0.0.0.0", 51434, 2_000_000)
    client = TestClient(started["app"])
    assert client.get("/v1/models").json()["data"][0]["id"] == "My_critic"
    assert client.post("/api/generate", content=b" " * 500_001).status_code == 413


def test_a_port_that_is_taken_is_seen_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(serve_critiques, "start_model", lambda args: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit, match=f"Cannot start: port {port} of 127.0.0.1 is taken by another program"):
            serve_critiques.main(["--port", str(port)])
    with pytest.raises(SystemExit, match="Cannot start: port 70000 of"):
        serve_critiques.main(["--port", "70000"])


def test_what_makes_no_sense_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        serve_critiques.main(["--max-megabytes", "0"])
    assert "--max-megabytes is 0" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["serve_critiques.py"])
    with pytest.raises(SystemExit, match="Cannot start: nowhere"):
        serve_critiques.main(["--model", "nowhere"])
