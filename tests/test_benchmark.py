"""examples/benchmark.py on a tiny model: what it counts is right, what it times it runs, what it writes can be read."""

import benchmark
import pytest
import torch
from common import write_between
from conftest import graft, tiny_base


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base = tiny_base()
    base.save_pretrained(folder / "base")
    graft(base).save_pretrained(folder / "graft")
    return folder


def test_every_task_is_timed_for_base_and_graft(pair):
    results = benchmark.measure_times(pair, repeats=2)
    assert list(results) == [
        "load",
        "operations of prefill",
        "prefill",
        "decode",
        "memory of the cache",
        "training step",
    ]
    for row in results.values():
        assert row["base"] > 0 and row["graft"] > 0 and row["ratio"] > 0
    within = [f"{budget:.0%}" for budget in benchmark.BUDGETS]
    assert all(results[task][share] > 0 for task in ("prefill", "decode") for share in within)
    rows = [round(16 * budget) + benchmark.PROMPT_TOKENS for budget in benchmark.BUDGETS]
    cache = results["memory of the cache"]
    assert [cache[share] for share in within] == [row / (16 + benchmark.PROMPT_TOKENS) for row in rows]
    assert cache["ratio"] == 1
    counted = results["operations of prefill"]
    text = [counted["ratio"], *(counted[share] for share in within)]
    # each token costs the text model the same, but for attention
    less = [16 + benchmark.PROMPT_TOKENS - row for row in rows]
    assert text[0] > text[1] > text[2] > text[3]
    assert (text[0] - text[3]) / (text[0] - text[1]) == pytest.approx(less[2] / less[0], rel=0.1)


@pytest.mark.parametrize(("tokens", "side"), [(16, 32), (4, 16)])
def test_the_picture_is_as_large_as_the_prompt_has_tokens(tokens, side):
    """The bundled model looks at pictures smaller than those that its encoder was trained on."""
    inputs = benchmark.make_inputs(tiny_base(image_seq_length=tokens))
    assert inputs["pixel_values"].shape == (1, 3, side, side)
    assert (inputs["input_ids"] == 4).sum() == tokens


@pytest.mark.slow
def test_the_peak_of_a_process_is_its_own(pair):
    ballast = torch.ones(400_000_000 // 4)  # the parent's memory must not count
    peak = benchmark.peak_memory(pair / "graft", "prefill")
    del ballast
    assert 100_000_000 < peak < 5_000_000_000


def test_added_operations_and_parameters_are_counted():
    row = benchmark.count_published(*benchmark.PUBLISHED["LLaVA-1.5-7B"])
    assert row["parameters"] == pytest.approx(7.06e9, rel=0.01)
    assert row["parameters_ratio"] == 1 + row["added_parameters"] / row["parameters"]
    # four fusions of 576 patches of width 1024 with 256 inside: two projections of the patches at two operations each
    assert row["added_flops"] > 4 * 576 * 1024 * 256 * 2 * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", benchmark.PUBLISHED)
def test_published_shapes_stay_under_two_percent(name):
    row = benchmark.count_published(*benchmark.PUBLISHED[name])
    assert 1 < row["parameters_ratio"] <= 1.02
    assert 1 < row["flops_ratio"] <= 1.03
    assert row["flops_ratio"] > row["flops_ratio_at_0.5"] > row["flops_ratio_at_0.25"] > row["flops_ratio_at_0.11"]


def test_tables_are_written_between_the_marks(tmp_path):
    timed = {"tiny": {"prefill": {"base": 1.0, "graft": 1.25, "ratio": 1.25}}}
    text = benchmark.render(timed, {}, "measured")
    assert "| prefill | 1 s | 1.25 s | 1.250 |" in text
    shares = {"50%": 0.75, "25%": 0.625, "11%": 0.5}
    counted = {"tiny": {"operations of prefill": {"base": 2e9, "graft": 3e9, "ratio": 1.5, **shares}}}
    row = "| operations of prefill | 2 GFLOP | 3 GFLOP | 1.500 | 0.750 | 0.625 | 0.500 |"
    assert row in benchmark.render(counted, {}, "counted")
    card = tmp_path / "card.md"
    card.write_text("before\n{}\nold\n{}\nafter\n".format(*benchmark.MARKS))
    write_between(card, *benchmark.MARKS, text)
    written = card.read_text()
    assert text in written and "old" not in written
    assert written.startswith("before\n") and written.endswith("after\n")
    card.write_text("nothing")
    with pytest.raises(ValueError, match="has no lines"):
        write_between(card, *benchmark.MARKS, text)
