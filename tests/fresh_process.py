"""Loads a saved folder where `ase_mllm` is not installed, and saves it again: `python fresh_process.py FOLDER SECOND`."""

# ruff: noqa: E402 (the package is hidden before anything else is imported)

import sys
import traceback
from pathlib import Path


class NotInstalled:
    """Hides the package, which an editable installation makes importable from everywhere."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ase_mllm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())
try:
    import ase_mllm  # noqa: F401
except ModuleNotFoundError:
    pass
else:
    sys.exit("`ase_mllm` can be imported here, so this process proves nothing.")

import torch
import transformers
from safetensors.torch import load_file, save_file


transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
NAMES = ["AutoConfig", "AutoProcessor", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"]


def inner_states(model, batch: dict) -> list:
    """What the saliency module is given of the image encoder."""
    seen = []
    hook = model.model.iasm.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_states"]), with_kwargs=True
    )
    model(**batch)
    hook.remove()
    return seen[0]


def main(folder: Path, second: Path):
    for name in NAMES:
        try:
            getattr(transformers, name).from_pretrained(folder)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError(f"{name} ran the folder's code without being told to trust it.")

    loaded = {name: getattr(transformers, name).from_pretrained(folder, trust_remote_code=True) for name in NAMES}
    for name, part in loaded.items():
        assert type(part).__module__.startswith("transformers_modules."), (name, type(part))
    config, processor, body, model, _ = loaded.values()
    assert config.model_type == model.config.model_type == "ase"

    batch = load_file(folder / "inputs.safetensors")
    with torch.no_grad():
        outputs, inner = model(**batch), body(**batch)
    save_file(
        {
            "logits": outputs.logits,
            "saliency_maps": outputs.saliency_maps,
            "last_hidden_state": inner.last_hidden_state,
            "tokens": model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False),
            "prompt": processor.tokenizer(processor.critique_prompt(), return_tensors="pt")["input_ids"],
        },
        folder / "outputs.safetensors",
    )

    model.save_pretrained(second)
    processor.save_pretrained(second)
    save_file(batch, second / "inputs.safetensors")
    config.save_pretrained(second / "config_alone")
    body.save_pretrained(second / "body_alone")
    processor.save_pretrained(second / "processor_alone")
    model.model.iasm.save_pretrained(second / "iasm_alone")

    # the parts can be had alone too
    reload = {"trust_remote_code": True}
    assert transformers.AutoConfig.from_pretrained(second / "config_alone", **reload).model_type == "ase"
    assert transformers.AutoProcessor.from_pretrained(second / "processor_alone", **reload).aspect_names
    again = transformers.AutoModel.from_pretrained(second / "body_alone", **reload)
    assert torch.equal(again(**batch).last_hidden_state, inner.last_hidden_state)
    iasm = transformers.AutoModel.from_pretrained(second / "iasm_alone", **reload)
    states = inner_states(model, batch)
    assert torch.equal(iasm(batch["pixel_values"], encoder_states=states).saliency_maps, outputs.saliency_maps)


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
