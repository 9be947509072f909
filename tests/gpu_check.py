"""
What only a GPU can show, in one table: exactness in bfloat16, attention kernels, compilation, host synchronisation,
memory and time at the shapes of published models (random weights), and what a budget of image tokens saves there.

    PYTHONPATH=examples python tests/gpu_check.py --record examples/gpu.md

Without CUDA it says so and ends. `--device cpu` runs the checks that need no GPU, and the figures on shapes of a few layers,
to try the script itself. The table is written after every check, what takes longest comes last.
"""

import argparse
import copy
import gc
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from benchmark import BUDGETS, PROMPT_TOKENS, PUBLISHED
from caption_photos import load_model
from common import critique
from conftest import graft, open_gates, with_noise
from families import FAMILIES, SIDE
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from ase_mllm import ASEForConditionalGeneration, read_photograph


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
Inputs = dict[str, torch.Tensor]
FAMILY_NAMES = ("llava", "qwen2_5_vl")
SHAPES = ("LLaVA-1.5-7B", "Qwen2.5-VL-7B")
BUDGET_SHAPE = "LLaVA-1.5-7B"
BATCHES = (1, 8)
DECODED = 16  # tokens


class Skipped(Exception):
    """A check that this machine cannot do, and why."""


def move(inputs: Inputs, device: str, dtype: torch.dtype) -> Inputs:
    return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


def tiny_pair(family: str, device: str, dtype: torch.dtype, attention: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base and its fresh graft. FlashAttention needs heads of eight and more."""
    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_config(FAMILIES[family].config(), attn_implementation=attention)
    base = with_noise(base).to(device, dtype)
    return base, graft(copy.deepcopy(base)).to(device).eval()


def open_model(family: str, device: str, gate: float = 1.0) -> tuple[PreTrainedModel, Inputs]:
    """A graft in float32 whose saliency branch reaches the text, and inputs for it."""
    _, model = tiny_pair(family, device, torch.float32, "sdpa")
    return open_gates(model, gate), tiny_inputs(family, device, torch.float32)


def tiny_inputs(family: str, device: str, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(1)
    images = [torch.randn(3, SIDE, SIDE) for _ in range(2)]
    return move(FAMILIES[family].inputs(images), device, dtype)


# Checks of correctness: each returns what it found, raises if it is wrong ----------------------------------------


@torch.no_grad()
def fresh_graft_is_its_base(device: str, attention: str, dtype: torch.dtype) -> str:
    if attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise Skipped("flash-attn is not installed")
    if attention == "flash_attention_2" and dtype == torch.float32:
        raise Skipped("FlashAttention has no float32")
    for family in FAMILY_NAMES:
        base, model = tiny_pair(family, device, dtype, attention)
        inputs = tiny_inputs(family, device, dtype)
        if not torch.equal(model(**inputs).logits, base(**inputs).logits):
            raise AssertionError(f"{family}: the logits differ")
        changed = open_gates(model)(**inputs).logits
        if torch.equal(changed, base(**inputs).logits) or not changed.isfinite().all():
            raise AssertionError(f"{family}: open gates change nothing, or give no numbers")
    return "bit for bit"


@torch.no_grad()
def compiled_is_plain(device: str, mode: str | None) -> str:
    model, inputs = open_model("llava", device)
    expected = model(**inputs).logits
    run = torch.compile(model, mode=mode)
    for _ in range(3):  # CUDA graphs are recorded in the second call and replayed from the third
        found = run(**inputs).logits
    difference = (found - expected).abs().max().item() / expected.abs().max().item()
    torch._dynamo.reset()
    if not difference <= 1e-3:
        raise AssertionError(f"relative difference {difference:.1e}")
    return f"relative difference {difference:.1e}"


@torch.no_grad()
def added_part_waits_for_nothing(device: str) -> str:
    if device == "cpu":
        raise Skipped("needs CUDA")
    _, model = tiny_pair("llava", device, torch.bfloat16, "sdpa")
    inner = open_gates(model).model
    pixels = tiny_inputs("llava", device, torch.bfloat16)["pixel_values"]
    layer = inner.config.fusion_layers[0]
    hidden = torch.randn(len(pixels), 16, inner.fusions.hidden_size(layer), device=device, dtype=torch.bfloat16)
    states = [hidden.transpose(1, 2).unflatten(2, (4, 4)) for _ in inner.config.iasm_config.encoder_layers]

    def added_part():
        inner.fusions(layer, hidden, inner.iasm(pixels, encoder_states=states).saliency_tokens)

    added_part()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        added_part()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no synchronisation"


@torch.no_grad()
def generates_as_step_by_step(device: str) -> str:
    for family in FAMILY_NAMES:
        model, inputs = open_model(family, device, gate=0.3)
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        cached = model.generate(**inputs, **options)
        if not torch.equal(cached, model.generate(**inputs, **options, use_cache=False)):
            raise AssertionError(f"{family}: another text without the cache")
    return "the same with and without a cache"


def trains_with_checkpointing(device: str) -> str:
    losses = {}
    for checkpointing in (False, True):
        model, inputs = open_model("llava", device)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with torch.autocast(device, torch.bfloat16):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        gradient = max(p.grad.norm().item() for n, p in model.named_parameters() if "iasm" in n and p.grad is not None)
        if not gradient > 0:
            raise AssertionError("nothing reaches the saliency module")
        losses[checkpointing] = loss.item()
    if abs(losses[True] - losses[False]) > 1e-3:
        raise AssertionError(f"{losses}")
    return f"loss {losses[True]:.4f} and {losses[False]:.4f} without"


@torch.no_grad()
def splits_over_cpu_and_gpu(device: str) -> str:
    if device == "cpu":
        raise Skipped("needs CUDA")
    model, inputs = open_model("llava", device)
    expected = model(**inputs).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        # room for the largest part that is not cut, the saliency module, is kept free beside the others
        most = sum(p.numel() * p.element_size() for p in model.parameters()) * 4 // 5
        split = ASEForConditionalGeneration.from_pretrained(
            folder, device_map="auto", max_memory={0: most, "cpu": "8GiB"}
        )
        places = set(split.hf_device_map.values())
        found = split(**inputs).logits.to(device)
    if len(places) < 2:
        raise AssertionError(f"it was not split: {places}")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    return f"on {', '.join(sorted(map(str, places)))}"


@torch.no_grad()
def loads_in_8_bit(device: str) -> str:
    if device == "cpu" or find_spec("bitsandbytes") is None:
        raise Skipped("needs CUDA and bitsandbytes")
    _, model = tiny_pair("llava", device, torch.float32, "sdpa")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        loaded = ASEForConditionalGeneration.from_pretrained(folder, quantization_config=config, device_map=0)
        kinds = {p.dtype for name, p in loaded.named_parameters() if name.startswith(("model.iasm", "model.fusions"))}
        logits = loaded(**tiny_inputs("llava", device, torch.float16)).logits
    if torch.int8 in kinds or not logits.isfinite().all():
        raise AssertionError(f"added modules in {kinds}")
    return f"added modules in {', '.join(map(str, kinds))}"


# Figures ---------------------------------------------------------------------------------------------------------


def wait(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], None], device: str, repeats: int = 7) -> float:
    """Median, after two calls that warm up; on a CPU, where it says nothing, of one call."""
    for _ in range(2 if device == "cuda" else 0):
        run()
    times = []
    for _ in range(repeats if device == "cuda" else 1):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def published_base(name: str, device: str) -> PreTrainedModel:
    """The shape with random weights, made where it is to be; on a CPU, of few and narrow layers."""
    family, settings, *_ = PUBLISHED[name]
    settings = copy.deepcopy(settings)
    if device == "cpu":
        settings["text_config"] |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        settings["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 2}
        if family == "qwen2_5_vl":
            settings["vision_config"] |= {"depth": 2, "out_hidden_size": 256}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    if device == "cpu" and family == "llava":
        config.vision_config.num_hidden_layers = 4
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()


def published_inputs(base: PreTrainedModel, name: str, device: str, batch: int = 1) -> Inputs:
    family, _, (height, width), image_tokens = PUBLISHED[name]
    ids = torch.tensor([[base.config.image_token_id] * image_tokens + [1] * PROMPT_TOKENS] * batch, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "llava":
        return {**inputs, "pixel_values": torch.randn(batch, 3, height, width, device=device, dtype=torch.bfloat16)}
    patch = base.config.vision_config.patch_size
    rows, columns = height // patch, width // patch
    return {
        **inputs,
        "pixel_values": torch.randn(batch * rows * columns, 3 * 2 * patch**2, device=device, dtype=torch.bfloat16),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * batch, device=device),
        "mm_token_type_ids": (ids == base.config.image_token_id).int(),
    }


@torch.no_grad()
def published_shape(device: str, name: str) -> str:
    """Ratios of prefill time and of peak memory, and whether the fresh graft is its base."""
    base = published_base(name, device)
    inputs = published_inputs(base, name, device)
    times, memory, logits = {}, {}, {}
    for kind in ("base", "graft"):
        model = base if kind == "base" else ASEForConditionalGeneration.from_mllm_pretrained(base).to(device).eval()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        logits[kind] = model(**inputs, logits_to_keep=1).logits
        times[kind] = seconds(partial(model, **inputs, logits_to_keep=1), device)
        memory[kind] = torch.cuda.max_memory_allocated() if device == "cuda" else float("nan")
    if not torch.equal(logits["base"], logits["graft"]):
        raise AssertionError("the logits differ")
    return (
        f"bit for bit; prefill {1000 * times['base']:.1f} ms, x {times['graft'] / times['base']:.3f}; "
        f"peak {memory['base'] / 2**30:.1f} GiB, x {memory['graft'] / memory['base']:.3f}"
    )


def decoding(model: PreTrainedModel, inputs: Inputs, **options) -> tuple[Callable[[], None], int]:
    """`DECODED` steps after the prompt, from a cache that is cut back each time, and the bytes of that cache."""
    cache = model(**inputs, **options, use_cache=True, logits_to_keep=1).cache
    size = sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))
    length, batch = cache.get_seq_length(), len(inputs["input_ids"])
    mask = torch.ones(batch, length + DECODED, dtype=torch.long, device=inputs["input_ids"].device)
    ids = torch.ones_like(mask[:, :1])

    def run():
        for i in range(DECODED):
            model(input_ids=ids, attention_mask=mask[:, : length + i + 1], cache=cache)
        cache.crop(-DECODED)

    return run, size


@torch.no_grad()
def image_token_budgets(device: str) -> dict[str, str]:
    """Prefill, a step of decoding and the cache within each budget, beside the base; by each selection."""
    base = published_base(BUDGET_SHAPE, device)
    rows, inputs, known = {}, {n: published_inputs(base, BUDGET_SHAPE, device, n) for n in BATCHES}, {}

    def measure(name: str, model: PreTrainedModel, batch: int, decodes: bool, **options):
        prefill = seconds(partial(model, **inputs[batch], **options, logits_to_keep=1), device)
        figures = {"prefill": prefill}
        if decodes:
            run, size = decoding(model, inputs[batch], **options)
            figures |= {"decode": seconds(run, device, 3) / DECODED, "cache": size}
        before = known.setdefault(batch, figures)
        told = [f"prefill {1000 * prefill:.1f} ms, x {prefill / before['prefill']:.3f}"]
        if decodes:
            told += [
                f"decoding {1000 * figures['decode']:.2f} ms a token, x {figures['decode'] / before['decode']:.3f}",
                f"cache {figures['cache'] / 2**20:.0f} MiB, x {figures['cache'] / before['cache']:.3f}",
            ]
        rows[f"{BUDGET_SHAPE}, batch of {batch}, {name}"] = "; ".join(told)

    for batch in BATCHES:
        measure("base", base, batch, True)
    model = ASEForConditionalGeneration.from_mllm_pretrained(base).to(device).eval()
    for batch in BATCHES:
        measure("all image tokens", model, batch, True)
        for selection in ("diverse", "saliency", "uniform"):
            model.config.image_token_selection = selection
            for budget in BUDGETS:
                decodes = selection == "diverse"
                measure(f"{budget:.0%}, {selection}", model, batch, decodes, image_token_budget=budget)
    return rows


def bundled_model_captions() -> str:
    """By what captions folders, so with scores and maps, and on the device that it chooses."""
    model, processor = load_model(str(EXAMPLES / "ase-mini"), trust_remote_code=False)
    photos = [read_photograph(file) for file in sorted((EXAMPLES / "photos").glob("*.jpg"))]
    sizes = [photo.size[::-1] for photo in photos]
    critique(model, processor, photos, sizes, max_new_tokens=2)
    start = time.perf_counter()
    critique(model, processor, photos, sizes, max_new_tokens=160)
    return f"{len(photos) / (time.perf_counter() - start):.1f} photographs a second in one batch"


# The table -------------------------------------------------------------------------------------------------------


def checks(device: str) -> dict[str, Callable[[], str | dict[str, str]]]:
    found = {"ase-mini": bundled_model_captions}
    for dtype in (torch.float32, torch.bfloat16):
        for attention in ("eager", "sdpa", "flash_attention_2"):
            name = f"fresh graft, {str(dtype).removeprefix('torch.')}, {attention}"
            found[name] = partial(fresh_graft_is_its_base, device, attention, dtype)
    found["the added part and the host"] = partial(added_part_waits_for_nothing, device)
    found["generate()"] = partial(generates_as_step_by_step, device)
    found["training step with checkpointing, autocast"] = partial(trains_with_checkpointing, device)
    found["device map over CPU and GPU"] = partial(splits_over_cpu_and_gpu, device)
    found["8-bit loading"] = partial(loads_in_8_bit, device)
    for name in SHAPES:
        found[f"shape of {name}, bfloat16"] = partial(published_shape, device, name)
    found["image token budgets, bfloat16, sdpa"] = partial(image_token_budgets, device)
    found["torch.compile"] = partial(compiled_is_plain, device, None)
    found["torch.compile with CUDA graphs"] = partial(compiled_is_plain, device, "reduce-overhead")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    parser.add_argument("--record", type=Path, metavar="FILE", help="where to write the table")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device: nothing was checked.")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    table = f"{device}, torch {torch.__version__}, transformers {transformers.__version__}\n\n| check | result |\n|---|---|\n"
    failed = False
    for name, check in checks(args.device).items():
        start = time.perf_counter()
        try:
            result = check()
        except Skipped as why:
            result = f"skipped: {why}"
        except Exception as error:
            failed = True
            result = f"FAILED: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            traceback.print_exception(error)
        gc.collect()  # grafts have circles
        if args.device == "cuda":
            torch.cuda.empty_cache()
        for row, text in (result if isinstance(result, dict) else {name: result}).items():
            print(f"{row}: {text}", flush=True)
            table += f"| {row} | {text} |\n"
        print(f"    ({time.perf_counter() - start:.1f} s)", flush=True)
        if args.record:
            args.record.write_text(table, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
