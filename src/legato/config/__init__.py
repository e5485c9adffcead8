"""Configs: what they hold, how they are read, how they are refused.

A config is a frozen pydantic model. It is made in Python
(`TrainerConfig(train_steps=2000)`) or read from YAML (`load_yaml`, then
`apply_overrides`, then `validate`); either way all problems are reported at
once, each with its place, its value, the rule and the nearest valid name.
"""

from legato.config.data import BucketsConfig, DataConfig, PadConfig
from legato.config.document import (
    Document,
    apply_overrides,
    load_yaml,
    parse_yaml,
)
from legato.config.duration import parse_duration
from legato.config.experiment import (
    CallbackSpec,
    Experiment,
    built_in,
    built_in_names,
    suggest,
)
from legato.config.initial import InitConfig
from legato.config.model import (
    Config,
    config_hash,
    dump_yaml,
    nearest,
    validate,
    validate_mapping,
)
from legato.config.objects import OBJECT, Arguments, check_object
from legato.config.optimizer import OptimizerConfig, ScheduleConfig
from legato.config.trainer import MAX_SHAPES, TrainerConfig

__all__ = [
    "MAX_SHAPES",
    "OBJECT",
    "Arguments",
    "BucketsConfig",
    "CallbackSpec",
    "Config",
    "DataConfig",
    "Document",
    "Experiment",
    "InitConfig",
    "OptimizerConfig",
    "PadConfig",
    "ScheduleConfig",
    "TrainerConfig",
    "apply_overrides",
    "built_in",
    "built_in_names",
    "check_object",
    "config_hash",
    "dump_yaml",
    "load_yaml",
    "nearest",
    "parse_duration",
    "parse_yaml",
    "suggest",
    "validate",
    "validate_mapping",
]
