"""The training loop: epochs of steps, from wherever the state is to the end or to a signal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sepconv import mobilenet

from .curves import write_curves
from .data import Images, epoch_batches, mixed_seed, open_images
from .network import make_network
from .optimisation import Average, learning_rate, make_optimizer
from .processes import Processes, StopSignal
from .recipe import Recipe
from .state import Parts, load_state, save_state

_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """A run of a recipe in this process.

    Args:
        recipe: What to do.
        processes: This process among all.
        console: Where the first process reports.
    """

    def __init__(self, recipe: Recipe, processes: Processes, console: Console) -> None:
        if recipe.amp == "fp16" and processes.device.type != "cuda":
            raise SystemExit("--amp fp16 needs a GPU; a CPU has bf16")
        self.recipe, self.processes, self.console = recipe, processes, console
        self.images: Images = open_images(recipe, processes.device)
        torch.manual_seed(recipe.seed)
        network = make_network(recipe, self.images.channels, self.images.num_classes)
        network.to(processes.device)
        self.parts = Parts(
            network,
            Average(network, recipe.ema_decay),
            make_optimizer(network, recipe),
            torch.amp.GradScaler(processes.device.type, enabled=recipe.amp == "fp16"),
        )
        self.path = recipe.out / "state.pt"
        self.progress = load_state(self.path, recipe, self.parts, processes.device)
        self.steps_per_epoch = len(self._batches(0))
        if not self.steps_per_epoch:
            raise SystemExit(
                f"{self.images.train_size} images are no full batch of {recipe.batch_size} for "
                f"each of {processes.world_size} processes"
            )
        self.forward = self._wrapped(network)
        self.stop = StopSignal()
        self._saved_at = time.monotonic()

    def run(self) -> bool:
        """Train to the last epoch; return False if a signal ended it before."""
        while self.progress.step < self.recipe.epochs * self.steps_per_epoch:
            if not self._epoch(self.progress.step // self.steps_per_epoch):
                return False
        if self.processes.is_first:
            self._write_network()
        return True

    def _epoch(self, epoch: int) -> bool:
        progress, first = self.progress, self.progress.step % self.steps_per_epoch
        batches = self._batches(epoch)
        seeds = [
            mixed_seed(self.recipe.seed, epoch, step, self.processes.rank)
            for step in range(len(batches))
        ]
        self.parts.network.train()
        totals = torch.tensor(
            [progress.losses, float(progress.correct), float(progress.seen)],
            dtype=torch.float64,
            device=self.processes.device,
        )
        if not self.processes.is_first:
            totals.zero_()  # the saved sums are those of all processes
        begun = time.monotonic() - progress.seconds
        with self._bar(epoch) as advance:
            advance(first)
            for x, y in self.images.train_batches(batches[first:], seeds[first:]):
                torch.manual_seed(seeds[progress.step % self.steps_per_epoch])
                self._step(x.to(self.processes.device), y.to(self.processes.device), totals)
                progress.step += 1
                progress.seconds = time.monotonic() - begun
                advance(1)
                stop, save = self._wishes()
                ended = progress.step % self.steps_per_epoch == 0
                if (stop or save) and not ended:
                    self._save(totals)
                    if stop:
                        return False
        self._sum_up(totals)
        self._close_epoch(epoch)
        return not stop or progress.step == self.recipe.epochs * self.steps_per_epoch

    def _step(self, x: Tensor, y: Tensor, totals: Tensor) -> None:
        optimizer, scaler = self.parts.optimizer, self.parts.scaler
        lr = learning_rate(self.recipe, self.progress.step, self.steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with self._autocast():
            logits = self.forward(x)
            loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        self.parts.average.update(self.parts.network, self.progress.step)
        with torch.no_grad():
            totals[0] += loss.double() * len(y)
            totals[1] += (logits.argmax(1) == y).sum()
            totals[2] += len(y)

    def _close_epoch(self, epoch: int) -> None:
        progress = self.progress
        test_loss, test_accuracy = self.evaluate(self.parts.average.network)
        _, last_accuracy = self.evaluate(self.parts.network)
        row = {
            "epoch": epoch + 1,
            "step": progress.step,
            "lr": self.parts.optimizer.param_groups[0]["lr"],
            "train_loss": progress.losses / progress.seen,
            "train_accuracy": progress.correct / progress.seen,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "test_accuracy_last": last_accuracy,
            "seconds": round(progress.seconds, 2),
            "images_per_second": round(progress.seen / progress.seconds, 1),
        }
        progress.history.append(row)
        progress.losses, progress.correct, progress.seen, progress.seconds = 0.0, 0, 0, 0.0
        if self.processes.is_first:
            save_state(self.path, self.recipe, self.parts, progress)
            write_curves(self.recipe.out, progress.history)
            self.console.print(
                f"epoch {row['epoch']:>3}: loss {row['train_loss']:.4f}, test accuracy "
                f"{test_accuracy:.2%} ({last_accuracy:.2%} without averaging), "
                f"{row['seconds']:.1f} s, {row['images_per_second']:.0f} images/s",
                highlight=False,
            )

    @torch.no_grad()
    def evaluate(self, network: nn.Module) -> tuple[float, float]:
        """Return loss and accuracy on the test images."""
        network.eval()
        losses = correct = seen = 0.0
        processes = self.processes
        for x, y in self.images.test_batches(256, processes.rank, processes.world_size):
            x, y = x.to(processes.device), y.to(processes.device)
            with self._autocast():
                logits = network(x).float()
            losses += float(F.cross_entropy(logits, y, reduction="sum"))
            correct += float((logits.argmax(1) == y).sum())
            seen += len(y)
        losses, correct, seen = processes.summed(losses, correct, seen)
        return losses / seen, correct / seen

    def _wishes(self) -> tuple[bool, bool]:
        """Whether to stop, and whether to save now: the same answer in every process."""
        every = self.recipe.save_steps
        due = time.monotonic() - self._saved_at > self.recipe.save_seconds
        due = due or (every > 0 and self.progress.step % every == 0)
        stop, save = self.processes.summed(self.stop.received, due and self.processes.is_first)
        return stop > 0, save > 0

    def _save(self, totals: Tensor) -> None:
        mine = totals.clone()
        self._sum_up(totals)
        if self.processes.is_first:
            save_state(self.path, self.recipe, self.parts, self.progress)
        totals.copy_(mine)
        self._saved_at = time.monotonic()

    def _sum_up(self, totals: Tensor) -> None:
        losses, correct, seen = self.processes.summed(*totals.tolist())
        self.progress.losses, self.progress.correct = losses, int(correct)
        self.progress.seen = int(seen)

    def _batches(self, epoch: int) -> list[Tensor]:
        return epoch_batches(
            self.images.train_size,
            self.recipe.batch_size,
            self.recipe.seed,
            epoch,
            repeats=self.recipe.repeats,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )

    def _wrapped(self, network: nn.Module) -> nn.Module:
        if self.recipe.compile:
            network.compile()
        if self.processes.world_size == 1:
            return network
        ids = [self.processes.device.index] if self.processes.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids)

    def _autocast(self) -> torch.autocast:
        dtype = _AMP_DTYPES.get(self.recipe.amp)
        return torch.autocast(self.processes.device.type, dtype, enabled=dtype is not None)

    @contextmanager
    def _bar(self, epoch: int) -> Iterator[Callable[[int], None]]:
        shown = self.processes.is_first and self.console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with ProgressBar(*columns, console=self.console, disable=not shown, transient=True) as bar:
            task = bar.add_task(f"epoch {epoch + 1}", total=self.steps_per_epoch)
            yield lambda steps: bar.advance(task, steps)

    def _write_network(self) -> None:
        network = self.parts.average.network
        if isinstance(network, mobilenet.MobileNetV1):
            mobilenet.save(network, self.recipe.out / "mobilenet.safetensors")
        else:
            torch.save(network.state_dict(), self.recipe.out / "timm.pt")
