"""The part of a configuration that decides the results, and the run names made from it."""

from itertools import combinations
from typing import Any

import pytest
from defaults import configured as default_config
from omegaconf.errors import MissingMandatoryValue

from runner.config.identity import IDENTITY, flatten, identity, is_name, quote_run_names, value_digest, variant

FILLED = {
    "model": {"_target_": "m", "width": "${data.batch_size}"},
    "data": {"train": {"_target_": "d"}, "batch_size": 8},
    "task": {"_target_": "t"},
    "optimizer": {"_target_": "o", "lr": 0.1},
    "scheduler": {"_target_": "s"},
}


def configured(**more: Any) -> Any:
    return default_config(FILLED, more)


def test_without_overrides_a_run_is_the_base() -> None:
    assert variant([]) == "base"
    assert variant(["experiment=digits"]) == "base"


def test_overrides_are_sorted_by_key() -> None:
    assert variant(["seed=3", "optimizer.lr=0.1"]) == "optimizer.lr=0.1,seed=3"
    assert variant(["optimizer.lr=0.1", "seed=3"]) == "optimizer.lr=0.1,seed=3"
    assert variant(["task.name='a,seed=3'"]) != variant(["task.name=a", "seed=3"])


@pytest.mark.parametrize(
    "override",
    [
        "run.root=/tmp",
        "run.name=x",
        "runtime.num_workers=4",
        "checkpoint.every_steps=5",
        "metrics.every_steps=5",
        "experiment=digits",
        "hydra/launcher=basic",
        "hydra.job.name=x",
        "+tags=[a]",
        "modelling.x=1",
    ],
)
def test_how_a_run_is_executed_is_not_in_its_name(override: str) -> None:
    assert variant([override, "seed=3"]) == "seed=3"


def test_the_parent_of_a_run_is_in_its_name() -> None:
    assert variant(["run.inherit=all", "seed=1"]) == "run.inherit=all,seed=1"
    names = [variant([f"run.parent={parent}"]) for parent in ("a/b", "a_b", "a/b@best", "a/b@10")]
    assert len({*names}) == len(names)
    assert all(map(is_name, names))


def test_every_key_of_the_identity_is_in_the_name() -> None:
    assert [variant([f"{key}=x"]) for key in IDENTITY] == [f"{key}=x" for key in IDENTITY]


@pytest.mark.parametrize(
    ("spellings", "name"),
    [
        (["optimizer.lr=0.01", "optimizer.lr=1e-2", "optimizer.lr=0.010", "optimizer.lr=1E-2"], "optimizer.lr=0.01"),
        (["model.width=64", "model.width=64.0", "model.width=6.4e1", "model.width=64 "], "model.width=64"),
        (["data.shuffle=true", "data.shuffle=True", "data.shuffle=TRUE"], "data.shuffle=true"),
        (["trainer.clip_norm=null", "trainer.clip_norm=NULL"], "trainer.clip_norm=null"),
        (["model=mlp", "+model=mlp", "model='mlp'", 'model="mlp"'], "model=mlp"),
        (["~trainer.clip_norm", "~trainer.clip_norm=1.0"], "~trainer.clip_norm"),
        (["+model.new=1", "model.new=1", "++model.new=1"], "model.new=1"),
        (["optimizer.lr=-0.0", "optimizer.lr=0"], "optimizer.lr=0"),
        (["optimizer.lr=1e20"], "optimizer.lr=1e+20"),
    ],
)
def test_the_same_value_gives_the_same_name(spellings: list[str], name: str) -> None:
    assert {variant([spelling]) for spelling in spellings} == {name}


def test_spelling_within_lists_and_mappings_does_not_matter() -> None:
    assert variant(["model.hidden=[64, 1e1,null]"]) == variant(["model.hidden=[64.0,10,NULL]"])
    assert variant(["model.sizes={a: 1, b: 2}"]) == variant(["model.sizes={b:2.0,a:1}"])
    assert variant(["model.hidden=[1,2]"]) != variant(["model.hidden=[2,1]"])


def test_the_last_of_two_overrides_wins() -> None:
    assert variant(["seed=1", "seed=2"]) == "seed=2"
    assert variant(["model.width=8", "~model.width"]) == "~model.width"


@pytest.mark.parametrize(
    "override",
    ["data.train.path=/a/b", "task.prompt='def f():'", "model.hidden=[64]", "model.x='ü'", "model/block=big"],
)
def test_unsafe_names_are_made_safe_and_get_a_digest(override: str) -> None:
    name = variant([override])
    assert is_name(name)
    assert name[-9] == "~"


def test_names_that_look_alike_stay_distinct() -> None:
    alike = ["[1]", "'{1}'", "'(1)'", "_1_", "' 1 '", "/1/"]
    names = [variant([f"model.x={value}"]) for value in alike]
    assert len({*names}) == len(names)


@pytest.mark.parametrize("text", ["1", "1.5", "1e3", "true", "null", "nan", "[1]", "{a:1}", "-1", "1_000"])
def test_a_quoted_text_is_no_number(text: str) -> None:
    names = [variant([f"model.x={spelling}"]) for spelling in (text, f"'{text}'", f"[{text}]", f"['{text}']")]
    assert len({*names}) == 4
    assert variant([f'model.x="{text}"']) == names[1]
    assert all(map(is_name, names))


def test_names_of_ordinary_texts_have_no_quotes() -> None:
    texts = ["adam", "2026-01-01", "1a", "v1.0.0", "-x", ".hidden", "True_", "nano"]
    assert [variant([f"model.x={quote}{text}{quote}"]) for text in texts for quote in ("", "'")] == [
        f"model.x={text}" for text in texts for _ in range(2)
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run.parent=o/a/lr=1,seed=2"], ['run.parent="o/a/lr=1,seed=2"']),
        (["run.parent=s3://b/a/lr=1@best"], ['run.parent="s3://b/a/lr=1@best"']),
        (["run.parent=o/a/base~1a2b3c4d@40"], ['run.parent="o/a/base~1a2b3c4d@40"']),
        (["++run.name=lr=1-2"], ['++run.name="lr=1-2"']),
        (
            ["-m", "run.parent=o/a/lr=1,seed=2,o/a/lr=2,seed=2"],
            ["-m", 'run.parent="o/a/lr=1,seed=2","o/a/lr=2,seed=2"'],
        ),
        (["-m", "run.parent=o/a/base,o/b/base", "run.name=a,b"], None),
        (['run.parent="o/a/lr=1"'], None),
        (["run.parent='o/a/lr=1'"], None),
        (["run.parent=${oc.env:A}/lr=1"], None),
        (["-m", "run.parent=choice(o/a/base,'o/a/lr=1')"], None),
        (["run.root=a=b", "model.x=a=b", "xrun.parent=a=b"], None),
    ],
)
def test_names_may_be_typed_as_they_are_printed(words: list[str], expected: list[str] | None) -> None:
    assert quote_run_names(words) == (expected or words)


def test_long_names_are_cut_and_stay_distinct() -> None:
    names = [variant([f"model.x={'a' * length}"]) for length in range(140, 250)]
    assert len({*names}) == len(names)
    assert max(map(len, names)) == 160
    assert all(map(is_name, names))


def test_names_are_frozen() -> None:
    """The same command must find the directory that an older version made."""
    assert variant(["model.hidden=[64,32]", "seed=1"]) == "model.hidden=_64,32_,seed=1~40243a8a"
    assert value_digest({"a": [1, None, True], "b": 0.1}) == "786c0af0"


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert value_digest({"a": 1, "b": 2}) == value_digest({"b": 2, "a": 1})
    values: list[Any] = [{"a": 1}, {"a": "1"}, {"a": True}, {"a": None}, {"a": [1]}, {"b": 1}, {}]
    assert all(value_digest(left) != value_digest(other) for left, other in combinations(values, 2))
    assert value_digest([{1: {2: 0, "b": 0}, "a": 0}]) == value_digest([{"a": 0, 1: {"b": 0, 2: 0}}])


@pytest.mark.parametrize("text", ["baseline", "a.b_c=1,d+e~f-g", "x" * 160, "_"])
def test_a_safe_text_can_name_a_run(text: str) -> None:
    assert is_name(text)


@pytest.mark.parametrize("text", ["", ".", "..", ".hidden", "-rf", "a/b", "a b", "a\n", "ü", "x" * 161, "a\\b", "$x"])
def test_an_unsafe_text_cannot(text: str) -> None:
    assert not is_name(text)


def test_the_identity_is_resolved_plain_and_in_order() -> None:
    parts = identity(configured(data={"tail": "drop"}, runtime={"num_workers": 3}))
    assert [*parts] == [key for key in IDENTITY if key != "params"]
    assert parts["model"] == {"_target_": "m", "width": 8}
    assert parts["data"]["tail"] == "drop"
    assert parts["trainer"]["precision"] == "fp32"
    assert type(parts["objective"]["mode"]) is str


def test_how_a_run_is_executed_does_not_change_its_identity() -> None:
    elsewhere = configured(runtime={"num_workers": 3}, run={"root": "elsewhere"}, checkpoint={"every_steps": 1})
    assert identity(elsewhere) == identity(configured())
    assert identity(configured(seed=1)) != identity(configured())


def test_a_missing_value_is_no_identity() -> None:
    with pytest.raises(MissingMandatoryValue, match="model"):
        identity(default_config())


def test_flatten_names_leaves_by_dotted_key() -> None:
    tree = {"a": {"b": 1, "c": {"d": [1, {"e": 2}]}}, "f": {}, "g": None}
    assert flatten(tree) == {"a.b": 1, "a.c.d": [1, {"e": 2}], "f": {}, "g": None}
    assert flatten({}) == {}
