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
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def main() -> None:
    """Run what has no result yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results/thirdparty.jsonl")
    parser.add_argument("--table", type=Path, default=ROOT / "docs/thirdparty.md")
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--compile", action="store_true", help="torch.compile too; takes long")
    parser.add_argument("--only-table", action="store_true", help="run nothing")
    args = parser.parse_args()

    torch.set_num_threads(1)  # threads do not survive a fork
    known = {} if args.again else read(args.results)
    chosen = [n for n in MODELS if any(fnmatchcase(n, p) for p in args.patterns)]
    for name in [] if args.only_table else chosen:
        result = known.setdefault(name, {"model": name, "problems": {}, "facts": {}})
        columns = [*checks.CHECKS, *(["compile"] if args.compile else [])]
        missing = [c for c in columns if c not in result["facts"] and c not in result["problems"]]
        if missing:
            found = in_a_process(name, missing)
            for part, seen in found.items():
                result[part] |= seen
            print(f"{name}: {found['problems'] or 'ok'}", flush=True)
            lines = (json.dumps(known[n]) for n in MODELS if n in known)
            args.results.write_text("".join(f"{line}\n" for line in lines))
    write_table(args.table, read(args.results))


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Results by model."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["model"]: result for result in map(json.loads, lines)}


def in_a_process(name: str, columns: list[str]) -> dict[str, dict[str, Any]]:
    """The result of one model, also where it takes the process with it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(result_of(name, columns)), daemon=True)
    process.start()
    theirs.close()
    try:
        why = f"over {SECONDS} s"
        found = ours.recv() if ours.poll(SECONDS) else None
    except EOFError:
        why, found = "the process died", None
    process.kill()
    process.join()
    return found or {"problems": dict.fromkeys(columns, why), "facts": {}}


def result_of(name: str, columns: list[str]) -> dict[str, dict[str, Any]]:
    """What the checks saw of one model, and what they raised."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    facts: dict[str, Any] = {}
    problems: dict[str, str] = {}
    subject = None
    for column in columns:
        try:
            subject = subject or checks.Subject(MODELS[name])
            facts[column] = checks.ALL[column](subject)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            problems[column] = text[:600]
    return {"problems": problems, "facts": facts}


def write_table(path: Path, known: dict[str, dict[str, Any]]) -> None:
    """Replace what is between the marks in the page."""
    text = path.read_text()
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{path}: expected the marks {BEGIN} and {END}")
    path.write_text(f"{before}{mark}\n{table(known)}\n{end}{after}")


def table(known: dict[str, dict[str, Any]]) -> str:
    """The totals and a row for each model."""
    good = [r for r in known.values() if not r["problems"]]
    sums = {c: [r["facts"][c] for r in known.values() if c in r["facts"]] for c in checks.ALL}
    convert, fuse = sums["convert"], sums["fuse"]
    lines = [
        f"{len(known)} models of {len({n.partition('/')[0] for n in known})} packages: on "
        f"{len(good)} every check passed. {sum(f['converted'] for f in convert)} of "
        f"{sum(f['layers'] for f in convert)} convolutions converted, "
        f"{sum(f['fused'] for f in fuse)} of {sum(f['layers'] for f in fuse)} layers fused.",
        "",
        "| model | answers with | converted | not, and why | error | fused | not, and why |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [row(result) for result in known.values()]
    for name, result in known.items():
        lines += [f"\n{name}, {column}: {why}" for column, why in result["problems"].items()]
    return "\n".join(lines)


def row(result: dict[str, Any]) -> str:
    """One model."""
    facts = result["facts"]
    convert, fuse = facts.get("convert"), facts.get("fuse")
    cells = [result["model"], facts.get("built", {}).get("answer", "")]
    if convert:
        cells += [f"{convert['converted']} of {convert['layers']}", _counted(convert["reasons"])]
        cells.append(f"{convert['errors'][0]:.0e}")
    else:
        cells += ["fails", "", ""]
    if fuse:
        parts = [f"{name or 'the model'}: {why}" for name, why in fuse["left"].items()]
        why = "; ".join([_counted(fuse["reasons"]), *parts])
        cells += [f"{fuse['fused']} of {fuse['layers']}", why.strip("; ")]
    else:
        cells += ["fails", ""]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _counted(reasons: dict[str, int]) -> str:
    return ", ".join(f"{n} {why}" for why, n in reasons.items())


if __name__ == "__main__":
    main()
