"""The configuration of a training: which keys there are, what they may be and what they mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from cvt_model.choices import Precision
from cvt_model.config import CvtConfig
from cvt_model.image_processor import CvtImageProcessor
from pipeline.config import Destination, ImageLimits, RunConfig, Section, Source, StorageOptions

MOST_SEED = 2**43 - 1  # a million times as much, and the steps, make a number of 64 bits (together.py)
Probability = Annotated[float, Field(ge=0, le=1)]


class LabelledSource(Source):
    """Labelled images."""

    label_column: str | None = Field(
        None,
        description="where an image's label is: a column of a Parquet file or a manifest (label if not "
        "given), an extension of a WebDataset sample (cls); loose images are labelled by their folder",
    )


class ValidationConfig(Source):
    """What the training is judged by: a source of its own, or a share of the input."""

    uri: str = Field("", description="labelled images of their own; empty: a share of the input")
    label_column: str | None = Field(None, description="as input.label_column")
    fraction: float = Field(
        0.1, gt=0, lt=1, description="share of the input held out, chosen by the images' ids"
    )


class NetworkConfig(Section):
    """Which network is trained: that of a checkpoint, or one from scratch."""

    checkpoint: str = Field(
        "", description="what to start from, as extract takes it; its head goes where the classes differ"
    )
    config: dict[str, Any] | None = Field(
        None, description="or a network from scratch: fields of CvtConfig, without those of the labels"
    )
    preprocessing: dict[str, Any] | None = Field(
        None, description="fields of preprocessor_config.json; needed from scratch, else the checkpoint's"
    )
    initialization: Literal["authors", "attend_to_self"] = Field(
        "authors",
        description="from scratch: the authors' weights, or attention that begins local, for small data",
    )
    drop_path_rate: tuple[Probability, ...] | None = Field(
        None, description="stochastic depth of each stage's last layer, over the checkpoint's"
    )
    precision: Literal["auto"] | Precision = Field(
        "auto", description="of the products (weights stay float32); auto: bfloat16 on GPUs, else float32"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.checkpoint) == (self.config is not None):
            raise ValueError("give either checkpoint (to start from it) or config (from scratch)")
        if self.config is not None:
            if self.preprocessing is None:
                raise ValueError("preprocessing: a network from scratch needs it, such as {size: 224}")
            CvtConfig.from_dict(self.config)
        if self.preprocessing is not None:
            CvtImageProcessor.from_dict(self.preprocessing)
        return self


class Recipe(Section):
    """A section that is arithmetic: its numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)


class TrainConfig(Recipe):
    """The recipe; the defaults are the paper's, with a learning rate for fine-tuning."""

    epochs: float = Field(30, gt=0, description="passes over the training images")
    batch_size: int = Field(64, strict=True, ge=1, description="images a step, of all workers together")
    accumulate: int = Field(
        1, strict=True, ge=1, description="parts that a batch is computed in, one after the other"
    )
    learning_rate: float = Field(2.5e-4, gt=0, description="of AdamW, at its highest")
    min_learning_rate: float = Field(1e-6, ge=0, description="at the cosine's end")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw: the paper's; muon: Muon for matrices and convolutions, AdamW for the rest, "
        "which learns from scratch in fewer epochs",
    )
    muon_learning_rate: float = Field(0.02, gt=0, description="of Muon, at its highest")
    warmup_epochs: float = Field(1, ge=0, description="in which the rate rises from 0")
    weight_decay: float = Field(0.05, ge=0, description="not of norms, biases and CLS tokens")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="of AdamW"
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="weight given to all classes alike")
    clip_grad_norm: float | None = Field(1.0, gt=0, description="of all gradients; null: no limit")
    ema_decay: float | None = Field(
        0.999, gt=0, lt=1, description="of the averaged weights, which are kept; null: no average"
    )
    interpolate: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (),
        description="shares of the trained weights that are tried beside 1 when it ends, the rest being "
        "the checkpoint's; the most accurate is kept, as in WiSE-FT (arXiv 2109.01903): [0.25, 0.5, 0.75]",
    )
    freeze: Literal["none", "backbone"] = Field(
        "none", description="backbone: only the final norm and the classifier learn"
    )
    early_stop_epochs: float | None = Field(
        None, gt=0, description="end after so many without a better accuracy; null: never"
    )
    seed: int = Field(0, ge=0, le=MOST_SEED, description="of weights, order and augmentation")


class AugmentConfig(Recipe):
    """What happens to a training image; drawn anew each time, by seed, step and place in the batch."""

    crop: Literal["random_resized", "padded", "none"] = Field(
        "random_resized",
        description="random_resized: a random part, resized; padded: shifted by up to `padding` pixels; "
        "none: as in evaluation",
    )
    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = Field(
        (0.08, 1.0), description="share of the area that random_resized keeps"
    )
    ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (3 / 4, 4 / 3), description="width over height of what random_resized keeps"
    )
    padding: int = Field(4, ge=0, description="pixels on each side, mirrored")
    flip: Probability = Field(0.5, description="chance of a mirror image")
    policy: Literal["none", "randaugment", "trivialaugment"] = Field(
        "randaugment", description="random operations on colours and shape"
    )
    num_ops: int = Field(2, ge=1, le=16, description="of randaugment, for each image")
    magnitude: float = Field(9, ge=0, le=10, description="of randaugment's operations")
    magnitude_std: float = Field(0.5, ge=0, description="spread of the magnitude")
    erasing: Probability = Field(0.25, description="chance that a rectangle is replaced by noise")
    mixup: float = Field(0.8, ge=0, description="alpha of mixup; 0: none")
    cutmix: float = Field(1.0, ge=0, description="alpha of cutmix; 0: none")
    mix_probability: Probability = Field(1.0, description="share of batches that are mixed")
    sizes: tuple[tuple[Probability, Annotated[int, Field(ge=8)]], ...] = Field(
        (),
        description="smaller images for the beginning, as [until, pixels]: [[0.5, 24]] trains the first "
        "half on 24 x 24; a CvT takes any size",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: {low} is more than {high}")
        if [until for until, _ in self.sizes] != sorted({until for until, _ in self.sizes}):
            raise ValueError("sizes: their ends must rise")
        return self


class WorkersConfig(Section):
    """How the machines are used."""

    workers: Literal["auto"] | Annotated[int, Field(strict=True, ge=1)] = Field(
        "auto", description="processes that train together; auto: one a GPU, or one where there is none"
    )
    worker_gpus: Literal["auto"] | Annotated[int, Field(strict=True, ge=0, le=1)] = Field(
        "auto", description="GPUs of each; auto: one where there is one"
    )
    shard_images: int = Field(4096, ge=1, description="loose images read by one task")
    checkpoint_every_s: float = Field(
        300, gt=0, description="seconds of work that a kill may cost, beside those of a step"
    )
    max_failures: int = Field(3, ge=0, description="deaths of a worker after which the training gives up")


class FinetuneConfig(Section):
    """The whole of a training's configuration."""

    input: LabelledSource
    validation: ValidationConfig = ValidationConfig()
    model: NetworkConfig
    output: Destination
    train: TrainConfig = TrainConfig()
    augment: AugmentConfig = AugmentConfig()
    compute: WorkersConfig = WorkersConfig()
    limits: ImageLimits = ImageLimits()
    run: RunConfig = RunConfig()
    storage_options: StorageOptions = Field(
        default_factory=dict, description="options of the file systems of input and output, as fsspec's are"
    )

    @model_validator(mode="after")
    def _interpolation_has_two_ends(self) -> Self:
        if self.train.interpolate and not self.model.checkpoint:
            raise ValueError("train.interpolate: needs model.checkpoint, whose weights are the other end")
        return self

    def options_of(self, place: Source | Destination) -> dict[str, Any]:
        """Storage options of the input, the validation's source or the output."""
        return {**self.storage_options, **place.storage_options}
