"""`python -m examples.benchmarks.bench compiled | cpu | fuse | ...`: a sub-command each module."""

import argparse

from examples.benchmarks.bench import compiled, conversion, cpu, fuse, gpu, overhead


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmarks.bench")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (compiled, conversion, cpu, fuse, gpu, overhead):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
