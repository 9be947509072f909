"""Runs of a benchmark that fail, in a file of their own: a process that runs them imports nothing else."""

import os


def failing_run(args, run):
    """One arm fails, one is killed."""
    if run[0] == "longer":
        raise ValueError("no luck")
    if run[0] == "control":
        os._exit(1)
    return {"arm": run[0]}
