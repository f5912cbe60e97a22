# What the other files of this folder use: the checked configuration, where things are, and which settings matter to whom.
import json
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from vlm.benchmarks import BENCHMARKS as TABLES
from vlm.config import COMBINED, MINIATURE, OBSERVING, Miniature, Stage, dump, validate

try:
    CONFIG = validate(config)
except ValueError as mistakes:
    raise WorkflowError(mistakes) from None

IMAGE = "vlm.sif"
CONTAINED = any(str(method) == "apptainer" for method in workflow.deployment_settings.deployment_method)
# `vlm` and `snakemake` beside the running interpreter, so that the environment need not be activated, and our scripts. In
# a container its own are meant. A prefix replaces snakemake's, without which a pipeline ends as its last command does.
COMMANDS = ":".join([*([] if CONTAINED else [str(Path(sys.executable).parent)]), f"{workflow.basedir}/scripts"])
shell.prefix(f'set -euo pipefail; export PATH={shlex.quote(COMMANDS)}:"$PATH"; ')

RESULTS = f"results/{CONFIG.run}"
RESOLVED_CONFIG = f"{RESULTS}/config.yaml"


pathvars:
    results=RESULTS,
    logs=f"{RESULTS}/logs",
    benchmarks=f"{RESULTS}/benchmarks",


STAGES = CONFIG.ordered_stages
LAST_STAGE = STAGES[-1]
MODELS = [COMBINED, *STAGES]
PARTS = ("language", "vision")
EVALUATIONS = {"captions": CONFIG.evaluation.captions, "mmmu": CONFIG.evaluation.mmmu}
BENCHMARKS = CONFIG.evaluation.benchmarks
SOURCES = {**CONFIG.data.sets, **EVALUATIONS, **BENCHMARKS}
ON_THE_WAY = 5
"""Priority of what training waits for; evaluation (0) fills the cores that are left."""
SAMPLING = ("image_resize", "shuffle_run", "shuffle_buffer", "packing_buffer")
DRAWINGS = [CONFIG.miniature.stamps] if CONFIG.miniature and CONFIG.miniature.stamps else []
"""What the miniature's pictures are made of, where they are not drawn by themselves."""
CAPTION_SET = next(iter(CONFIG.stages[STAGES[0]].data))


wildcard_constraints:
    stage="|".join(STAGES),
    model="|".join(MODELS),
    task="|".join(["captions", "captions_shuffled", "dialogue", "mmmu", *BENCHMARKS]),
    control="random|nearest",


def write_resolved_config():
    """The one file of settings that commands read, touched only when a setting changed."""
    path, text = Path(RESOLVED_CONFIG), dump(CONFIG)
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.writing")
        beside.write_text(text)
        beside.replace(path)


def settings_text(*keys):
    """The settings at `keys` (`a/b/c`) as text."""
    chosen = {}
    for key in keys:
        value = CONFIG.model_dump(mode="json")
        for step in key.split("/"):
            value = value[step]
        chosen[key] = value
    return json.dumps(chosen)


def settings(*keys):
    """For `params`: the step runs again when a setting at `keys` changes. A function, since prompts hold braces."""
    return lambda wildcards: settings_text(*keys)


def source_folder(name):
    """Where the data set `name` lies, named as its source is. The miniature's are rendered there in the same layout."""
    return f"{RESULTS}/sources/{SOURCES[name].folder(name)}"


def origin(name):
    """What data sets have in common that share a folder."""
    return SOURCES[name].source, SOURCES[name].revision


def included_files(name):
    """Patterns of the files of a Hub repository that a data set reads; none where it reads them all."""
    data = SOURCES[name]
    if name in CONFIG.data.sets:
        return [data.annotations, f"{data.images}*"]
    if name == "mmmu":
        return [f"*{data.split}-*"]
    return [f"{TABLES[name].folder}/{data.split}-*"] if name in BENCHMARKS else []


def listed(origins):
    """Where something comes from, as a list."""
    return [origins] if isinstance(origins, str) else list(origins)


def fetch_options(names):
    """Options of `vlm fetch` for data sets that share a folder. Only the evaluation reads pictures one by one, so that
    the archives of training data stay packed."""
    included = [included_files(name) for name in names]
    sets = {name: CONFIG.data.sets[name] for name in names if name in CONFIG.data.sets}
    below = [
        f"{data.images}/{place}={origin}"
        for data in sets.values()
        for place, origins in data.image_sets.items()
        for origin in listed(origins)
    ]
    options = [f"--include {shlex.quote(pattern)}" for patterns in included if all(included) for pattern in patterns]
    options += [f"--below {shlex.quote(one)}" for one in below]
    return " ".join(options if sets else [*options, "--unpack"])


def local_files(source):
    """Files of a source that is a folder on this machine, so that a changed model is converted again; else none."""
    folder = Path(source)
    if not folder.is_dir():
        return []
    return sorted(str(path) for path in folder.iterdir() if path.is_file() and path.suffix != ".md")


def model_folder(model):
    """What to read a model from: the combined checkpoint, or the folder of its stage."""
    return f"{RESULTS}/convert/combined" if model == COMBINED else f"{RESULTS}/train/{model}"


def finished_file(model):
    """What has to exist before `model` can be read. A stage's checkpoints are no outputs: Snakemake deletes the
    outputs of a job that fails, and an interrupted training goes on from them."""
    return model_folder(model) if model == COMBINED else f"{model_folder(model)}/finished.json"


def exported_model(wildcards):
    """What the export waits for, where the configuration has one."""
    if not CONFIG.export:
        raise WorkflowError("export: is false; `vlm export --part language` and `--part vision` write the models alone")
    return finished_file(LAST_STAGE)


def stage_inputs(wildcards):
    """The checkpoint that a stage starts from, proven, and the indexed data of its blend."""
    stage = CONFIG.stages[wildcards.stage]
    return [
        f"{RESULTS}/convert/verified.json",
        finished_file(stage.start_from),
        *(f"{RESULTS}/data/{name}/.nv-meta/dataset.yaml" for name in stage.data),
    ]


def stage_settings(wildcards):
    """What decides a stage's weights, as the trainer sees it too when it resumes. How many processes work on it, with
    which kernels, and what it saves, logs and validates does not."""
    own = [f"stages/{wildcards.stage}/{name}" for name in Stage.model_fields if name not in OBSERVING]
    return settings_text(*own, "seed", "dtype", *(f"data/{name}" for name in SAMPLING))


def rendering_settings():
    """What the miniature's pictures and texts are made from: the questions are asked as the evaluation will ask them."""
    files = [f"data/sets/{name}/{key}" for name in CONFIG.data.sets for key in ("source", "annotations", "images")]
    captions = [f"evaluation/captions/{key}" for key in ("source", "annotations", "images", "prompt")]
    mmmu = [f"evaluation/mmmu/{key}" for key in ("source", "split", "prompt_multiple_choice", "prompt_open")]
    pictures = [f"miniature/{name}" for name in Miniature.model_fields if name != "vision"]
    return settings(*pictures, "seed", *files, *captions, *mmmu)


def evaluation_of(wildcards):
    """The section of `evaluation` whose data a task reads."""
    return wildcards.task if wildcards.task in {"mmmu", *BENCHMARKS} else "captions"


def task_settings(wildcards):
    """What decides a task's answers beside the model."""
    captions = [f"evaluation/captions/{key}" for key in ("source", "annotations", "images")]
    own = (
        ["evaluation/dialogue", *captions]
        if wildcards.task == "dialogue"
        else [f"evaluation/{evaluation_of(wildcards)}"]
    )
    return settings_text(*own, "data/image_resize", "seed", "dtype")


def check_names():
    """Refuse names that would put two data sets in one folder."""
    for name in sorted(set(CONFIG.data.sets) & {*EVALUATIONS, *BENCHMARKS}):
        raise WorkflowError(f"data.sets.{name}: the name is taken by evaluation.{name}")
    owners = {}
    for name in SOURCES:
        folder = source_folder(name)
        if folder in owners and origin(owners[folder]) != origin(name):
            raise WorkflowError(
                f"the sources of {owners[folder]!r} and {name!r} have the same last name; both would be in {folder}"
            )
        owners[folder] = name


check_names()
