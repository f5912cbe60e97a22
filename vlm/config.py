"""One typed tree holds every setting of a run, so that a typo stops it before the first job starts.

`config/config.yaml` is the full recipe; overlays such as `config/tiny.yaml` are deep-merged over it by Snakemake's
`--configfile`. The workflow validates the merged tree with `Config` and writes it to `results/{run}/config.yaml`,
which is the only configuration file a command reads. Architecture sizes are not settings: they come from the base
models' own `config.json`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PARTS = ("vision", "projector", "language")
Part = Literal["vision", "projector", "language"]
COMBINED = "combined"
"""Name of the checkpoint that the first stage starts from: both base models and a fresh projector."""


class Tree(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BaseModelSource(Tree):
    source: str
    """A Hugging Face Hub repository (`owner/name`) or a local folder."""
    revision: str = "main"
    """Branch, tag or commit on the Hub, also `refs/pr/N`. Ignored for a local folder."""


Origins = str | tuple[str, ...]
"""A Hub repository (`owner/name`, with `@revision` where it is not that of the source), a local folder or file, a URL,
or several of these. A URL may end in `#sha256=...`, which is checked."""


class Source(Tree):
    source: Origins
    """Where the data come from: a Hugging Face Hub data set (`owner/name`), a local folder or file, a URL, or a list of
    these, whose files are joined in one folder. What begins with `/`, `./` or `~` is local."""
    revision: str = "main"
    """Branch, tag or commit on the Hub. Ignored for the rest."""

    def folder(self, name: str) -> str:
        """Name of the folder with the fetched files: as the repository or folder is called, or the data set `name`
        where several parts or a URL make it up."""
        single = isinstance(self.source, str) and "://" not in self.source
        return Path(str(self.source)).name if single else name


class LanguageModel(BaseModelSource):
    image_token: str
    """Token of the model's own vocabulary that stands for one image patch. A reserved control token keeps the
    embedding matrix at its size, so the trained model exports to stock `transformers` without a resize."""


class VisionModel(BaseModelSource):
    feature_layer: int = Field(lt=0)
    """Which hidden state is projected, counted from the end: -1 is the last block's output, -2 the one before."""


class Projector(Tree):
    hidden_size: int = Field(gt=0)
    """Width between the two linear layers."""
    bias: bool
    """Whether both linear layers have a bias. Stock `transformers` reads this as `multimodal_projector_bias`."""
    init_std: float = Field(gt=0)
    """Standard deviation of the normal initialisation of both weights; biases start at zero."""


class Models(Tree):
    language: LanguageModel
    vision: VisionModel
    projector: Projector


class Kernels(Tree):
    backend: Literal["torch", "triton", "transformer_engine"]
    """Who computes attention, norms and the loss. All three read the same checkpoints."""


class Parallel(Tree):
    nodes: int = Field(gt=0)
    """Machines of a training job."""
    ranks_per_node: int = Field(gt=0)
    """Processes per machine: one per GPU, or per CPU process group."""
    tensor: int = Field(gt=0)
    """Ranks that share each weight matrix."""
    pipeline: int = Field(gt=0)
    """Ranks that share the language model's stack of layers; the vision model and the projector are on the first."""
    sequence: bool
    """Shard the activations between tensor-parallel regions along the sequence."""
    distributed_optimizer: bool
    """Shard masters and optimizer state over the data-parallel ranks (ZeRO 1)."""
    recompute: bool
    """Keep only each language layer's input and run the layer again in backward."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.world_size // (self.tensor * self.pipeline)

    @model_validator(mode="after")
    def _divides(self) -> Parallel:
        if self.world_size % (self.tensor * self.pipeline):
            raise ValueError(
                f"nodes x ranks_per_node = {self.world_size} is not a multiple of tensor x pipeline = "
                f"{self.tensor * self.pipeline}"
            )
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs tensor > 1, which is 1")
        return self


class DataSet(Source):
    annotations: str
    """JSON file with a list of `{id, image, conversations}`, relative to the source."""
    images: str
    """Folder that the `image` paths are relative to, relative to the source. A zip archive counts as the folder that it
    would unpack to, so `images.zip` serves as well."""
    image_sets: dict[str, Origins] = {}
    """Pictures with a home of their own: below which part of `images` they belong, and where they come from. An empty
    list leaves a set out."""
    missing_images: Literal["stop", "drop"] = "stop"
    """`drop` leaves out samples whose pictures are missing, counted by image set; `stop` refuses a missing set, and
    counts single missing pictures under `max_rejected_share`."""
    validation_share: float = Field(ge=0, lt=1)
    """Share of the samples, drawn by seed, that goes to the validation split."""
    samples_per_shard: int = Field(gt=0)


class Data(Tree):
    image_resize: Literal["crop", "square"]
    """`crop`: shortest edge to size, centre crop, as CLIP's own processor. `square`: stretch to size."""
    max_rejected_share: float = Field(ge=0, le=1)
    """Share of samples that may be unusable (broken image, malformed conversation, too long) before a run stops."""
    workers: int = Field(ge=0)
    """Loader processes per data-parallel rank."""
    shuffle_run: int = Field(gt=0)
    """Samples read one after the other from a shard before the next place is drawn. 1 makes every epoch a new
    permutation; longer runs suit disks that only stream, and need a buffer of many runs."""
    shuffle_buffer: int = Field(gt=0)
    """Samples held for shuffling per loader process, pictures compressed. 1 holds none."""
    packing_buffer: int = Field(gt=0)
    """Samples held while packing sequences, pictures compressed; more fills sequences better."""
    sets: dict[str, DataSet]


class Optimizer(Tree):
    lr: float = Field(gt=0)
    """Peak learning rate of Adam with decoupled weight decay."""
    min_lr: float = Field(ge=0)
    """Learning rate at the end of the cosine."""
    warmup_share: float = Field(ge=0, lt=1)
    """Share of the iterations with linear warm-up from zero."""
    weight_decay: float = Field(ge=0)
    beta1: float = Field(gt=0, lt=1)
    beta2: float = Field(gt=0, lt=1)
    eps: float = Field(gt=0)
    clip_grad: float = Field(gt=0)
    """Bound on the global gradient norm."""

    @model_validator(mode="after")
    def _ordered(self) -> Optimizer:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


class Stage(Tree):
    start_from: str
    """`combined` or the name of another stage."""
    trainable: tuple[Part, ...] = Field(min_length=1)
    """Parts that learn; the others are frozen and run in evaluation mode."""
    data: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Weight of each data set in the blend, by its name under data.sets."""
    prompt: Literal["instruction", "plain"]
    """`instruction` keeps the human turn as written; `plain` reduces the first turn to the image alone (LLaVA)."""
    sequence_length: int = Field(gt=0)
    """Tokens of a packed sequence, image tokens included. One packed sequence is one micro-batch."""
    global_batch: int = Field(gt=0)
    """Packed sequences per optimizer step, over all data-parallel ranks."""
    iterations: int = Field(gt=0)
    save_interval: int = Field(gt=0)
    """Iterations between checkpoints; the last iteration is always saved."""
    keep: int = Field(default=2, gt=0)
    """The newest so many checkpoints stay. One of a 7B model with its optimizer takes about 100 GB."""
    keep_best: bool = False
    """Keep the checkpoint of the lowest validation loss too; `checkpoints/best` names it."""
    log_interval: int = Field(gt=0)
    """Iterations between lines of metrics."""
    validation_interval: int = Field(default=0, ge=0)
    """Iterations between measurements of the validation loss, which the last iteration always gets; 0 means never."""
    validation_batches: int = Field(default=0, ge=0)
    """Global batches measured each time, always the same ones; 0 means all of the validation split."""
    early_stop: int | None = Field(default=None, gt=0)
    """Training ends when so many validations in a row have not improved on the lowest loss before them."""
    optimizer: Optimizer

    @model_validator(mode="after")
    def _validated(self) -> Stage:
        """What is decided by the validation loss needs one."""
        interval = self.validation_interval
        if self.early_stop is not None and not interval:
            raise ValueError(f"early_stop: {self.early_stop} needs a validation_interval above 0")
        if self.keep_best and (not interval or self.save_interval % interval):
            raise ValueError(
                f"keep_best: true needs every checkpoint validated: save_interval {self.save_interval} must be a "
                f"multiple of validation_interval, which is {interval}"
            )
        return self


OBSERVING = ("save_interval", "keep", "keep_best", "log_interval", "validation_interval", "validation_batches")
"""Settings of a stage that decide what is seen and kept of its training, and not its weights."""


class Captions(Source):
    annotations: str
    """COCO captions file, relative to the source."""
    images: str
    """Folder of the pictures, relative to the source."""
    prompt: str
    """User turn after the image."""
    max_new_tokens: int = Field(gt=0)


class Dialogue(Tree):
    """What the last stage's model is asked about pictures of the captions, for the gallery."""

    num_images: int = Field(gt=0)
    """The first pictures of `evaluation.captions`, which are also those that the gallery shows."""
    questions: tuple[str, ...] = Field(min_length=1)
    """User turns in their order, the first after the image; each is asked with all that was said before it."""
    max_new_tokens: int = Field(gt=0)
    """Longest answer to each."""


class Mmmu(Source):
    split: str
    """Parquet files `<Subject>/<split>-*.parquet` are read."""
    prompt_multiple_choice: str
    """User turn with `{question}` and `{options}`."""
    prompt_open: str
    """User turn with `{question}`."""
    max_new_tokens: int = Field(gt=0)
    fallback: Literal["first", "random", "wrong"]
    """What an unparsable multiple-choice response counts as."""


class Benchmark(Source):
    """A short-answer benchmark; `vlm/benchmarks.py` knows the columns of its Hub repository."""

    split: str
    """Parquet files `<split>-*.parquet` are read."""
    prompt: str
    """User turn after the image, with `{question}`; also `{options}`, a line for each, where questions have some, and
    for MathVista `{query}`, the question with a hint of what is asked for."""
    prompt_multiple_choice: str | None = None
    """The turn for questions with options, where it is another."""
    max_new_tokens: int = Field(gt=0)


class Evaluation(Tree):
    batch_size: int = Field(gt=0)
    """Prompts decoded together."""
    captions: Captions
    dialogue: Dialogue
    mmmu: Mmmu
    vqav2: Benchmark | None = None
    textvqa: Benchmark | None = None
    chartqa: Benchmark | None = None
    ai2d: Benchmark | None = None
    realworldqa: Benchmark | None = None
    docvqa: Benchmark | None = None
    infovqa: Benchmark | None = None
    mathvista: Benchmark | None = None
    ocrbench: Benchmark | None = None
    pope: Benchmark | None = None

    @property
    def benchmarks(self) -> dict[str, Benchmark]:
        """The short-answer benchmarks that are to be run, by name."""
        return {name: value for name in type(self).model_fields if isinstance(value := getattr(self, name), Benchmark)}


MINIATURE = "miniature"
"""Source of a model that the run makes itself."""


class VisionTraining(Tree):
    """A CLIP-shaped vision model that is trained from nothing on the miniature's own pictures, contrastively.

    Its picture and patch are those of the pictures; other sizes are settings since no config.json says them yet."""

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    steps: int = Field(gt=0)
    batch: int = Field(gt=1)
    """Pictures per step, each against the captions of all others."""
    lr: float = Field(gt=0)
    """Peak learning rate of one cycle."""
    save_interval: int = Field(gt=0)
    """Steps between the states that an interrupted training goes on from."""

    @model_validator(mode="after")
    def _divides(self) -> VisionTraining:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        return self


class Miniature(Tree):
    """Sizes of the rendered data sets that stand in for the real ones."""

    stamps: str | None = None
    """Parquet file of emoji drawings (`vlm tiny stamps`) that the pictures show; null for drawn shapes."""
    vision: VisionTraining | None = None
    """How to train the vision model where `models.vision.source` is `miniature`."""

    pretrain_samples: int = Field(gt=0)
    sft_samples: int = Field(gt=0)
    test_images: int = Field(gt=0)
    questions_per_subject: int = Field(gt=0)


class Config(Tree):
    run: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the run: everything it makes is under `results/{run}`."""
    seed: int = Field(ge=0)
    dtype: Literal["float32", "bfloat16"]
    """Type of weights and activations; bfloat16 keeps fp32 master weights in the optimizer."""
    models: Models
    kernels: Kernels
    parallel: Parallel
    data: Data
    stages: dict[str, Stage] = Field(min_length=1)
    evaluation: Evaluation
    export: bool = True
    """Whether the last stage is also written as a `transformers` LLaVA folder, whose projector is as wide inside as the
    language model."""
    miniature: Miniature | None = None
    """Set only by the miniature: its data sets are rendered instead of fetched."""

    @model_validator(mode="after")
    def _references(self) -> Config:
        for name, stage in self.stages.items():
            key = f"stages.{name}"
            if name == COMBINED:
                raise ValueError(f"{key}: the name {COMBINED!r} is taken by the untrained checkpoint")
            if stage.start_from != COMBINED and stage.start_from not in self.stages:
                raise ValueError(_unknown(f"{key}.start_from", stage.start_from, [COMBINED, *self.stages]))
            for data_set in stage.data:
                if data_set not in self.data.sets:
                    raise ValueError(_unknown(f"{key}.data", data_set, list(self.data.sets)))
            if stage.validation_interval and not any(self.data.sets[one].validation_share for one in stage.data):
                raise ValueError(
                    f"{key}.validation_interval: {stage.validation_interval} needs validation samples, but "
                    f"validation_share is 0 in {', '.join(f'data.sets.{one}' for one in stage.data)}"
                )
            if stage.global_batch % self.parallel.data:
                raise ValueError(
                    f"{key}.global_batch: {stage.global_batch} is not a multiple of the {self.parallel.data} "
                    "data-parallel ranks that parallel gives"
                )
            if self.parallel.sequence and stage.sequence_length % self.parallel.tensor:
                raise ValueError(
                    f"{key}.sequence_length: {stage.sequence_length} is not a multiple of parallel.tensor = "
                    f"{self.parallel.tensor}, which parallel.sequence needs"
                )
        for name in self.stages:
            self.lineage(name)
        if self.models.vision.source == MINIATURE and (self.miniature is None or self.miniature.vision is None):
            raise ValueError(f"models.vision.source: {MINIATURE} needs miniature.vision, which says what to train")
        if self.models.projector.hidden_size % self.parallel.tensor:
            raise ValueError(
                f"models.projector.hidden_size: {self.models.projector.hidden_size} is not a multiple of "
                f"parallel.tensor {self.parallel.tensor}"
            )
        return self

    @property
    def ordered_stages(self) -> list[str]:
        """Names of the stages, each after the one that it starts from; the last is the one that is handed over."""
        return sorted(self.stages, key=lambda name: len(self.lineage(name)))

    def lineage(self, stage: str) -> list[str]:
        """Names of the stages trained one after the other to reach `stage`, itself last."""
        chain = [stage]
        while (parent := self.stages[chain[0]].start_from) != COMBINED:
            if parent in chain:
                raise ValueError(f"stages.{stage}.start_from: {' -> '.join([parent, *chain])} is a circle")
            chain.insert(0, parent)
        return chain


def _unknown(key: str, received: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(received, allowed, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{key}: {received!r} does not exist, allowed are {', '.join(allowed)}{hint}"


def _model_at(path: tuple[Any, ...]) -> type[BaseModel] | None:
    """The tree class that holds the key at `path`, to name the keys it allows."""
    current: Any = Config
    for step in path:
        if isinstance(current, type) and issubclass(current, BaseModel):
            if step not in current.model_fields:
                return None
            current = current.model_fields[step].annotation
        else:  # dict[str, X] or X | None
            current = getattr(current, "__args__", (None, None))[-1]
        if getattr(current, "__origin__", None) is None and hasattr(current, "__args__"):
            current = next(a for a in current.__args__ if a is not type(None))
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def validate(tree: dict[str, Any], where: str = "the configuration") -> Config:
    """Check a merged tree of settings.

    Raises:
        ValueError: one line per mistake, each with the key's full path, what was received and what is allowed.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            path = tuple(item["loc"])
            key = ".".join(map(str, path)) or "(top)"
            if item["type"] == "extra_forbidden":
                owner = _model_at(path[:-1])
                lines.append(_unknown(key, str(path[-1]), sorted(owner.model_fields) if owner else []))
            elif item["type"] == "missing":
                lines.append(f"{key}: is missing")
            elif item["type"] == "value_error":
                message = str(item["ctx"]["error"])
                lines.append(message if not path else f"{key}: {message}")
            else:
                lines.append(f"{key}: {item['msg']}, received {item['input']!r}")
        raise ValueError(f"{where} has {len(lines)} mistake(s):\n  " + "\n  ".join(lines)) from None


def read(path: str | Path) -> dict[str, Any]:
    """The settings in a file as they stand there: a whole configuration or an overlay.

    Raises:
        ValueError: naming the file, which cannot be read or holds something else.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def load(path: str | Path) -> Config:
    """Read a resolved configuration, as the workflow writes it to `results/{run}/config.yaml`."""
    tree = read(path)
    try:
        return validate(tree, where=str(path))
    except ValueError as error:
        if all(name in tree for name, field in Config.model_fields.items() if field.is_required()):
            raise
        hint = "an overlay by itself? Commands read the whole of it, which a run writes to results/{run}/config.yaml"
        raise ValueError(f"{error}\n{hint}") from None


def dump(config: Config) -> str:
    """The tree as YAML, in the order of the fields."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)
