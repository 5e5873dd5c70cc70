"""`sepconv tune`: race the kernels for a model's calls on this machine's GPU."""

from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.table import Table

from sepconv.cli.result import Result
from sepconv.cli.sources.opening import open_source
from sepconv.ops import choice, choice_files
from sepconv.ops.backend import backend, can_run_kernels
from sepconv.tuning import Tuned, tune
from sepconv.tuning.race import OUT_OF_TIME


def run(options: Namespace) -> Result:
    """Tune each shape and type, and export the table of this GPU."""
    source = open_source(options, trained=False)
    device = next(source.model.parameters(), torch.empty(0)).device
    cases = [(getattr(torch, name), shape) for name in options.dtype for shape in options.input]
    found: list[Tuned] = []
    for dtype, shape in cases:
        x = torch.randn(shape, device=device, dtype=dtype)
        seconds = None if options.seconds is None else options.seconds / len(cases)
        # A CPU can only interpret the kernels: good for trying this out, not for timing.
        interprets = x.is_cpu and can_run_kernels(x)
        with backend("triton" if interprets else "auto"):
            found += tune(
                source.model.to(dtype).train(options.backward),
                source.wrap(x),
                backward=options.backward,
                seconds=seconds,
                retune=options.retune,
                max_candidates=options.candidates,
            )
    remarks = [*_losses(found)]
    data = {"source": source.name, "tuned": [_plain(tuned) for tuned in found]}
    result = Result(data, [_table(found), *remarks])
    result.data["remarks"] = remarks
    if options.export:
        path, told = _export(options, device)
        result.data["written"] = [path]
        result.shown += [f"wrote {path}", told]
    return result


def _plain(tuned: Tuned) -> dict[str, object]:
    """What was found for one kind of call, as it stands in files."""
    entry = choice_files.Entry(*tuned[1:])
    return {"key": tuned.key, **choice_files.entry_json(tuned.key, entry)}


def _table(found: Sequence[Tuned]) -> Table:
    table = Table(title=f"tuned now: {len(found)} kinds of calls")
    for column in ("call", "choice", "us", "default us", "gain", "tried"):
        table.add_column(column, justify="left" if column in ("call", "choice") else "right")
    for tuned in found:
        won = choice_files.choice_json(tuned.key, tuned.choice)
        shown = won if isinstance(won, str) else " ".join(f"{k}={won[k]}" for k in won)
        table.add_row(
            tuned.key,
            shown,
            f"{tuned.seconds * 1e6:.1f}",
            f"{tuned.default_seconds * 1e6:.1f}",
            f"{tuned.default_seconds / tuned.seconds:.2f}x",
            f"{tuned.tried}/{tuned.candidates}",
        )
    return table


def _losses(found: Sequence[Tuned]) -> Iterator[str]:
    """What has no time, and what to do about it."""
    unfinished = sum(not tuned.finished for tuned in found)
    if unfinished:
        yield f"ran out of time: {unfinished} of {len(found)}; the same command goes on with them"
    reasons = Counter(
        (tuned.key.split("_float")[0].split("_bfloat")[0], lost.reason)
        for tuned in found
        for lost in tuned.lost
        if lost.reason != OUT_OF_TIME
    )
    for (op, reason), count in sorted(reasons.items()):
        yield f"{op}: {count} candidates left out: {reason}"


def _export(options: Namespace, device: torch.device) -> tuple[str, str]:
    """Write the table; where it is, and what is in it."""
    index = -1 if device.type == "cpu" else (device.index or 0)
    where = choice.target(index)
    entries = choice_files.all_entries(where.gpu, where.triton)
    choices = choice_files.finished(entries)
    left_out = f"{len(entries) - len(choices)} left out, whose races are not finished"
    if not choices:
        raise ValueError(
            f"--export: nothing is tuned for {where.gpu}, Triton {where.triton}; {left_out}"
        )
    name = where.arch if options.export_arch else where.gpu
    path = choice_files.write_table(Path(options.export), name, where.triton, choices)
    return str(path), f"{len(choices)} choices; {left_out}"
