"""
Captions by Ray: every photograph has one row, whatever dies meanwhile.

What needs Ray itself is left out where it is not installed: `pip install -e '.[ray]'`, then these tests.
"""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections import Counter
from pathlib import Path
from unittest.mock import MagicMock

import caption_ray
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from caption_ray import ROWS, Captioner, left_to_do, set_cut_files_aside, written
from common import critique
from photo_files import read_photo
from PIL import Image


ROOT = Path(__file__).parents[1]
needs_ray = pytest.mark.skipif(caption_ray.ray is None, reason="Ray is not installed")


def write_photo(file: Path, seed: int):
    blocks = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((160, 120), Image.Resampling.BICUBIC).save(file)


def make_photos(folder: Path, number: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    files = [folder / f"{i:03}.jpg" for i in range(number)]
    for i, file in enumerate(files):
        write_photo(file, i)
    return list(map(str, files))


def rows_of(out: Path) -> list[dict]:
    tables = [pq.read_table(file, partitioning=None) for file in sorted(out.glob("*.parquet"))]
    assert all(table.schema.equals(ROWS) for table in tables)
    return pa.concat_tables(tables).to_pylist()


def write_rows(file: Path, *rows: dict):
    pq.write_table(pa.Table.from_pylist([{"model": "m", **row} for row in rows], schema=ROWS), file)


# One worker's work ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner(caption_ray.parse_arguments([str(ROOT), "--out", "out", "--threads", "1"]))


def test_every_path_has_a_row(captioner, tmp_path):
    good, small, gone = tmp_path / "good.jpg", tmp_path / "small.png", tmp_path / "gone.jpg"
    write_photo(good, 0)
    Image.new("RGB", (4, 4)).save(small)
    table = captioner(pa.table({"path": [str(small), str(good), str(gone)]}))
    assert table.schema.equals(ROWS)
    rows = {Path(row["path"]).stem: row for row in table.to_pylist()}
    image = read_photo(good).image
    (answer,) = critique(captioner.model, captioner.processor, [image], [(8, 8)], max_new_tokens=160)
    assert rows["good"]["caption"] == answer["caption"] and rows["good"]["error"] is None
    assert (rows["good"]["score"], rows["good"]["std"]) == pytest.approx(tuple(answer["score"].values()), abs=1e-4)
    assert json.loads(rows["good"]["aspects"]).keys() == answer["aspects"].keys()
    assert (rows["good"]["width"], rows["good"]["height"]) == (160, 120)
    assert rows["good"]["sha256"] == read_photo(good).stamp.sha256
    assert "too small" in rows["small"]["error"] and "No such file" in rows["gone"]["error"]
    assert {row["model"] for row in rows.values()} == {captioner.args.model}


def test_a_batch_that_all_failed_has_the_same_columns(captioner):
    assert captioner(pa.table({"path": ["nowhere.jpg"]})).schema.equals(ROWS)


def test_a_photograph_that_the_model_cannot_do_costs_no_other(captioner, tmp_path, monkeypatch):
    paths = make_photos(tmp_path, 3)

    def critique_all(model, processor, photos, max_new_tokens):
        if any(photo.path.stem == "001" for photo in photos):
            raise ValueError("odd")
        return [{"caption": "So.", "score": {"mean": 5.0, "std": 1.0}, "aspects": {}} for _ in photos]

    monkeypatch.setattr(caption_ray, "critique_all", critique_all)
    rows = captioner(pa.table({"path": paths})).to_pylist()
    assert [row["error"] for row in rows] == [None, "the model failed: odd", None]
    assert [row["caption"] for row in rows] == ["So.", None, "So."]


def test_limits_and_threads_reach_the_model(tmp_path, monkeypatch):
    (path,) = make_photos(tmp_path, 1)
    table = pa.table({"path": [path]})
    threads = torch.get_num_threads()
    options = [str(tmp_path), "--out", "out", "--threads", "2", "--max-new-tokens", "3"]
    small = Captioner(caption_ray.parse_arguments(options))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert len(small.processor.tokenizer(small(table)["caption"][0].as_py())["input_ids"]) <= 4
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    with warnings.catch_warnings():
        bounded = Captioner(caption_ray.parse_arguments([*options, "--max-megapixels", "0.01"]))
        assert "too large" in bounded(table)["error"][0].as_py()
    monkeypatch.setattr(caption_ray, "start_model", lambda args: (args.model, args.trust_remote_code))
    other = Captioner(caption_ray.parse_arguments([*options, "--model", "some/model", "--trust-remote-code"]))
    assert (other.model, other.processor) == ("some/model", True)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("address", "options"), [("auto", {"address": "auto"}), (None, {"include_dashboard": False})])
def test_a_cluster_is_found_by_its_address(address, options, monkeypatch):
    given = {}
    monkeypatch.setattr(caption_ray, "ray", Namespace(init=given.update))
    caption_ray.start_ray(address)
    assert options.items() <= given.items()
    assert ("num_cpus" in given) == (address is None), "a cluster's cores are its own"
    assert given.get("num_cpus", 2) >= 2


def test_blocks_batches_and_workers_are_as_many_as_was_said(tmp_path, monkeypatch):
    rows, context = MagicMock(), Namespace(max_errored_blocks=0)
    rows.repartition.return_value = rows.map_batches.return_value = rows
    data = MagicMock(from_arrow=MagicMock(return_value=rows))
    data.DataContext.get_current.return_value = context
    monkeypatch.setattr(caption_ray, "ray", Namespace(data=data, cluster_resources=lambda: {"CPU": 9}))
    options = ["--block", "7", "--batch-size", "3", "--workers", "5"]
    caption_ray.caption(["a"], caption_ray.parse_arguments([str(tmp_path), "--out", "out", *options]))
    rows.repartition.assert_called_once_with(target_num_rows_per_block=7)
    data.ActorPoolStrategy.assert_called_once_with(size=5)
    assert rows.map_batches.call_args.kwargs["batch_size"] == 3
    assert rows.write_parquet.call_args.kwargs["mode"] == "append"
    assert context.max_errored_blocks == 0, "with others, rows are lost without a word"


def test_what_makes_no_sense_is_refused(tmp_path, capsys):
    for options in (["--block", "0"], ["--workers", "-1"], ["nowhere"]):
        with pytest.raises(SystemExit):
            caption_ray.parse_arguments([*options, str(tmp_path), "--out", "out"])
    said = capsys.readouterr().err
    assert "--block is 0" in said and "--workers is -1" in said and "no file or folder nowhere" in said


# What is written -----------------------------------------------------------------------------------------------------


def test_what_has_a_row_is_not_done_again(tmp_path):
    write_rows(tmp_path / "a.parquet", {"path": "/a.jpg", "caption": "So."}, {"path": "/b.jpg", "error": "broken"})
    files = [Path("/a.jpg"), Path("/b.jpg"), Path("/c.jpg")]
    assert left_to_do(files, written(tmp_path), retry=False) == ["/c.jpg"]
    assert left_to_do(files, written(tmp_path), retry=True) == ["/b.jpg", "/c.jpg"]
    write_rows(tmp_path / "b.parquet", {"path": "/b.jpg", "caption": "So."})
    assert left_to_do(files, written(tmp_path), retry=True) == ["/c.jpg"], "it has one that is no error"
    assert left_to_do(files, written(tmp_path / "empty"), retry=False) == ["/a.jpg", "/b.jpg", "/c.jpg"]


def test_a_file_that_was_cut_short_is_set_aside(tmp_path, capsys):
    write_rows(tmp_path / "whole.parquet", {"path": "/a.jpg"})
    whole = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    (tmp_path / "empty.parquet").write_bytes(b"")
    set_cut_files_aside(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.cut", "empty.cut", "whole.parquet"]
    assert "cut.parquet: cut short" in capsys.readouterr().err
    assert len(written(tmp_path)) == 1


def test_the_captions_of_two_models_are_not_mixed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(caption_ray, "ray", object())
    make_photos(tmp_path / "photos", 1)
    out = tmp_path / "out"
    out.mkdir()
    write_rows(out / "a.parquet", {"path": "/a.jpg"})
    assert caption_ray.main([str(tmp_path / "photos"), "--out", str(out)]) == 2
    assert "has captions by m, not" in capsys.readouterr().err


def test_two_runs_at_a_time_are_refused(tmp_path, capsys):
    with caption_ray.FileLock(tmp_path / ".lock"):
        assert caption_ray.main([str(ROOT / "examples" / "photos"), "--out", str(tmp_path)]) == 2
    assert "another run is at work" in capsys.readouterr().err


def test_without_ray_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(caption_ray, "ray", None)
    assert caption_ray.main([str(ROOT / "examples" / "photos"), "--out", str(tmp_path)]) == 2
    assert "pip install -e '.[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cores", "cards", "asked", "workers"),
    [(8, 0, None, (7, 0)), (2, 0, 1, (1, 0)), (8, 2, None, (2, 1)), (2, 0, 2, "2 workers need 3"), (8, 1, 2, "card")],
)
def test_a_core_is_left_for_rays_own_work(cores, cards, asked, workers, monkeypatch):
    monkeypatch.setattr(caption_ray, "ray", Namespace(cluster_resources=lambda: {"CPU": cores, "GPU": cards}))
    if isinstance(workers, tuple):
        assert caption_ray.workers_of(asked) == workers
    else:
        with pytest.raises(caption_ray.CannotStart, match=workers):
            caption_ray.workers_of(asked)


# With Ray, on two cores ----------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path):
    """The command on a folder, in a process group of its own that is gone at the end."""
    started = []

    def start(*options: str, code: str | None = None) -> subprocess.Popen:
        script = [str(ROOT / "examples" / "caption_ray.py")] if code is None else ["-c", code]
        options = [str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--workers", "1", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples"), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, *script, *options],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()


def wait_for(condition, seconds: float = 90):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)
    return found


def workers_below(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if any("Captioner" in part for part in child.cmdline())]


@needs_ray
@pytest.mark.slow
def test_a_worker_that_is_killed_costs_no_row(command, tmp_path):
    paths = make_photos(tmp_path / "photos", 60)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no picture")
    run = command("--block", "10", "--batch-size", "5")
    wait_for(lambda: list((tmp_path / "out").glob("*.parquet")))
    (worker,) = workers_below(run)
    worker.kill()
    said, _ = run.communicate(timeout=180)
    assert run.returncode == 1 and "60 captioned, 1 failed" in said, said
    rows = rows_of(tmp_path / "out")
    assert Counter(row["path"] for row in rows) == Counter([*paths, str(tmp_path / "photos" / "broken.jpg")])
    assert [row["path"] for row in rows if row["error"]] == [str(tmp_path / "photos" / "broken.jpg")]


@needs_ray
@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(command, tmp_path):
    paths = make_photos(tmp_path / "photos", 80)
    out = tmp_path / "out"
    first = command("--block", "10", "--batch-size", "5")
    wait_for(lambda: len(list(out.glob("*.parquet"))) >= 2)
    family = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=60)  # its Ray ends by itself
    set_cut_files_aside(out)
    kept = len(rows_of(out))
    assert 20 <= kept < 80 and kept % 10 == 0
    second = command("--block", "10", "--batch-size", "5")
    said, _ = second.communicate(timeout=180)
    assert second.returncode == 0 and f"{kept} of 80 photographs are in" in said, said
    assert Counter(row["path"] for row in rows_of(out)) == Counter(paths)
    third = command()
    said, _ = third.communicate(timeout=180)
    assert third.returncode == 0 and "0 captioned, 0 failed" in said and "workers" not in said, said


POISON = """
import os, sys
import caption_ray

class Poisoned(caption_ray.Captioner):
    def __call__(self, batch):
        if any("poison" in path for path in batch["path"].to_pylist()):
            os._exit(1)
        return super().__call__(batch)

caption_ray.Captioner = Poisoned
sys.exit(caption_ray.main())
"""


@needs_ray
@pytest.mark.slow
def test_a_photograph_that_kills_every_worker_ends_the_run(command, tmp_path):
    make_photos(tmp_path / "photos", 12)
    write_photo(tmp_path / "photos" / "poison.jpg", 0)
    run = command("--block", "4", "--batch-size", "4", code=POISON)
    said, _ = run.communicate(timeout=240)
    assert run.returncode == 1 and "Stopped" in said, said
    assert all("poison" not in row["path"] for row in rows_of(tmp_path / "out"))
