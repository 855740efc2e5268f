"""All students of a comparison, and their teacher, on the same latents, labels, blocks and features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.base.files import load_tensors, save_tensors
from distmatch.base.progress import quietly
from distmatch.base.ranks import ALONE, Ranks, joined
from distmatch.data import TOY_NAMES, Dataset, Scaling, load_data, toy
from distmatch.data.columns import columns_of
from distmatch.data.prompts import read_prompts
from distmatch.diffusion.conditioning import Conditioning
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.interop import decoder_of
from distmatch.methods.student import Student
from distmatch.metrics import plan
from distmatch.metrics.by_prompt import prompt_estimates
from distmatch.metrics.evaluate import evaluate_replicates
from distmatch.metrics.features import Features
from distmatch.metrics.notes import marked
from distmatch.training.comparison.options import CompareOptions
from distmatch.training.comparison.stats import Measured
from distmatch.training.distill_data import check_fit
from distmatch.training.evaluation import (
    asked_of,
    measure_samples,
    plain,
    reference_samples,
    write_evaluation,
    write_samples,
)
from distmatch.training.known_data import known_data, with_encodings
from distmatch.training.models import Model, open_model
from distmatch.training.prompt_reference import guided_as, images_in, reference_on_prompts
from distmatch.training.prompted import digest_of
from distmatch.training.runfolder import RunFolder
from distmatch.training.sampling import SampleResult, Sampling
from distmatch.training.shared_draw import draw_shared, shared_features

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
        of: What the data are where they are not real.
        batch: Samples at a time.
        prompts: The hash of the prompts; '' without.
        ranks: The processes that measure together; the first one writes.
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
    of: str = ""
    batch: int = 1024
    prompts: str = ""
    ranks: Ranks = ALONE

    def settings(self) -> dict[str, Any]:
        """What the values depend on besides the samples, as JSON."""
        found = plan(self.data, features=self.space, n=self.block, seed=self.seed)
        return {**found.to_dict(), **self.sampling.to_dict()}

    def draw(self, model: Model, place: Path) -> SampleResult:
        """The samples of a model: always from the same latents, under the same conditions."""
        with quietly():
            few = self.asked.index(slice(warm := min(_WARM, self.batch)))
            model.draw(warm, few, self.seed, Sampling(steps=2), device=self.device)

        def part(count: int, asked: Conditioning, first: int) -> SampleResult:
            how: dict[str, Any] = {"batch": self.batch, "device": self.device, "first": first}
            return model.draw(count, asked, self.seed, self.sampling, **how)

        where: dict[str, Any] = {"batch": self.batch, "ranks": self.ranks, "place": place}
        return draw_shared(part, 2 * self.block, self.asked, model.shape, **where)

    def baseline(self, folder: RunFolder) -> dict[str, dict[str, Any]]:
        """Measures real data and the teacher, and writes their samples; the JSON form of both."""
        found, drawn = measure_samples(
            self.data,
            {"teacher": lambda count, asked: self.draw(self.teacher, folder.samples)},
            asked=self.asked,
            features=self.space,
            n=self.block,
            seed=self.seed,
            mixture=self.mixture,
            of=self.of,
            ranks=self.ranks,
            place=folder.samples,
        )
        if self.ranks.main:
            write_samples(folder, drawn, self.data.scaling, self.data.class_names)
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
        together: dict[str, Any] = {"ranks": self.ranks, "place": folder.samples}
        real = reference_samples(self.data, self.asked.label, 2 * self.block, self.seed, **together)
        model = Model("student", student, None, self.data.scaling, "")
        drawn = replace(self.draw(model, folder.samples), prompts=real.prompts)
        found = evaluate_replicates(
            drawn.x,
            self.data,
            labels=self.asked.label,
            features=self.space,
            n=self.block,
            seed=self.seed,
            mixture=self.mixture,
            ranks=self.ranks,
        )
        by_prompt = prompt_estimates(drawn.x, real.x, real.prompts)
        speed = {"nfe": drawn.nfe, "seconds_per_1000": drawn.seconds_per_1000}
        metrics: dict[str, dict[str, Any]] = {
            **others,
            "student": {**speed, **marked(found.estimates, student.info), **by_prompt},
        }
        settings, names = self.settings(), self.data.class_names
        if self.ranks.main:
            save_tensors(folder.path / "replicates.safetensors", found.replicates)
            write_evaluation(folder, metrics, {"student": drawn}, self.data.scaling, settings, names)
        return plain(metrics)["student"]


def open_bench(
    options: CompareOptions,
    teacher: Denoiser | None = None,
    data: Dataset | None = None,
    texts: Sequence[str] | None = None,
) -> Bench:
    """Makes the bench of a comparison; whatever cannot be measured is refused here.

    Args:
        options: The options.
        teacher: Used instead of the teacher that they name.
        data: Used instead of the data that they name.
        texts: Prompts in place of those that they name.

    Raises:
        UserError: No data, or data that do not fit.
    """
    run = options.shared.run
    prompts = options.shared.prompts
    if teacher is not None:
        known = known_data(teacher)
        scaling = (
            Scaling.known(known, (decoder_of(teacher) or teacher).shape) if data is None else data.scaling
        )
        model = Model("teacher", None, teacher, scaling, "", known)
    else:
        model = open_model(options.shared.teacher, options=options.shared.pipeline.given())
    given = options.shared.settings.guidance
    guidance = 1.0 if given is None else given
    sampling = Sampling(solver=options.eval_solver, steps=options.eval_steps, guidance=guidance)
    spec = options.shared.data or ("" if prompts or texts is not None else model.data)
    of, digest, batch = "", "", 1024
    folder = "" if model.teacher is None else images_in(prompts, options.shared.data, model.teacher)
    if model.teacher is not None and (prompts or texts is not None or folder):
        asked = list(texts) if texts is not None else read_prompts(prompts or folder)
        sampling = guided_as(sampling, vars(options.shared.settings), model.teacher, run.device)
        batch = min(batch, run.batch)
        found = reference_on_prompts(
            model,
            asked,
            folder=folder,
            spec=spec,
            data=data,
            n=options.n,
            sampling=sampling,
            seed=run.seed,
            device=run.device,
            batch=batch,
        )
        data, of, digest = found.data, found.of, digest_of(asked)
    if data is None and spec:
        labeled, columns = bool(model.conditioning_spec), columns_of(model.trained_on)
        data = load_data(spec, labels=labeled, columns=columns)
    if data is None:
        raise UserError(
            "students can only be compared against real data",
            got="a teacher that does not say what it was trained on, and no --data",
            fix="pass --data, or --prompts for a teacher that takes them",
        )
    data = with_encodings(data, model)
    check_fit(model, data)
    data = model.seen(data)
    if model.teacher is not None:
        sampling.check(model.teacher)
    ranks = joined()
    space = shared_features(options.features, data, ranks, options.feature_weights)
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
        of=of,
        batch=batch,
        prompts=digest,
        ranks=ranks,
    )


def measured(run: dict[str, Any], folder: RunFolder) -> Measured:
    """The metrics of a finished run, from its entry in `compare.json` and its folder."""
    estimates = {key: Estimate.from_dict(v) for key, v in run["metrics"].items() if isinstance(v, dict)}
    return Measured(estimates, load_tensors(folder.path / "replicates.safetensors"))
