"""How random generators are captured."""

# ruff: noqa: D102 - what the methods of a codec do is said in `Codec`
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from legato.capture.decoding import Decoder, field
from legato.capture.encoding import (
    Codec,
    Encoder,
    UncapturableError,
    type_name,
)
from legato.errors import DamagedError, RestoreError


class RandomCodec(Codec):
    """A `random.Random`."""

    kind = "random"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        version, numbers, gauss = obj.getstate()
        state = np.array(numbers, np.uint32)
        return {
            "version": version,
            "state": encoder.array(state, path),
            "gauss": gauss,
        }

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return type(live) is random.Random

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        random.Random().setstate(self._state(node, decoder))  # or it raises
        return live if live is not None else random.Random()

    def _state(self, node: dict[str, Any], decoder: Decoder) -> tuple:
        numbers = decoder.array(field(node, "state", dict)).tolist()
        gauss = node.get("gauss")
        if not isinstance(gauss, float | None):
            raise DamagedError("callback state: a random state is none.")
        return field(node, "version", int), tuple(numbers), gauss

    def prepare(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None]:
        state = self._state(node, decoder)
        return lambda: obj.setstate(state)


_BIT_GENERATORS: dict[str, type[np.random.BitGenerator]] = {
    cls.__name__: cls
    for cls in (
        np.random.MT19937,
        np.random.PCG64,
        np.random.PCG64DXSM,
        np.random.Philox,
        np.random.SFC64,
    )
}

# `spawn` is the only way to move its counter on; a file may not ask for more.
_MAX_SPAWNED = 100_000


def _write_entropy(seeds: Any) -> list[str]:
    entropy = getattr(seeds, "entropy", None)
    if entropy is None:  # made from a state, not from a seed
        return []
    entropy = [entropy] if isinstance(entropy, int) else entropy
    return [hex(int(number)) for number in entropy]


def _write_state(state: Any, encoder: Encoder, path: str) -> Any:
    if isinstance(state, dict):
        return {
            "dict": {
                name: _write_state(value, encoder, f"{path}.{name}")
                for name, value in state.items()
            }
        }
    if isinstance(state, np.ndarray):
        return encoder.array(state, path)
    return encoder.value(state, path, nested=True)


def _read_state(state: Any, decoder: Decoder, depth: int = 3) -> Any:
    if isinstance(state, dict) and isinstance(state.get("dict"), dict):
        if not depth:
            raise DamagedError("callback state: a random state is none.")
        return {
            name: _read_state(value, decoder, depth - 1)
            for name, value in state["dict"].items()
        }
    if isinstance(state, dict) and "array" in state:
        return decoder.array(state)
    return decoder.value(state)


class BitGeneratorCodec(Codec):
    """The state of a NumPy generator, and how many it has spawned."""

    kind = "bit generator"

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        if type(obj).__name__ not in _BIT_GENERATORS:
            raise UncapturableError(f"a `{type_name(obj)}`")
        seeds = obj.seed_seq
        return {
            "class": type(obj).__name__,
            "state": _write_state(obj.state, encoder, path),
            "spawned": getattr(seeds, "n_children_spawned", 0),
            "entropy": _write_entropy(seeds),
            "spawn_key": list(getattr(seeds, "spawn_key", ())),
        }

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return isinstance(live, np.random.BitGenerator) and type(
            live
        ).__name__ == node.get("class")

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        cls = _BIT_GENERATORS.get(field(node, "class", str))
        if cls is None:
            raise DamagedError("callback state: an unknown generator.")
        spawned = field(node, "spawned", int)
        if not 0 <= spawned <= _MAX_SPAWNED:
            raise RestoreError(f"a generator that spawned {spawned} others.")
        trial = cls(0)
        trial.state = _read_state(node.get("state"), decoder)  # or it raises
        if live is not None:
            return live
        entropy = [int(text, 16) for text in field(node, "entropy", list)]
        key = tuple(field(node, "spawn_key", list))
        # One number and a list of it alone seed alike.
        return cls(np.random.SeedSequence(entropy, spawn_key=key))

    def prepare(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None]:
        state = _read_state(node.get("state"), decoder)
        spawned = field(node, "spawned", int)

        def apply() -> None:
            obj.state = state
            done = getattr(obj.seed_seq, "n_children_spawned", spawned)
            if done < spawned:
                obj.seed_seq.spawn(spawned - done)

        return apply


class GeneratorCodec(Codec):
    """`np.random.Generator` and `RandomState`: around a bit generator."""

    def __init__(self, cls: type) -> None:
        self.kind = cls.__name__
        self._cls = cls

    def encode(self, obj: Any, encoder: Encoder, path: str) -> dict[str, Any]:
        bits = self._bits(obj)
        node = {"bits": encoder.value(bits, f"{path}.bit_generator")}
        if self._cls is np.random.RandomState:
            state = obj.get_state(legacy=False)
            node["gauss"] = [state["has_gauss"], state["gauss"]]
        return node

    def _bits(self, obj: Any) -> Any:
        # `RandomState` has no public name for it.
        return getattr(obj, "bit_generator", None) or obj._bit_generator

    def accepts(self, node: dict[str, Any], live: Any) -> bool:
        return type(live) is self._cls

    def children(self, node: dict[str, Any], live: Any) -> Any:
        yield node.get("bits"), self._bits(live)

    def make(self, node: dict[str, Any], live: Any, decoder: Decoder) -> Any:
        bits = decoder.value(node.get("bits"))
        if not isinstance(bits, np.random.BitGenerator):
            raise DamagedError("callback state: a generator without bits.")
        # Live, but around another kind of bit generator: a new one.
        if live is not None and self._bits(live) is bits:
            return live
        return self._cls(bits)

    def prepare(
        self, node: dict[str, Any], obj: Any, decoder: Decoder
    ) -> Callable[[], None] | None:
        if "gauss" not in node:
            return None
        match node["gauss"]:
            case [int(has_gauss), float(gauss)]:
                pass
            case _:
                raise DamagedError("callback state: a random state is none.")

        def apply() -> None:
            state = obj.get_state(legacy=False)
            state.update(has_gauss=has_gauss, gauss=gauss)
            obj.set_state(state)

        return apply


RANDOMS: dict[type, Codec] = {
    random.Random: RandomCodec(),
    np.random.Generator: GeneratorCodec(np.random.Generator),
    np.random.RandomState: GeneratorCodec(np.random.RandomState),
    **dict.fromkeys(_BIT_GENERATORS.values(), BitGeneratorCodec()),
}
