"""`vlm convert legacy`: Megatron-LM's per-rank files, of any tensor-parallel size, to one of our checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from vlm import checkpoint, files
from vlm import config as settings
from vlm.checkpoint import PARTS, Manifest
from vlm.checkpoint.manifest import NAME, Kind
from vlm.convert import language as languages
from vlm.convert import source as sources
from vlm.convert import vision as visions
from vlm.convert.combine import image_token_id
from vlm.model.sizes import language_sizes, vision_sizes
from vlm.weights import Row, language_table, projector_table, vision_table
from vlm.weights.folder import some
from vlm.weights.legacy import PADDED, Legacy, Spec, is_taken
from vlm.weights.tables import num_bytes


def convert(
    source: Path, out: Path, language: Path | None = None, vision: Path | None = None, config: Path | None = None
) -> None:
    """Convert the files that Megatron-LM loads with `--ckpt-format torch`.

    Args:
        source: folder with `latest_checkpointed_iteration.txt`, or the one with `mp_rank_00` inside.
        out: the checkpoint. Complete or absent; what was there before is replaced at the end.
        language, vision: Hugging Face folders of the base models: configuration, tokenizer, image processor. One alone
            takes that model out of the files; both take a whole LLaVA. What Megatron-LM's vision model has no module
            for (blocks after the features, the last norm) comes from the vision folder where the files lack it.
        config: resolved settings of the run, for a whole LLaVA: `models`, `seed`, `dtype`, `data.image_resize`.

    Raises:
        ValueError: naming the file and the weight: content that could run code, missing ranks, ranks that disagree,
            missing, unexpected or misshapen weights, settings that do not fit.
    """
    folders = {part: Path(path) for part, path in (("language", language), ("vision", vision)) if path}
    if not folders:
        raise ValueError("name --language, --vision or both: the Hugging Face folders of the base models")
    if len(folders) > 1 and config is None:
        raise ValueError("--config is missing: a whole LLaVA has settings; leave out --language or --vision for a part")
    run = settings.load(config) if config and len(folders) > 1 else None
    _Conversion(Path(source), folders, run).write(Path(out))


class _Conversion:
    """Files of Megatron-LM, the base models beside them, and the check that they belong together."""

    def __init__(self, source: Path, folders: dict[str, Path], run: settings.Config | None) -> None:
        self.found = Legacy(source)
        self.folders, self.run = folders, run
        self.configs = {part: sources.read_config(folder) for part, folder in folders.items()}
        if "vision" in folders:
            self.configs["vision"] = visions.tower(self.configs["vision"])
        if "language" in folders and not (tokenizer := folders["language"] / "tokenizer.json").is_file():
            raise ValueError(f"{tokenizer}: is missing; save the tokenizer as a fast one beside the model")
        self.rows = {row.ours: row for row in self._rows()}
        self.from_base: dict[str, Callable[[], Tensor]] = {}
        self.read_files = {f"legacy/{file.parent.name}": file for file in self.found.files}
        self._check()
        beside = "vision_model.class_token"  # for a weight that the files lack
        self.specs: dict[str, Spec] = {
            key: (self.found.specs[key if key in self.found.specs else beside][0], row.shape)
            for key, row in self.rows.items()
        }

    def _rows(self) -> list[Row]:
        tables = []
        if "vision" in self.configs:
            tables.append(vision_table(self.configs["vision"]))
        if self.run:
            vision, language = vision_sizes(self.configs["vision"]), language_sizes(self.configs["language"])
            hidden, bias = self.run.models.projector.hidden_size, self.run.models.projector.bias
            tables.append(projector_table(vision.hidden_size, hidden, language.hidden_size, bias=bias))
        if "language" in self.configs:
            tables.append(language_table(self.configs["language"]))
        return [row for table in tables for row in table.rows]

    def _check(self) -> None:
        """Compare the files with what the configurations describe, before anything is written."""
        where, specs = self.found.folder, self.found.specs
        parts = tuple({key.split(".")[0] + "." for key in self.rows})
        if odd := sorted(key for key in specs if key.startswith(parts) and key not in self.rows):
            raise ValueError(f"{where}: {some(odd)} unexpected: config.json describes no such weight")
        for key, row in self.rows.items():
            if key not in specs:
                continue
            shape, wanted = specs[key][1], row.shape
            longer = key in PADDED and shape[0] >= wanted[0] and shape[1:] == wanted[1:]
            if shape != wanted and not longer:
                given = "models.projector" if key.startswith("vision_projection.") else "config.json"
                raise ValueError(f"{where}: {key} has shape {list(shape)}, {given} gives {list(wanted)}")
        missing = [key for key in self.rows if key not in specs]
        built = self._num_built_layers()
        if needed := [key for key in missing if is_taken(key, built)]:
            fresh = all(key.startswith("vision_projection.") for key in needed)
            hint = "; convert the parts one by one and join them with `vlm convert combine`" if fresh else ""
            raise ValueError(f"{where}: {some(needed)} missing{hint}")
        if missing:
            self._read_base(missing)

    def _num_built_layers(self) -> int:
        if "vision" not in self.configs:
            return 0
        sizes = vision_sizes(self.configs["vision"])
        return sizes.num_built_layers(self.run.models.vision.feature_layer) if self.run else sizes.num_layers

    def _read_base(self, missing: list[str]) -> None:
        """Find in the base model's folder what Megatron-LM's model does not take."""
        try:
            base, _, table = visions.read(self.folders["vision"])
        except ValueError as error:
            raise ValueError(
                f"{some(missing)} not in the files, because Megatron-LM's model does not take such weights; --vision "
                f"must be a folder that holds them: {error}"
            ) from None
        rows = {row.ours: row for row in table.rows}
        for key in missing:
            self.from_base[key] = (lambda row: lambda: base.join(row))(rows[key])
        self.read_files |= {f"vision/{file.name}": file for file in base.files}

    def write(self, out: Path) -> None:
        total = sum(num_bytes(shape, dtype) for dtype, shape in self.specs.values())
        reads = [self.found.folder, *self.folders.values()]
        # Hashing reads the same files at the same time, so that the second reader finds them in memory.
        with (
            ThreadPoolExecutor(1) as hasher,
            checkpoint.writing(out, reads=reads, needed_bytes=total, replaces=NAME) as folder,
            tqdm(total=total, desc="convert legacy", unit="B", unit_scale=True) as bar,
        ):
            self._write_side_files(folder)
            if self.run:
                image_token_id(folder, self.run.models.language.image_token)
            hashes = {name: hasher.submit(sources.sha256, path) for name, path in self.read_files.items()}

            def make(key: str) -> Tensor:
                dtype, shape = self.specs[key]
                bar.update(num_bytes(shape, dtype))
                if key in self.from_base:
                    return self.from_base[key]().to(dtype)
                return self.found.read(key)[: shape[0]]

            checkpoint.write_tensors(folder, self.specs, make)
            self._manifest({name: digest.result() for name, digest in sorted(hashes.items())}).write(folder)

    def _write_side_files(self, out: Path) -> None:
        for part, folder in self.folders.items():
            place = checkpoint.huggingface(out, part)
            place.mkdir(parents=True)
            files.write_json(place / "config.json", self.configs[part])
            self.read_files[f"{part}/config.json"] = folder / "config.json"
            for name in languages.SIDE_FILES if part == "language" else visions.SIDE_FILES:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, place / name)
                    self.read_files[f"{part}/{name}"] = folder / name

    def _manifest(self, hashes: dict[str, str]) -> Manifest:
        kind: Kind = "combined" if len(self.folders) > 1 else "language" if "language" in self.folders else "vision"
        if self.run is None:
            return Manifest(kind=kind, parts=(PARTS[kind],), sources=hashes)
        return Manifest(
            kind=kind,
            parts=tuple(PARTS.values()),
            sources=hashes,
            models=self.run.models.model_dump(mode="json"),
            settings={"seed": self.run.seed, "dtype": self.run.dtype, "image_resize": self.run.data.image_resize},
        )
