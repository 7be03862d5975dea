"""Recording: what is written is what was there, and the training does not notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trady
from tests.small_task import CLASSES, small_data, small_net
from trady.errors import BudgetError, DataError, ModelError, StateError, TrainingError
from trady.study.folder import StudyFolder, Unit
from trady.study.noise import NoiseSample, layer_noise
from trady.study.parquet import read_noise, read_norms
from trady.study.records import read_records
from trady.study.run import StudyTask, record
from trady.study.settings import StudySettings
from trady.training.data.datasets import ImageDataset, epoch_order

SETTINGS = StudySettings("small", epochs=2, batch_size=8, noise_batches=3)
NAMES = ["first", "second"]


class Fails(ImageDataset):
    """Gives so many batches, then fails as a full disk or a pulled plug would."""

    left = 0

    def batch(self, indices: Any) -> tuple[torch.Tensor, torch.Tensor]:
        Fails.left -= 1
        if Fails.left < 0:
            raise OSError("no more")
        return super().batch(indices)


def task(name: str, fails: bool = False, model: Callable[[], nn.Module] = small_net) -> Callable[[], StudyTask]:
    train = small_data(40, NAMES.index(name))
    if fails:
        train = Fails(train.pixels, train.labels, train.image_size, train.normalization)
    return lambda: StudyTask(name, train, small_data(16, 9), lambda seed: model())


def run(path: Path, settings: StudySettings = SETTINGS, *, seeds: int = 1, **options: Any) -> StudyFolder:
    folder = StudyFolder(path)
    tasks = [task(name, **options) for name in NAMES]
    record(folder, settings, tasks, NAMES, range(seeds), progress=False)
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    return run(tmp_path_factory.mktemp("study") / "study", seeds=2)


def test_a_recorded_run_trains_as_an_unrecorded_one_does(study: StudyFolder) -> None:
    plain = trady.finetune(
        small_net(), small_data(40, 0), small_data(16, 9), policy="full", epochs=2, out=None, batch_size=8,
        lr=SETTINGS.lr, seed=1, progress=False,
    )  # fmt: skip
    lines = (study.run("first", 1) / "metrics.jsonl").read_text().splitlines()
    assert [
        f'"train_loss": {epoch.train_loss!r}' in line for epoch, line in zip(plain.history, lines, strict=True)
    ] == [
        True,
        True,
    ]


def without_dropout() -> nn.Module:
    model = small_net()
    model.dropout.p = 0.0
    return model


def test_the_first_step_has_the_norms_of_the_dense_gradient(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    settings = StudySettings("small", epochs=1, batch_size=8, noise_batches=2)
    record(folder, settings, [task("first", model=without_dropout)], ["first"], [0], progress=False)
    steps, norms = read_norms(folder.norms(Unit("first", 0, 0)))
    assert steps == (0, 1, 2, 3, 4)
    for name, expected in dense_norms().items():
        np.testing.assert_allclose(norms[name][0], expected, rtol=1e-4)


def dense_norms() -> dict[str, np.ndarray]:
    """Squared norms of the first step's gradient, by plain PyTorch."""
    model = without_dropout().eval()  # the statistics of normalisation are fixed, and so both modes are one
    images, labels = small_data(40, 0).batch(epoch_order(40, 0, 0)[:8].tolist())
    F.cross_entropy(model(images), labels).backward()
    found = {}
    for name in ("features.0", "features.3"):
        gradient = model.get_parameter(f"{name}.weight").grad
        assert gradient is not None
        found[name] = gradient.transpose(0, 1).flatten(1).double().square().sum(1).numpy()
    return found


BUDGETED = replace(SETTINGS, epochs=1, budget="elements:1200", noise_batches=2)


def test_inside_a_budget_every_channel_is_seen_in_sweeps_and_the_training_goes_as_without(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    record(folder, BUDGETED, [task("first", model=without_dropout)], ["first"], [0], progress=False)
    plain = trady.finetune(
        without_dropout(), small_data(40, 0), small_data(16, 9), budget="elements:1200", epochs=1, out=None,
        batch_size=8, lr=SETTINGS.lr, seed=0, progress=False,
    )  # fmt: skip
    (line,) = (folder.run("first", 0) / "metrics.jsonl").read_text().splitlines()
    assert f'"train_loss": {plain.history[0].train_loss!r}' in line
    assert f'"selection_hash": "{plain.history[0].selection_hash}"' in line
    norms = read_norms(folder.norms(Unit("first", 0, 0)))[1]
    assert sum(layer.channels * layer.elements for layer in folder.load_table()) > 1200
    for name, expected in dense_norms().items():
        np.testing.assert_allclose(norms[name][0], expected, rtol=1e-4)


def test_a_policy_that_measures_before_it_draws_trains_as_without_being_watched(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    settings = replace(BUDGETED, policy="dynamic-rgn")
    record(folder, settings, [task("first")], ["first"], [0], progress=False)
    plain = trady.finetune(
        small_net(), small_data(40, 0), small_data(16, 9), budget="elements:1200", policy="dynamic-rgn", epochs=1,
        out=None, batch_size=8, lr=SETTINGS.lr, seed=0, progress=False,
    )  # fmt: skip
    (line,) = (folder.run("first", 0) / "metrics.jsonl").read_text().splitlines()
    assert f'"train_loss": {plain.history[0].train_loss!r}' in line


def test_the_sweeps_of_a_study_stay_inside_a_peak_budget() -> None:
    batch = small_data(8, 0).batch(range(8))
    tuner = trady.prepare(without_dropout(), batch[0], budget="peak:140 KiB", policy="dynamic-random")
    sweeper, seen = tuner.sweeper(F.cross_entropy), dict[str, int]()

    def see(name: str, channels: np.ndarray, gradient: torch.Tensor) -> None:
        seen[name] = seen.get(name, 0) + len(channels)

    ledger = tuner.ledger(lambda: sweeper.visit(batch, see, seed=0))
    assert len(sweeper.selections) > 1
    assert seen == {"features.0": 3, "features.3": 8}
    assert ledger.peak_bytes <= 140 * 1024
    tuner.finish()


def test_a_budget_that_some_layer_does_not_fit_in_is_refused_with_its_name(tmp_path: Path) -> None:
    settings = replace(BUDGETED, budget="elements:230")
    with pytest.raises(BudgetError, match=r"a channel of features\.3 alone does not fit"):
        record(StudyFolder(tmp_path / "study"), settings, [task("first")], ["first"], [0], progress=False)


def test_every_part_of_a_study_is_recorded_and_read_back(study: StudyFolder) -> None:
    records = read_records(study)
    assert records.datasets == ("first", "second")
    assert records.seeds == (0, 1)
    assert len(records.units) == 8
    assert records.steps(records.of("first"), "features.3").shape == (20, 8)
    assert all(0 <= records.accuracy[unit] <= 1 for unit in records.units)
    assert records.without_gradient == ()
    assert [noise.layer for noise in records.noise[records.units[0]]] == list(records.table.names)
    assert records.table["features.3"].elements == 16 * 9 + 12 * 12


def test_a_study_keeps_no_weights(study: StudyFolder) -> None:
    assert not [*study.path.rglob("*.safetensors")]


def test_what_is_finished_is_not_run_again(study: StudyFolder) -> None:
    def never() -> StudyTask:
        raise AssertionError("it was loaded")

    before = {path: path.stat().st_mtime_ns for path in study.path.rglob("*.parquet")}
    record(study, SETTINGS, [never, never], NAMES, range(2), progress=False)
    assert {path: path.stat().st_mtime_ns for path in study.path.rglob("*.parquet")} == before


@pytest.mark.parametrize("batches", [4, 12, 20, 33])
def test_a_study_that_was_stopped_anywhere_ends_with_the_records_of_an_unbroken_one(
    study: StudyFolder, tmp_path: Path, batches: int
) -> None:
    Fails.left = batches
    with pytest.raises(OSError, match="no more"):
        run(tmp_path / "study", fails=True)
    folder = run(tmp_path / "study")
    for name in NAMES:
        for epoch in range(2):
            unit = Unit(name, 0, epoch)
            (steps, norms), (expected_steps, expected) = read_norms(folder.norms(unit)), read_norms(study.norms(unit))
            assert steps == expected_steps
            assert all(np.array_equal(norms[layer], expected[layer]) for layer in expected)
            assert read_noise(folder.noise(unit)) == read_noise(study.noise(unit))


def test_seeds_and_data_sets_can_be_added_but_no_other_settings(tmp_path: Path) -> None:
    settings = StudySettings("small", epochs=1, batch_size=8, noise_batches=2)
    folder = StudyFolder(tmp_path / "study")
    record(folder, settings, [task("first")], ["first"], [0], progress=False)
    record(folder, settings, [task("second")], ["second"], [0], progress=False)
    assert read_records(folder).datasets == ("first", "second")
    other = StudySettings("small", epochs=1, batch_size=8, noise_batches=2, lr=0.01)
    with pytest.raises(StateError, match=r"lr 0\.05 there and 0\.01 here"):
        record(folder, other, [task("first")], ["first"], [1], progress=False)


def test_every_so_many_steps_are_recorded(tmp_path: Path) -> None:
    folder = run(tmp_path / "study", StudySettings("small", epochs=1, batch_size=8, noise_batches=2, every=2))
    assert read_norms(folder.norms(Unit("first", 0, 0)))[0] == (0, 2, 4)


class Detached(nn.Module):
    """A branch that counts for nothing: its gradient is zero."""

    def __init__(self, everything: bool) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.classifier = nn.Linear(8, CLASSES)
        self.everything = everything

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.stem(x))
        if self.everything:
            y = y.detach()
        y = y[..., 1:-1, 1:-1] + 0.0 * self.branch(y)
        return self.classifier(y.mean((2, 3)))


def test_a_layer_that_never_sees_a_gradient_is_named(tmp_path: Path) -> None:
    said: list[str] = []
    folder = StudyFolder(tmp_path / "study")
    settings = StudySettings("small", epochs=1, batch_size=8, noise_batches=2)
    record(folder, settings, [task("first", model=lambda: Detached(False))], ["first"], [0], progress=False,
           say=said.append)  # fmt: skip
    assert said == ["without a gradient in the first epoch on first: branch"]
    assert read_records(folder).without_gradient == ("branch",)


def test_a_model_without_any_gradient_is_refused(tmp_path: Path) -> None:
    settings = StudySettings("small", epochs=1, batch_size=8, noise_batches=2)
    with pytest.raises(ModelError, match="no layer ever saw a gradient"):
        record(StudyFolder(tmp_path / "study"), settings, [task("first", model=lambda: Detached(True))], ["first"],
               [0], progress=False)  # fmt: skip


def test_too_few_images_for_the_noise_are_refused_before_anything_trains(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lower --noise-batches"):
        run(tmp_path / "study", StudySettings("small", epochs=1, batch_size=8, noise_batches=6))


def test_another_model_in_the_same_study_is_refused(study: StudyFolder) -> None:
    with pytest.raises(ModelError, match="all runs of a study need the same model"):
        record(study, SETTINGS, [task("first", model=lambda: Detached(False))], ["first"], [7], progress=False)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(StateError, match="not a study"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_records_that_are_missing_or_cut_short_are_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="there is no study"):
        read_records(StudyFolder(tmp_path))
    folder = run(tmp_path / "study", StudySettings("small", epochs=1, batch_size=8, noise_batches=2))
    part = folder.norms(Unit("second", 0, 0))
    part.write_bytes(part.read_bytes()[:-40])
    with pytest.raises(StateError, match=r"second-seed0-epoch0.*cannot be read"):
        read_records(folder)
    part.unlink()
    with pytest.raises(StateError, match="lacks the records of second, seed 0, epoch 1"):
        read_records(folder)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"every": 0}, {"noise_batches": 1}, {"batch_size": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(TrainingError, match=next(iter(wrong))):
        StudySettings(**{"model": "small", "epochs": 1, **wrong})  # type: ignore[arg-type]


def test_gaussian_noise_of_one_scale_has_the_index_of_a_gaussian() -> None:
    noise = layer_noise("layer", np.random.default_rng(0).normal(size=(8, 4096)), seed=0)
    assert noise.stable is not None
    assert noise.gaussian is not None
    assert noise.stable.low < 2 < noise.stable.high
    assert noise.hill is not None
    assert noise.hill.low > 4
    assert noise.zeros == 0


def test_the_control_tells_coordinates_of_different_scale_from_heavy_tails() -> None:
    rng = np.random.default_rng(1)
    scales = np.exp(1.5 * rng.normal(size=4096))
    mixed = layer_noise("layer", scales * rng.normal(size=(8, 4096)), seed=0)
    heavy = layer_noise("layer", rng.standard_cauchy(size=(8, 4096)), seed=0)
    assert mixed.stable is not None
    assert mixed.gaussian is not None
    assert mixed.stable.high < 1.9
    assert mixed.gaussian.value == pytest.approx(mixed.stable.value, abs=0.15)
    assert heavy.stable is not None
    assert heavy.stable.value < 1.3


def test_a_dead_layer_has_no_tail() -> None:
    noise = layer_noise("layer", np.zeros((4, 500)), seed=0)
    assert noise.zeros == 1
    assert (noise.stable, noise.hill, noise.power_law, noise.quantiles) == (None, None, None, ())


def test_a_sample_seen_in_parts_is_the_one_seen_at_once(study: StudyFolder) -> None:
    table = study.load_table()
    layer = table["features.3"]
    gradient = torch.randn(layer.channels, layer.weight_elements)
    whole, parts = (NoiseSample(table, 0) for _ in range(2))
    for sample in (whole, parts):
        sample.next_batch()
    whole.see(layer.name, np.arange(8), gradient)
    for channels in ([0, 1, 2], [3], [4, 5, 6, 7]):
        parts.see(layer.name, np.array(channels), gradient[channels])
    assert np.array_equal(whole._batches[0][layer.name], parts._batches[0][layer.name])
    assert whole._batches[0][layer.name].any()


def test_a_study_that_was_killed_as_it_began_or_ended_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("trady.study.folder.write_json", "trady.training.run_folder.RunFolder.drop_weights"):
        with monkeypatch.context() as patch:
            patch.setattr(name, killed)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "study")
    assert list((tmp_path / "study").rglob("*.safetensors"))
    folder = run(tmp_path / "study")
    assert len(folder.units(SETTINGS.epochs)) == 4
    assert not list((tmp_path / "study").rglob("*.safetensors"))
