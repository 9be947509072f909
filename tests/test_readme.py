"""The README's code runs as it stands: only the Hub id of a large base is exchanged for a tiny folder."""

import re
from pathlib import Path

from conftest import tiny_base, tiny_processor


ROOT = Path(__file__).parents[1]


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    blocks = [block for block in blocks if "import OpenAI" not in block]  # needs a server: see test_serving.py
    assert len(blocks) == 3
    base = tmp_path / "base"
    tiny_base().save_pretrained(base)
    tiny_processor().base_processor.save_pretrained(base)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks:
        exec(block.replace("llava-hf/llava-1.5-7b-hf", str(base)), namespace)
    assert (tmp_path / "heat.png").exists()
    assert (tmp_path / "my-ase" / "modeling_ase.py").exists()
    assert namespace["trainer"].state.global_step == 3


def test_usage_in_the_model_card_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "examples/ase-mini/README.md").read_text(), re.DOTALL)
    exec(block, {})
    assert "generated_text" in capsys.readouterr().out


def test_links_and_pictures_exist():
    for readme in (ROOT / "README.md", ROOT / "examples" / "ase-mini" / "README.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme.read_text(encoding="utf-8")):
            assert (readme.parent / target).exists(), f"{readme}: {target}"
