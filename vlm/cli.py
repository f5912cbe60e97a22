"""The `vlm` command: one verb per step. Parsing imports nothing heavy; a command is imported when it runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm.benchmarks import BENCHMARKS


def _call(target: str) -> Callable[..., Any]:
    """Import `package.module:function` only when it is called."""

    def run(**arguments: Any) -> Any:
        module, function = target.split(":")
        # PyTorch reads it at its first allocation. Fresh memory in pages of 2 MB costs a fifth of the CPU time that
        # pages of 4 KB do (700 MB: 0.07 against 0.36 s), which is most of what converting a model takes.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        # megatron-core warns its own developers: of optional packages that are not there, of its own deprecated calls.
        warnings.filterwarnings("ignore", module=r"megatron\.core\.")
        return getattr(importlib.import_module(module), function)(**arguments)

    return run


def _group(commands: Any, name: str, summary: str) -> Any:
    group = commands.add_parser(name, help=summary, description=summary)
    return group.add_subparsers(dest=f"{name}_command", required=True, metavar="COMMAND")


def _command(commands: Any, name: str, target: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=_call(target))
    return parser


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="resolved settings of the run")


def _add_sources(commands: Any) -> None:
    fetch = _command(commands, "fetch", "vlm.fetch.folder:fetch", "Bring models and data into place, from wherever.")
    fetch.add_argument("source", nargs="+", help="owner/name[@revision] on the Hub, a local folder or file, or a URL")
    fetch.add_argument("out", type=Path)
    fetch.add_argument("--revision", default="main")
    fetch.add_argument("--kind", choices=("model", "dataset"), default="model")
    part = "download only such files of a data set, for instance 'data/test-*'; may be repeated"
    fetch.add_argument("--include", action="append", default=[], metavar="PATTERN", help=part)
    more = "what belongs in a folder below, for instance images/coco=URL; may be repeated"
    fetch.add_argument("--below", action="append", default=[], metavar="PLACE=SOURCE", help=more)
    fetch.add_argument("--unpack", action="store_true", help="unpack zip archives")
    fetch.add_argument("--offline", action="store_true", help="take what the caches hold (also: HF_HUB_OFFLINE=1)")

    tiny = _group(commands, "tiny", "Make the miniature's pictures, texts and base models.")
    stamps = _command(tiny, "stamps", "vlm.tiny.stamps:prepare", "Render emoji of npm packages into one file.")
    stamps.add_argument("--packages", type=Path, required=True, help="node_modules with the fonts and emojibase-data")
    stamps.add_argument("--out", type=Path, required=True, help="Parquet file")
    stamps.add_argument("--limit", type=int, default=None, help="only so many names")
    data = _command(tiny, "data", "vlm.tiny.datasets:write", "Render the miniature data sets in the real layouts.")
    _config(data)
    data.add_argument("--out", type=Path, required=True)
    for name, what in (("language", "language model and tokenizer"), ("vision", "vision model")):
        model = _command(tiny, name, f"vlm.tiny.{name}:train", f"Train the miniature {what} from nothing.")
        model.add_argument("--out", type=Path, required=True)
        model.add_argument("--seed", type=int, default=0)
        model.add_argument("--steps", type=int, default=None, help="optimizer steps (default: those of the model card)")
        if name == "vision":
            whole = "settings of a run whose miniature.vision is trained, instead of the committed model"
            model.add_argument("--config", type=Path, default=None, metavar="YAML", help=whole)
            state = "file that a training is saved to every so often and goes on from"
            model.add_argument("--state", type=Path, default=None, help=state)
        model.add_argument("--workers", type=int, default=0, help="processes that render samples")
        model.add_argument("--device", default=None, help="default: cuda where present, else cpu")


def _add_convert(commands: Any) -> None:
    convert = _group(commands, "convert", "Between Hugging Face folders and Megatron checkpoints.")
    for part in ("language", "vision"):
        one = _command(convert, part, f"vlm.convert.{part}:convert", f"Convert a {part} model to Megatron.")
        one.add_argument("source", type=Path, help="Hugging Face folder with config.json and safetensors")
        one.add_argument("out", type=Path)
    gguf = _command(
        convert, "gguf", "vlm.convert.gguf:convert", "Convert a Llama's GGUF file to a Hugging Face folder."
    )
    gguf.add_argument("source", type=Path, help="GGUF file of a Llama, tokenizer included")
    gguf.add_argument("out", type=Path)
    llava = _command(convert, "llava", "vlm.convert.llava:convert", "Convert a transformers LLaVA folder to Megatron.")
    llava.add_argument("source", type=Path, help="folder of a LlavaForConditionalGeneration with safetensors")
    llava.add_argument("out", type=Path)
    legacy = _command(convert, "legacy", "vlm.convert.legacy:convert", "Convert Megatron-LM's per-rank files.")
    legacy.add_argument("source", type=Path, help="folder with latest_checkpointed_iteration.txt or mp_rank_00")
    legacy.add_argument("out", type=Path)
    for part in ("language", "vision"):
        legacy.add_argument(f"--{part}", type=Path, default=None, help="Hugging Face folder of that base model")
    legacy.add_argument("--config", type=Path, default=None, metavar="YAML", help="settings of the run, for both parts")
    combine = _command(convert, "combine", "vlm.convert.combine:combine", "Join both models and a fresh projector.")
    _config(combine)
    combine.add_argument("--language", type=Path, required=True)
    combine.add_argument("--vision", type=Path, required=True)
    combine.add_argument("--out", type=Path, required=True)
    verify = _command(convert, "verify", "vlm.convert.verify:verify", "Compare a checkpoint with transformers.")
    verify.add_argument("--checkpoint", type=Path, required=True)
    verify.add_argument("--language", type=Path, required=True, help="Hugging Face folder it was converted from")
    verify.add_argument("--vision", type=Path, required=True, help="Hugging Face folder it was converted from")
    verify.add_argument("--out", type=Path, required=True, help="JSON report")
    verify.add_argument("--tolerance", type=float, default=1e-4, help="largest absolute difference in fp32")


def _add_data(commands: Any) -> None:
    data = _group(commands, "data", "Training data: WebDataset shards and the Energon index.")
    shard = _command(data, "shard", "vlm.data.shard:shard", "Write WebDataset shards of one data set.")
    _config(shard)
    shard.add_argument("--set", dest="set_name", required=True, help="name under data.sets")
    shard.add_argument("--source", type=Path, required=True, help="folder with the annotations and images")
    shard.add_argument("--out", type=Path, required=True)
    shard.add_argument("--workers", type=int, default=1, help="processes that write (default: 1)")
    index = _command(data, "index", "vlm.data.index:index", "Prepare shards for Energon, asking nothing.")
    index.add_argument("directory", type=Path)
    inspect = _command(data, "inspect", "vlm.data.inspect:inspect", "Draw packed sequences as the model gets them.")
    _config(inspect)
    inspect.add_argument("--stage", required=True)
    inspect.add_argument("--data", type=Path, required=True, help="folder that holds one indexed folder per data set")
    inspect.add_argument("--checkpoint", type=Path, help="where tokenizer and picture size come from; or else:")
    for part in ("language", "vision"):
        inspect.add_argument(f"--{part}", type=Path, help=f"Hugging Face folder of the {part} model")
    inspect.add_argument("--out", type=Path, required=True, help="HTML file")
    inspect.add_argument("--sequences", type=int, default=1, help="how many (default: 1)")
    inspect.add_argument("--split", choices=("train", "val"), default="train")


def _add_plan(commands: Any) -> None:
    plan = _command(commands, "plan", "vlm.estimate.command:plan", "Memory, time and disk of a run, before it starts.")
    whole = "settings of the run, and overlays that go over them as --configfile does"
    plan.add_argument("--config", type=Path, nargs="+", required=True, metavar="YAML", help=whole)
    known = "h100, h200, a100-80 and others, or GiB:TFLOP/s[:GB/s of its link] (default: %(default)s)"
    plan.add_argument("--gpu", default="h100", help=known)
    plan.add_argument("--gpus-per-node", type=int, default=None, help="default: parallel.ranks_per_node")
    plan.add_argument("--nodes", type=int, default=None, help="default: parallel.nodes")
    for part in ("language", "vision"):
        plan.add_argument(f"--{part}", type=Path, default=None, help=f"Hugging Face folder of the {part} model")
    speed = plan.add_mutually_exclusive_group()
    speed.add_argument("--mfu", type=float, default=None, help="share of the GPU's peak to count with, 0 to 1")
    speed.add_argument("--metrics", type=Path, default=None, help="metrics.jsonl of a run to take that share from")
    plan.add_argument("--json", dest="as_json", action="store_true", help="one JSON object instead of tables")


def _add_train(commands: Any) -> None:
    train = _command(commands, "train", "vlm.train.run:run", "Train one stage, resuming where it stopped.")
    _config(train)
    train.add_argument("--stage", required=True)
    train.add_argument("--start-from", type=Path, required=True, help="checkpoint or folder of the stage before")
    train.add_argument("--data", type=Path, required=True, help="folder that holds one indexed folder per data set")
    train.add_argument("--out", type=Path, required=True, help="folder of the stage")
    train.add_argument("--stop-after", metavar="TIME", help="save and exit 75 before so long has passed: 90m, 3h50m")
    train.add_argument("--wait", action="store_true", help="wait for another training in --out to end")


def _add_generate(commands: Any) -> None:
    tasks = _command(commands, "generate", "vlm.generate.tasks:generate", "Answer every item of an evaluation task.")
    _config(tasks)
    tasks.add_argument("--checkpoint", type=Path, required=True)
    names = ("captions", "captions_shuffled", "dialogue", "mmmu", *BENCHMARKS)
    tasks.add_argument("--task", choices=names, required=True)
    tasks.add_argument("--source", type=Path, required=True, help="folder of the evaluation data")
    tasks.add_argument("--out", type=Path, required=True, help="JSON lines, continued where they stop")
    ask = _command(commands, "ask", "vlm.generate.ask:ask", "Answer one question about one picture.")
    ask.add_argument("--checkpoint", type=Path, required=True, help="Megatron checkpoint or exported folder")
    ask.add_argument("--image", type=Path, action="append", default=[], help="once per picture")
    ask.add_argument("--prompt", required=True)
    ask.add_argument("--max-new-tokens", type=int, default=64)


def _add_score(commands: Any) -> None:
    score = _group(commands, "score", "Score predictions; needs neither torch nor a GPU.")
    captions = _command(score, "captions", "vlm.evaluate.captions:score", "CIDEr, BLEU, METEOR and ROUGE-L.")
    captions.add_argument("--annotations", type=Path, required=True, help="COCO captions file")
    captions.add_argument("--predictions", type=Path, required=True, help="COCO results list, or generated JSON lines")
    captions.add_argument("--output", type=Path, required=True)
    mmmu = _command(score, "mmmu", "vlm.evaluate.mmmu:score", "MMMU accuracy per subject, domain and overall.")
    mmmu.add_argument("--answers", type=Path, required=True, help="answer_dict_val.json, or the Hub's files")
    mmmu.add_argument("--predictions", type=Path, required=True)
    mmmu.add_argument("--split", default="validation", help="parquet files to read the answers from")
    mmmu.add_argument("--output", type=Path, required=True)
    mmmu.add_argument("--fallback", choices=("first", "random", "wrong"), default="random")
    mmmu.add_argument("--seed", type=int, default=0)
    for name, benchmark in BENCHMARKS.items():
        one = _command(score, name, "vlm.evaluate.answers:score", f"{benchmark.title}, overall and per group.")
        one.set_defaults(benchmark=name)
        hub = "copy of the Hub's repository, its parquet files, or the benchmark's own JSON files"
        one.add_argument("--annotations", type=Path, nargs="+", required=True, help=hub)
        own = "generated JSON lines, or the benchmark's own results"
        one.add_argument("--predictions", type=Path, nargs="+", required=True, help=own)
        one.add_argument("--output", type=Path, required=True)
        one.add_argument("--split", default=benchmark.split, help="of the repository (default: %(default)s)")
    controls = _command(score, "controls", "vlm.evaluate.controls:predict", "Captions of a control, to be scored.")
    _config(controls)
    controls.add_argument("--control", choices=("random", "nearest", "reference"), required=True)
    controls.add_argument("--source", type=Path, required=True, help="folder of the caption evaluation data")
    controls.add_argument("--train", type=Path, required=True, help="folder of the caption training data")
    controls.add_argument("--out", type=Path, required=True, help="COCO results list")
    controls.add_argument("--annotations-out", type=Path, default=None, help="references left for `reference`")
    table = _command(score, "table", "vlm.evaluate.table:write", "Gather all scores of a run in one CSV table.")
    _config(table)
    table.add_argument("--scores", type=Path, required=True, help="folder of the score files")
    table.add_argument("--out", type=Path, required=True)


def _add_export(commands: Any) -> None:
    export = _command(commands, "export", "vlm.export.command:export", "Write what transformers or Megatron-LM reads.")
    export.add_argument("checkpoint", type=Path)
    export.add_argument("out", type=Path)
    parts = ("llava", "language", "vision")
    export.add_argument("--part", choices=parts, default=None, help="transformers: what to write (default: llava)")
    whole = "refuse a checkpoint made with other settings than these"
    export.add_argument("--config", type=Path, default=None, metavar="YAML", help=whole)
    export.add_argument("--format", choices=("transformers", "megatron"), default="transformers")
    export.add_argument("--tensor", type=int, default=None, help="megatron: tensor-parallel ranks (default: 1)")
    implementations = ("transformer_engine", "local")
    export.add_argument("--transformer-impl", choices=implementations, default="", help="megatron: names of norms")


def _add_checkpoint(commands: Any) -> None:
    one = _group(commands, "checkpoint", "Say what a checkpoint is, and in what two of them differ.")
    show = _command(one, "show", "vlm.describe.show:show", "Kind, stage, parents, sizes and hashes of a checkpoint.")
    show.add_argument("directory", type=Path, help="checkpoint, stage, Hugging Face folder or Megatron-LM's files")
    show.add_argument("--layers", action="store_true", help="a line per layer")
    show.add_argument("--hash", dest="hashes", action="store_true", help="SHA-256 of the weights on each line")
    show.add_argument("--only-manifest", action="store_true", help="leave the weights alone, at once and without torch")
    show.add_argument("--json", dest="as_json", action="store_true", help="one JSON object instead of tables")
    diff = _command(one, "diff", "vlm.describe.diff:diff", "List weights that differ; exits 1 where any does.")
    for name in ("first", "second"):
        diff.add_argument(name, type=Path, help="checkpoint, stage, Hugging Face folder or Megatron-LM's files")


def _add_report(commands: Any) -> None:
    report = _group(commands, "report", "Pictures and pages of the report.")
    curves = _command(report, "curves", "vlm.report.curves:draw", "Draw the loss curves of the stages.")
    curves.add_argument("--metrics", type=Path, nargs="+", required=True, help="metrics.jsonl per stage")
    curves.add_argument("--out", type=Path, required=True)
    scores = _command(report, "scores", "vlm.report.scores:draw", "Draw the scores beside their controls.")
    scores.add_argument("--table", type=Path, required=True)
    scores.add_argument("--out", type=Path, required=True)
    gallery = _command(report, "gallery", "vlm.report.gallery:write", "A page of held-out pictures and what was said.")
    _config(gallery)
    gallery.add_argument("--sources", type=Path, required=True, help="folder of the evaluation data sets")
    gallery.add_argument("--generated", type=Path, required=True, help="folder of the generated JSON lines")
    gallery.add_argument("--out", type=Path, required=True)
    summary = _command(report, "summary", "vlm.report.summary:show", "Print the scores and what to open.")
    summary.add_argument("--table", type=Path, required=True)
    summary.add_argument("--report", type=Path, required=True)
    summary.add_argument("--gallery", type=Path, required=True)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="vlm", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_sources,
        _add_convert,
        _add_data,
        _add_plan,
        _add_train,
        _add_generate,
        _add_score,
        _add_export,
        _add_checkpoint,
        _add_report,
    ):
        add(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command. A mistake of the user's prints one message and exits 2; a bug keeps its traceback."""
    arguments = vars(parser().parse_args(argv))
    run = arguments.pop("run")
    for name in [key for key in arguments if key == "command" or key.endswith("_command")]:
        del arguments[name]
    try:
        code = run(**arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"vlm: {error}", file=sys.stderr)
        return 2
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
