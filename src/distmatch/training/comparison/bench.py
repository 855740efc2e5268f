"""All students of a comparison, and their teacher, on the same latents, labels, blocks and features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.base.files import atomic_write, load_tensors, save_tensors
from distmatch.base.progress import quietly
from distmatch.data import TOY_NAMES, Dataset, load_data, toy
from distmatch.data.columns import columns_of
from distmatch.diffusion.conditioning import Conditioning
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.methods.student import Student
from distmatch.metrics import plan, resolve_features
from distmatch.metrics.evaluate import evaluate_replicates
from distmatch.metrics.features import Features
from distmatch.training.comparison.options import CompareOptions
from distmatch.training.comparison.stats import Measured
from distmatch.training.distill_data import check_fit
from distmatch.training.evaluation import asked_of, measure_samples, npz_bytes, plain, write_evaluation
from distmatch.training.known_data import known_data, with_encodings
from distmatch.training.models import Model, open_model
from distmatch.training.runfolder import RunFolder
from distmatch.training.sampling import SampleResult, Sampling

_WARM = 64  # samples of a first call, which pays for memory and threads and is not part of a model's speed


@dataclass(frozen=True)
class Bench:
    """What every model of a comparison is measured by.

    Attributes:
        data: The real data.
        teacher: The teacher.
        space: The feature space, made once.
        asked: What the samples are conditioned on, 2 * block rows.
        block: Samples in a block; every model gives two.
        seed: Of latents, labels and blocks.
        sampling: How the teacher is sampled.
        device: Where to sample.
        mixture: The exact mixture behind the data, for the mode metrics.
    """

    data: Dataset
    teacher: Model
    space: Features
    asked: Conditioning
    block: int
    seed: int
    sampling: Sampling
    device: str
    mixture: GaussianMixture | None

    def settings(self) -> dict[str, Any]:
        """What the values depend on besides the samples, as JSON."""
        found = plan(self.data, features=self.space, n=self.block, seed=self.seed)
        return {**found.to_dict(), **self.sampling.to_dict()}

    def draw(self, model: Model) -> SampleResult:
        """The samples of a model: always from the same latents, under the same conditions."""
        with quietly():
            model.draw(
                _WARM, self.asked.index(slice(_WARM)), self.seed, Sampling(steps=2), device=self.device
            )
        count = 2 * self.block
        return model.draw(count, self.asked, self.seed, self.sampling, device=self.device)

    def baseline(self, folder: RunFolder) -> dict[str, dict[str, Any]]:
        """Measures real data and the teacher, and writes their samples; the JSON form of both."""
        found, drawn = measure_samples(
            self.data,
            {"teacher": lambda count, asked: self.draw(self.teacher)},
            asked=self.asked,
            features=self.space,
            n=self.block,
            seed=self.seed,
            mixture=self.mixture,
        )
        for name, samples in drawn.items():
            content = npz_bytes(
                self.data.scaling.export(samples.x), samples.conditioning, self.data.class_names
            )
            atomic_write(folder.samples / f"{name}.npz", content)
        return plain(found)

    def student(
        self, student: Student, folder: RunFolder, others: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """Measures a student and writes what was found to its run folder.

        Args:
            student: The student.
            folder: The folder of its run.
            others: The JSON form of the metrics of real data and teacher, which go beside.

        Returns:
            The JSON form of its metrics.
        """
        drawn = self.draw(Model("student", student, None, self.data.scaling, ""))
        found = evaluate_replicates(
            drawn.x,
            self.data,
            labels=self.asked.label,
            features=self.space,
            n=self.block,
            seed=self.seed,
            mixture=self.mixture,
        )
        speed = {"nfe": drawn.nfe, "seconds_per_1000": drawn.seconds_per_1000}
        metrics: dict[str, dict[str, Any]] = {**others, "student": {**speed, **found.estimates}}
        save_tensors(folder.path / "replicates.safetensors", found.replicates)
        write_evaluation(
            folder, metrics, {"student": drawn}, self.data.scaling, self.settings(), self.data.class_names
        )
        return plain(metrics)["student"]


def open_bench(
    options: CompareOptions, teacher: Denoiser | None = None, data: Dataset | None = None
) -> Bench:
    """Makes the bench of a comparison; whatever cannot be measured is refused here.

    Args:
        options: The options.
        teacher: Used instead of the teacher that they name.
        data: Used instead of the data that they name.

    Raises:
        UserError: No data, or data that do not fit.
    """
    run = options.shared.run
    if teacher is not None:
        scaling = data.scaling if data is not None else None
        model = None if scaling is None else Model("teacher", None, teacher, scaling, "", known_data(teacher))
    else:
        model = open_model(options.shared.teacher, options=options.shared.pipeline.given())
    spec = options.shared.data or (model.data if model is not None else "")
    if data is None and spec:
        labeled = model is not None and bool(model.conditioning_spec)
        columns = columns_of(model.trained_on) if model is not None else ()
        data = load_data(spec, labels=labeled, columns=columns)
    if data is None or model is None:
        raise UserError(
            "students can only be compared against real data",
            got="a teacher that does not say what it was trained on, and no --data",
            fix="pass --data",
        )
    data = with_encodings(data, model)
    check_fit(model, data)
    data = model.seen(data)
    given = options.shared.settings.guidance
    guidance = 1.0 if given is None else given
    sampling = Sampling(solver=options.eval_solver, steps=options.eval_steps, guidance=guidance)
    if model.teacher is not None:
        sampling.check(model.teacher)
    space = resolve_features(options.features, data)
    block = plan(data, features=space, n=options.n, seed=run.seed).n
    return Bench(
        data=data,
        teacher=model,
        space=space,
        asked=asked_of(data, model.conditioning_spec, 2 * block, run.seed),
        block=block,
        seed=run.seed,
        sampling=sampling,
        device=run.device,
        mixture=toy(spec) if spec in TOY_NAMES else None,
    )


def measured(run: dict[str, Any], folder: RunFolder) -> Measured:
    """The metrics of a finished run, from its entry in `compare.json` and its folder."""
    estimates = {key: Estimate.from_dict(v) for key, v in run["metrics"].items() if isinstance(v, dict)}
    return Measured(estimates, load_tensors(folder.path / "replicates.safetensors"))
