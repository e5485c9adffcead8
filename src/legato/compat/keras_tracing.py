"""What Keras does behind our back while a step is traced, put in our hands."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src import backend as keras_backend
from keras.src.backend.common import global_state
from keras.src.backend.common.variables import initialize_all_variables
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.optimizers.loss_scale_optimizer import LossScaleOptimizer
from keras.src.random import seed_generator

from legato.errors import StepError

Cond = Callable[[Any, Callable[[], Any], Callable[[], Any]], Any]


def current_scope() -> keras.StatelessScope | None:
    """The innermost stateless scope of this thread."""
    return global_state.get_global_attribute("stateless_scope")


def native_cond(
    pred: Any, true_fn: Callable[[], Any], false_fn: Callable[[], Any]
) -> Any:
    """The backend's own conditional, without merging of assignments."""
    return _NATIVE_COND(pred, true_fn, false_fn)


_NATIVE_COND: Cond = keras_backend.core.cond


def only_here(
    function: Callable[..., Any], elsewhere: Callable[..., Any]
) -> Callable[..., Any]:
    """One function in this thread, and another one in all others.

    What is bound while a step is traced is bound for the process, and host
    metrics may use Keras meanwhile.
    """
    thread = threading.get_ident()

    @functools.wraps(function)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        here = threading.get_ident() == thread
        return (function if here else elsewhere)(*args, **kwargs)

    return chosen


@contextlib.contextmanager
def bound_cond(cond: Cond | None) -> Iterator[None]:
    """While active: `keras.ops.cond` is `cond`; None keeps the backend's."""
    before = keras_backend.core.cond
    if cond is not None:
        keras_backend.core.cond = only_here(cond, before)
    try:
        yield
    finally:
        keras_backend.core.cond = before


@contextlib.contextmanager
def read_by_conversion() -> Iterator[None]:
    """While active: what makes a tensor of a variable reads it.

    TensorFlow takes Keras's variables for tensors, and gives them back as they
    are. They would be read when they are used: later assignments would show.
    """

    def reading(convert: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(convert)
        def wrapped(x: Any, *args: Any, **kwargs: Any) -> Any:
            value = x.value if isinstance(x, keras.Variable) else x
            return convert(value, *args, **kwargs)

        return wrapped

    core: Any = keras_backend.core
    numpy: Any = keras_backend.numpy
    before = core.convert_to_tensor, numpy.array
    core.convert_to_tensor = only_here(reading(before[0]), before[0])
    numpy.array = only_here(reading(before[1]), before[1])
    try:
        yield
    finally:
        core.convert_to_tensor, numpy.array = before


@contextlib.contextmanager
def traced_step(
    cond: Cond | None,
    eager: Callable[[], Any] = contextlib.nullcontext,
) -> Iterator[None]:
    """While a step is traced: our `cond`, and no unseeded randomness.

    Args:
        cond: takes the place of the backend's conditional, which leaks what
            is assigned inside a branch (`LossScaleOptimizer.apply` does);
            None keeps it.
        eager: makes a context in which the backend computes at once, not in
            the trace.
    """
    old_generator = seed_generator.global_seed_generator
    old_dropout = keras_backend.random.dropout
    seed_generator.global_seed_generator = only_here(
        _refuse_unseeded, old_generator
    )
    # PyTorch's asks for no seed where it is given none.
    keras_backend.random.dropout = only_here(_seeded(old_dropout), old_dropout)
    try:
        with bound_cond(cond), _watching_apply(eager):
            yield
    finally:
        keras_backend.random.dropout = old_dropout
        seed_generator.global_seed_generator = old_generator


def in_apply() -> bool:
    """Whether an optimizer's `apply` is under way in a traced step.

    Optimizers change variables in place, so what they read has to be the
    variables' own memory.
    """
    return _apply_depth > 0


_apply_depth = 0


@contextlib.contextmanager
def _watching_apply(eager: Callable[[], Any]) -> Iterator[None]:
    """Notes when `optimizer.apply` runs; it builds outside of any scope.

    Some optimizers (Nadam, Adafactor) make variables from values when they
    are built, which Keras refuses in a stateless scope.
    """

    def watched(apply: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(apply)
        def wrapped(
            optimizer: Any, grads: Any, trainable_variables: Any = None
        ) -> Any:
            global _apply_depth
            if trainable_variables is not None and not optimizer.built:
                trainable_variables = list(trainable_variables)
                _build(optimizer, trainable_variables, eager)
            _apply_depth += 1
            try:
                return apply(optimizer, grads, trainable_variables)
            finally:
                _apply_depth -= 1

        return wrapped

    classes: tuple[Any, ...] = (BaseOptimizer, LossScaleOptimizer)
    originals = [cls.apply for cls in classes]
    for cls, apply in zip(classes, originals, strict=True):
        cls.apply = watched(apply)
    try:
        yield
    finally:
        for cls, apply in zip(classes, originals, strict=True):
            cls.apply = apply


def _build(
    optimizer: Any, variables: list[Any], eager: Callable[[], Any]
) -> None:
    scope = current_scope()
    global_state.set_global_attribute("stateless_scope", None)
    try:
        with (
            eager(),
            keras_backend.name_scope(optimizer.name, caller=optimizer),
        ):
            optimizer.build(variables)
        optimizer.built = True
    finally:
        global_state.set_global_attribute("stateless_scope", scope)


def initialize_variables() -> None:
    """Give their values at once to variables made in a stateless scope.

    Keras would do it when the outermost scope is left.
    """
    scope = current_scope()
    global_state.set_global_attribute("stateless_scope", None)
    try:
        initialize_all_variables()
    finally:
        global_state.set_global_attribute("stateless_scope", scope)


def global_seed_state() -> keras.Variable | None:
    """The state behind unseeded `keras.random` calls, if any was made."""
    generator = global_state.get_global_attribute(
        seed_generator.GLOBAL_SEED_GENERATOR
    )
    return None if generator is None else generator.state


def make_global_seed_state() -> keras.Variable:
    """The same, made if there is none."""
    return seed_generator.global_seed_generator().state


def _refuse_unseeded() -> Any:
    raise StepError(
        "A keras.random function was called in a step with seed=None. Its "
        "values would not be part of the run's state. Make a "
        "keras.random.SeedGenerator(seed) an attribute of the Task or of a "
        "layer, and pass it as `seed`."
    )


def _seeded(dropout: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(dropout)
    def wrapped(
        inputs: Any, rate: Any, noise_shape: Any = None, seed: Any = None
    ) -> Any:
        if seed is None:
            _refuse_unseeded()
        return dropout(inputs, rate, noise_shape=noise_shape, seed=seed)

    return wrapped
