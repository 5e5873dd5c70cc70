"""Train MobileNetV1 as in the paper, on digits, CIFAR-10 or a folder of images.

    python examples/train_mobilenet.py digits
    python examples/train_mobilenet.py cifar10 --data DIR --amp bf16
    torchrun --nproc-per-node 8 examples/train_mobilenet.py folder --data DIR --schedule staircase

RMSprop, no weight decay on depthwise filters, light augmentation, no label smoothing, averaged
weights. Stop it whenever you like (Ctrl-C, SIGTERM): the same command goes on from the same step,
with the same result as without the pause. `--help` lists the options.
"""

import sys

from mobilenet_training.loop import Trainer
from mobilenet_training.processes import processes
from mobilenet_training.recipe import parse
from rich.console import Console


def main() -> int:
    recipe = parse()
    console = Console(stderr=True)
    with processes() as group:
        if group.is_first:
            recipe.out.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(recipe, group, console)
        if trainer.run():
            return 0
        if group.is_first:
            console.print(f"stopped at step {trainer.progress.step}; run it again to go on")
        return 143


if __name__ == "__main__":
    sys.exit(main())
