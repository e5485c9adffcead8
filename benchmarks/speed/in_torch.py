"""The step written by hand for PyTorch, Lightning, Accelerate, and a limit."""

import tempfile
from typing import Any

import modules
import torch
from problems import LEARNING_RATE, Problem
from torch import nn
from turns import EpochEnd, Train


class _Run:
    """A module, its optimizer, and sums for loss and metrics.

    Args:
        problem: what is trained.
        compiled: whether by `torch.compile`, with a fused optimizer.
    """

    def __init__(self, problem: Problem, *, compiled: bool = False) -> None:
        self.module = modules.build(problem.make())
        self.optimizer = torch.optim.Adam(
            [p for p in self.module.parameters() if p.requires_grad],
            LEARNING_RATE,
            eps=1e-7,  # Keras's, for the same losses
            fused=True if compiled else None,
        )
        self.sums = torch.zeros(3 if problem.top3 else 2)
        self._top3 = problem.top3
        self.loss_and_sums = self._loss_and_sums
        if compiled:
            self.loss_and_sums = torch.compile(self._loss_and_sums)

    def _loss_and_sums(self, x: Any, y: Any) -> tuple[Any, Any]:
        logits = self.module(x)
        loss = nn.functional.cross_entropy(logits, y)
        sums = [loss.detach(), (logits.argmax(-1) == y).float().mean()]
        if self._top3:
            best = logits.detach().topk(3).indices
            sums.append((best == y[:, None]).any(-1).float().mean())
        return loss, torch.stack(sums)

    def step(self, x: Any, y: Any) -> None:
        """Train on a batch."""
        self.optimizer.zero_grad()
        loss, sums = self.loss_and_sums(x, y)
        loss.backward()
        self.optimizer.step()
        self.sums += sums

    def take_loss(self, steps: int) -> float:
        """The mean loss, and begin another epoch."""
        loss = float(self.sums[0]) / steps
        self.sums.zero_()
        return loss


def _tensors(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = problem.data()
    return torch.from_numpy(x), torch.from_numpy(y).long()


def by_hand(problem: Problem, *, compiled: bool) -> Train:
    """A plain loop over slices of the tensors."""

    def train(epoch_end: EpochEnd) -> None:
        x, y = _tensors(problem)
        run = _Run(problem, compiled=compiled)
        while True:
            for first in range(0, len(x), problem.batch):
                batch = slice(first, first + problem.batch)
                run.step(x[batch], y[batch])
            if not epoch_end(run.take_loss(problem.steps)):
                return

    return train


def limit(problem: Problem) -> Train:
    """The compiled step on batches that are cut already."""

    def train(epoch_end: EpochEnd) -> None:
        x, y = _tensors(problem)
        batches = list(
            zip(x.split(problem.batch), y.split(problem.batch), strict=True)
        )
        run = _Run(problem, compiled=True)
        while True:
            for each in batches:
                run.step(*each)
            if not epoch_end(run.take_loss(problem.steps)):
                return

    return train


class _Rows(torch.utils.data.Dataset):
    """Gives a whole batch at once: collating examples would be slow."""

    def __init__(self, problem: Problem) -> None:
        self._x, self._y = _tensors(problem)

    def __len__(self) -> int:
        return len(self._x)

    def __getitems__(self, indices: list[int]) -> tuple[Any, Any]:
        return self._x[indices], self._y[indices]


def _loader(problem: Problem) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        _Rows(problem), problem.batch, collate_fn=lambda batch: batch
    )


def lightning(problem: Problem) -> Train:
    """Its Trainer without a logger, checkpoints and progress."""
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self, run: _Run) -> None:
            super().__init__()
            self.module, self.run = run.module, run

        def training_step(self, batch, index):
            loss, sums = self.run.loss_and_sums(*batch)
            # (`self.log` would take longer than the step.)
            self.run.sums += sums
            return loss

        def configure_optimizers(self):
            return self.run.optimizer

    def train(epoch_end: EpochEnd) -> None:
        module = Module(_Run(problem))

        class EndOfEpoch(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                loss = module.run.take_loss(problem.steps)
                trainer.should_stop = not epoch_end(loss)

        with tempfile.TemporaryDirectory() as folder:
            pl.Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=-1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[EndOfEpoch()],
                default_root_dir=folder,
            ).fit(module, _loader(problem))

    return train


def accelerate(problem: Problem) -> Train:
    """The plain loop, with what Accelerate prepared."""
    from accelerate import Accelerator

    def train(epoch_end: EpochEnd) -> None:
        run = _Run(problem)
        accelerator = Accelerator(cpu=True)
        run.module, optimizer, loader = accelerator.prepare(
            run.module, run.optimizer, _loader(problem)
        )

        while True:
            for x, y in loader:
                optimizer.zero_grad()
                loss, sums = run.loss_and_sums(x, y)
                accelerator.backward(loss)
                optimizer.step()
                run.sums += sums
            if not epoch_end(run.take_loss(problem.steps)):
                return

    return train
