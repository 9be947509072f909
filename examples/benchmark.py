"""
What the saliency branch costs: every figure as a ratio to the base model, both measured in turn in one run.

    python examples/benchmark.py                            # the bundled model and the shape of a real encoder
    python examples/benchmark.py --models mini --repeats 3  # a minute
    python examples/benchmark.py --card README.md           # writes the tables into a Markdown file too

Times are medians over repeats in which base and graft take turns; memory is the peak of a fresh process for each, and
that of the cache the keys and values of a prompt; FLOPs and parameters of published shapes are counted without weights.
The last columns are the same ratios within a budget of image tokens. Writes `benchmark.md` and `benchmark.json`.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from math import isqrt
from pathlib import Path

import torch
import transformers
from common import BUDGETS, write_between
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from ase_mllm import ASEConfig, ASEForConditionalGeneration
from ase_mllm.image_encoders import find_image_encoder


EXAMPLES = Path(__file__).resolve().parent
SHAPES = json.loads((EXAMPLES / "published_shapes.json").read_text(encoding="utf-8"))
# what distinguishes a published model from its family's default configuration
PUBLISHED = {
    name: (shape["family"], shape["settings"], shape["image_size"], shape["image_tokens"])
    for name, shape in SHAPES.items()
}
DTYPES = {"mini": torch.float32, "vit-s-224": torch.float32, "clip-l-336": torch.bfloat16}
PROMPT_TOKENS = 64
# by a row's first word; the others are seconds
UNITS = {"memory": ("{:.3g} MB", 1e-6), "operations": ("{:.4g} GFLOP", 1e-9)}
WITHIN = " | ".join(f"{budget:.0%}" for budget in BUDGETS) + " of the image tokens"  # heads of the last columns
MARKS = "<!-- benchmark: written by examples/benchmark.py -->", "<!-- end of benchmark -->"


# Counting on published shapes ----------------------------------------------------------------------------------------


def count(module: torch.nn.Module, *args, **kwargs) -> int:
    """Floating point operations of one call."""
    with FlopCounterMode(display=False) as counter:
        module(*args, **kwargs)
    return counter.get_total_flops()


def count_published(family: str, settings: dict, image_size: tuple[int, int], image_tokens: int) -> dict[str, float]:
    """
    Parameters and operations of prefilling one image and a short prompt, and what the graft adds to them.

    The base counts two operations a parameter and token, without attention's own: the share of what is added comes out
    too large, not too small. The added modules are counted exactly, reading one layer of every encoder (Qwen2.5-VL's is
    not read where it is real: there less is added).
    """
    height, width = image_size
    config = AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(config)
        encoder = find_image_encoder(base)
        layer = (encoder.last_layer + 1) // 2 - 1  # nothing can be probed where there are no numbers
        iasm_config = {"encoder_layers": [layer], "encoder_hidden_sizes": [encoder.hidden_sizes[layer]]}
        model = ASEForConditionalGeneration(ASEConfig(mllm_config=config, iasm_config=iasm_config), base)
        model = model.requires_grad_(False).model
        vision, side = model.vision_tower, patch_side(encoder.module.config)
        patches = height * width // side**2
        inputs = {
            "pixel_values": torch.empty(1, 3, height, width),
            "encoder_states": [torch.empty(1, encoder.hidden_sizes[layer], height // side, width // side)],
        }
        added = count(model.iasm, **inputs)
        tokens = model.iasm(**inputs).saliency_tokens
        for layer in model.config.fusion_layers:
            added += count(model.fusions, layer, torch.empty(1, patches, model.fusions.hidden_size(layer)), tokens)
    text = parameters(model.get_decoder()) - parameters(model.get_input_embeddings())
    operations = 2 * (parameters(vision) * patches + text * (image_tokens + PROMPT_TOKENS))
    ours = parameters(model.iasm) + parameters(model.fusions)
    shares = {}
    for budget in BUDGETS:
        kept = operations - 2 * text * round((1 - budget) * image_tokens) + added
        shares[f"flops_ratio_at_{budget:g}"] = kept / operations
    return {
        **shares,
        "parameters": parameters(model.mllm),
        "added_parameters": ours,
        "parameters_ratio": 1 + ours / parameters(model.mllm),
        "flops": operations,
        "added_flops": added,
        "flops_ratio": 1 + added / operations,
    }


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def patch_side(config: PreTrainedConfig) -> int:
    return config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]


# Timing --------------------------------------------------------------------------------------------------------------


def llava_config(name: str) -> PreTrainedConfig:
    """LLaVA with CLIP ViT-L/14 at 336 pixels and a text model of Qwen2.5-0.5B's shape; with ViT-S/14 at 224 and 50 M."""
    if name == "clip-l-336":
        vision, image_size = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096}, 336
        vision |= {"num_hidden_layers": 24, "num_attention_heads": 16, "projection_dim": 768}
        text = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
        text |= {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936}
    else:
        vision, image_size = {"model_type": "clip_vision_model", "hidden_size": 384, "intermediate_size": 1536}, 224
        vision |= {"num_hidden_layers": 12, "num_attention_heads": 6}
        text = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
        text |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 49152}
    return AutoConfig.for_model(
        "llava",
        vision_config={**vision, "image_size": image_size, "patch_size": 14},
        text_config={**text, "tie_word_embeddings": True},
        image_token_index=text["vocab_size"] - 1,
        image_seq_length=(image_size // 14) ** 2,
        tie_word_embeddings=True,
    )


def make_pair(name: str, folder: Path, dtype: torch.dtype) -> None:
    """Saves the base and its graft as two checkpoints."""
    if name == "mini":
        graft = ASEForConditionalGeneration.from_pretrained(EXAMPLES / "ase-mini", dtype=dtype)
        graft.model.mllm.save_pretrained(folder / "base")
    else:
        base = AutoModelForImageTextToText.from_config(llava_config(name), dtype=dtype)
        base.generation_config.eos_token_id = None
        base.save_pretrained(folder / "base")
        graft = ASEForConditionalGeneration.from_mllm_pretrained(base)
    graft.save_pretrained(folder / "graft")


def make_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """One image of the size that the model is used with, and a prompt."""
    config = getattr(model.config, "mllm_config", model.config)
    patches = config.image_seq_length
    side = isqrt(patches) * config.vision_config.patch_size  # an encoder may have been trained on larger pictures
    image = torch.randn(1, 3, side, side, dtype=model.dtype)
    ids = [config.image_token_id] * patches + [1] * PROMPT_TOKENS
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)), "pixel_values": image}


def prefill(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    return torch.no_grad()(lambda: model(**inputs, logits_to_keep=1))


def decode(model: PreTrainedModel, inputs: dict[str, torch.Tensor], tokens: int = 8, **options) -> Callable[[], None]:
    """Tokens after the prefill, from a cache that is cut back each time."""
    with torch.no_grad():
        cache = model(**inputs, **options, use_cache=True, logits_to_keep=1).cache
    length = cache.get_seq_length()
    mask = torch.ones(1, length + tokens)

    @torch.no_grad()
    def run():
        for i in range(tokens):
            ids, seen = torch.ones(1, 1, dtype=torch.long), mask[:, : length + i + 1]
            model(input_ids=ids, attention_mask=seen, cache=cache)
        cache.crop(-tokens)

    return run


def cache_bytes(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options) -> int:
    """Keys and values of a prompt and its image."""
    with torch.no_grad():
        cache = model(**inputs, **options, use_cache=True, logits_to_keep=1).cache
    return sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))


def beside(base: int, graft: int) -> dict[str, float]:
    return {"base": base, "graft": graft, "ratio": graft / base}


def measure_budgets(models: dict, inputs: dict, repeats: int) -> dict[str, dict[str, float]]:
    """Prefill, decoding and cache beside the base, and the ratios to it within each budget of image tokens."""
    base, graft = ((models[name], inputs[name]) for name in ("base", "graft"))
    operations, cache = count(base[0], **base[1], logits_to_keep=1), cache_bytes(*base)

    def within(budget: float | None) -> dict[str, dict[str, float]]:
        options = {"image_token_budget": budget}
        cut = graft[0], {**graft[1], **options}
        return {
            "operations of prefill": beside(operations, count(cut[0], **cut[1], logits_to_keep=1)),
            "prefill": ratio({"base": prefill(*base), "graft": prefill(*cut)}, repeats),
            "decode": ratio({"base": decode(*base), "graft": decode(*graft, **options)}, repeats),
            "memory of the cache": beside(cache, cache_bytes(*graft, **options)),
        }

    results = within(None)
    for budget in BUDGETS:
        for name, row in within(budget).items():
            results[name][f"{budget:.0%}"] = row["ratio"]
    return results


def training_step(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Forward, backward and update of all parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def run():
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def ratio(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Medians in seconds of functions that take turns, and the median ratio of neighbours."""
    for run in runs.values():
        run()
    seconds = {name: [] for name in runs}
    for i in range(repeats):
        for name in sorted(runs, reverse=i % 2 == 1):
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    ratios = [graft / base for base, graft in zip(seconds["base"], seconds["graft"])]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {**medians, "ratio": statistics.median(ratios)}


def measure_times(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    results = {}

    def load(name: str) -> PreTrainedModel:
        return AutoModelForImageTextToText.from_pretrained(folder / name, dtype="auto").eval()

    results["load"] = ratio({name: lambda name=name: load(name) for name in ("base", "graft")}, repeats)
    models = {name: load(name) for name in ("base", "graft")}
    inputs = {name: make_inputs(model) for name, model in models.items()}
    results |= measure_budgets(models, inputs, repeats)
    steps = {name: training_step(model, inputs[name]) for name, model in models.items()}
    return {**results, "training step": ratio(steps, repeats)}


def peak_memory(folder: Path, task: str) -> int:
    """Bytes at the peak of a fresh process that loads one checkpoint and runs one task."""
    command = [sys.executable, __file__, "--peak", str(folder), task]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak_memory(folder: str, task: str):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    {"prefill": prefill, "training_step": training_step}[task](model, make_inputs(model))()
    # not `getrusage`, whose peak a child process inherits from its parent
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024)


def import_time(statement: str) -> Callable[[], None]:
    return lambda: subprocess.run([sys.executable, "-c", statement], check=True)


def measure(name: str, dtype: torch.dtype, repeats: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        make_pair(name, Path(folder), dtype)
        results = measure_times(Path(folder), repeats)
        for task in ("prefill", "training_step"):
            peaks = {kind: peak_memory(Path(folder) / kind, task) for kind in ("base", "graft")}
            results[f"memory of {task}"] = beside(**peaks)
    return results


# Report --------------------------------------------------------------------------------------------------------------


def render(timed: dict[str, dict], published: dict[str, dict], about: str) -> str:
    lines = [about, ""]
    for name, rows in timed.items():
        lines += [
            f"**{name}**",
            "",
            f"| | base | with saliency | ratio | with {WITHIN} |",
            "|---" * (4 + len(BUDGETS)) + "|",
        ]
        for task, row in rows.items():
            unit, scale = UNITS.get(task.split(" ")[0], ("{:.4g} s", 1))
            cells = [unit.format(row[kind] * scale) for kind in ("base", "graft")]
            shares = ("ratio", *(f"{budget:.0%}" for budget in BUDGETS))
            cells += [f"{row[share]:.3f}" if share in row else "" for share in shares]
            lines.append(f"| {' | '.join([task.replace('_', ' '), *cells])} |")
        lines.append("")
    if published:
        lines += [
            f"| published shape | parameters | added | operations of a prefill | added | with {WITHIN} |",
            "|---" * (5 + len(BUDGETS)) + "|",
        ]
        for name, row in published.items():
            cut = " | ".join(f"{row[f'flops_ratio_at_{budget:g}']:.2f}" for budget in BUDGETS)
            lines.append(
                f"| {name} | {row['parameters'] / 1e9:.2f} B | {row['parameters_ratio'] - 1:.2%} | "
                f"{row['flops'] / 1e12:.2f} TFLOP | {row['flops_ratio'] - 1:.2%} | {cut} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--published", nargs="*", default=list(PUBLISHED), help="published shapes to count")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--card", type=Path, help="a Markdown file with benchmark marks to write between")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    if args.peak:
        return print_peak_memory(*args.peak)
    timed = {f"{name}, {DTYPES[name]}": measure(name, DTYPES[name], args.repeats) for name in args.models}
    if timed:
        base = "from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration"
        imports = {"base": import_time(base), "graft": import_time(f"{base}; import ase_mllm")}
        timed[next(iter(timed))]["import"] = ratio(imports, args.repeats)
    published = {name: count_published(*PUBLISHED[name]) for name in args.published}
    about = (
        f"Medians of {args.repeats} on {torch.get_num_threads()} CPU threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}."
    )
    text = render(timed, published, about)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "benchmark.md").write_text(text, encoding="utf-8")
    results = {"about": about, "timed": timed, "published": published}
    (args.out / "benchmark.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if args.card:
        write_between(args.card, *MARKS, text)
    print(text)


if __name__ == "__main__":
    main()
