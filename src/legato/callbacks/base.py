"""What the runner asks about a callback."""

from typing import Any, ClassVar

from legato.errors import RestoreError
from legato.types import JSON


class Adapter:
    """What the runner asks about a callback; this one is for a user's.

    One adapter serves all callbacks of its class.

    Attributes:
        state: the attributes that are the state, and the type of each
            (`object`: any). One that does not exist is not saved.
        derived: attributes that `get` and `set` take care of.
        whole: all other attributes are captured too, also where the class is
            Keras's own and not a subclass of the user's.
    """

    state: ClassVar[dict[str, type]] = {}
    derived: ClassVar[frozenset[str]] = frozenset()
    whole = False

    @property
    def owned(self) -> frozenset[str]:
        """The attributes that capture has to leave alone."""
        return self.derived | self.state.keys()

    def check(self, callback: Any) -> str | None:
        """Says why a callback cannot be used, if so."""
        return None

    def has_batch_hooks(self, callback: Any) -> bool:
        """Whether the batch hooks that Keras gave it do anything."""
        return True

    def attach(self, callback: Any, model: Any) -> None:
        """Gives it the model; must leave no trace if nothing is trained."""
        callback.set_model(model)

    def note(self, callback: Any) -> JSON:
        """What the next process must know if this one leaves no checkpoint.

        Asked before a run's first `on_train_begin`; None if there is nothing.
        """
        return None

    def before_train_begin(
        self, callback: Any, *, resuming: bool, note: JSON, token: str | None
    ) -> Any:
        """Comes before `on_train_begin`; the result goes to `after`.

        Args:
            callback: the callback.
            resuming: whether `set` or `absent` will follow.
            note: if not resuming: what `note` gave in a process of this run
                that died without a checkpoint. Files are to be put back to
                what they were then.
            token: a word that no other callback of any run has; None if
                nothing is written down of this run.
        """
        return None

    def after_train_begin(self, callback: Any, before: Any) -> None:
        """Comes after `on_train_begin`."""

    def get(self, callback: Any) -> dict[str, Any]:
        """The state."""
        here = vars(callback)
        return {name: here[name] for name in self.state if name in here}

    def set(self, callback: Any, state: dict[str, Any]) -> str | None:
        """Puts the state back; comes after `on_train_begin`.

        Returns:
            What could not be put back though the rest was, if anything.

        Raises:
            RestoreError: if the state does not fit; nothing was changed.
        """
        for name, value in state.items():
            if name in self.state and not isinstance(value, self.state[name]):
                raise RestoreError(
                    f"`{name}` is {value!r:.80} and not "
                    f"{self.state[name].__name__}."
                )
        for name in self.state.keys() & state.keys():
            setattr(callback, name, state[name])
        return None

    def absent(self, callback: Any, note: JSON) -> None:
        """Comes when a run is resumed that did not have this callback.

        Args:
            callback: the callback.
            note: as for `before_train_begin`, of a process that had it and
                left no checkpoint.
        """

    def resumed(self, callback: Any) -> None:
        """Comes last when a run is resumed, perhaps in mid-epoch."""

    def close(self, callback: Any) -> None:
        """Lets go of what the process holds; also if `on_train_end` came."""
