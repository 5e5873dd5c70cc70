"""Check every model of the matrix and write the table `docs/thirdparty.md`.

Run as `python tests/thirdparty/run.py [pattern ...]` from the root, with the extra `thirdparty`
installed. Each model runs in a process of its own. Results are appended to a JSON-lines file, and a
run that was stopped goes on where it was.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402 (after the line above)

from examples.benchmarks.bench import torchvision_shim  # noqa: E402 (the same)

torchvision_shim.install()

from thirdparty import checks  # noqa: E402 (the same)
from thirdparty.models import MODELS  # noqa: E402 (the same)

SECONDS = 900  # for one model


def main() -> None:
    """Run what has no result yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results/thirdparty.jsonl")
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--compile", action="store_true", help="torch.compile too; takes minutes")
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    known = read(args.results)
    for name in MODELS:
        if not any(fnmatchcase(name, pattern) for pattern in args.patterns):
            continue
        if name not in known or args.again:
            known[name] = in_a_process(name, args.compile)
            problems = known[name]["problems"]
            print(f"{known[name]['seconds']:6.1f} s {name} {problems or 'ok'}", flush=True)
            lines = (json.dumps(known[n]) for n in MODELS if n in known)
            args.results.write_text("".join(f"{line}\n" for line in lines))


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Results by model."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["model"]: result for result in map(json.loads, lines)}


def in_a_process(name: str, compiling: bool) -> dict[str, Any]:
    """The result of one model, also where it takes the process with it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(result_of(name, compiling)), daemon=True)
    start = time.time()
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(SECONDS) else {"problems": {"all": f"over {SECONDS} s"}}
    except EOFError:
        found = {"problems": {"all": "the process died"}}
    process.kill()
    process.join()
    return {"model": name, "seconds": round(time.time() - start, 1)} | found


def result_of(name: str, compiling: bool) -> dict[str, Any]:
    """What every check saw of one model, and what it raised."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    facts: dict[str, Any] = {}
    problems: dict[str, str] = {}
    try:
        subject = checks.Subject(MODELS[name])
        facts["answer"] = type(subject.expected).__name__
        facts["wide"] = subject.wide is not None
        facts["strong"] = checks.strong(subject)
    except Exception:
        return {"problems": {"build": traceback.format_exc(limit=-2)}}
    chosen = checks.CHECKS | ({"compile": checks.compiled} if compiling else {})
    for column, check in chosen.items():
        try:
            facts[column] = check(subject)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            problems[column] = text[:600]
    return {"problems": problems, "facts": facts}


if __name__ == "__main__":
    main()
