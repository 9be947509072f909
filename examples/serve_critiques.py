"""
Answers photo managers that ask an Ollama or OpenAI server for captions, with critiques by an ASE model.

    pip install -e '.[serving]'
    python examples/serve_critiques.py [--model NAME_OR_PATH] [--host 0.0.0.0]

PhotoPrism, in `vision.yml` (either form; the name is the model's folder):

    Models:
      - Type: caption
        Model: ase-mini
        Engine: ollama          # or openai
        Service:
          Uri: http://192.168.1.10:11434/api/generate    # or .../v1/responses

Any other client that can be given the address of an Ollama server gets its critiques by /api/generate and /api/chat, one
of an OpenAI server's, http://localhost:11434/v1, by /v1/chat/completions and /v1/responses. One photograph a request, in the request itself: addresses are not fetched. Photographs are read as caption_photos.py reads
them. Answers are greedy, whatever temperature is asked for, and in plain words: labels and other JSON are refused. They
come as a whole, in one piece also where a stream is asked for. Beside the text each answer has the `score`, mean and
standard deviation, 1 to 10.

There is no password: whoever reaches the port can use it. By default that is this machine alone.
"""

import argparse
import base64
import binascii
import errno
import json
import socket
import sys
import tempfile
import threading
import time
import uuid
import warnings
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from caption_photos import CannotStart, add_model_arguments, refuse_below_zero, start_model
from common import write_captions
from photo_files import Failure, read_photo
from PIL import Image


try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse, Response
except ModuleNotFoundError as error:
    sys.exit(f"serve_critiques.py needs {error.name}: pip install -e '.[serving]'")


class Refused(Exception):
    """A request that gets no critique: the HTTP status, and why in words."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


# Critiques -----------------------------------------------------------------------------------------------------------


@dataclass
class Question:
    """What is left of a request: one photograph's encoded file, the words, and the longest answer in tokens."""

    photograph: bytes
    words: str
    max_new_tokens: int | None


@dataclass
class Answer:
    text: str
    score: dict[str, float]
    prompt_tokens: int
    tokens: int
    finished: bool  # it came to its own end, within the tokens it was given
    seconds: float


class Critic:
    """A model that answers one question after the other."""

    def __init__(self, model: Any, processor: Any, name: str, max_new_tokens: int):
        self.model, self.processor, self.name, self.max_new_tokens = model, processor, name, max_new_tokens
        self.lock = threading.Lock()

    def goes_by(self, name: Any) -> bool:
        """Clients write names in lower case with dashes, and say which version."""
        return isinstance(name, str) and plain_name(name) == plain_name(self.name)

    @torch.inference_mode()
    def answer(self, question: Question) -> Answer:
        start = time.perf_counter()
        limit = min(question.max_new_tokens or self.max_new_tokens, self.max_new_tokens)
        prompt = self.processor.critique_prompt(question.words or "critique")
        with self.lock:
            image = read_sent(question.photograph)
            inputs = self.processor(images=[image], text=[prompt], return_tensors="pt")
            inputs = inputs.to(self.model.device, dtype=self.model.dtype)
            try:
                (text,), output = write_captions(self.model, self.processor, inputs, max_new_tokens=limit)
            except RuntimeError as error:  # out of memory, most likely
                raise Refused(500, f"the model failed: {str(error).splitlines()[0]}") from error
        ends = self.model.generation_config.eos_token_id
        return Answer(
            text=text,
            score=self.processor.post_process_scores(output)[0],
            prompt_tokens=inputs["input_ids"].shape[1],
            tokens=output.sequences.shape[1] - inputs["input_ids"].shape[1],
            finished=output.sequences[0, -1].item() in (ends if isinstance(ends, list) else [ends]),
            seconds=time.perf_counter() - start,
        )


def plain_name(name: str) -> str:
    return name.strip().lower().removesuffix(":latest").replace("_", "-").replace(" ", "-")


def read_sent(encoded: bytes) -> Image.Image:
    """The photograph of a file's content, as caption_photos.py reads it from disk."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        file = Path(folder, "photograph")
        file.write_bytes(encoded)
        photo = read_photo(file)
    if isinstance(photo, Failure):
        raise Refused(400, f"the photograph cannot be read: {photo.reason}")
    return photo.image


# Requests ------------------------------------------------------------------------------------------------------------


def decoded(image: Any) -> bytes:
    """A file's content, of base64 or of a data URL."""
    if image == "":
        raise Refused(400, "the image is empty (0 bytes).")
    if not isinstance(image, str):
        raise Refused(400, "the image is no text: send its file as base64 or as a data URL.")
    if image.startswith(("http:", "https:", "file:")):
        raise Refused(400, "addresses of images are not fetched: send the file itself, as a data URL or as base64.")
    if image.startswith("data:"):
        head, _, image = image.partition(",")
        if not head.endswith(";base64"):
            raise Refused(400, "the image's data URL is not in base64 (data:image/jpeg;base64,...).")
    try:
        return base64.b64decode("".join(image.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"the image is not valid base64: {error}.") from error


def the_question(images: Any, words: list[str], limit: Any) -> Question:
    if not isinstance(images, list):
        raise Refused(400, "`images` is not a list.")
    if len(images) != 1:
        raise Refused(400, f"there are {len(images)} images in the request: send one photograph.")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
        raise Refused(400, f"the longest answer is a number of tokens, not {limit!r}.")
    # below 1 it means "as long as you like" to Ollama
    return Question(decoded(images[0]), " ".join(words).strip(), limit if limit and limit > 0 else None)


def dictionaries(value: Any, name: str) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Refused(400, f"`{name}` is not a list of objects.")
    return value


def refuse_json(form: Any):
    if form:
        raise Refused(400, "this model writes critiques in plain words: it cannot answer in JSON, nor name labels.")


def question_of_generate(body: dict) -> Question:
    refuse_json(body.get("format"))
    limit = (body.get("options") or {}).get("num_predict")
    return the_question(body.get("images") or [], [str(body.get("prompt") or "")], limit)


def question_of_chat(body: dict) -> Question:
    """The last photograph that the user sent, with the words beside it."""
    refuse_json(body.get("format"))
    limit = (body.get("options") or {}).get("num_predict")
    for message in reversed(dictionaries(body.get("messages"), "messages")):
        if message.get("role") == "user" and message.get("images"):
            return the_question(message["images"], [str(message.get("content") or "")], limit)
    raise Refused(400, "there is no image in the messages: send one photograph.")


def question_of_responses(body: dict) -> Question:
    """The last photograph that the user sent, with the words beside it, in OpenAI's form of content."""
    if body.get("stream"):
        raise Refused(400, "answers are not streamed here: send `stream: false`.")
    form = (body.get("text") or {}).get("format") or {}
    refuse_json(form.get("type", "text") != "text")
    messages = [] if isinstance(body.get("input"), str) else dictionaries(body.get("input"), "input")
    images, words = openais_content(messages, "input_image", "input_text")
    return the_question(images, words, body.get("max_output_tokens"))


def question_of_completions(body: dict) -> Question:
    """The last photograph that the user sent, with the words beside it, in the older form of OpenAI's."""
    refuse_json((body.get("response_format") or {}).get("type", "text") != "text")
    images, words = openais_content(dictionaries(body.get("messages"), "messages"), "image_url", "text")
    addresses = [image.get("url") if isinstance(image, dict) else image for image in images]
    return the_question(addresses, words, body.get("max_completion_tokens") or body.get("max_tokens"))


def openais_content(messages: list[dict], image: str, text: str) -> tuple[list[Any], list[str]]:
    """Images and words of the last message of the user's that has an image; `image` and `text` are the types of parts."""
    for message in reversed(messages):
        if message.get("role") != "user" or isinstance(message.get("content"), str):
            continue
        content = dictionaries(message.get("content"), "content")
        images = [part.get("image_url") for part in content if part.get("type") == image]
        if images:
            return images, [str(part.get("text", "")) for part in content if part.get("type") == text]
    raise Refused(400, f"there is no image in the messages: send one photograph, as `{image}` with a data URL.")


async def body_of(request: Request, max_bytes: int) -> dict:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise Refused(413, f"the request is larger than {max_bytes / 1e6:g} MB (raise it with --max-megabytes).")
        parts.append(part)
    try:
        body = json.loads(b"".join(parts))
    except ValueError as error:
        raise Refused(400, f"the request is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refused(400, "the request is not a JSON object.")
    for name in ("options", "text", "response_format"):
        if not isinstance(body.get(name) or {}, dict):
            raise Refused(400, f"`{name}` is not an object.")
    return body


# Answers -------------------------------------------------------------------------------------------------------------


def as_ollama(name: str, answer: Answer, said: dict[str, Any]) -> dict[str, Any]:
    """`said` is the text, where this kind of request has it."""
    nanoseconds = round(answer.seconds * 1e9)
    return {
        "model": name,
        "created_at": datetime.now(timezone.utc).isoformat(),
        **said,
        "done": True,
        "done_reason": "stop" if answer.finished else "length",
        "total_duration": nanoseconds,
        "eval_duration": nanoseconds,
        "prompt_eval_count": answer.prompt_tokens,
        "eval_count": answer.tokens,
        "score": answer.score,
    }


def as_response(name: str, answer: Answer) -> dict[str, Any]:
    state = "completed" if answer.finished else "incomplete"
    content = [{"type": "output_text", "text": answer.text, "annotations": []}]
    message = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "status": state}
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": state,
        "error": None,
        "incomplete_details": None if answer.finished else {"reason": "max_output_tokens"},
        "model": name,
        "output": [{**message, "content": content}],
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
        "usage": {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": answer.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.prompt_tokens + answer.tokens,
        },
        "score": answer.score,
    }


def as_completion(name: str, answer: Answer, stream: bool) -> dict[str, Any]:
    """The whole answer, or the one piece of a stream."""
    said = {"role": "assistant", "content": answer.text}
    end = {"finish_reason": "stop" if answer.finished else "length", "logprobs": None}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if stream else "chat.completion",
        "created": int(time.time()),
        "model": name,
        "choices": [{"index": 0, "delta" if stream else "message": said, **end}],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.tokens,
            "total_tokens": answer.prompt_tokens + answer.tokens,
        },
        "score": answer.score,
    }


def make_app(critic: Critic, max_bytes: int) -> FastAPI:
    # its pages about itself would fetch scripts from the network
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    started = datetime.now(timezone.utc)

    @app.exception_handler(Refused)
    def refuse(request: Request, refused: Refused) -> Response:
        error = {
            "message": refused.reason,
            "type": "invalid_request_error" if refused.status < 500 else "server_error",
        }
        openai = request.url.path.startswith("/v1/")
        return JSONResponse({"error": error if openai else refused.reason}, refused.status)

    async def ask(request: Request, question_of: Any) -> tuple[dict, Answer]:
        body = await body_of(request, max_bytes)
        if not critic.goes_by(body.get("model")):
            raise Refused(404, f"there is no model {body.get('model')!r} here, only {critic.name!r}.")
        return body, await run_in_threadpool(critic.answer, question_of(body))

    def in_ollamas_way(body: dict, answer: dict) -> Response:
        """One object; on one line of its own where a stream is asked for, as it is unless the request says otherwise."""
        if body.get("stream", True):
            return Response(json.dumps(answer) + "\n", media_type="application/x-ndjson")
        return JSONResponse(answer)

    @app.post("/api/generate")
    async def generate(request: Request) -> Response:
        body, answer = await ask(request, question_of_generate)
        return in_ollamas_way(body, as_ollama(body["model"], answer, {"response": answer.text}))

    @app.post("/api/chat")
    async def chat(request: Request) -> Response:
        body, answer = await ask(request, question_of_chat)
        message = {"role": "assistant", "content": answer.text}
        return in_ollamas_way(body, as_ollama(body["model"], answer, {"message": message}))

    @app.post("/v1/responses")
    async def responses(request: Request) -> dict:
        body, answer = await ask(request, question_of_responses)
        return as_response(body["model"], answer)

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        body, answer = await ask(request, question_of_completions)
        said = as_completion(body["model"], answer, bool(body.get("stream")))
        if body.get("stream"):
            return Response(f"data: {json.dumps(said)}\n\ndata: [DONE]\n\n", media_type="text/event-stream")
        return JSONResponse(said)

    @app.get("/v1/models")
    def models() -> dict:
        model = {"id": critic.name, "object": "model", "created": int(started.timestamp()), "owned_by": "local"}
        return {"object": "list", "data": [model]}

    @app.get("/api/tags")
    def tags() -> dict:
        name, size = f"{critic.name}:latest", critic.model.num_parameters()
        details = {"family": "ase", "format": "safetensors", "parameter_size": f"{size / 1e6:.1f}M"}
        model = {"name": name, "model": name, "modified_at": started.isoformat(), "details": details}
        return {"models": [{**model, "size": critic.model.get_memory_footprint()}]}

    @app.get("/api/version")
    def tell_version() -> dict:
        return {"version": version("ase-mllm")}

    return app


# Run -----------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description, _, details = __doc__.strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=11434, help="default: %(default)s, which is Ollama's")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="longest critique (default: %(default)s)")
    parser.add_argument("--max-megabytes", type=float, default=64, help="largest request (default: %(default)s)")
    parser.add_argument("--max-megapixels", type=float, help="refuse larger photographs (default: Pillow's limit, 89)")
    args = parser.parse_args(argv)
    refuse_below_zero(parser, args, "threads", "max_new_tokens", "max_megabytes", "max_megapixels")
    return args


def check_port(host: str, port: int):
    """Sees that a server can listen there, before anything that takes long."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does: one that has just ended is none
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            why = "taken by another program, perhaps by Ollama" if taken else f"not to be had ({error})"
            raise CannotStart(f"port {port} of {host} is {why}. Choose another by --port.") from error


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    if args.max_megapixels is not None:
        Image.MAX_IMAGE_PIXELS = int(args.max_megapixels * 1e6)
    try:
        check_port(args.host, args.port)
        model, processor = start_model(args)
    except CannotStart as error:
        sys.exit(f"Cannot start: {error}")
    critic = Critic(model, processor, Path(args.model).resolve().name, args.max_new_tokens)
    uvicorn.run(make_app(critic, int(args.max_megabytes * 1e6)), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
