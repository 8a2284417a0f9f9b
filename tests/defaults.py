"""The default configuration without Hydra, for tests of code that takes a configuration."""

from typing import Any

from omegaconf import OmegaConf

from runner.app import CONFIGS
from runner.config.schema import Config


def configured(*changes: Any) -> Any:
    """The defaults of conf/config.yaml with their types, and changes of them: mappings or configurations."""
    defaults: Any = OmegaConf.load(CONFIGS / "config.yaml")
    del defaults["defaults"], defaults["hydra"]
    return OmegaConf.merge(OmegaConf.structured(Config), defaults, *changes)
