"""Trains a small neural network on handwritten digits, as a job that can move between hosts.

What makes it a good citizen of Lessor is in :func:`train`: it starts from the
checkpoint that an earlier attempt handed on, saves one after every epoch, tells
its progress, and stops when it is asked to. It runs outside Lessor as well.

    python train.py --epochs 20 --checkpoint-dir /tmp/digits

The work is real and on one core: each epoch makes a fresh set of shifted,
blurred and noisy copies of the 1,437 training images that scikit-learn carries
(UCI's "Optical Recognition of Handwritten Digits") and trains on it once.
``--epochs`` and ``--repeat`` set how much work that is.

An epoch's randomness depends on the seed and the epoch alone, and the optimiser's
state is part of a checkpoint: a resumed training ends with the very model that an
undisturbed one ends with.
"""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import joblib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

from lessor import job

EXIT_CANCELLED = 143
"""What a program ended by SIGTERM is seen to exit with."""

IMAGES_ALTERED_ALIKE = 48
"""One shift and one blur serve this many images at a time, which is what makes an epoch varied and yet quick."""

CHECKPOINTS_KEPT = 2
"""The newest may be half read by a person who copies it; the one before is whole."""


class Reporter(Protocol):
    """What the training asks of :mod:`lessor.job`."""

    def progress(self, fraction: float, message: str = "", /) -> None: ...

    def metrics(self, values: Mapping[str, float], /) -> None: ...

    def checkpoint(self, cursor: str, /) -> None: ...

    def last_checkpoint(self) -> str | None: ...

    def result(self, value: Any, /) -> None: ...

    def cancelled(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Options:
    """How much to train, and where the checkpoints go."""

    epochs: int
    """Passes over the augmented training set, at least 1."""
    repeat: int
    """Augmented copies of each image per epoch, at least 1."""
    checkpoint_dir: Path
    """Reached from every host the job may move to."""
    seed: int = 0
    hidden: tuple[int, ...] = (320, 160)
    """Neurons per hidden layer."""
    resume: Path | None = None
    """Checkpoint to start from where Lessor hands none."""

    @property
    def kind(self) -> tuple[str, int, tuple[int, ...]]:
        """What a checkpoint must agree on to be gone on from."""
        return ("train_digits", self.seed, self.hidden)


@dataclass(slots=True)
class Training:
    """A model and how far it is."""

    model: MLPClassifier
    epoch: int
    """Epochs done."""


@dataclass(frozen=True, slots=True)
class Digits:
    """The data set, split the same way in every attempt. Images are 8 x 8 with values 0 … 1."""

    train_images: NDArray[np.float64]
    test_images: NDArray[np.float64]
    train_labels: NDArray[np.int64]
    test_labels: NDArray[np.int64]

    @classmethod
    def load(cls) -> Digits:
        digits = load_digits()
        return cls(*train_test_split(digits.images / 16.0, digits.target, test_size=0.2, random_state=0))

    def augmented(self, epoch: int, options: Options) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Returns ``repeat`` altered copies of the training set as rows of 64 values, and their labels."""
        random = np.random.default_rng([options.seed, epoch])
        copies = []
        for _ in range(options.repeat):
            for start in range(0, len(self.train_images), IMAGES_ALTERED_ALIKE):
                images = self.train_images[start : start + IMAGES_ALTERED_ALIKE]
                moved = ndimage.shift(images, (0, *random.uniform(-1, 1, 2)), order=1)
                blurred = ndimage.gaussian_filter(moved, (0, *random.uniform(0, 0.5, 2)))
                copies.append(blurred + random.normal(0, 0.05, blurred.shape))
        return np.concatenate(copies).reshape(-1, 64), np.tile(self.train_labels, options.repeat)

    def accuracy(self, model: MLPClassifier) -> float:
        """Returns the share of test images that ``model`` reads right."""
        return float(model.score(self.test_images.reshape(-1, 64), self.test_labels))


@dataclass(slots=True)
class Checkpoints:
    """The checkpoints of one attempt.

    Their names carry the fencing token, so that an attempt that was thought dead
    and one that took its place never write the same file, and an attempt removes
    only what it wrote itself.
    """

    folder: Path
    fencing_token: str
    own: list[Path] = field(default_factory=list)

    def save(self, training: Training, options: Options) -> Path:
        """Writes a checkpoint, whole or not at all, and returns where it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = (self.folder / f"epoch-{training.epoch:04d}.lease-{self.fencing_token}.joblib").resolve()
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("wb") as file:
            joblib.dump({"kind": options.kind, "epoch": training.epoch, "model": training.model}, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        if path not in self.own:
            self.own.append(path)
        return path

    def newest_first(self) -> list[Path]:
        """Returns what all attempts of this job left, the furthest first.

        An attempt whose agent died goes on until its lease runs out: it saves
        more than it can tell. Before the next attempt begins it has been stopped.
        """
        return sorted((path.resolve() for path in self.folder.glob("epoch-*.joblib")), reverse=True)

    def prune(self) -> None:
        """Removes all but the newest. Called once a newer one is reported."""
        while len(self.own) > CHECKPOINTS_KEPT:
            self.own.pop(0).unlink(missing_ok=True)


def load_checkpoint(path: Path, options: Options) -> Training | None:
    """Returns the training saved at ``path``; None, and a line that says why, where it cannot be used.

    Loading runs what the file says: the checkpoint directory must be as trusted as this program.
    """
    try:
        saved = joblib.load(path)
        if saved["kind"] == options.kind:
            return Training(saved["model"], saved["epoch"])
        reason = "it is of another training"
    except FileNotFoundError:
        reason = "there is no such file; is the checkpoint directory shared between the hosts?"
    except (OSError, EOFError, ValueError, LookupError, TypeError, ImportError, pickle.UnpicklingError) as error:
        reason = str(error) or type(error).__name__
    print(f"cannot use checkpoint {path}: {reason}", file=sys.stderr, flush=True)
    return None


def begin(options: Options, checkpoints: Checkpoints, reporter: Reporter) -> tuple[Training, int]:
    """Returns the training to go on with, and the epoch it resumes from (0: it starts fresh)."""
    if cursor := reporter.last_checkpoint():
        candidates = list(dict.fromkeys([*checkpoints.newest_first(), Path(cursor)]))
    else:
        candidates = [options.resume] if options.resume else []
    for path in candidates:
        training = load_checkpoint(path, options)
        if training is not None:
            print(f"resuming after epoch {training.epoch} from {path}", flush=True)
            return training, training.epoch
    if candidates:
        print("starting over", file=sys.stderr, flush=True)
    model = MLPClassifier(options.hidden, batch_size=64, learning_rate_init=5e-4, random_state=options.seed)
    return Training(model, 0), 0


def train(
    options: Options,
    checkpoints: Checkpoints,
    reporter: Reporter,
    stopping: Callable[[], bool] = lambda: False,
) -> int:
    """Trains to the last epoch and returns the exit code: 0, or ``EXIT_CANCELLED``.

    It is asked to stop between epochs (about a second each), where the last
    checkpoint is complete: nothing that was trained is lost.
    """
    digits = Digits.load()
    classes = np.unique(digits.train_labels)
    training, resumed_from = begin(options, checkpoints, reporter)
    while training.epoch < options.epochs:
        if stopping() or reporter.cancelled():
            print(f"asked to stop: {training.epoch} of {options.epochs} epochs are saved", flush=True)
            return EXIT_CANCELLED
        began = time.monotonic()
        images, labels = digits.augmented(training.epoch, options)
        training.model.partial_fit(images, labels, classes=classes)
        training.epoch += 1
        accuracy = digits.accuracy(training.model)
        loss = float(training.model.loss_)
        reporter.checkpoint(str(checkpoints.save(training, options)))
        checkpoints.prune()
        reporter.metrics({"epoch": training.epoch, "loss": loss, "accuracy": accuracy})
        reporter.progress(training.epoch / options.epochs, f"epoch {training.epoch}/{options.epochs}")
        print(f"epoch {training.epoch:3d}/{options.epochs}  loss {loss:.4f}  test accuracy {accuracy:.4f}"
              f"  {time.monotonic() - began:.2f} s", flush=True)  # fmt: skip
    accuracy = digits.accuracy(training.model)
    reporter.result({"accuracy": accuracy, "epochs": training.epoch, "resumed_from": resumed_from})
    print(f"test accuracy {accuracy:.4f} after {training.epoch} epochs", flush=True)
    return 0


def count(text: str) -> int:
    """Reads a number that is at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a small network on handwritten digits.")
    parser.add_argument("--epochs", type=count, default=20, help="passes over the training set (default 20)")
    parser.add_argument("--repeat", type=count, default=16, help="altered copies of each image per epoch (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the model and of the alterations (default 0)")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoints"), metavar="DIR",
                        help="below it each job gets a folder (default ./checkpoints)")  # fmt: skip
    parser.add_argument("--resume", type=Path, metavar="FILE", help="checkpoint to start from outside Lessor")
    given = parser.parse_args(arguments)
    folder = given.checkpoint_dir / (job.id() or "local")
    options = Options(given.epochs, given.repeat, folder, given.seed, resume=given.resume)
    checkpoints = Checkpoints(folder, str(job.fencing_token() or "none"))
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: asked.append(received))
    # The job reserves one core, so it computes on one.
    with threadpool_limits(limits=1):
        return train(options, checkpoints, job, stopping=lambda: bool(asked))


if __name__ == "__main__":
    sys.exit(main())
