"""
The field's table by one command: a plain base and its graft trained alike, both and the untrained base measured on the test.

    make paper-table                                                      # small, offline, minutes on two cores
    python examples/paper_table.py --base llava-hf/llava-1.5-7b-hf --data PCCD --images PCCD/images --out runs/table \
        --stage lora --num_train_epochs 3 --dtype bfloat16 --bf16

Without --base and --data both are made by small_pccd.py. Trained by finetune.py twice, which differ in `--graft` alone:
`base` (none) and `ase`, on the same rows in the same order with the same seed, steps and options; the last weights of both
are taken, as the losses by which a best would be chosen are not of the same terms. Options that are not named here are
finetune.py's. Then evaluate_captions.py has `zero-shot` (the base as it came), `base` and `ase` caption the test split, and
the table goes to --out: table.md (wide, as papers have it), evaluation/report.md and .json (every figure).

Interrupted, the same command goes on where the training was. One seed is one draw: the intervals are over photographs of
the test, not over training runs; for those give other --seed and --out. Needs the extras `training` and `evaluation`.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from readers import pccd
from small_pccd import write_small


try:
    from report_table import as_wide
except ModuleNotFoundError as error:
    sys.exit(f"paper_table.py needs {error.name}: pip install -e '.[training,evaluation]'")


HERE = Path(__file__).parent
# what both runs share where nothing else is said; small enough for two cores
SMALL = {
    "stage": "all",
    "max_steps": "400",
    "per_device_train_batch_size": "16",
    "learning_rate": "1e-3",
    "gate_lr_ratio": "5",
    "save_strategy": "steps",
    "save_steps": "100",
}
ALWAYS = {"eval_strategy": "no", "patience": "0", "logging_steps": "20", "report_to": "none"}


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--base", help="folder or Hub id of a base (default: a tiny one)")
    parser.add_argument("--data", help="with a test split, in one of the forms of aic_data.py (default: a small one)")
    parser.add_argument("--images", help="folder of the pictures, if they are elsewhere")
    parser.add_argument("--pccd", choices=pccd.TEXTS, default="joined", help="which texts of PCCD are a row")
    parser.add_argument("--aspects", action="store_true", help="train the module's aspects by the data's topic scores")
    parser.add_argument("--against", default="base", choices=("zero-shot", "base", "ase"), help="default: base")
    parser.add_argument("--out", type=Path, default=Path("paper-table"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resamples", type=int, default=1000, help="of bootstrap and permutation test")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args, others = parser.parse_known_args(argv)
    if (args.base is None) != (args.data is None):
        parser.error("give both --base and --data, or neither")
    return args, others


def run(script: str, *arguments: object) -> str:
    """Runs a script of this folder, says how, and returns that."""
    command = ["python", f"examples/{script}", *map(str, arguments)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, HERE / script, *command[2:]], check=True)
    return shlex.join(command)


def main(argv: list[str] | None = None):
    args, others = parse_arguments(argv)
    shared = ALWAYS
    if args.base is None:
        shared = ALWAYS | SMALL
        args.data, args.base = write_small(args.out / "small")
    source = ["--data", args.data, "--pccd", args.pccd, *(["--images", args.images] if args.images else [])]

    # Training
    options = [part for name, value in shared.items() for part in (f"--{name}", value)]
    options += ["--seed", args.seed, *(["--aspect_names", "topics"] if args.aspects else []), *others]
    trained = {name: args.out / name for name in ("base", "ase")}
    commands = [
        run(
            *("finetune.py", "--model", args.base, *source, "--graft", "none" if name == "base" else "ase"),
            *("--output_dir", folder, *options),
        )
        for name, folder in trained.items()
    ]

    # The table
    names, folder = ["zero-shot", *trained], args.out / "evaluation"
    measured = ["--split", "test", "--against", args.against, "--resamples", args.resamples, "--out", folder]
    measured += ["--max-new-tokens", args.max_new_tokens, "--seed", args.seed]
    commands.append(run("evaluate_captions.py", args.base, *trained.values(), "--names", *names, *source, *measured))
    table = as_wide(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    table += f"- one training run each, seed {args.seed}: the intervals are over photographs, not over runs.\n"
    if shared is not ALWAYS:
        table += "- small generated data and a tiny base of random weights: the procedure works, nothing about photographs.\n"
    table += "\nMade by\n\n" + "".join(f"    {command}\n" for command in commands)
    (args.out / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\n{args.out / 'table.md'}")


if __name__ == "__main__":
    main()
