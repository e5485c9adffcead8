"""What keeps resuming from being exact is named before training goes on."""

import warnings
from typing import Protocol

from legato.errors import ExactnessError, ExactnessWarning


class Part(Protocol):
    """Something that may turn out not to be exact."""

    @property
    def inexact(self) -> str | None:
        """Why resuming is not exact, as far as is known."""
        ...


class Exactness:
    """Names what is not exact, as the policy says.

    Args:
        policy: "strict", "warn" or "off"; see `TrainerConfig.exact`.
    """

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._named: set[str] = set()

    def name_parts(self, *parts: Part) -> None:
        """Once; some reasons show only while data are drawn, or measured.

        Raises:
            ExactnessError: as `name`.
        """
        for part in parts:
            why = part.inexact
            if why is not None and why not in self._named:
                self._named.add(why)
                self.name(why)

    def name(self, message: str) -> None:
        """Refuse to go on, warn, or say nothing.

        Raises:
            ExactnessError: the policy is strict.
        """
        if self._policy == "strict":
            raise ExactnessError(
                f'{message.rstrip(".")}. exact="strict" refuses to go on; '
                'exact="warn" would.'
            )
        if self._policy == "warn":
            warnings.warn(message, ExactnessWarning, stacklevel=4)
