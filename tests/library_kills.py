"""
Captions a large library and is killed at random: `PYTHONPATH=examples python tests/library_kills.py --record examples/library.md`.

Many small generated photographs, a tiny model, `caption_photos.py` as anyone runs it, killed without a warning again and
again; then once to the end, and once more with nothing to do. Each photograph must have one result, and memory must not
grow with the number of photographs. It takes minutes, so it is no test of the suite.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from finetuning import write_checkpoint
from library_file import LibraryError, reading
from PIL import Image


SCRIPT = Path(__file__).parents[1] / "examples" / "caption_photos.py"


def write_noise(folder: Path, number: int):
    """Pictures of noise, no two alike, a thousand in a folder."""
    rng = np.random.default_rng(0)
    for i in range(number):
        path = folder / f"{i // 1000:03d}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48)).save(path)


def count_results(library: Path) -> int:
    try:
        with reading(library) as opened:
            return opened.execute("SELECT count(*) FROM result").fetchone()[0]
    except LibraryError:  # killed before there was one
        return 0


def memory(process: int) -> int:
    """Resident, in whole MiB; 0 when it has ended."""
    try:
        return psutil.Process(process).memory_info().rss // 2**20
    except psutil.Error:
        return 0


def run(command: list[str], kill_at: int | None, library: Path, log: Path) -> dict[str, float]:
    """One run, killed when that many results are there: its exit status, how long it took, and its memory (MiB) when a
    tenth of its own results were there and at most later."""
    began, before, trace = time.monotonic(), count_results(library), []
    kill_at = kill_at and max(kill_at, before + 1)
    with log.open("a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.05 if kill_at is not None else 0.5)
            done = count_results(library)
            trace.append((done, memory(process.pid)))
            if kill_at is not None and done >= kill_at:
                process.kill()
                process.wait()
    tenth = before + 0.1 * (trace[-1][0] - before)
    early = [used for done, used in trace if before < done <= tenth]
    late = [used for done, used in trace if done > tenth]
    return {
        "status": process.returncode,
        "seconds": time.monotonic() - began,
        "results": count_results(library),
        "early": max(early, default=0),
        "late": max(late, default=0),
    }


def check(library: Path, number: int):
    counts = """
        SELECT (SELECT count(*) FROM file WHERE error IS NULL), (SELECT count(*) FROM result WHERE error IS NULL),
            (SELECT count(DISTINCT path) FROM file JOIN result USING (sha256) WHERE caption IS NOT NULL)
    """
    with reading(library) as opened:
        files, results, described = opened.execute(counts).fetchone()
        assert files == results == described == number, f"{number} photographs, but {files=}, {results=}, {described=}"
        assert opened.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    generator = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, photos, out = write_checkpoint(folder / "model"), folder / "photographs", folder / "captions"
        write_noise(photos, args.photographs)
        options = ["--model", model, "--out", out, "--max-new-tokens", "8", "--batch-size", "16"]
        command = [sys.executable, *map(str, [SCRIPT, photos, *options])]
        log, lines = folder / "log", []
        moments = sorted(generator.sample(range(1, args.photographs * 9 // 10), args.kills))
        runs = {f"{number}, killed": moment for number, moment in enumerate(moments, 1)}
        for name, moment in {**runs, "to the end": None, "once more, nothing to do": None}.items():
            one = run(command, moment, out, log)
            assert one["status"] == (0 if moment is None else -signal.SIGKILL), log.read_text()[-2000:]
            if moment is None:
                check(out, args.photographs)
            grown = f"{one['early'] or '-'} / {one['late']}" if one["late"] else "-"
            lines.append(f"| {name} | {one['results']:,} | {one['seconds']:.0f} | {grown} |")
            print(lines[-1], flush=True)
    head = [
        "# A large library, killed again and again",
        "",
        f"`tests/library_kills.py`: {args.photographs:,} small generated photographs and a tiny model, killed {args.kills} "
        "times at random moments (`SIGKILL`). In the end each photograph had one result, and SQLite found the library whole.",
        "",
        "| run | results by its end | seconds | memory, MiB: at a tenth of its own results / at most later |",
        "|---|---|---|---|",
    ]
    if args.record:
        args.record.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
