"""A compiled model that is killed and resumed equals the uninterrupted run to the bit."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from crews import Crews
from lives import lives
from results import results

pytestmark = [
    pytest.mark.campaign,  # it is the compiler that takes so long
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]

COMMAND = (
    "experiment=smoke",
    "trainer.max_steps=12",
    "trainer.evaluate_every_steps=6",
    "checkpoint.every_steps=4",
    "runtime.compile=true",
    "runtime.audit=false",
    "runtime.num_threads=1",
)


@pytest.fixture
def crew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crews]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    with lives(tmp_path) as life:
        yield Crews(life)


@pytest.mark.parametrize("size", [1, 2])
def test_a_compiled_run_goes_on_to_the_bit(size: int, crew: Crews, tmp_path: Path) -> None:
    command = (*COMMAND, f"run.root={tmp_path}")
    whole = crew(size, *command, "run.name=whole")
    assert not any(whole.statuses), whole.output
    assert [*(tmp_path / "compiled").rglob("*.so")], "nothing was compiled"
    cut = crew(size, *command, "run.name=cut", to=[0], step=7)
    assert cut.statuses[0] is None
    resumed = crew(size, *command, "run.name=cut")
    assert not any(resumed.statuses), resumed.output
    assert "resumed from step 6" in resumed.output
    expected, actual = (results(tmp_path / "smoke" / name) for name in ("whole", "cut"))
    assert not actual.differences(expected)
