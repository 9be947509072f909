"""A budget of image tokens: which are chosen, and prompts without the others. (test_families.py has every family.)"""

import copy
import itertools

import numpy as np
import pytest
import torch
from conftest import (
    LORA,
    PEFT_ASKS,
    TRAINING,
    graft,
    losses,
    make_inputs,
    open_gates,
    tiny_model,
    tiny_processor,
    training_examples,
)
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaConfig, TextIteratorStreamer, Trainer, TrainingArguments

from ase_mllm import ASEConfig, ASEDataCollator, ASEForConditionalGeneration
from ase_mllm.image_tokens import QUALITY_POWER, choose_tokens, cut_prompt, kept_number, pool_map, token_grids


def chosen(features, maps, grids, budget, selection) -> list[list[int]]:
    """Places of the kept tokens, by image."""
    lengths = [rows * columns for rows, columns in grids]
    quality = [pool_map(one, grid) for one, grid in zip(maps, grids)]
    kept = choose_tokens(features.split(lengths), quality, budget, selection)
    return [torch.nonzero(part).flatten().tolist() for part in kept.split(lengths)]


@pytest.mark.parametrize(
    ("tokens", "budget", "kept"), [(16, 0.5, 8), (16, 0.01, 1), (3, 1.0, 3), (16, 1, 1), (16, 20, 16), (9, 0.25, 2)]
)
def test_a_share_and_a_number(tokens, budget, kept):
    assert kept_number(tokens, budget) == kept


@pytest.mark.parametrize("budget", [0, 0.0, 1.5, -1, True, "half"])
def test_other_budgets_are_refused(budget):
    with pytest.raises(Exception, match="image_token_budget"):  # strict configurations check types by themselves
        ASEConfig(image_token_budget=budget)


@pytest.mark.parametrize("rows, columns", [(4, 4), (6, 6), (12, 12), (16, 16), (24, 24), (7, 30), (32, 32)])
@pytest.mark.parametrize("share", [1 / 16, 0.11, 0.25, 0.5, 0.8, "row", "column"])
def test_even_ones_leave_out_no_part_of_the_picture(rows, columns, share):
    budget = {"row": rows, "column": columns}.get(share, share)
    number = kept_number(rows * columns, budget)
    (kept,) = chosen(torch.ones(rows * columns, 2), [torch.ones(8, 8)], [(rows, columns)], budget, "uniform")
    assert len(kept) == number
    for parts in (2, 4):
        across = [place // columns * parts // rows for place in kept]
        along = [place % columns * parts // columns for place in kept]
        least = min(one.count(part) for one in (across, along) for part in range(parts))
        assert least >= (number / parts - 4) / 2


def test_an_unknown_selection_is_refused():
    with pytest.raises(Exception, match=r"image_token_selection.*'best'"):
        ASEConfig(image_token_selection="best")


def test_grids_are_squares_of_the_area_that_a_token_has():
    assert token_grids(LlavaConfig(), [(32, 64), (48, 32)], 14) == [(2, 4), (3, 2)]
    for sizes, tokens in (([(32, 64)], 9), ([(32, 64), (30, 32)], 8), ([(32, 32)], 0)):
        with pytest.raises(ValueError, match=f"made {tokens} of {len(sizes)} images"):
            token_grids(LlavaConfig(), sizes, tokens)


def test_the_most_salient_are_those_of_the_map():
    maps = [torch.zeros(8, 8), torch.zeros(4, 8)]
    maps[0][2:4, 4:6], maps[1][0, 7] = 1.0, 1.0
    assert chosen(torch.randn(24, 5), maps, [(4, 4), (2, 4)], 1, "saliency") == [[6], [3]]


@pytest.mark.parametrize(("number", "rows"), [(4, [[0, 3, 4, 7]]), (2, [[0, 6]]), (8, [list(range(8))])])
def test_uniform_ones_are_spread(number, rows):
    assert chosen(torch.randn(8, 3), [torch.rand(4, 8)], [(2, 4)], number, "uniform") == rows


def test_diverse_ones_are_the_greedy_maximum_of_the_determinant():
    """By brute force: of all next tokens the one with the largest determinant."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3 * 12, 7, generator=generator)
    maps = [torch.rand(3, 4, generator=generator) for _ in range(3)]
    found = chosen(features, maps, [(3, 4)] * 3, 5, "diverse")
    for image, part in enumerate(features.split(12)):
        quality = (maps[image].flatten() / maps[image].mean()) ** QUALITY_POWER
        unit = torch.nn.functional.normalize(part, dim=-1).double() * quality.unsqueeze(1).double()
        kernel, picked = unit @ unit.T, []
        for _ in range(5):
            rest = [i for i in range(12) if i not in picked]
            picked.append(max(rest, key=lambda i: torch.linalg.det(kernel[[*picked, i]][:, [*picked, i]])))
        assert found[image] == sorted(picked)


def test_of_equal_tokens_one_is_enough():
    features = torch.eye(6)[[0, 0, 0, 1, 2, 2]]
    assert {
        tuple(features[i].tolist())
        for (row,) in [chosen(features, [torch.ones(2, 3)], [(2, 3)], 3, "diverse")]
        for i in row
    } == {tuple(row) for row in torch.eye(6)[:3].tolist()}


def test_more_tokens_than_features_have_dimensions():
    """The kernel has no rank left then; every token is still chosen once."""
    assert len(chosen(torch.randn(16, 2), [torch.rand(4, 4)], [(4, 4)], 12, "diverse")[0]) == 12


@pytest.mark.parametrize("left", [True, False])
def test_prompts_are_cut_and_put_back(left):
    mask = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 1]], dtype=torch.bool)
    cut = cut_prompt(mask, left)
    ids = torch.arange(10, 16).expand(2, -1)
    rows = [[10, 11, 13, 15], [-7, 10, 14, 15] if left else [10, 14, 15, -7]]
    assert cut.gather(ids, -7).tolist() == rows
    assert cut.gather(ids[:1], -7).tolist() == rows  # one row for all
    assert cut.gather(ids.expand(3, 2, 6), -7).tolist() == [rows] * 3  # positions of three kinds
    whole = cut.restore(cut.gather(ids, -7).unsqueeze(-1)).squeeze(-1)
    assert whole.tolist() == [[10, 11, 11, 13, 13, 15], [10, 10, 10, 10, 14, 15]]


def test_the_body_alone_keeps_to_the_budget_too():
    model, inputs = open_gates(tiny_model()).eval(), make_inputs()
    with torch.no_grad():
        whole = model(**inputs, image_token_budget=0.5)
        body = model.model(**inputs, image_token_budget=0.5)
    assert torch.equal(body.image_token_mask, whole.image_token_mask)
    torch.testing.assert_close(model.lm_head(body.last_hidden_state), whole.logits)


def test_a_budget_is_saved_and_a_given_one_counts_in_its_place(tmp_path):
    model, inputs = open_gates(tiny_model()).eval(), make_inputs()
    model.config.image_token_budget, model.config.image_token_selection = 0.25, "uniform"
    model.save_pretrained(tmp_path)
    loaded = ASEForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        saved, half, one, whole = (loaded(**inputs, image_token_budget=budget) for budget in (None, 0.5, 1, 1.0))
    tokens = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    others = inputs["input_ids"].shape[1] - tokens
    assert saved.image_token_mask.sum(1).tolist() == (others + tokens // 4).tolist()
    assert half.image_token_mask.sum(1).tolist() == (others + tokens // 2).tolist()
    assert one.image_token_mask.sum(1).tolist() == (others + 1).tolist() and "image_token_mask" not in whole
    for selection in ("uniform", "diverse", "saliency"):
        model.config.image_token_selection = selection
        with torch.no_grad():
            same = torch.equal(model(**inputs).image_token_mask, saved.image_token_mask)
        assert same == (selection == "uniform")


def test_rows_that_lose_different_numbers_write_what_they_write_alone():
    """Rows of one length need no padding of their own: what the cut adds must stand on the left."""
    generator, model = torch.Generator().manual_seed(1), tiny_model().eval()
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    rows = [
        torch.cat([torch.full((16 * images,), 4), torch.randint(5, 99, (40 - 16 * images,), generator=generator)])
        for images in (1, 2, 0)
    ]
    given = {"max_new_tokens": 6, "do_sample": False, "image_token_budget": 0.5}
    together = model.generate(input_ids=torch.stack(rows), pixel_values=pixels, **given)
    for row, answer, photos in zip(rows, together, (pixels[:1], pixels[1:], None)):
        options = {"max_new_tokens": 6, "do_sample": False} if photos is None else {"pixel_values": photos, **given}
        alone = model.generate(input_ids=row[None], **options)[0]
        assert torch.equal(answer, alone)


def test_generation_within_a_budget_keeps_no_gradients():
    model, inputs = tiny_model().eval(), make_inputs()
    outputs = model.generate(**inputs, max_new_tokens=2, image_token_budget=0.5, return_dict_in_generate=True)
    assert not outputs.score_logits.requires_grad and not outputs.saliency_maps.requires_grad


def test_a_prompt_that_goes_on_from_a_cache_is_refused():
    model, inputs = tiny_model(), make_inputs()
    cache = model(**inputs, use_cache=True).cache
    with pytest.raises(ValueError, match="goes on from a cache"):
        model(**inputs, cache=cache, image_token_budget=0.5)
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "pixel_values": inputs["pixel_values"],
    }
    with pytest.raises(ValueError, match="input_ids"):
        model(**embedded, image_token_budget=0.5)


def test_text_alone_has_nothing_to_cut():
    model, inputs = tiny_model().eval(), {"input_ids": torch.tensor([[1, 20, 21, 22]])}
    with torch.no_grad():
        assert torch.equal(model(**inputs, image_token_budget=0.5).logits, model(**inputs).logits)


def test_what_is_asked_of_the_logits_is_kept():
    model, inputs = open_gates(tiny_model()).eval(), make_inputs()
    with torch.no_grad():
        whole = model(**inputs, image_token_budget=0.5).logits
        last = model(**inputs, image_token_budget=0.5, logits_to_keep=2).logits
    torch.testing.assert_close(last, whole[:, -2:])


def test_a_streamer_gets_what_is_new():
    model, processor = open_gates(tiny_model()).eval(), tiny_processor()
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    inputs = {name: value[:1] for name, value in make_inputs().items()}
    tokens = model.generate(**inputs, image_token_budget=0.5, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert "".join(streamer) == processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])


def test_caption_weights_meet_the_whole_logits():
    model = open_gates(tiny_model()).eval()
    batch = ASEDataCollator(tiny_processor())(training_examples())
    batch["caption_weights"] = torch.ones(len(batch["input_ids"]))
    with torch.no_grad():
        weighted = model(**batch, image_token_budget=0.5).caption_loss
        batch.pop("caption_weights")
        torch.testing.assert_close(weighted, model(**batch, image_token_budget=0.5).caption_loss)


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.parametrize("adapter", [False, True])
def test_the_trainer_keeps_to_the_budget(adapter, tmp_path):
    """Two runs of the same seed, one with a budget of the configuration: it counts in every step."""
    runs = {}
    for budget in (None, 0.5):
        torch.manual_seed(0)
        model = open_gates(tiny_model())
        model.config.image_token_budget = budget
        wrapped = get_peft_model(model, LoraConfig(**LORA)) if adapter else model
        trainer = Trainer(
            wrapped,
            TrainingArguments(str(tmp_path / str(budget)), **{**TRAINING, "remove_unused_columns": False}),
            train_dataset=training_examples(),
            data_collator=ASEDataCollator(tiny_processor()),
        )
        trainer.train()
        runs[budget] = losses(trainer)
    assert len(runs[0.5]) == len(runs[None]) > 0 and all(a != b for a, b in zip(runs[0.5], runs[None]))
    assert torch.tensor(runs[0.5]).isfinite().all()


@pytest.mark.slow
def test_a_compiled_model_keeps_to_the_budget():
    model, inputs = open_gates(tiny_model()).eval(), make_inputs()
    with torch.no_grad():
        expected = model(**inputs, image_token_budget=0.5)
        compiled = torch.compile(copy.deepcopy(model), backend="eager")(**inputs, image_token_budget=0.5)
    torch.testing.assert_close(compiled.logits, expected.logits)
    assert torch.equal(compiled.image_token_mask, expected.image_token_mask)


@pytest.mark.parametrize(("selection", "budget"), [*itertools.product(["diverse", "uniform", "saliency"], [0.25, 3])])
def test_every_selection_keeps_as_many(selection, budget):
    grids = [(4, 4), (2, 8), (4, 4)]
    kept = chosen(torch.randn(48, 6), [torch.rand(9, 11) for _ in grids], grids, budget, selection)
    assert [len(row) for row in kept] == [kept_number(16, budget)] * 3


def test_mixed_precision_chooses_the_same_tokens():
    features, maps = torch.randn(64, 24) + 8 * torch.randn(24), [torch.rand(9, 11)]
    plain = chosen(features, maps, [(8, 8)], 0.5, "diverse")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chosen(features, maps, [(8, 8)], 0.5, "diverse") == plain


def test_what_was_kept_is_drawn_on_the_photograph():
    model, processor = open_gates(tiny_model()).eval(), tiny_processor()
    photo = Image.effect_noise((96, 64), 60).convert("RGB").point(lambda code: max(code, 40))
    inputs = processor(images=[photo] * 2, text=[processor.critique_prompt()] * 2, return_tensors="pt")
    options = {"max_new_tokens": 2, "return_dict_in_generate": True, "image_token_budget": 0.5}
    outputs = model.generate(**inputs, **options)
    for said in (outputs, model(**inputs, image_token_budget=0.5)):
        kept = processor.post_process_image_tokens(said, inputs["input_ids"])
        assert len(kept) == 2 and all(one.ndim == 2 and one.sum() == one.numel() // 2 for one in kept)
    drawn = np.asarray(processor.overlay_image_tokens(photo, kept[0])).astype(int)
    shares = drawn.sum(-1) / np.asarray(photo).astype(int).sum(-1)
    bright = torch.tensor(shares > 0.9).float()
    expected = torch.nn.functional.interpolate(kept[0][None, None].float(), size=bright.shape, mode="nearest")[0, 0]
    assert (bright == expected).float().mean() > 0.97
    with pytest.raises(ValueError, match="no `image_token_budget`"):
        processor.post_process_image_tokens(model(**inputs), inputs["input_ids"])


@pytest.mark.parametrize(("tile", "row", "column"), [(0, 2, 3), (1, 0, 1), (2, 3, 0)])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_tiles_are_judged_on_the_way_that_their_features_go(name, tile, row, column, monkeypatch):
    """A map that is bright in one cell of one tile keeps the token that the base makes of that cell."""
    model = graft(AutoModelForImageTextToText.from_config(FAMILIES[name].config())).eval()
    model.config.image_token_selection = "saliency"
    image = torch.randn(3, *FAMILIES[name].sizes[0])  # one row of two tiles, behind an overview
    inputs, side = FAMILIES[name].inputs([image]), 4  # patches of a tile
    encode = model.model.iasm.encode

    def marked(*args, **kwargs):
        said = encode(*args, **kwargs)
        said.saliency_maps = torch.full_like(said.saliency_maps, 1e-6)
        step = said.saliency_maps.shape[1] // side
        said.saliency_maps[tile, row * step : (row + 1) * step, column * step : (column + 1) * step] = 1.0
        return said

    monkeypatch.setattr(model.model.iasm, "encode", marked)
    with torch.no_grad():
        outputs = model(**inputs, image_token_budget=1)
    kept = outputs.image_token_mask[inputs["input_ids"] == model.config.image_token_id].nonzero().item()
    # the overview comes first; then the rows of the whole, each with its end
    of_whole = side**2 + row * (2 * side + 1) + (tile - 1) * side + column
    assert kept == (row * side + column if tile == 0 else of_whole)
