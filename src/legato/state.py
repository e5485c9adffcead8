"""What a run is: the parts of its state, and names for its arrays.

The step is the one clock: `Clock.step` is the number of completed training
steps. Everything else about a run's future is in the parts listed in
`PARTS`; the trainer gathers them for a checkpoint and puts them back.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras

from legato.errors import DamagedError
from legato.types import JSON

PARTS = {
    "arrays": "every keras.Variable that the steps read or write",
    "clock": "step, epoch, duties not yet done, sums of the epoch's logs",
    "data": "position after the last batch that a completed step consumed",
    "callbacks": "state of each callback",
    "random": "generators of Python, NumPy, Keras and the backend",
    "best": "best value and its step",
    "sinks": "byte offset or last step of each log",
    "trainable": "which layers and variables are frozen",
    "settings": "numbers and flags of layers and optimizers that were changed",
    "identity": "fingerprint, config, data and code of the run",
}
"""The closed list of what decides a run's future, and so is saved."""

DUTIES = ("validation", "epoch_end")
"""What may be due at a step and survive a stop: done in this order."""


@dataclasses.dataclass
class Clock:
    """Where a run is.

    Attributes:
        step: completed training steps.
        epoch: the epoch (from 0) that the next step belongs to.
        step_in_epoch: completed steps of that epoch.
        duties: what is due at this step and not yet done.
        epoch_begun: whether `on_epoch_begin` was called for `epoch`.
        epoch_logs: for each log of the step, the sum over the epoch's
            examples so far; the weight that it must be divided by is
            `epoch_examples`.
        epoch_examples: examples of the epoch so far.
        interval_logs: sums over steps since the last summary.
        interval_steps: steps since the last summary.
        epoch_first_step: the step at which the epoch began.
        last_logs: the logs of the last step.
        validation_logs: results of this epoch's last validation.
        training_logs: the logs of the last epoch, as it ended.
        stop_training: a callback asked to stop.
        finished: training came to its end, and at which step it did.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    duties: tuple[str, ...] = ()
    epoch_begun: bool = False
    epoch_logs: dict[str, float] = dataclasses.field(default_factory=dict)
    epoch_examples: int = 0
    interval_logs: dict[str, float] = dataclasses.field(default_factory=dict)
    interval_steps: int = 0
    epoch_first_step: int = 0
    last_logs: dict[str, float] = dataclasses.field(default_factory=dict)
    validation_logs: dict[str, float] = dataclasses.field(default_factory=dict)
    training_logs: dict[str, float] = dataclasses.field(default_factory=dict)
    stop_training: bool = False
    finished: bool = False

    def to_json(self) -> dict[str, JSON]:
        """Its fields, for a checkpoint."""
        return {
            field.name: _encode(getattr(self, field.name))
            for field in dataclasses.fields(self)
        }

    def load(self, saved: JSON) -> None:
        """Take the saved values.

        Raises:
            DamagedError: a field is missing or of another type.
        """
        fields = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self)
        }
        if not isinstance(saved, dict) or set(saved) != set(fields):
            raise DamagedError("The saved clock does not have its fields.")
        values = {}
        for name, present in fields.items():
            try:
                values[name] = _decode(saved[name], type(present))
            except (TypeError, ValueError) as error:
                raise DamagedError(
                    f"The saved clock's {name} is {saved[name]!r:.80}, which "
                    "it cannot be."
                ) from error
        for name, value in values.items():
            setattr(self, name, value)

    def extend(self, saved_steps: JSON, train_steps: int) -> None:
        """A run that is made longer goes on, also one that stopped early.

        Args:
            saved_steps: how long the run was to be when it was saved.
            train_steps: how long it is to be.
        """
        if isinstance(saved_steps, int) and train_steps > saved_steps:
            self.stop_training = False
        self.finished = not self.duties and (
            self.stop_training or self.step >= train_steps
        )


def _encode(value: Any) -> JSON:
    match value:
        case dict():
            # As pairs: logs are shown in their order, which JSON objects, as
            # we write them, do not keep.
            return [list(pair) for pair in value.items()]
        case tuple():
            return list(value)
        case _:
            return value


def _decode(value: Any, kind: type) -> Any:
    if kind is dict:
        return {str(name): _numbers(each) for name, each in value}
    if kind is tuple:
        duties = tuple(value)
        if not set(duties) <= set(DUTIES):
            raise ValueError(duties)
        return duties
    if type(value) is not kind:
        raise TypeError(value)
    return value


def _numbers(value: Any) -> Any:
    """A float, or lists of these, as the results of metrics are."""
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return float(value)


def variable_paths(
    roots: Mapping[str, Any], extra: Iterable[keras.Variable] = ()
) -> dict[str, keras.Variable]:
    """Name every variable reachable from the roots by where it is.

    The names depend on structure (attribute, index, class and the variable's
    own name), never on Keras's automatic counters, which differ between
    processes: `dense_7` of one is `dense` of another.

    Args:
        roots: objects by name, in order: models, optimizers, metrics, tasks,
            or containers of these.
        extra: variables that steps use and that may not be reachable; they
            are named `variable/<order>`.

    Returns:
        Each variable once, by path, in an order that is the same in every
        process.
    """
    walker = _Walker()
    for name, root in roots.items():
        walker.visit(root, name)
    for variable in extra:
        walker.add(variable, f"variable/{_own_name(variable) or 'unnamed'}")
    return walker.found


def layer_paths(roots: Mapping[str, Any]) -> dict[str, keras.layers.Layer]:
    """Name every layer reachable from the roots, parents before children."""
    walker = _Walker(only_layers=True)
    for name, root in roots.items():
        walker.visit(root, name)
    return walker.layers


def metric_paths(roots: Mapping[str, Any]) -> dict[str, keras.metrics.Metric]:
    """Wherever variables of metrics may be named, in one root or another.

    Args:
        roots: see `variable_paths`.

    Returns:
        The outermost metric that each belongs to, by path.
    """
    found: dict[str, keras.metrics.Metric] = {}
    for name, root in roots.items():
        walker = _Walker()
        walker.visit(root, name)
        found |= walker.of_metrics
    return found


def average_paths(paths: Iterable[str]) -> dict[str, str]:
    """Where optimizers keep averages of a model's variables.

    Args:
        paths: as of `variable_paths`, of models and optimizers.

    Returns:
        The path of the average, by that of the model's variable.
    """
    found = (_AVERAGE.fullmatch(path) for path in paths)
    return {match[1]: match[0] for match in found if match}


_AVERAGE = re.compile(r"optimizer/(?:.*?/)?average/(model/.*)")
_AUTOMATIC = re.compile(r"^(variable|keras_?variable)(_\d+)?$", re.IGNORECASE)


def _own_name(variable: keras.Variable) -> str:
    return "" if _AUTOMATIC.match(variable.name) else variable.name


class _Walker:
    """Walks objects in a fixed order and names their variables.

    Args:
        only_layers: name no variables, which takes most of the time; at each
            checkpoint that is wanted.
    """

    def __init__(self, *, only_layers: bool = False) -> None:
        self._only_layers = only_layers
        self.found: dict[str, keras.Variable] = {}
        self.layers: dict[str, keras.layers.Layer] = {}
        self.of_metrics: dict[str, keras.metrics.Metric] = {}
        self._paths: dict[int, str] = {}
        # Visited objects are kept alive, so that no id is used twice.
        self._seen: dict[int, Any] = {}

    def add(self, variable: keras.Variable, path: str) -> None:
        if id(variable) in self._paths:
            return
        # Two variables of one layer may carry the same name.
        unique, count = path, 1
        while unique in self.found:
            count += 1
            unique = f"{path}.{count}"
        self.found[unique] = variable
        self._paths[id(variable)] = unique

    def visit(self, obj: Any, path: str) -> None:
        if isinstance(obj, keras.Variable):
            if not self._only_layers:
                self.add(obj, path)
            return
        if id(obj) in self._seen:
            return
        if isinstance(obj, keras.layers.Layer):
            self.layers[path] = obj
        known = len(self.found)
        for name, child in _children(obj):
            self._seen[id(obj)] = obj
            if not isinstance(child, keras.Variable):
                self.visit(child, f"{path}/{name}")
            elif not self._only_layers:
                own = _own_name(child)
                self.add(child, f"{path}/{own or name}")
        if isinstance(obj, keras.metrics.Metric):
            for new in itertools.islice(self.found, known, None):
                self.of_metrics[new] = obj
        if isinstance(obj, keras.optimizers.Optimizer):
            self._seen[id(obj)] = obj
            if not self._only_layers:
                self._visit_optimizer(obj, path)

    def _visit_optimizer(
        self, optimizer: keras.optimizers.Optimizer, path: str
    ) -> None:
        """Slots are named after the variable they belong to.

        Keras calls them `<path of the variable with _ for />_<slot>`, and
        that path holds automatic counters.
        """
        owners: dict[str, keras.Variable] = {}
        for owner in getattr(optimizer, "_trainable_variables", []) or []:
            owners.setdefault(owner.path.replace("/", "_"), owner)
        for variable in optimizer._variables:
            name = variable.name
            end = name.rfind("_")
            # The longest that is one: a path may begin as another one does.
            while end > 0 and name[:end] not in owners:
                end = name.rfind("_", 0, end)
            if end > 0:
                place = self._paths.get(id(owners[name[:end]]), "unnamed")
                self.add(variable, f"{path}/{name[end + 1 :]}/{place}")
            else:
                self.visit(variable, f"{path}/{_own_name(variable) or 'own'}")


def _children(obj: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, by structural name, in a fixed order."""
    if isinstance(obj, keras.layers.Layer):
        yield from _numbered(obj, "_trainable_variables")
        yield from _numbered(obj, "_non_trainable_variables")
        for i, generator in enumerate(obj._seed_generators):
            yield f"seed_generator{i or ''}", generator.state
        for i, layer in enumerate(obj._layers):
            yield f"{i}_{_snake(type(layer).__name__)}", layer
        for i, metric in enumerate(obj._metrics):
            yield f"metric{i}_{_snake(type(metric).__name__)}", metric
        # Last: their variables are named after those of layers. (A GAN's has
        # two; the one that Keras knows is a root of its own.)
        optimizers = {
            name: value
            for name, value in vars(obj).items()
            if isinstance(value, keras.optimizers.Optimizer)
        }
        for name in sorted(optimizers.keys() - {"optimizer"}):
            yield name, optimizers[name]
    elif isinstance(obj, keras.metrics.Metric):
        yield from _numbered(obj, "_variables")
        for i, metric in enumerate(obj._metrics):
            yield f"{i}_{_snake(type(metric).__name__)}", metric
        # Those of a compiled model hold their metrics in a way of their own.
        yield from _numbered(obj, "variables")
    elif isinstance(obj, keras.random.SeedGenerator):
        yield "state", obj.state
    elif isinstance(obj, keras.optimizers.Optimizer):
        for name in ("inner_optimizer", "optimizers"):
            inner = vars(obj).get(name)
            if inner is not None:
                yield name, inner
    elif isinstance(obj, Mapping):
        for key, value in obj.items():
            yield str(key), value
    elif isinstance(obj, list | tuple):
        for i, value in enumerate(obj):
            yield str(i), value


def _numbered(obj: Any, attribute: str) -> Iterator[tuple[str, Any]]:
    for i, variable in enumerate(getattr(obj, attribute)):
        yield f"{attribute.strip('_')}{i}", variable


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
