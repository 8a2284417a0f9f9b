"""The directory of one run: its layout, and its record, configuration and result.

    run.json            run id, format version, lineage; marks the directory as a run's
    config.yaml         the resolved configuration of what is computed; written once, and then only compared
    attempts/           one claim per process life (run.attempts)
    commits/ data/      checkpoints (checkpoint.manifest)
    ledger/             the samples that each step consumed (data.ledger)
    metrics/            scalars as lines (metrics.lines)
    writers/            the id of the run at each service outside, and the last step sent (metrics.service)
    tensorboard/        event files
    model.safetensors   final weights; best.safetensors beside it when there is an objective
    result.json         present when the run is finished

An error is never mistaken for absence: an object that cannot be read raises StorageError.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from runner.config.identity import IDENTITY, value_digest
from runner.config.secrets import Unresolved
from runner.errors import ConfigError, StorageError, printable
from runner.plain import MAX_DEPTH, MAX_DIGITS, parse
from runner.run import attempts
from runner.storage import LocalLocation, open_location
from runner.storage.location import Location, local_folder

FORMAT = 1  # the format of the whole run directory; newer formats are refused

MODEL = "model.safetensors"
BEST = "best.safetensors"
TENSORBOARD = "tensorboard"
FOLDERS = ("attempts", "commits", "data", "ledger", "metrics", "writers", TENSORBOARD, ".hydra")  # in every run

_RUN = "run.json"
_CONFIG = "config.yaml"
_RESULT = "result.json"
_LIMIT = 1 << 20  # bytes of each of these files
_EARLY_FILES = ("runner.log", "multirun.yaml")  # Hydra writes them before the run begins
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # listing a thousand runs spends most of its time here
yaml.SafeDumper.add_representer(Unresolved, yaml.SafeDumper.represent_str)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The place ``<root>/<experiment>/<variant>``. Reads and writes the run's record, configuration and result."""

    root: str
    experiment: str
    variant: str
    location: Location
    options: Mapping[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def under(
        cls, root: str, experiment: str, variant: str, options: Mapping[str, Any] | None = None
    ) -> "RunDirectory":
        """The directory of one run. Creates and reads nothing. ``options`` are for a remote storage."""
        scheme, mark, path = root.rpartition("://")  # s3:// keeps its slashes: without them it would be a path
        url = f"{scheme}{mark}{path.rstrip('/')}/{experiment}/{variant}"
        return cls(root, experiment, variant, open_location(url, options), options)

    @classmethod
    def at(cls, path: str, options: Mapping[str, Any] | None = None) -> "RunDirectory":
        """The run whose directory is ``path``. Raises ConfigError if no run lives there."""
        location = open_location(path, options)
        record = cls("", "", "", location).record()
        if record is None:
            raise ConfigError(f"{location.url} is not a run directory: it has no {_RUN}")
        return cls("", str(record.get("experiment")), str(record.get("variant")), location, options)

    @property
    def name(self) -> str:
        """``experiment/variant``, the name of the run in messages."""
        return f"{self.experiment}/{self.variant}"

    @property
    def local(self) -> Path:
        """The directory itself; for a remote root a folder of this machine, where Hydra's own files are, too."""
        if isinstance(self.location, LocalLocation):
            return self.location.path
        return Path(local_folder(self.root), self.experiment, self.variant).absolute()

    def record(self) -> dict[str, Any] | None:
        """The content of ``run.json``; None where no run was ever started. Raises ConfigError for a directory that
        holds something else, or a run of a newer format.
        """
        record = self._json(_RUN)
        if record is None:
            foreign = [entry.name for entry in self.location.list("") if entry.name not in _EARLY_FILES]
            if _RUN in foreign:  # another process began the run between the read and the listing
                return self.record()
            if foreign:
                raise ConfigError(
                    f"{self.location.url} is not a run directory: it has no {_RUN} but holds {printable(foreign[0])}. "
                    "Choose another run.root or run.name."
                )
        elif record.get("format") != FORMAT:
            raise ConfigError(
                f"{self.location.url} has format {printable(record.get('format'))}, this version reads {FORMAT}. "
                "Use the version of hydra-runner that wrote it (attempts/*.json name it), or another run.name."
            )
        return record

    def create(self, identity: dict[str, Any], *, parent: dict[str, Any] | None) -> None:
        """Write record and configuration unless they are there; only for the newest attempt. Can be repeated."""
        record = {
            "format": FORMAT,
            "id": secrets.token_hex(8),
            "experiment": self.experiment,
            "variant": self.variant,
            "created": attempts.now("seconds"),
            "parent": parent,
        }
        # The record first: after a kill between the two, the next attempt writes the configuration. A configuration
        # alone would be taken for the directory of something else.
        if self.location.read(_RUN, limit=_LIMIT) is None:
            self.location.replace(_RUN, [attempts.encode(record, allow_nan=False)])
        if self.location.read(_CONFIG, limit=_LIMIT) is None:
            raw = yaml.safe_dump(identity, sort_keys=False).encode()
            try:
                _parse_yaml(raw)
            except (yaml.YAMLError, ValueError) as error:
                raise ConfigError(f"the configuration cannot be stored: {error}") from error
            self.location.replace(_CONFIG, [raw])

    def configuration(self) -> dict[str, Any] | None:
        """The configuration that the run was created with; None between the two writes of ``create``."""
        raw = self.location.read(_CONFIG, limit=_LIMIT)
        if raw is None:
            return None
        try:
            return self._sections(_parse_yaml(raw), _CONFIG)
        except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
            raise self._unusable(_CONFIG, f"cannot be read: {error}") from error

    def identity(self, *, before: int | None = None) -> dict[str, Any] | None:
        """The configuration that the run has now: from its creation, unless its newest attempt (with a number below
        ``before``) accepted another.
        """
        return self.identity_since(attempts.newest(self.location, before=before))

    def identity_since(self, newest: attempts.AttemptRecord | None) -> dict[str, Any] | None:
        """The configuration that the run has since its ``newest`` attempt, whose record was read already."""
        accepted = newest.claim.get("accepted") if newest else None
        return self._sections(accepted, f"{newest.name}.json") if newest and accepted else self.configuration()

    def sync_parents(self) -> None:
        """Make the folder of the run and its parents durable; Hydra may have created them without a sync."""
        if isinstance(self.location, LocalLocation):
            self.location.sync_parents()

    def remove_leftovers(self) -> None:
        """Remove temporary files of processes that were killed while they wrote."""
        for folder in ("", *FOLDERS[:-1]):  # .hydra is Hydra's own
            self.location.remove_leftovers(folder)

    def result(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The result of the run; None if it is not finished, or was finished with another configuration."""
        result = self._json(_RESULT)
        if result is None or result.get("identity") != value_digest(identity):
            return None
        objective: Any = result.get("objective") or {}
        metrics: Any = result.get("metrics")
        usable = isinstance(metrics, dict) and isinstance(objective, dict) and isinstance(result.get("step"), int)
        numbers = [*metrics.values(), objective.get("value")] if usable else []
        if not usable or not all(number is None or isinstance(number, int | float) for number in numbers):
            raise StorageError(f"{self.location.url}/{_RESULT} is not a run's result. Remove it to finish it again.")
        return result

    def complete_result(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The result; None also if exported weights are not there in full size, so that the run makes them again."""
        result = self.result(identity)
        return None if result is None or self.missing_export(result) else result

    def missing_export(self, result: Mapping[str, Any]) -> str:
        """The first exported file that a finished run lacks in full size, for a message; empty if it has all."""
        names, lengths = result.get("sha256"), result.get("bytes")
        if not names or not isinstance(names, dict):
            return ""
        sizes = {entry.name: entry.size for entry in self.location.list("")}
        for name in names:
            size, expected = sizes.get(name, 0), lengths.get(name) if isinstance(lengths, dict) else None
            if not size or (expected is not None and size != expected):  # older results have no sizes
                return printable(f"{name} has {size} bytes, expected {'some' if expected is None else expected}")
        return ""

    def finish(self, identity: dict[str, Any], result: dict[str, Any]) -> None:
        """Write the result, with which the run is finished."""
        record = {"identity": value_digest(identity), **result}
        self.location.replace(_RESULT, [attempts.encode(record, allow_nan=False)])

    def _sections(self, config: Any, name: str) -> dict[str, Any]:
        """A stored configuration. Raises StorageError if it, or one of its sections, is not a mapping."""
        if not isinstance(config, dict):
            raise self._unusable(name, "is not a mapping")
        for key in IDENTITY[1:]:
            if not isinstance(config.get(key) or {}, dict):
                raise self._unusable(name, f"is not a configuration: {key} is not a mapping")
        return dict(config)

    def _unusable(self, name: str, why: str) -> StorageError:
        return StorageError(f"{self.location.url}/{name} {why}. Restore it or use another run.name.")

    def _json(self, name: str) -> dict[str, Any] | None:
        raw = self.location.read(name, limit=_LIMIT)
        if raw is None:
            return None
        try:
            value = parse(raw)
        except ValueError as error:
            raise self._unusable(name, f"is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise self._unusable(name, "is not a JSON object")
        return value


class _Loader(_SafeLoader):  # type: ignore[misc]
    """Reads the plain values that ``yaml.safe_dump`` writes, and nothing else: dates, sets and bytes cannot be compared
    or shown like them, and a number in base 60 takes quadratic time.
    """

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in ("null", "bool", "int", "float", "str", "seq", "map"):
            raise yaml.YAMLError(f"a value of the kind {node.tag}, which no stored configuration has")
        if kind in ("int", "float") and (":" in node.value or len(node.value) > MAX_DIGITS):
            raise yaml.YAMLError(
                f"a number in base 60, or of more than {MAX_DIGITS} digits, which no stored configuration has"
            )
        return super().construct_object(node, deep)


def _parse_yaml(raw: bytes) -> Any:
    """A stored configuration. Aliases can expand a few bytes to gigabytes, and deep nesting crashes the C parser."""
    depth = 0
    for event in yaml.parse(raw, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} levels, which no stored configuration has")
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("an alias, which no stored configuration has")
    return yaml.load(raw, Loader=_Loader)
