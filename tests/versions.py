"""
Runs a core of the tests under other versions of transformers than the installed one.

    python tests/versions.py --oldest      # as CI does
    python tests/versions.py 5.22.0        # this one
    python tests/versions.py --record      # all of them, and the README's table of what was run

Each version gets an environment of its own under .venv/transformers that shares all else with this one.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import torch


ROOT = Path(__file__).parents[1]
VERSIONS = ["5.19.0", "5.20.0", "5.21.0", "5.22.0", "5.23.0", "5.24.0"]
# A fresh graft is its base, open gates reach the text, a folder loads itself, also where the package is not installed,
# and the bundled model says what it says. ViP-LLaVA's own states cannot be chosen from before 5.23.
CORE = [
    "tests/test_roundtrip.py",
    "tests/test_ase_mini.py",
    "tests/test_stored_outputs.py",
    "tests/test_families.py",
    "-k",
    "(roundtrip or says or faults_are_named or fresh_graft or open_gates or saves_and_loads or iasm_sees or whole_budget or taken_out) "
    "and not vipllava and not generation_says",
]
MARKS = "<!-- versions: written by tests/versions.py -->\n", "<!-- end of versions -->"


def environment(version: str) -> Path:
    """The interpreter of an environment that has this version; made where it is missing."""
    folder = ROOT / ".venv" / "transformers" / version
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, clear=True, symlinks=True)
        own = next((folder / "lib").glob("python*")) / "site-packages"
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            own,
            f"transformers=={version}",
        ]
        subprocess.run(command, check=True)
        shared = sysconfig.get_path("purelib")
        (own / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
        (folder / "ready").touch()
    return python


def run(version: str) -> tuple[bool, str]:
    """Whether the core passes, and pytest's closing line."""
    python = environment(version)
    found = subprocess.run(
        [python, "-c", "import transformers; print(transformers.__version__)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout.split()
    if found[-1:] != [version]:
        raise RuntimeError(f"The environment of {version} has transformers {found}: delete {python.parents[1]}.")
    command = [python, "-m", "pytest", "-q", "--disable-warnings", "-p", "no:cacheprovider", *CORE]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
    return done.returncode == 0, (done.stdout.strip().splitlines() or ["nothing"])[-1]


def record(lines: list[tuple[str, str]]):
    readme = ROOT / "README.md"
    rows = "".join(f"| {version} | {re.sub(r' in .*', '', line)} |\n" for version, line in lines)
    python = ".".join(map(str, sys.version_info[:2]))
    text = f"torch {torch.__version__}, Python {python}:\n\n| transformers | core of the tests |\n|---|---|\n{rows}"
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    readme.write_text(f"{before}{MARKS[0]}{text}{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="default: %(default)s")
    parser.add_argument("--record", action="store_true", help="write the table into the README")
    parser.add_argument("--oldest", action="store_true", help="the oldest of them alone")
    args = parser.parse_args()
    lines, passed = [], True
    for version in VERSIONS[:1] if args.oldest else args.versions:
        good, line = run(version)
        print(f"transformers {version}: {line}", flush=True)
        lines.append((version, line))
        passed &= good
    if args.record:
        record(lines)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
