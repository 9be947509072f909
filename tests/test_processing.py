"""Processor and collator: the base's processor inside, prompts, training batches, maps and scores to look at."""

import base64
import copy
import functools
import json
import pickle
import struct
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import ASPECTS, IMAGE_TOKENS, tiny_model, tiny_processor
from PIL import ExifTags, Image, ImageCms, ImageDraw
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer, LlavaImageProcessorPil, LlavaProcessor
from transformers.modeling_outputs import ModelOutput

from ase_mllm import ASEDataCollator, ASEProcessor, read_photograph
from ase_mllm.processing_ase import AESTHETIC_PROMPTS, ReducedCopyError


def photo(colour: str = "orange", size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)


def with_bos(processor: ASEProcessor) -> ASEProcessor:
    """Begins every text with <s>, as Llama's tokenizer does."""
    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    processor.tokenizer.backend_tokenizer.post_processor = template
    return processor


# The base's processor inside --------------------------------------------------------------------------------------


def test_it_prepares_inputs_as_the_base_processor_does(processor):
    base = processor.base_processor
    text = ["<image> Critique this photograph", "<image> what is good ?"]
    arguments = {"images": [[photo()], [photo("navy")]], "text": text, "padding": True, "return_tensors": "pt"}
    ours, theirs = processor(**arguments), base(**arguments)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (ours["input_ids"] == processor.image_token_id).sum(1).tolist() == [IMAGE_TOKENS] * 2
    assert processor.tokenizer is base.tokenizer and processor.image_processor is base.image_processor
    assert processor.model_input_names == base.model_input_names
    assert processor.unused_input_names == base.unused_input_names
    ids = [[5, 6, 7], [8, 9, 2]]
    assert processor.batch_decode(ids) == base.batch_decode(ids) and processor.decode(ids[0]) == base.decode(ids[0])
    assert processor.post_process_image_text_to_text(ids) == base.post_process_image_text_to_text(ids)
    expected = base._get_num_multimodal_tokens(image_sizes=[(30, 40)])
    assert processor._get_num_multimodal_tokens(image_sizes=[(30, 40)]) == expected


def test_the_chat_template_is_that_of_the_base(processor):
    assert processor.chat_template == processor.base_processor.chat_template
    processor.chat_template = "another"
    assert processor.base_processor.chat_template == "another"


@pytest.mark.parametrize("make_copy", [copy.deepcopy, copy.copy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_work(processor, make_copy):
    twin = make_copy(processor)
    assert twin.aspect_names == ASPECTS and twin.critique_prompt() == processor.critique_prompt()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = twin.no_such_thing


@pytest.mark.parametrize("loader", [ASEProcessor, AutoProcessor])
def test_round_trip(loader, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is ASEProcessor and type(loaded.base_processor) is LlavaProcessor
    assert loaded.aspect_names == ASPECTS
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.chat_template == processor.chat_template
    arguments = {"images": photo(), "text": "<image> good , wrong", "return_tensors": "pt"}
    ours, theirs = loaded(**arguments), processor(**arguments)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja", "processing_ase.py"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_folder_names_both_classes_and_carries_the_code(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "ASEProcessor" and saved["base_processor_class"] == "LlavaProcessor"
    assert saved["auto_map"] == {"AutoProcessor": "processing_ase.ASEProcessor"}
    assert saved["image_processor"]["size"] == {"height": 32, "width": 32}
    assert "class ASEProcessor" in (tmp_path / "processing_ase.py").read_text()
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is type(processor.tokenizer)


@pytest.mark.parametrize("aspect_names", [None, ["flat"]])
def test_it_wraps_the_processor_of_a_base_folder(aspect_names, processor, tmp_path):
    processor.base_processor.save_pretrained(tmp_path)
    named = {} if aspect_names is None else {"aspect_names": aspect_names}
    wrapped = ASEProcessor.from_pretrained(tmp_path, **named)
    assert type(wrapped.base_processor) is LlavaProcessor
    assert wrapped.aspect_names == (aspect_names or [])
    wrapped.save_pretrained(tmp_path / "saved")
    assert ASEProcessor.from_pretrained(tmp_path / "saved").aspect_names == (aspect_names or [])


def test_aspect_names_can_be_given_when_loading(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert ASEProcessor.from_pretrained(tmp_path, aspect_names=["flat"]).aspect_names == ["flat"]


def test_an_unknown_base_processor_is_named(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(path.read_text().replace("LlavaProcessor", "NoSuchProcessor"))
    with pytest.raises(ValueError, match=r"'NoSuchProcessor' of .* is no processor of transformers"):
        ASEProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["LlavaConfig", "load_image", "pipeline"])
def test_a_base_processor_that_is_none_is_refused(name, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(path.read_text().replace('"LlavaProcessor"', f'"{name}"'))
    with pytest.raises(ValueError, match=f"'{name}' of .* is no processor of transformers"):
        ASEProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("names", ["light", [1, 2]])
def test_aspect_names_are_a_list_of_names(names, processor):
    with pytest.raises(ValueError, match="`aspect_names` takes a list of names, got"):
        ASEProcessor(processor.base_processor, names)


# Photographs ------------------------------------------------------------------------------------------------------


def scene() -> Image.Image:
    """Half light, half dark, and a strip of colour: what is turned, swapped or lost can be told."""
    image = Image.new("RGB", (60, 40), (60, 60, 60))
    image.paste((200, 200, 200), (0, 0, 30, 40))
    image.paste((200, 40, 60), (0, 0, 60, 8))
    return image


def as_kept(kind: str) -> tuple[Image.Image, dict, Image.Image]:
    """A photograph as a file holds it, options of saving, and what people see."""
    seen, grey = scene(), scene().convert("L")
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 8  # to be turned a quarter to the left
        return seen.rotate(-90, expand=True), {"exif": exif}, seen
    if kind == "grey16":
        return Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), {}, grey.convert("RGB")
    if kind == "float":
        return Image.fromarray(np.asarray(grey).astype(np.float32) / 255), {}, grey.convert("RGB")
    if kind == "int32":
        return Image.fromarray(np.asarray(grey).astype(np.int32) * 257), {}, grey.convert("RGB")
    if kind == "transparent":
        alpha = Image.new("L", seen.size, 0)
        alpha.paste(255, (0, 0, 30, 40))
        hidden, expected = seen.copy(), Image.new("RGB", seen.size, "white")
        expected.paste(seen, mask=alpha)
        hidden.putalpha(alpha)
        return hidden, {}, expected
    if kind == "palette":
        return seen.quantize(8, dither=0), {}, seen
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")
    red, green, blue = seen.split()
    return Image.merge("RGB", (blue, green, red)), {"icc_profile": swapped}, seen


KINDS = ["turned", "grey16", "float", "int32", "transparent", "palette", "profile"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_photograph_is_read_as_people_see_it(kind, processor, tmp_path):
    kept, options, seen = as_kept(kind)
    path = tmp_path / ("photo.tif" if kind in ("float", "int32") else "photo.png")
    kept.save(path, **options)
    ways = {"path": path, "text": str(path), "bytes": path.read_bytes(), "opened": Image.open(path)}
    for way, source in ways.items():
        image = read_photograph(source)
        assert image.mode == "RGB" and image.size == seen.size, way
        difference = np.abs(np.asarray(image, dtype=float) - np.asarray(seen, dtype=float))
        assert difference.max() <= 3, way
        assert read_photograph(image).tobytes() == image.tobytes()
    # and so by all that takes photographs
    prompt = processor.critique_prompt()
    expected = processor.base_processor(images=seen, text=prompt, return_tensors="pt")["pixel_values"]
    chat = [{"role": "user", "content": [{"type": "image", "path": str(path)}, {"type": "text", "text": "good ?"}]}]
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    parts = (
        {"type": "image", "url": data},
        {"type": "image", "base64": data.partition(",")[2]},
        {"type": "image_url", "image_url": {"url": data}},  # as OpenAI's clients write it
        {"type": "image_url", "image_url": str(path)},
    )
    url, *others = [[{"role": "user", "content": [part, {"type": "text", "text": "good ?"}]}] for part in parts]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for pixels in (
        *(processor.apply_chat_template(other, **options) for other in others),
        processor(images=Image.open(path), text=prompt, return_tensors="pt"),
        processor(images=[[str(path)]], text=[prompt], return_tensors="pt"),
        ASEDataCollator(processor)([{"image": Image.open(path), "caption": "good"}]),
        processor.apply_chat_template(chat, **options),
        processor.apply_chat_template([chat, url], padding=True, **options),
    ):
        torch.testing.assert_close(pixels["pixel_values"][:1], expected, rtol=0, atol=0.06)


def test_photographs_at_addresses_are_read_as_files_are(processor, tmp_path):
    kept, _, seen = as_kept("grey16")
    kept.save(tmp_path / "photo.png")
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/photo.png"
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        content = [{"type": "image", "url": address}, {"type": "text", "text": "good ?"}]
        prompt = processor.critique_prompt()
        expected = processor.base_processor(images=seen, text=prompt, return_tensors="pt")["pixel_values"]
        for pixels in (
            processor(images=address, text=prompt, return_tensors="pt"),
            processor.apply_chat_template([{"role": "user", "content": content}], **options),
            ASEDataCollator(processor)([{"image": address, "caption": "good"}]),
        ):
            torch.testing.assert_close(pixels["pixel_values"], expected, rtol=0, atol=0.06)
        with pytest.raises(Exception, match="404"):
            processor(images=address + "x", text=prompt, return_tensors="pt")
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_white_is_0_is_no_negative(bits, tmp_path):
    path, grey = tmp_path / "photo.tif", np.asarray(scene().convert("L"))
    if bits == 8:  # which Pillow turns over when it writes, and again when it reads
        Image.fromarray(grey).save(path, tiffinfo={262: 0})
    else:
        Image.fromarray(65535 - grey.astype(np.uint16) * 257).save(path)
        black_is_0, white_is_0 = (struct.pack("<HHIHH", 262, 3, 1, value, 0) for value in (1, 0))
        path.write_bytes(path.read_bytes().replace(black_is_0, white_is_0))
    with Image.open(path) as photo:
        assert photo.tag_v2[262] == 0
    image = np.asarray(read_photograph(path).convert("L"), dtype=float)
    assert np.abs(image - grey).max() <= 3


def test_bright_and_dark_pictures_of_floating_point_stay_so():
    for values, expected in (([0.1, 0.5], [26, 128]), ([20.0, 200.0], [20, 200]), ([6554.0, 65535.0], [26, 255])):
        image = read_photograph(Image.fromarray(np.array([values], dtype=np.float32)))
        assert [image.getpixel((x, 0))[0] for x in (0, 1)] == expected
    assert read_photograph(Image.fromarray(np.array([[np.nan, 1]], dtype=np.float32))).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e4])
def test_one_odd_number_darkens_no_picture(odd, tmp_path):
    """A division by zero, a hot pixel or a spark in a picture of floating point."""
    values = np.full((50, 50), 0.5, dtype=np.float32)
    values[3, 4] = odd
    Image.fromarray(values).save(tmp_path / "odd.tif")
    image = np.asarray(read_photograph(tmp_path / "odd.tif"))
    assert (image == 128).all(axis=-1).sum() == values.size - 1


def test_camera_s_adobe_rgb_without_a_profile_is_converted(tmp_path):
    """Of the published primaries and curve: half green of Adobe RGB is out of sRGB, grey stays grey."""
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif).update({ExifTags.Base.ColorSpace: 0xFFFF, ExifTags.IFD.Interop: {1: "R03"}})
    for colour, expected in (
        ((128, 128, 128), (127, 127, 127)),
        ((200, 100, 50), (227, 99, 42)),
        ((60, 200, 60), (0, 200, 37)),
    ):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "wide.jpg", exif=exif, quality=100, subsampling=0)
        wide = read_photograph(tmp_path / "wide.jpg")
        assert np.abs(np.array(wide.getpixel((9, 9))) - expected).max() <= 3, colour
        assert read_photograph(wide).tobytes() == wide.tobytes()  # once, however often it is read
        Image.new("RGB", (32, 32), colour).save(tmp_path / "plain.jpg", quality=100, subsampling=0)
        assert np.abs(np.array(read_photograph(tmp_path / "plain.jpg").getpixel((9, 9))) - colour).max() <= 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12", b"Exif\0\0II*\0"])
def test_broken_exif_costs_no_photograph(exif, tmp_path):
    scene().save(tmp_path / "odd.jpg", exif=exif, quality=95)
    assert read_photograph(tmp_path / "odd.jpg").size == scene().size


@pytest.mark.parametrize(
    "tags", [{254: 1}, {255: 2}, {50706: b"\1\4\0\0"}, {330: (600, 400)}], ids=["NEF", "old", "DNG", "sub-image"]
)
def test_a_preview_is_never_taken_for_the_photograph(tags, tmp_path):
    """In a camera's raw file Pillow sees the small copy alone."""
    written = ImageFileDirectory_v2()
    larger = tags.pop(330, None)
    for tag, value in tags.items():
        written[tag] = value
        if tag == 50706:
            written.tagtype[tag] = 1  # bytes
    if larger:
        written[330] = 0
        written.tagtype[330] = 4
    scene().save(tmp_path / "photo.nef", format="TIFF", tiffinfo=written)
    if larger:
        content = bytearray((tmp_path / "photo.nef").read_bytes())
        place = content.index(struct.pack("<HHI", 330, 4, 1))
        content[place + 8 : place + 12] = struct.pack("<I", len(content))
        sides = [struct.pack("<HHII", tag, 4, 1, side) for tag, side in zip((256, 257), larger)]
        (tmp_path / "photo.nef").write_bytes(bytes(content) + struct.pack("<H", 2) + b"".join(sides) + bytes(4))
        smaller = bytes(content) + struct.pack("<H", 2) + sides[0] + struct.pack("<HHII", 257, 4, 1, 3) + bytes(4)
        (tmp_path / "pyramid.tif").write_bytes(smaller)
        assert read_photograph(tmp_path / "pyramid.tif").size == (60, 40)  # its own reduced copies lie below it
    with pytest.raises(ReducedCopyError, match=r"60 × 40 pixels can be seen .* rawpy"):
        read_photograph(tmp_path / "photo.nef")
    with Image.open(tmp_path / "photo.nef") as opened, pytest.raises(ReducedCopyError):
        read_photograph(opened, longest_side=30)


def test_large_photographs_are_reduced_and_the_caller_s_stays(tmp_path):
    image = scene().resize((600, 400))
    image.save(tmp_path / "large.jpg")
    for source in (image, tmp_path / "large.jpg"):
        assert read_photograph(source, longest_side=90).size == (90, 60)
        assert read_photograph(source).size == (600, 400)
    assert image.size == (600, 400)


def test_what_is_cut_short_is_an_error(tmp_path):
    scene().resize((600, 400)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    with pytest.raises(OSError):
        read_photograph(tmp_path / "cut.jpg")


# Prompts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aspect", [*AESTHETIC_PROMPTS, "Is it any good ?"])
def test_prompts_hold_one_image_and_the_wording(processor, aspect):
    text = AESTHETIC_PROMPTS.get(aspect, aspect)
    assert processor.critique_prompt(aspect) == f"<image> {text} "
    processor.chat_template = None
    assert processor.critique_prompt(aspect) == f"<image>\n{text}\n"
    assert processor.critique_prompt() == f"<image>\n{AESTHETIC_PROMPTS['critique']}\n"


@pytest.mark.parametrize("in_template", [False, True], ids=["bare", "bos_in_template"])
@pytest.mark.parametrize("in_tokenizer", [False, True], ids=["bare", "bos_in_tokenizer"])
def test_prompt_tokens_are_those_of_the_chat_template(processor, in_template, in_tokenizer):
    """Whoever adds it, a text begins with one <s> at most."""
    if in_tokenizer:
        with_bos(processor)
    if in_template:
        processor.chat_template = "{{ bos_token }}" + processor.chat_template
    content = [{"type": "image", "image": photo()}, {"type": "text", "text": AESTHETIC_PROMPTS["critique"]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    chat = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    prompt = processor(images=photo(), text=processor.critique_prompt(), return_tensors="pt")
    assert torch.equal(prompt["input_ids"], chat["input_ids"])
    assert torch.equal(prompt["pixel_values"], chat["pixel_values"])
    assert (prompt["input_ids"] == 1).sum() == (in_template or in_tokenizer)


# Training batches ---------------------------------------------------------------------------------------------------


def examples() -> list[dict]:
    return [
        {"image": photo(), "caption": "good , blurred ."},
        {"image": photo("navy"), "caption": "wrong", "prompt": "<image> what is good ?"},
    ]


def answers(batch) -> list[list[int]]:
    return [labels[labels != -100].tolist() for labels in batch["labels"]]


@pytest.mark.parametrize("bos", [False, True], ids=["no_bos", "bos"])
def test_labels_are_what_generation_has_to_write(processor, bos):
    if bos:
        with_bos(processor)
    batch = ASEDataCollator(processor)(examples())
    prompts = [processor.critique_prompt(), "<image> what is good ?"]
    for i, (prompt, caption) in enumerate(zip(prompts, ("good , blurred .", "wrong"))):
        expected = processor(images=examples()[i]["image"], text=prompt, return_tensors="pt")
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()
        answer = processor.tokenizer(caption, add_special_tokens=False)["input_ids"] + [2]
        assert ids == expected["input_ids"][0].tolist() + answer
        assert answers(batch)[i] == answer
        assert torch.equal(batch["pixel_values"][i], expected["pixel_values"][0])
    shift = batch["labels"] != -100
    assert torch.equal(batch["labels"][shift], batch["input_ids"][shift])
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}


@pytest.mark.slow
def test_a_model_that_learned_the_labels_generates_the_caption(processor):
    """The claim itself: teacher-forced and generated tokens have the same context."""
    batch = ASEDataCollator(processor)([{"image": photo(), "caption": "good , wrong ."}])
    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    prompt = processor(images=photo(), text=processor.critique_prompt(), return_tensors="pt")
    tokens = model.eval().generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokens.tolist() == answers(batch)[0]
    assert tokens[-1] == 2  # it learned to stop


def test_padding_side_does_not_matter(processor):
    left = ASEDataCollator(processor)(examples())
    processor.tokenizer.padding_side = "right"
    right = ASEDataCollator(processor)(examples())
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_long_captions_are_cut_and_long_prompts_refused(processor):
    whole = ASEDataCollator(processor)(examples()[:1])
    length = whole["input_ids"].shape[1]
    cut = ASEDataCollator(processor, max_length=length - 2)(examples()[:1])
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, : length - 2])
    assert answers(cut)[0] == answers(whole)[0][:-2]
    prompt = length - len(answers(whole)[0])
    with pytest.raises(ValueError, match=f"The prompt has {prompt} tokens, no room for a caption in {prompt}"):
        ASEDataCollator(processor, max_length=prompt)(examples()[:1])
    assert len(answers(ASEDataCollator(processor, max_length=prompt + 1)(examples()[:1]))[0]) == 1
    short = answers(ASEDataCollator(processor, max_caption_length=2)(examples()))
    assert short == [answer[:2] for answer in answers(ASEDataCollator(processor)(examples()))]


def test_missing_targets_are_marked_as_such(processor):
    rated, plain = examples()
    rated |= {
        "score": [0, 0, 0, 0, 0.5, 0.5, 0, 0, 0, 0],
        "saliency": np.eye(4),
        "aspect_labels": [1, 0, -1],
        "caption_weight": 0.25,
    }
    batch = ASEDataCollator(processor)([plain, rated])
    assert batch["score_targets"].tolist() == [[0.0] * 10, rated["score"]]
    assert torch.equal(batch["saliency_targets"], torch.stack([torch.zeros(4, 4), torch.eye(4)]))
    assert batch["aspect_targets"].tolist() == [[-1.0] * 3, [1.0, 0.0, -1.0]]
    assert batch["caption_weights"].tolist() == [1.0, 0.25]


def test_targets_of_different_shape_are_refused(processor):
    first, second = examples()
    with pytest.raises(ValueError, match=r"`saliency` has different shapes in one batch: \[\(2, 2\), \(4, 4\)\]"):
        ASEDataCollator(processor)([first | {"saliency": np.eye(4)}, second | {"saliency": np.eye(2)}])


NAN = float("nan")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("score", [NAN] * 10, "`score` takes finite numbers at least 0, got nan"),
        ("score", [-1, *[0.2] * 9], "got -1 to 0.2"),
        ("saliency", [[1.0, -0.5], [0, 0]], "`saliency` takes finite numbers at least 0, got -0.5 to 1"),
        ("saliency", [[1.0, float("inf")]], "`saliency` takes finite numbers"),
        ("aspect_labels", [0, 1.5, -1], "`aspect_labels` takes finite numbers .*, got -1 to 1.5"),
        ("caption_weight", -0.5, "`caption_weight` takes finite numbers at least 0, got -0.5"),
        ("caption_weight", NAN, "`caption_weight` takes finite numbers"),
    ],
)
def test_impossible_targets_are_refused_with_the_numbers(column, value, message, processor):
    with pytest.raises(ValueError, match=message):
        ASEDataCollator(processor)([examples()[0] | {column: value}])


@pytest.mark.parametrize("name", ["ratings", "aspect_label", "caption_weights", "salience"])
def test_a_misspelt_column_is_named(name, processor):
    with pytest.raises(ValueError, match=f"Column `{name}` is not known: did you mean"):
        ASEDataCollator(processor)([examples()[0] | {name: [0.1] * 10}])
    ASEDataCollator(processor)([examples()[0] | {"image_id": "7", "url": "x", "title": "y", "captions": ["z"]}])


def test_columns_of_another_kind_are_refused(processor):
    with pytest.raises(ValueError, match=r"one text an example, got \['good', 'blurred'\]"):
        ASEDataCollator(processor)([{"image": photo(), "caption": ["good", "blurred"]}])
    with pytest.raises(ValueError, match=r"`image` is None.*`images` \[\]"):
        ASEDataCollator(processor)([{"image": None, "caption": "good"}])


def test_columns_that_were_taken_away_are_missed(processor):
    """As `Trainer` does by default with a data set."""
    with pytest.raises(ValueError, match=r"got \['prompt'\].*remove_unused_columns=False"):
        ASEDataCollator(processor)([{"prompt": "Critique"}])


def test_samples_of_text_alone_train(processor):
    text = {"images": [], "prompt": "what is good ?", "caption": "blurred", "score": np.eye(10)[3]}
    model = tiny_model()
    for batch, images in (([text, text], 0), ([text], 0), ([text, examples()[0]], 1)):
        inputs = ASEDataCollator(processor)(batch)
        assert ("pixel_values" in inputs) == ("score_targets" in inputs) == bool(images)
        outputs = model(**inputs)
        assert outputs.loss.isfinite() and (outputs.score_logits is not None) == bool(images)


def test_several_images_a_sample(processor):
    two = {
        "images": [photo(), photo("navy")],
        "prompt": "<image> <image> what is wrong ?",
        "caption": "blurred",
        "score": np.eye(10)[4],
    }
    batch = ASEDataCollator(processor)([two, examples()[0]])
    assert batch["pixel_values"].shape[0] == 3
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [2 * IMAGE_TOKENS, IMAGE_TOKENS]
    assert batch["score_targets"].argmax(1).tolist() == [4, 4, 0]
    assert batch["score_targets"].sum(1).tolist() == [1, 1, 0]
    outputs = tiny_model()(**batch)
    assert outputs.saliency_maps.shape[0] == 3 and outputs.loss.isfinite()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_every_mode_become_rgb(processor, mode):
    image = photo("white").convert(mode)
    batch = ASEDataCollator(processor)([{"image": image, "caption": "good"}])
    expected = ASEDataCollator(processor)([{"image": photo("white"), "caption": "good"}])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])


# Maps and scores ----------------------------------------------------------------------------------------------------


def outputs_of(**fields) -> ModelOutput:
    return ModelOutput(**fields)


def test_chats_take_photographs_in_every_form(processor, tmp_path):
    """Files and addresses: see `test_a_photograph_is_read_as_people_see_it`."""
    image, batches = scene(), []
    for source in (image, np.asarray(image).transpose(2, 0, 1)):
        content = [{"type": "image", "image": source}, {"type": "text", "text": "Critique this photograph"}]
        batches.append(
            processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
            )
        )
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    assert (batches[0]["input_ids"] == 4).sum() == IMAGE_TOKENS


def test_chats_of_text_alone_and_of_several_photographs(processor):
    image = photo()
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}] * count + [{"type": "text", "text": "good"}]}]
        for count in (0, 1, 2)
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    assert "pixel_values" not in processor.apply_chat_template(chats[0], **options)
    batch = processor.apply_chat_template(chats[1:], padding=True, **options)
    assert batch["pixel_values"].shape[0] == 3
    assert (batch["input_ids"] == 4).sum(1).tolist() == [IMAGE_TOKENS, 2 * IMAGE_TOKENS]
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][:, -1].all()  # padded on the left


def test_assistant_masks_mark_the_answers(processor):
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
        " {{ message['content'][0]['text'] }}{% endgeneration %}{% else %}<image> what{% endif %}{% endfor %}"
    )
    chat = [
        {"role": "user", "content": [{"type": "image", "image": photo()}]},
        {"role": "assistant", "content": [{"type": "text", "text": "good . wrong ."}]},
    ]
    batch = processor.apply_chat_template(
        chat, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [token for token, mask in zip(batch["input_ids"][0], batch["assistant_masks"][0]) if mask]
    assert processor.decode(marked) == "good . wrong ."


def test_images_may_be_nested_flat_or_alone(processor):
    image = photo()
    prompt = processor.critique_prompt()
    alone = processor(images=image, text=prompt, return_tensors="pt")
    for images in ([image, image], [[image], [image]]):
        batch = processor(images=images, text=[prompt, prompt], return_tensors="pt")
        assert torch.equal(batch["pixel_values"], alone["pixel_values"].expand(2, -1, -1, -1))
        assert torch.equal(batch["input_ids"], alone["input_ids"].expand(2, -1))


def test_what_is_set_on_the_processor_is_set_on_the_base(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    processor.tokenizer = tokenizer
    processor.image_token = "<picture>"
    assert processor.base_processor.tokenizer is processor.tokenizer is tokenizer
    assert processor.base_processor.image_token == "<picture>"
    assert set(vars(processor)) == {"base_processor", "aspect_names"}


def test_saliency_is_scaled_to_the_photograph(processor):
    maps = torch.zeros(2, 2, 4)
    maps[0, 0, 0], maps[0, 1, 3], maps[1] = 0.8, 0.2, 1 / 8
    outputs = outputs_of(saliency_maps=maps)
    own = processor.post_process_saliency(outputs)
    assert torch.equal(own[0], maps[0] / 0.8) and torch.equal(own[1], torch.ones(2, 4))
    heat = processor.post_process_saliency(outputs, target_sizes=[(10, 40), torch.tensor([30, 20])])
    assert [tuple(one.shape) for one in heat] == [(10, 40), (30, 20)]
    assert all(one.min() >= 0 and one.max() == 1 for one in heat)
    assert heat[0][0, 0] == 1 and heat[0][-1, -1] == pytest.approx(0.25)
    half = processor.post_process_saliency(outputs_of(saliency_maps=maps.bfloat16()))
    assert half[0].dtype == torch.float32
    padded = outputs_of(
        saliency_maps=torch.nn.functional.pad(maps, (0, 3, 0, 5)), saliency_map_sizes=torch.tensor([[2, 4]] * 2)
    )
    for sizes in (None, [(10, 40), (30, 20)]):
        for cut, whole in zip(
            processor.post_process_saliency(padded, sizes), processor.post_process_saliency(outputs, sizes)
        ):
            assert torch.equal(cut, whole)
    with pytest.raises(ValueError, match="`target_sizes` has 1 sizes for 2 saliency maps"):
        processor.post_process_saliency(outputs, target_sizes=[(10, 40)])


def cropping(processor: ASEProcessor, kind: str) -> ASEProcessor:
    image_processor = processor.image_processor
    if kind == "shortest edge, then the middle":  # the default of CLIP's and of LLaVA-1.5's processor
        image_processor.size, image_processor.do_center_crop = {"shortest_edge": 32}, True
    elif kind == "the middle of the whole":
        image_processor.do_resize, image_processor.do_center_crop = False, True
        image_processor.crop_size = {"height": 128, "width": 256}
    elif kind == "padded to a square":
        processor.base_processor.image_processor = LlavaImageProcessorPil(
            do_pad=True, size={"height": 32, "width": 32}, do_center_crop=False
        )
    return processor


@pytest.mark.parametrize("size", [(200, 400), (400, 200), (300, 300)])
@pytest.mark.parametrize(
    "kind", ["whole", "shortest edge, then the middle", "the middle of the whole", "padded to a square"]
)
def test_a_map_lies_where_the_model_saw_it(kind, size, processor):
    """A spot of the photograph, found again in the model's pixels by eye of the code, is put back where it was."""
    processor = cropping(processor, kind)
    height, width = size
    y, x = height * 0.45, width * 0.55
    spot = Image.new("RGB", (width, height))
    ImageDraw.Draw(spot).ellipse((x - 30, y - 30, x + 30, y + 30), "white")
    pixels = processor.image_processor(spot, do_normalize=False, return_tensors="pt")["pixel_values"]
    if kind == "padded to a square":
        pixels = pixels * (pixels.amin(1, keepdim=True) > 0.9)  # without the padding's colour
    (heat,) = processor.post_process_saliency(outputs_of(saliency_maps=pixels.mean(1)), target_sizes=[size])
    assert tuple(heat.shape) == size
    centre = [(heat.sum(1 - axis) * torch.arange(size[axis])).sum().item() / heat.sum().item() for axis in (0, 1)]
    assert centre == pytest.approx([y, x], abs=size[0] / 40)


@pytest.mark.parametrize("kind", ["whole", "shortest edge, then the middle", "padded to a square"])
def test_large_photographs_are_asked_for_reduced_and_in_their_own_pixels(kind, processor, monkeypatch):
    processor = cropping(processor, kind)
    small, asked = processor._seen_box(333, 500), []
    ask = type(processor.image_processor).__call__

    def listen(self, images, **options):
        asked.append(images.size)
        return ask(self, images, **options)

    monkeypatch.setattr(type(processor.image_processor), "__call__", listen)
    large = processor._seen_box(3330, 5000)
    assert large == pytest.approx([10 * side for side in small], abs=15)
    assert kind == "whole" or max(asked[0]) == 2048


@pytest.mark.parametrize("kind", ["whole", "shortest edge, then the middle", "padded to a square"])
def test_target_maps_are_cut_as_the_photograph_is(kind, processor):
    processor = cropping(processor, kind)
    image = Image.new("RGB", (400, 200))
    ImageDraw.Draw(image).ellipse((190, 60, 250, 120), "white")
    target = np.asarray(image.convert("L").resize((64, 64)), dtype=float)
    example = {"image": image, "caption": "good", "saliency": target}
    batch = ASEDataCollator(processor)([example])
    pixels = processor.image_processor(image, do_normalize=False, return_tensors="pt")["pixel_values"].mean(1)
    if kind == "padded to a square":
        pixels = pixels * (pixels > 0.9)
    seen = torch.nn.functional.interpolate(pixels[None], size=(64, 64), mode="bilinear")[0]
    cut = batch["saliency_targets"] / 255
    assert (cut - seen).abs().mean() < 0.02
    centres = [
        [(one.sum((0, 2 - axis)) * torch.arange(64)).sum().item() / one.sum().item() for axis in (0, 1)]
        for one in (cut, seen)
    ]
    assert centres[0] == pytest.approx(centres[1], abs=0.5)


def test_overlay_colours_hot_places_and_keeps_cold_ones(processor):
    image = photo("green", (20, 10))
    heat = torch.zeros(10, 20)
    heat[:, 10:] = 1.0
    overlay = processor.overlay_saliency(image, heat)
    assert overlay.size == (20, 10) and overlay.mode == "RGB"
    assert overlay.getpixel((0, 0)) == image.getpixel((0, 0))
    hot = 0.35 * np.array(image.getpixel((15, 5))) + 0.65 * np.array([250, 193, 39])
    np.testing.assert_allclose(overlay.getpixel((15, 5)), hot, atol=1)
    assert processor.overlay_saliency(image, heat, opacity=0.0).tobytes() == image.tobytes()
    assert processor.overlay_saliency(image.convert("L"), heat).size == (20, 10)
    with pytest.raises(ValueError, match=r"The heat map is \(10, 20\), the photograph \(20, 10\)"):
        processor.overlay_saliency(photo(size=(10, 20)), heat)


def test_scores_are_means_and_deviations_of_the_shares(processor):
    shares = torch.tensor([[0.1, 0, 0, 0.2, 0, 0.3, 0, 0, 0.4, 0], [0] * 9 + [1.0]])
    scores = processor.post_process_scores(outputs_of(score_logits=(shares + 1e-12).log()))
    scale = np.repeat(np.arange(1, 11), (shares[0] * 10).int())
    assert scores[0] == {
        "mean": pytest.approx(scale.mean(), abs=1e-4),
        "std": pytest.approx(scale.std(), abs=1e-4),
    }
    assert scores[1] == {"mean": pytest.approx(10), "std": pytest.approx(0, abs=1e-3)}
    flat = processor.post_process_scores(outputs_of(score_logits=torch.zeros(1, 10)))
    assert flat[0]["mean"] == pytest.approx(5.5)


def test_aspects_are_named_probabilities(processor):
    logits = torch.tensor([[0.0, 100.0, -100.0]])
    aspects = processor.post_process_aspects(outputs_of(aspect_logits=logits))
    assert aspects == [{"underexposed": 0.5, "blurred": 1.0, "tilted": pytest.approx(0, abs=1e-6)}]
    assert processor.post_process_aspects(outputs_of(saliency_maps=torch.ones(2, 2, 2))) == [{}, {}]
    processor.aspect_names = ["flat"]
    with pytest.raises(ValueError, match="The model has 3 aspects, the processor names 1"):
        processor.post_process_aspects(outputs_of(aspect_logits=logits))


def test_outputs_of_the_model_are_understood(model):
    processor = tiny_processor()
    inputs = processor(images=[photo(), photo("navy")], text=[processor.critique_prompt()] * 2, return_tensors="pt")
    for outputs in (model(**inputs), model.get_image_features(inputs["pixel_values"])):
        heat = processor.post_process_saliency(outputs, target_sizes=[(30, 40)] * 2)
        assert [tuple(one.shape) for one in heat] == [(30, 40)] * 2
        assert processor.overlay_saliency(photo(), heat[0]).size == (40, 30)
        assert all(1 <= score["mean"] <= 10 for score in processor.post_process_scores(outputs))
        assert [list(aspects) for aspects in processor.post_process_aspects(outputs)] == [ASPECTS] * 2
