"""Every error and warning that legato raises on purpose.

The tree::

    LegatoError
    |-- ConfigError (also ValueError)     an argument or a config is wrong
    |-- DataError (also ValueError)       the training data is wrong
    |   `-- WorkerError                   what makes the batches failed
    |-- BackendError                      a backend is missing or unsuitable
    |-- StepError                         a user's step broke its contract
    |   `-- BadLossError                  the loss is above a bound
    |       `-- NonFiniteLossError        it became NaN or infinite
    |-- RunDirError                       the run directory cannot be used
    |-- CheckpointError                   a checkpoint cannot be read or written
    |   `-- DamagedError                  bytes on disk are not what was written
    |-- RestoreError                      a checkpoint does not fit this program
    |-- SummaryError (also ValueError)    a value is none that can be shown
    `-- ExactnessError                    exact="strict" and something is not

    Stopped (SystemExit, code 75)         a signal; everything was saved
    Interrupted (KeyboardInterrupt)       Ctrl-C; everything was saved

    LegatoWarning (UserWarning)
    `-- ExactnessWarning                  exact="warn" and something is not

A message names the argument, the value, the rule and the remedy.
"""


class LegatoError(Exception):
    """The base of all errors that legato raises on purpose."""


class ConfigError(LegatoError, ValueError):
    """An argument or a config value is wrong; nothing was started."""


class DataError(LegatoError, ValueError):
    """The training or validation data break a rule."""


class WorkerError(DataError):
    """A worker that makes batches raised, died or hangs; the message says."""


class BackendError(LegatoError):
    """The Keras backend is missing, or cannot do what was asked."""


class StepError(LegatoError):
    """A user's step broke its contract (no loss, no gradients, ...)."""


class BadLossError(StepError):
    """The loss is not one to train on with.

    Attributes:
        step: the step, from 1, whose loss it is.
        loss: the loss.
    """

    def __init__(self, message: str, step: int, loss: float) -> None:
        super().__init__(message)
        self.step = step
        self.loss = loss

    def explain(self, why: str) -> None:
        """Add a sentence to the message."""
        self.args = (f"{self} {why}", *self.args[1:])


class NonFiniteLossError(BadLossError):
    """The loss became NaN or infinite."""


class RunDirError(LegatoError):
    """The run directory is in use, cannot be written, or is another run's."""


class CheckpointError(LegatoError):
    """A checkpoint cannot be read or written."""


class DamagedError(CheckpointError):
    """What is on disk is not what was written: size, hash or structure."""


class RestoreError(LegatoError):
    """A checkpoint is intact but does not fit this program."""


class SummaryError(LegatoError, ValueError):
    """A value cannot be written as a summary."""


class ExactnessError(LegatoError):
    """Resuming would not be exact, and `exact="strict"` was asked for."""


class VerifyError(LegatoError):
    """A proof could not be carried through."""


class LegatoWarning(UserWarning):
    """The base of all warnings that legato gives."""


class ExactnessWarning(LegatoWarning):
    """Something makes resuming inexact; the message names it."""


class Stopped(SystemExit):
    """Training stopped on a signal with everything saved: run it again.

    Exits with status 75 (EX_TEMPFAIL), which schedulers take for "requeue".
    """

    CODE = 75

    def __init__(self, message: str) -> None:
        super().__init__(self.CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interrupted(KeyboardInterrupt):
    """Ctrl-C stopped training, and everything was saved before."""
