"""The weights by their names: as they are saved, and which optimizer trains them, in which groups."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from runner.errors import ConfigError

Patterns = str | Sequence[str]  # paths of weights or modules, with * and ?
NamedWeights = list[tuple[str, nn.Parameter]]


def saved_name(name: str) -> str:
    """The name under which a tensor is saved: without the prefix of modules that torch.compile has wrapped, so that the
    weights fit a model that is not compiled.
    """
    return name.replace("_orig_mod.", "")


def matching(names: Iterable[str], patterns: Patterns, key: str) -> list[str]:
    """The names of weights that a pattern matches, or that are below a module that it matches. Raises ConfigError,
    naming the ``key`` of the configuration, for a pattern without a match.
    """
    names, selection = [*names], set[str]()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = {
            n for n in names if fnmatchcase(saved_name(n), pattern) or fnmatchcase(saved_name(n), f"{pattern}.*")
        }
        if not matches:
            near = get_close_matches(pattern, names, 3, cutoff=0.3) or names[:3]
            raise ConfigError(f"{key}: no weight of the model matches {pattern!r}; there are {', '.join(near)} ...")
        selection |= matches
    return [name for name in names if name in selection]


class Named(dict[str, Any]):
    """Several optimizers or schedulers by the names that the configuration gives them."""


def by_name(thing: Any) -> dict[str, Any]:
    """Several by their names; a single optimizer or scheduler under an empty name."""
    return thing if isinstance(thing, Named) else {"": thing}


def for_each(function: Callable[[Any], Any], thing: Any) -> Any:
    """``function`` of a single optimizer or scheduler, or of each of several, by the same names."""
    return (
        Named({name: function(each) for name, each in thing.items()}) if isinstance(thing, Named) else function(thing)
    )


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """How many numbers the weights of a model hold, and how many of these are trained."""
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def first_of(thing: Any) -> Any:
    """A single optimizer or scheduler, or the first of several."""
    return next(iter(thing.values())) if isinstance(thing, Named) else thing


def weights_of(optimizers: Iterable[Any]) -> list[Tensor]:
    """All weights that the optimizers have."""
    return [weight for each in optimizers for group in getattr(each, "param_groups", ()) for weight in group["params"]]


def parts_of(kind: str, thing: Any) -> dict[str, Any]:
    """Optimizers or schedulers by the names of their parts of the state: ``optimizer`` or ``optimizer.generator``."""
    return {f"{kind}.{name}" if name else kind: each for name, each in by_name(thing).items()}


def divide(
    model: nn.Module, params: Mapping[str, Patterns | None], by_task: Mapping[str, Iterable[Tensor]]
) -> dict[str, NamedWeights]:
    """The weights of each optimizer: those that the task gives it in ``by_task``, or those that its ``params``
    match; an optimizer without either gets all the others. Raises ConfigError unless each weight that is trained
    belongs to exactly one.
    """
    weights, shares = dict(model.named_parameters()), dict[str, list[str]]()
    names = {id(weight): name for name, weight in weights.items()}
    for name, tensors in by_task.items():
        if name not in params or params[name] is not None:
            raise ConfigError(
                f"optimizer: the task divides the weights, and also optimizer.{name}.params, or {name} is unknown"
            )
        shares[name] = [names[id(tensor)] for tensor in tensors if id(tensor) in names]
    shares |= {n: matching(weights, p, f"optimizer.{n}.params") for n, p in params.items() if p is not None}
    rest = [name for name in params if name not in shares]
    if len(rest) > 1:
        raise ConfigError(f"optimizer: {' and '.join(rest)} have no params; one at most can take all other weights")
    owners: dict[str, str] = {}
    for owner, share in shares.items():
        for name in share:
            if owners.setdefault(name, owner) != owner:
                both = f"the params of {owners[name]} and {owner}"
                raise ConfigError(f"optimizer: {name} is among {both}; each weight belongs to exactly one")
    others = [name for name in weights if name not in owners]
    if rest:
        shares[rest[0]] = others
    elif missing := [name for name in others if weights[name].requires_grad]:
        remedy = "Add them to the params of one, or leave params out of one, which then takes all others"
        raise ConfigError(f"optimizer: {', '.join(missing[:5])} would be trained by no optimizer. {remedy}")
    if empty := [name for name in params if not shares[name]]:
        raise ConfigError(f"optimizer.{empty[0]} has no weights to train")
    return {name: [(each, weights[each]) for each in shares[name]] for name in params}


def settings_of(maker: Any) -> dict[str, Any]:
    """Take the settings that are ours out of the keywords of an optimizer's partial: params, groups, no_decay and
    layer_decay, unless its function has a parameter of that name behind the first, which gets the weights.
    """
    keywords = maker.keywords if isinstance(maker, partial) else {}
    own = [key for key in ("params", "groups", "no_decay", "layer_decay") if key in keywords]
    theirs = [*signature(maker.func).parameters][1:] if own else ()
    return {key: keywords.pop(key) for key in own if key not in theirs}


def grouped(
    model: nn.Module,
    named: NamedWeights,
    key: str,
    *,
    lr: float | None = None,
    groups: Mapping[str, Mapping[str, Any]] | None = None,
    no_decay: bool | Patterns = False,
    layer_decay: float | None = None,
) -> Any:
    """The weights in groups for a torch optimizer: each ``groups`` entry has the weights that its ``params`` (default:
    its name) match, with its other keys as settings; a weight belongs to the first that matches it. ``no_decay`` gives
    those weights, or biases and the weights of norms, a weight_decay of 0; ``layer_decay`` multiplies the rate by this
    factor per repeated layer, counted from the output (ELECTRA, BEiT). Raises ConfigError.
    """
    if not groups and not no_decay and layer_decay is None:
        return named
    names = [name for name, _ in named]
    base = {name: ("others" if groups else "all", dict[str, Any]()) for name in names}
    for group, settings in reversed([*(groups or {}).items()]):  # the first comes last, and wins
        own = {name: value for name, value in settings.items() if name != "params"}
        base |= dict.fromkeys(matching(names, settings.get("params", group), f"{key}.groups.{group}"), (group, own))
    exempt = _biases_and_norms(model) if no_decay is True else {*matching(names, no_decay or [], f"{key}.no_decay")}
    layers, last = _layers(model) if layer_decay is not None else ({}, 0)
    by_settings: dict[tuple[str, int, bool], dict[str, Any]] = {}
    for name, weight in named:
        group, settings = base[name]
        layer, plain = layers.get(name, last), name in exempt and "weight_decay" not in settings
        settings = {"name": group, **settings, **({"weight_decay": 0.0} if plain else {})}
        if layer_decay is not None:
            rate = settings.get("lr", lr)
            if rate is None:
                raise ConfigError(f"{key}.layer_decay={layer_decay} needs {key}.lr, which it multiplies")
            settings |= {"name": f"{group}, layer {layer}", "lr": rate * layer_decay ** (last - layer)}
        by_settings.setdefault((group, layer, plain), {"params": [], **settings})["params"].append((name, weight))
    return [*by_settings.values()]


def without_names(groups: Any) -> Any:
    """What ``grouped`` returns, with the weights alone."""
    if any(isinstance(each, dict) for each in groups):
        return [{**group, "params": without_names(group["params"])} for group in groups]
    return [weight for _, weight in groups]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: the children of a ``ModuleList`` or ``Sequential``, where there are two or more,
    all of one class and with parameters. Blocks within blocks do not count.
    """
    layers: list[nn.Module] = []
    for child in model.children():
        inner: Sequence[nn.Module] = [*child.children()] if isinstance(child, nn.ModuleList | nn.Sequential) else []
        repeated = len(inner) > 1 and len({type(layer) for layer in inner}) == 1
        trained = all(any(True for _ in layer.parameters()) for layer in inner)
        layers += inner if repeated and trained else blocks(child)
    return layers


def table(optimizer: Any) -> str:
    """The groups of all optimizers, with the settings that are not the same for all; empty for a single group."""
    rows = []
    for name, each in by_name(optimizer).items():
        for group in getattr(each, "param_groups", ()):
            size = sum(weight.numel() for weight in group["params"])
            head = {"optimizer": name, "group": group.get("name", "all"), "weights": len(group["params"])}
            rows.append({**head, "parameters": f"{size:,}", **group, "lr": group.get("initial_lr", group.get("lr"))})
    internal = {"params", "param_names", "name", "initial_lr"}
    keys = [key for key in {key: None for row in rows for key in row} if key not in internal]
    columns = [key for key in keys if key == "lr" or len({str(row[key]) for row in rows if key in row}) > 1]
    if len(rows) < 2:
        return ""
    from tabulate import tabulate  # takes 40 ms, which a start without a table saves

    return tabulate([[row.get(key) for key in columns] for row in rows], headers=columns, tablefmt="plain")


def add_group(optimizer: Optimizer, model: nn.Module, group: dict[str, Any]) -> None:
    """``Optimizer.add_param_group`` that also takes weights without names: torch refuses them beside weights with
    names, which is how this optimizer was built.
    """
    weights = group["params"]
    weights = [weights] if isinstance(weights, Tensor) else weights
    if isinstance(weights, Sequence | Iterator) and "param_names" in optimizer.param_groups[0]:
        names = {id(weight): name for name, weight in model.named_parameters()}
        first = sum(len(each["params"]) for each in optimizer.param_groups)
        named = [
            (names.get(id(weight), f"added.{number}"), weight) if isinstance(weight, Tensor) else weight
            for number, weight in enumerate(weights, first)
        ]
        group = {**group, "params": named}
    type(optimizer).add_param_group(optimizer, group)


def step_error(instance: Any, *arguments: Any) -> Exception | None:
    """Why ``instance.step`` does not take these arguments; None if it does."""
    try:
        signature(type(instance).step).bind(instance, *arguments)
    except (AttributeError, TypeError) as error:
        return error
    return None


def takes_metric(scheduler: Any) -> bool:
    """Whether ``step`` takes a metric, and not the number of an epoch or update, as the schedulers of timm do."""
    names = [*signature(type(scheduler).step).parameters]
    return not step_error(scheduler, 0.0) and not {"epoch", "num_updates", "step"}.intersection(names[1:2])


def require_plain_step(instance: Any, key: str) -> None:
    """Raise ConfigError for an object without a ``step()`` that takes no arguments."""
    if error := step_error(instance):
        path = f"{type(instance).__module__}.{type(instance).__qualname__}"
        remedy = ". A task with an optimization_step of its own may call step(closure)"
        if key.startswith("scheduler"):
            remedy = ". Use a scheduler of torch.optim.lr_scheduler, or runner.schedules.warmup_cosine"
        raise ConfigError(
            f"{key}: training calls step() without arguments, which {path} does not take: {error}{remedy}"
        ) from error


def _biases_and_norms(model: nn.Module) -> set[str]:
    """Names of weights that are not decayed: of fewer than two dimensions, or of a module that is a norm."""
    norms = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    own = {f"{path}.{name}" for path in norms for name, _ in model.get_submodule(path).named_parameters(recurse=False)}
    return own | {name for name, weight in model.named_parameters() if weight.dim() < 2}


def _layers(model: nn.Module) -> tuple[dict[str, int], int]:
    """The layer of each weight, by the order in which the model has them, and the number of the last: 0 before the
    repeated layers, which count from 1, and one more behind them. Raises ConfigError for a model without.
    """
    number = {id(weight): place for place, block in enumerate(blocks(model), 1) for weight in block.parameters()}
    if not number:
        remedy = "Give the rates by groups"
        raise ConfigError(f"optimizer.layer_decay needs repeated layers, in a ModuleList or Sequential. {remedy}")
    last, current, layers = max(number.values()), 0, dict[str, int]()
    weights = [*model.named_parameters()]
    end = max(place for place, (_, weight) in enumerate(weights) if id(weight) in number)
    for place, (name, weight) in enumerate(weights):
        current = number.get(id(weight), current if place <= end else last + 1)
        layers[name] = current
    return layers, last + 1
