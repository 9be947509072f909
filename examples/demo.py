"""
A page to try the model on: drop a photograph, read its critique, and slide between it and what the model looked at.

    python -m venv .venv/demo     # an environment of its own, Gradio 6.31 needs an older Pillow
    .venv/demo/bin/pip install torch==2.13.0 && .venv/demo/bin/pip install -e '.[demo]'
    .venv/demo/bin/python examples/demo.py [--model NAME_OR_PATH] [--host 0.0.0.0]

Nothing leaves this machine: the page asks no other for anything, and what is uploaded is deleted within two hours. For
whole folders of photographs use caption_photos.py. As a Space of the Hugging Face Hub: demo_space.md.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from caption_photos import (
    HERE,
    OVERLAY_SIDE,
    CannotStart,
    add_model_arguments,
    reduced,
    refuse_below_zero,
    start_model,
)
from common import critique
from photo_files import FORMATS, RAW_SUFFIXES, SUFFIXES, Failure, read_photo
from PIL import Image


MAX_NEW_TOKENS = 160
ABOUT = """# Aesthetic critique

What is good in a photograph, what is wrong, what would help; how people might score it; and where the model looked."""
WAITING = f"Choose a photograph: {', '.join(FORMATS)}{', camera raw' if RAW_SUFFIXES <= SUFFIXES else ''}."


def judge(model: Any, processor: Any, file: str | None) -> tuple[str, tuple[Image.Image, Image.Image] | None]:
    """Critique and score in words, and the photograph without and with its heat map; or why there are none."""
    if file is None:
        return WAITING, None
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        photo = read_photo(Path(file))
    if isinstance(photo, Failure):
        return f"**{Path(file).name} cannot be judged:** {photo.reason}", None
    image = reduced(photo.image, OVERLAY_SIDE)
    try:
        (answer,) = critique(model, processor, [photo.image], [image.size[::-1]], max_new_tokens=MAX_NEW_TOKENS)
    except RuntimeError as error:  # out of memory, most likely
        return f"**The model failed:** {str(error).splitlines()[0]}", None
    score = f"**{answer['score']['mean']:.1f}** of 10, give or take {answer['score']['std']:.1f} from person to person"
    said = "\n\n".join(filter(None, [answer["caption"].strip(), score, photo.note]))
    return said[:1].upper() + said[1:], (image, processor.overlay_saliency(image, answer["heat"]))


def make_page(model: Any, processor: Any) -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when it is imported
    try:
        import gradio as gr  # here, for only the page needs it
    except ModuleNotFoundError as error:
        sys.exit(f"demo.py needs {error.name}, in an environment of its own: --help says how to make one")

    with gr.Blocks(title="Aesthetic critique", delete_cache=(3600, 3600)) as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=2):
                file = gr.File(label="Photograph", type="filepath", file_count="single", height=140)
                button = gr.Button("Critique", variant="primary")
                said = gr.Markdown(WAITING, container=True)
            with gr.Column(scale=3):
                slider = gr.ImageSlider(label="Where it looked", interactive=False, height="min(520px, 80vw)")
        shown = [said, slider]
        gr.on([button.click, file.upload], lambda path: judge(model, processor, path), file, shown)
        file.clear(lambda: judge(model, processor, None), None, shown)
        photos = [[str(photo)] for photo in sorted((HERE / "photos").glob("*.jpg"))[:4]]
        gr.Examples(
            photos, file, shown, lambda path: judge(model, processor, path), run_on_click=True, label="Try one"
        )
    return page


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description, _, details = __doc__.strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--host", help="0.0.0.0 lets other machines in (default: this machine alone)")
    parser.add_argument("--port", type=int, help="default: the first that is free from 7860 on")
    args = parser.parse_args(argv)
    refuse_below_zero(parser, args, "threads")
    return args


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    try:
        model, processor = start_model(args)
    except CannotStart as error:
        sys.exit(f"Cannot start: {error}")
    page = make_page(model, processor)
    # fonts of the system: those of Gradio's own themes come from the network
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    from gradio.themes import Default

    try:
        page.launch(server_name=args.host, server_port=args.port, max_file_size="64mb", theme=Default(**fonts))
    except OSError as error:  # the port is taken, most likely
        sys.exit(f"Cannot start: {error}")


if __name__ == "__main__":
    main()
