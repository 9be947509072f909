"""The README's code runs as it stands: only the Hub ids of large bases are exchanged for tiny folders."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import caption_photos
import pytest
import search_photos
from conftest import tiny_base, tiny_processor
from families import FAMILIES
from transformers import AutoModelForImageTextToText


ROOT = Path(__file__).parents[1]
EXAMPLES = [
    path for path in sorted((ROOT / "examples").glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")
]


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    blocks = [block for block in blocks if "import OpenAI" not in block]  # needs a server: see test_serving.py
    assert len(blocks) == 4
    llava, qwen = tmp_path / "llava", tmp_path / "qwen"
    tiny_base().save_pretrained(llava)
    AutoModelForImageTextToText.from_config(FAMILIES["qwen2_vl"].config()).save_pretrained(qwen)
    for folder in (llava, qwen):  # Qwen's own processor needs torchvision, for videos
        tiny_processor().base_processor.save_pretrained(folder)
    folders = {"llava-hf/llava-1.5-7b-hf": llava, "Qwen/Qwen2-VL-2B-Instruct": qwen}
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks:
        for hub_id, folder in folders.items():
            block = block.replace(hub_id, str(folder))
        exec(block, namespace)
    assert (tmp_path / "heat.png").exists() and (tmp_path / "kept.png").exists()
    for name in ("llava", "qwen"):
        for file in ("modeling_ase.py", "processing_ase.py", "processor_config.json", "model.safetensors"):
            assert (tmp_path / "my-ase" / name / file).exists(), f"{name}/{file}"
    assert namespace["trainer"].state.global_step == 3


@pytest.mark.slow
def test_its_search_finds_some_of_the_bundled_photographs(tmp_path, capsys):
    (line,) = re.findall(r"^python examples/search_photos.py captions (.*)$", (ROOT / "README.md").read_text(), re.M)
    assert caption_photos.main([str(ROOT / "examples" / "photos"), "--out", str(tmp_path)]) == 0
    assert search_photos.main([str(tmp_path), *shlex.split(line, comments=True)]) == 0
    assert "complementary colours" in capsys.readouterr().out.lower()


def test_the_families_named_are_those_tested():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Which bases")[1].split("Every other base")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert sorted(re.findall(r"`([^`]+)`", "".join(rows))) == sorted(FAMILIES)


def test_usage_in_the_model_card_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "examples/ase-mini/README.md").read_text(), re.DOTALL)
    exec(block, {})
    answer = capsys.readouterr().out
    assert len(answer.split()) > 5 and "Critique" not in answer  # and not the prompt


@pytest.mark.slow
@pytest.mark.parametrize("script", [path.name for path in EXAMPLES if path.name != "serve_vllm.py"])
def test_every_script_has_a_help(script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert stopped.value.code == 0 and capsys.readouterr().out.startswith("usage: ") and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "missing", "remedy"),
    [
        ("finetune.py", "scipy", "pip install -e '.[training]'"),
        ("evaluate_captions.py", "matplotlib", "pip install -e '.[evaluation]'"),
        ("paper_table.py", "pycocoevalcap", "pip install -e '.[training,evaluation]'"),
        ("post_train.py", "trl", "pip install -e '.[trl]'"),
        ("serve_critiques.py", "uvicorn", "pip install -e '.[serving]'"),
        ("serve_vllm.py", "vllm", "its first lines say how"),
    ],
)
def test_a_script_names_the_extra_that_it_lacks(script, missing, remedy, monkeypatch):
    for name in list(sys.modules):
        if name in ("metrics", "report_table") or name.startswith(f"{missing}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert stopped.value.code.startswith(f"{script} needs {missing}") and remedy in stopped.value.code


def test_links_and_pictures_exist():
    for readme in (ROOT / "README.md", ROOT / "examples" / "ase-mini" / "README.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme.read_text(encoding="utf-8")):
            assert (readme.parent / target).exists(), f"{readme}: {target}"


def test_pre_commit_lints_by_the_pinned_version():
    hooks, pins = (ROOT / ".pre-commit-config.yaml").read_text(), (ROOT / "tests" / "constraints.txt").read_text()
    assert re.search(r"rev: v(\S+)", hooks)[1] == re.search(r"^ruff==(\S+)", pins, re.MULTILINE)[1]
