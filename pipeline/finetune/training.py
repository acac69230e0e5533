"""The training itself: batches in, a state after each while, the best weights kept.

Runs in every worker alike; the first one writes. Goes on from the newest state as if it had not been
interrupted. Knows torch and the files of a state, and Ray only through the batches.
Shape suffixes: B batch, C channels, H, W height and width, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import LimitError
from pipeline.finetune.augment import Augmentation
from pipeline.finetune.batches import Batch, Loader, Order
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.judge import Judge, Verdict
from pipeline.finetune.network import Start
from pipeline.finetune.recipe import (
    Average,
    Schedule,
    clip_gradients,
    draw_mix,
    interpolate,
    make_optimizers,
    mix_pairs,
    mixed_loss,
    set_rates,
)
from pipeline.finetune.sample_set import SampleSet
from pipeline.finetune.state import (
    FOLDER,
    INTERPOLATED,
    Progress,
    Sums,
    Tensors,
    load_optimizer,
    optimizer_tensors,
    prefixed,
    read_best,
    read_state,
    without_prefix,
    write_best,
    write_state,
)
from pipeline.finetune.together import Chances, Share, share_statistics, sum_over_all
from pipeline.storage import Storage

Command = Literal["go", "save", "stop"]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Job:
    """All that settles a training; travels to the workers."""

    config: FinetuneConfig
    start: Start
    classes: tuple[str, ...]
    train: SampleSet
    validation: SampleSet
    output: Storage
    precision: str
    digest: str
    recipe: str  # digest of what is known of it before an image is read

    @property
    def schedule(self) -> Schedule:
        return Schedule.of(self.config.train, len(self.train))

    def size_of(self, step: int) -> int:
        """Pixels a side of a step's images."""
        share = step / self.schedule.total_steps
        smaller = (size for until, size in self.config.augment.sizes if share < until)
        return next(smaller, self.start.pixels)

    def loader(self, share: Share) -> Loader:
        """What loads a worker's shares of the steps' images."""
        config = self.config
        augment = Augmentation(config.augment, self.start.processor, config.limits.max_pixels)
        order = Order(len(self.train), config.train.batch_size, config.train.seed)
        return Loader(self.train, augment, order, share)

    def epochs_after(self, steps: int) -> float:
        return steps * self.config.train.batch_size / len(self.train)


class Training:
    """A worker's part of a training: the network, its optimizer, and where it stands."""

    def __init__(self, job: Job, share: Share, device: torch.device) -> None:
        self._job, self._share, self._device = job, share, device
        self._config = job.config.train
        model = job.start.build(job.classes, self._config.seed)
        if self._config.freeze == "backbone":
            model.cvt.requires_grad_(False)
        elif share.num_workers > 1:
            share_statistics(model, device)
        self.model = model.to(device)
        self._chances = Chances(self.model, self._config.seed)
        self._optimizers = make_optimizers(
            self.model, self._config, torch.bfloat16 if job.precision == "bfloat16" else torch.float32
        )
        self._average = Average(self.model, self._config.ema_decay) if self._config.ema_decay else None
        self._scaler = torch.amp.GradScaler(device.type, enabled=job.precision == "float16")
        self.progress = Progress(job.digest, recipe=job.recipe)
        self._resume()
        self._parallel: nn.Module = self.model
        if share.num_workers > 1:
            ids = [device.index] if device.type == "cuda" else None
            self._parallel = nn.parallel.DistributedDataParallel(
                self.model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        gain_C, offset_C = job.start.processor.affine()
        self._gain, self._offset = (it.to(device)[:, None, None] for it in (gain_C, offset_C))
        self._running = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, images
        self._judge = Judge(job.validation, share, self._normalize, self._autocast)

    def steps(self) -> Iterator[tuple[int, int]]:
        """What is left to do: steps, with the size of their images."""
        end = 0 if self.progress.finished else self._job.schedule.total_steps  # it may have ended early
        return ((n, self._job.size_of(n)) for n in range(self.progress.step, end))

    def run(self, batches: Iterator[Batch], command: Callable[[Training], Command]) -> None:
        """Train on these batches to the end; `command` is asked after each step, and saves or stops it."""
        schedule = self._job.schedule
        self._set_mode()
        began = time.monotonic()
        for batch in batches:
            assert batch.step == self.progress.step, "batches come in their order"
            self._step(batch, schedule.rate(batch.step))
            now = time.monotonic()
            self.progress.seconds += now - began
            self.progress.sums.seconds += now - began
            began = now
            if self._ends_epoch(batch.step):
                self._evaluate(schedule.rate(batch.step))
                began = time.monotonic()
            if self.progress.finished:
                break
            match command(self):
                case "save":
                    self.save()
                case "stop":
                    self.save()
                    return
        self.progress.finished = True
        self.save()
        if self._config.interpolate:
            self._interpolate()

    def status(self) -> dict[str, Any]:
        """Where it stands, for people, since the last evaluation: this worker's share stands for all."""
        progress, job = self.progress, self._job
        loss, correct, images = (self._running * self._share.num_workers).tolist()
        sums = progress.sums
        images += sums.images
        seen = self.progress.step * self._config.batch_size
        rate = images / sums.seconds if sums.seconds else 0.0
        left = (job.schedule.total_steps - progress.step) * self._config.batch_size
        return {
            "step": progress.step,
            "total_steps": job.schedule.total_steps,
            "epoch": job.epochs_after(progress.step),
            "epochs": self._config.epochs,
            "loss": (sums.loss + loss) / images if images else None,
            "accuracy": (sums.correct + correct) / images if images else None,
            "best_accuracy": progress.best_accuracy if progress.history else None,
            "images": seen,
            "images_per_s": rate,
            "seconds_left": left / rate if rate else None,
            "pixels": job.size_of(progress.step),
        }

    def save(self) -> None:
        """Write the state; all workers take part, the first one writes.

        Raises LimitError where the training has diverged: what is there already is worth more.
        """
        self._settle()
        self._check_finite(self.progress.sums.loss)
        if self._share.rank == 0:
            write_state(self._job.output, self.progress, self._tensors())

    def _step(self, batch: Batch, rate: float) -> None:
        """One step of the optimizer, in as many parts as the configuration says."""
        train, share = self._config, self._share.of(self._config.batch_size)
        set_rates(self._optimizers, rate, train)
        chances = self._chances.draw(batch.step, train.batch_size)[..., share]
        size = batch.pixels_BHWC.shape[1]
        mix = draw_mix(self._job.config.augment, size, np.random.default_rng((train.seed, batch.step, 2)))
        part = len(batch.labels_B) // train.accumulate
        for number in range(train.accumulate):
            rows = slice(number * part, (number + 1) * part)
            self._chances.set(chances[..., rows])
            x_BCHW = self._normalize(torch.from_numpy(batch.pixels_BHWC[rows]))
            labels_B = torch.from_numpy(batch.labels_B[rows]).to(self._device).long()
            with self._synchronised(number + 1 == train.accumulate):
                with self._autocast():
                    (logits_BK,) = self._parallel(mix_pairs(x_BCHW, mix), return_dict=False)
                loss = mixed_loss(logits_BK.float(), labels_B, mix, train.label_smoothing)
                self._scaler.scale(loss / train.accumulate).backward()  # type: ignore[no-untyped-call]
            correct = (logits_BK.detach().argmax(1) == labels_B).sum()
            values = loss.detach() * part, correct, torch.tensor(part, device=self._device)
            self._running += torch.stack([it.double() for it in values])
        optimizers = self._optimizers.values()
        for optimizer in optimizers:
            self._scaler.unscale_(optimizer)
        clip_gradients(self.model.parameters(), train.clip_grad_norm)
        for optimizer in optimizers:
            self._scaler.step(optimizer)
            optimizer.zero_grad()
        self._scaler.update()
        if self._average:
            self._average.update(self.model, batch.step)
        self.progress.step += 1

    def _normalize(self, pixels_BHWC: Tensor) -> Tensor:
        """uint8 pixels to the network's input (B, 3, H, W), on its device, channels last in memory."""
        x_BCHW = pixels_BHWC.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        return x_BCHW.float().mul_(self._gain).add_(self._offset)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = _DTYPES.get(self._job.precision)
        return torch.autocast(self._device.type, dtype) if dtype else contextlib.nullcontext()

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are exchanged with the last part of a batch only."""
        if last or self._parallel is self.model:
            return contextlib.nullcontext()
        return self._parallel.no_sync()  # type: ignore[operator, no-any-return]

    def _set_mode(self) -> None:
        self.model.train()
        if self._config.freeze == "backbone":
            self.model.cvt.eval()

    def _ends_epoch(self, step: int) -> bool:
        whole = int(self._job.epochs_after(step + 1)) > int(self._job.epochs_after(step))
        return whole or step + 1 == self._job.schedule.total_steps

    def _evaluate(self, rate: float) -> None:
        """Judge the weights that would be kept, add to the curve, keep them where they are the best yet.

        Raises LimitError where the training has diverged.
        """
        self._settle()
        verdict = self._judged(self.kept_state())
        progress, sums = self.progress, self.progress.sums
        self._check_finite(sums.loss, verdict.loss)
        progress.history.append(
            {
                "epoch": round(self._job.epochs_after(progress.step), 4),
                "step": progress.step,
                "learning_rate": rate,
                "train_loss": sums.loss / max(1, sums.images),
                "train_accuracy": sums.correct / max(1, sums.images),
                "validation_loss": verdict.loss,
                "validation_accuracy": verdict.accuracy,
                "images_per_s": round(sums.images / max(1e-9, sums.seconds), 2),
                "seconds": round(progress.seconds, 2),
            }
        )
        progress.sums = Sums()
        if verdict.accuracy > progress.best_accuracy:
            progress.best_accuracy, progress.best_step = verdict.accuracy, progress.step
            if self._share.rank == 0:
                facts = {"step": progress.step, "digest": progress.digest}
                write_best(self._job.output, facts, self.kept_state(), verdict.tensors)
        patience = self._config.early_stop_epochs
        if patience is not None:
            waited = self._job.epochs_after(progress.step - progress.best_step)
            progress.finished = waited >= patience

    def _check_finite(self, *losses: float) -> None:
        """Raise LimitError where a loss or a weight is not finite: no step leads back from there."""
        weights = self.model.state_dict().values()
        if all(map(math.isfinite, losses)) and all(bool(it.isfinite().all()) for it in weights):
            return
        epoch = self._job.epochs_after(self.progress.step)
        best = ", where the best weights until then are" if self.progress.history else ""
        raise LimitError(
            f"the loss is not finite at epoch {epoch:.4g}: the training has diverged; "
            "lower train.learning_rate, or set or lower train.clip_grad_norm, and choose another output, "
            f"or delete {self._job.output.url(FOLDER)}{best}"
        )

    def _judged(self, state: Tensors) -> Verdict:
        """What the network with these weights says of the validation images."""
        judged = copy.deepcopy(self.model)
        judged.load_state_dict(state)
        return self._judge(judged.eval())

    def _interpolate(self) -> None:
        """Keep the best point of the line from the weights that it began with to the best of its own.

        WiSE-FT (arXiv 2109.01903). Reads what the steps left, so that it can be done again.
        """
        job = self._job
        facts, trained, _ = read_best(job.output)
        begun = job.start.build(job.classes, self._config.seed).state_dict()
        shares = sorted({1.0, *self._config.interpolate}, reverse=True)
        verdicts = {share: self._judged(interpolate(begun, trained, share)) for share in shares}
        best = max(shares, key=lambda share: (verdicts[share].accuracy, -verdicts[share].loss))
        facts["interpolation"] = {
            "share": best,
            "tried": [
                {"share": share, "validation_accuracy": it.accuracy, "validation_loss": it.loss}
                for share, it in verdicts.items()
            ],
        }
        if self._share.rank == 0:
            state = interpolate(begun, trained, best)
            write_best(job.output, facts, state, verdicts[best].tensors, INTERPOLATED)

    def _settle(self) -> None:
        """Add what all workers' steps gave to the progress that they share."""
        loss, correct, images = sum_over_all(self._running).tolist()
        self._running.zero_()
        sums = self.progress.sums
        sums.loss, sums.correct, sums.images = (
            sums.loss + loss,
            sums.correct + correct,
            sums.images + int(images),
        )

    def kept_state(self) -> Tensors:
        """The weights that are kept: the average, where there is one."""
        return self._average.state if self._average else dict(self.model.state_dict())

    def _tensors(self) -> Tensors:
        tensors = prefixed("model/", dict(self.model.state_dict()))
        for name, optimizer in self._optimizers.items():
            tensors |= prefixed(f"{name}/", optimizer_tensors(optimizer))
        if self._average:
            tensors |= prefixed("average/", self._average.state)
        if self._scaler.is_enabled():
            tensors["scale"] = torch.tensor(self._scaler.get_scale())
        return tensors

    def _resume(self) -> None:
        found = read_state(self._job.output, self._job.digest)
        if found is None:
            return
        self.progress, tensors = found
        self.model.load_state_dict(without_prefix("model/", tensors))
        for name, optimizer in self._optimizers.items():
            load_optimizer(optimizer, without_prefix(f"{name}/", tensors))
        if self._average:
            for name, value in without_prefix("average/", tensors).items():
                self._average.state[name].copy_(value)
        if self._scaler.is_enabled():
            self._scaler = torch.amp.GradScaler(self._device.type, init_scale=float(tensors["scale"]))
