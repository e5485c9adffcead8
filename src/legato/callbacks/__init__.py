"""Keras callbacks: which hooks act, calling them, and their state."""

from legato.callbacks.runner import CallbackRunner

__all__ = ["CallbackRunner"]
