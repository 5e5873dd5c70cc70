"""Write this GPU's tuned choices as a table of the kind that the package ships. Tunes nothing.

Choices of races that are not finished are left out.

    python examples/benchmarks/export_table.py FOLDER [--dry-run]

`--dry-run` tunes one tiny call on the CPU first, with TRITON_INTERPRET=1.
"""

import argparse
import sys
from pathlib import Path

import torch

import sepconv
from sepconv.ops import choice, choice_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        with sepconv.backend("triton"):
            model, x = sepconv.nn.SeparableConv2d(3, 4, 3), torch.ones(1, 3, 6, 6)
            sepconv.tune(model, x, max_candidates=1)
    where = choice.target(-1 if args.dry_run else 0)
    entries = choice_files.all_entries(where.gpu, where.triton)
    choices = choice_files.finished(entries)
    left_out = f"{len(entries) - len(choices)} left out, whose races are not finished"
    if not choices:
        sys.exit(f"nothing is tuned for {where.gpu}, Triton {where.triton}; {left_out}")
    path = choice_files.write_table(args.folder, where.gpu, where.triton, choices)
    print(f"wrote {len(choices)} choices to {path}; {left_out}")


if __name__ == "__main__":
    main()
