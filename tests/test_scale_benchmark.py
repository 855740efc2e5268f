"""What `benchmarks/scale.py` predicts from is what a step does: its messages and memory; and sums by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from distmatch.base.ranks import Ranks


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import scale

    return scale


@pytest.fixture
def counts(scale: ModuleType) -> ModuleType:
    """What it counts with."""
    import scale_counts

    return scale_counts


@pytest.fixture
def cycle(counts: ModuleType) -> object:
    """Five steps, in the last of which the student learns as well."""
    return counts.Cycle(5, 40.0, 24, 6, Counter(student=1, fake=5, ratio=5), 10)


def test_predicted_messages_are_those_that_a_cycle_sends(
    scale: ModuleType, counts: ModuleType, cycle: object
) -> None:
    method, state, _, steps = counts.small_run(Ranks(0, 2))
    batch = counts.small_batch(2)
    with counts.unsent() as sent:
        for _ in range(steps):
            method.step(state, batch)
    gradients = {
        name: float(sum(p.nbytes for g in optimizer.param_groups for p in g["params"]))
        for name, optimizer in state.optimizers.items()
    }
    found = scale.summed(gradients, cycle, 2)
    large = [m for m in found if m.bytes > 1024]
    assert sum(m.bytes * m.count for m in large) * steps == sum(size for _, size in sent if size > 1024)
    assert sum(m.count for m in large) * steps == sum(size > 1024 for _, size in sent)
    (small,) = (m for m in found if m.bytes <= 1024)
    assert small.count * steps == sum(size <= 1024 for _, size in sent) + steps  # one flag a step


@pytest.mark.slow
def test_sizes_go_on_in_a_straight_line(counts: ModuleType) -> None:
    """Predicted from 2 and 4 blocks, 6 blocks have what a prediction of 6 blocks has."""
    found = counts.network(128, 6)
    whole = counts._memory(128, 6, 8, {})
    twice = counts._memory(128, 6, 16, {})
    assert found.kept == counts._kept(whole)
    assert found.gradients == whole.sizes["student"].gradients
    assert found.parameters == whole.sizes["teacher"].parameters
    assert found.activations == pytest.approx((twice.passes - whole.passes) / 8, rel=0.02)


def test_sums_by_hand(scale: ModuleType, counts: ModuleType, cycle: object) -> None:
    """A gigabyte of weights, with ten blocks, on devices of round numbers."""
    net = counts.Network(
        parameters=250_000_000,
        work=1e12,
        blocks=10,
        kept=9e9,
        gradients=1e9,
        learned=250_000_000,
        weights=1e9,
        activations=1e9,
    )
    assumed = scale.Assumed(
        flops=1e14, memory_rate=1e12, within=1e11, between=1e10, latency=0.0, overlap=0.5, batch=2
    )
    alone = scale.predict(net, cycle, "ddp", 1, assumed)
    passes, updates = 8 * 2e12 / 1e14, 4 * (7 * 6 + 3) / 5 * 250e6 / 1e12
    assert alone.seconds == pytest.approx(passes + updates)
    assert (alone.memory, alone.sent) == (12e9, 0.0)
    for mode in ("fsdp2", "hybrid"):
        assert scale.predict(net, cycle, mode, 1, assumed) == alone

    ddp = scale.predict(net, cycle, "ddp", 16, assumed)  # gradients 6 times in 5 steps, between machines
    turn = 15 / 16 * 1e9 * 6 / 5
    assert ddp.sent == pytest.approx(2 * turn, rel=1e-5)
    assert ddp.seconds == pytest.approx(passes + updates + 2 * turn / 1e10, rel=1e-5)

    shared = scale.predict(net, cycle, "fsdp2", 8, assumed)  # 24 gathers and 6 scatters, half of them hidden
    turns = 7 / 8 * 1e9 * 30 / 5
    assert shared.sent == pytest.approx(turns, rel=1e-5)
    assert shared.seconds == pytest.approx(passes + updates / 8 + turns / 1e11 * 0.5, rel=1e-5)
    assert shared.memory == pytest.approx(10e9 / 8 + 2 * 1e8 + 2e9)

    hybrid = scale.predict(net, cycle, "hybrid", 16, assumed)  # two machines sum what each holds an eighth of
    across = 2 * 1 / 2 * 1e9 / 8 * 6 / 5
    assert hybrid.sent == pytest.approx(turns + across, rel=1e-5)
    assert hybrid.seconds == pytest.approx(
        passes + updates / 8 + turns / 1e11 * 0.5 + across / 1e10, rel=1e-5
    )


def test_a_measured_table_is_read_on_a_straight_line(scale: ModuleType) -> None:
    import scale_check

    table = scale_check.Table({("all_reduce", 2): {100: 1.0, 300: 3.0}})
    assert table.seconds(scale.Message("all_reduce", 200, 2, count=3)) == pytest.approx(6.0)
    assert table.seconds(scale.Message("all_reduce", 5, 2)) == 1.0
    assert table.seconds(scale.Message("all_reduce", 200, 1)) == 0.0
