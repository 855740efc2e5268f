"""The preset for small networks, where the teacher is a large one or comes from elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import distmatch as dm
from distmatch.data import Dataset, from_arrays
from distmatch.methods.table import METHODS
from distmatch.nets.build import build_net
from distmatch.training import presets
from distmatch.training.options import DistillOptions, RunOptions
from distmatch.training.presets import of_method
from tests.helpers.command import done
from tests.helpers.edm_pickles import teacher_and_pickle
from tests.helpers.presets import own_teacher, points, warned


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    """A small network pickle of EDM, and images for it."""
    folder = tmp_path_factory.mktemp("edm")
    teacher_and_pickle(folder, "edm")
    shape = dm.load_teacher(folder / "edm.pkl").shape
    images = np.random.default_rng(0).integers(0, 256, (30, *shape[1:], shape[0]), dtype=np.uint8)
    np.savez(folder / "images.npz", x=images, y=np.arange(30) % 2)
    return folder, from_arrays(images, np.arange(30) % 2)


def test_a_teacher_from_elsewhere_is_not_given_laptop_rates_without_a_word(
    foreign: tuple[Path, Dataset], tmp_path: Path
) -> None:
    folder, _ = foreign
    line = f"distill --teacher {folder}/edm.pkl --data {folder}/images.npz --method sid --batch 4 --steps 5"
    told = done(f"{line} --out {tmp_path}/run").err
    assert "warning: --preset laptop is in force, --lr 0.0005, --lr-fake-score 0.001" in told
    assert "comes from elsewhere" in told
    assert "--preset paper:sid-cifar10" in told
    assert "--preset laptop is in force" in (tmp_path / "run/log.jsonl").read_text()
    assert "# warning     --preset laptop is in force" in done(f"{line} --dry-run").out
    assert "--preset laptop" not in done(f"{line} --preset paper:sid-cifar10 --dry-run").err


def test_the_warning_names_what_is_kept_and_the_closest_preset(foreign: tuple[Path, Dataset]) -> None:
    folder, data = foreign
    teacher = dm.load_teacher(folder / "edm.pkl")
    run = RunOptions(batch=4, steps=10)
    for name, method in METHODS.items():
        if (method.family == "consistency" and name in ("ctm", "mean-flow")) or name == "imm":
            continue  # they need a network of ours
        options = DistillOptions.of(name, run=run)
        if "backtrack" in method.options():
            options = replace(options, settings=replace(options.settings, backtrack=0))
        found = warned(options, teacher, data)
        assert len(found) == (method.family != "transport"), name
        for message in found:
            assert ("--lr-fake-score" in message.split(":")[0]) == method.has_fake_score
            near = of_method(name) or of_method(presets._LIKE[name])
            assert near[0].name in message
    rates = {"lr": 1e-5, "lr_fake_score": 2e-5, "lr_discriminator": 3e-5}
    options = DistillOptions.of("dmd2", run=run)
    assert "published for this method: --preset paper:dmd2-cifar10" in warned(options, teacher, data)[0]
    kept = replace(options, settings=replace(options.settings, lr=1e-5, lr_discriminator=3e-5))
    assert "in force, --lr-fake-score 0.001: for" in warned(kept, teacher, data)[0]
    assert warned(replace(options, settings=replace(options.settings, **rates)), teacher, data) == []


def test_presets_of_other_models_are_not_named_for_prompts() -> None:
    rates = {"lr": 1e-3}
    told = {"usual": rates, "parameters": 10, "elsewhere": True, "shape": (4, 64, 64), "text": True}
    for name, said in (
        ("dmd2", "published for this method: --preset paper:dmd2-sd15, --preset paper:dmd2-sdxl"),
        ("diff-instruct", "none is published for diff-instruct on prompts (docs/presets.md)"),
        ("dmd", "(docs/presets.md); paper:dmd2-sd15 has --lr 1e-05"),
    ):
        found = presets.laptop_warning(METHODS[name], rates, **told)
        assert found is not None
        assert found.endswith(said)


def test_a_network_of_ours_is_warned_of_from_a_size_on(monkeypatch: pytest.MonkeyPatch) -> None:
    options = DistillOptions.of("sid", run=RunOptions(batch=4, steps=10))
    assert warned(options, own_teacher(), points()) == []
    count = sum(p.numel() for p in own_teacher().parameters())
    monkeypatch.setattr(presets, "LAPTOP_PARAMETERS", count + 1)
    assert warned(options, own_teacher(), points()) == []
    monkeypatch.setattr(presets, "LAPTOP_PARAMETERS", count)
    (message,) = warned(options, own_teacher(), points())
    assert f"This one has {count:,}, and" in message


def test_the_size_is_above_what_train_builds_by_itself() -> None:
    from distmatch.nets.config import default_config

    for shape in ((2,), (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 128, 128)):
        net = build_net(default_config("auto", shape, "cuda"), shape, 10)
        assert sum(p.numel() for p in net.parameters()) < presets.LAPTOP_PARAMETERS
