"""Answers a file of prompts: `trimtab batch --input prompts.jsonl --output results.jsonl`.

Runs on a machine of the cluster, by itself or under `ray job submit --working-dir . -- trimtab batch ...`.
What it reads is in `deploy.jobs.batch.lines`, what it writes in `deploy.jobs.batch.results`; neither knows of Ray.
"""

import asyncio
import sys
from collections.abc import Sequence

import ray

from cluster.errors import InvalidConfiguration
from deploy.cli.options.batch import COMMAND, Options
from deploy.cli.trimtab import old_way
from deploy.jobs.batch.lines import Pending, read_lines
from deploy.jobs.batch.results import ResultFile
from deploy.jobs.outcome import BadOutcome
from deploy.jobs.progress import Progress
from deploy.jobs.requests import answer_all, connect


def run(options: Options) -> None:
    """Do the batch.

    Raises:
        BadOutcome: a request failed.
        InvalidConfiguration: it could not be started.
        OSError: a file cannot be read or written.
    """
    defaults = options.defaults
    source, target = options.input.resolve(), options.output.resolve()
    if not source.is_file():
        raise InvalidConfiguration(f"--input: there is no file {source}")
    if not target.parent.is_dir():
        raise InvalidConfiguration(f"--output: there is no folder {target.parent}; make it first")
    if source == target:
        raise InvalidConfiguration(f"--output: {target} is the input")
    if target.exists() and not target.is_file():
        raise InvalidConfiguration(f"--output: {target} is no file")
    pending = Pending(read_lines(source, defaults))
    total = len(pending)
    client = connect()
    results = ResultFile(target)
    try:
        num_done = results.resume(pending, redo_changed=options.redo_changed)
        progress = Progress(total=total, num_done=num_done, file=sys.stderr)
        progress.note(f"{total} requests, {num_done} of them done before; results go to {target}")
        if ray.get_runtime_context().runtime_env.working_dir() and not options.output.is_absolute():
            progress.note("which is in the job's copy of the working folder: give an absolute --output to keep them")
        lines = (line for line in read_lines(source, defaults) if line.number in pending)
        try:
            asyncio.run(answer_all(lines, client.generate, results.append, progress, concurrency=options.concurrency))
        finally:
            progress.close()
    finally:
        results.close()
    if progress.num_failed:
        raise BadOutcome(f"{progress.num_failed} of {total} requests failed; the same command tries them again")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status: 0, 1 if a request failed, 2 if the batch could not be done."""
    return COMMAND.main(arguments)


if __name__ == "__main__":
    sys.exit(old_way("batch"))
