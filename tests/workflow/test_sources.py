"""From the hosts to indexed shards: the full recipe's own rules and commands, on small files in the genuine layouts."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from hub_server import World, commit_of, serve
from PIL import Image
from pyarrow import parquet
from workspace import STAND_IN, environment, lay_out

from vlm.resources.bases import KNOWN

RUN = "results/small"
INDEXES = [f"{RUN}/data/{name}/.nv-meta/dataset.yaml" for name in ("pretrain", "sft")]
PER_SET = 4
IMAGE_SETS = {
    "coco/train2017": ("train2017.zip", "train2017"),
    "gqa/images": ("gqa/images.zip", "images"),
    "textvqa/train_images": ("train_val_images.zip", "train_images"),
    "vg/VG_100K": ("vg/images.zip", "VG_100K"),
    "vg/VG_100K_2": ("vg/images2.zip", "VG_100K_2"),
}
"""How the annotations name a folder; the archive that holds it, and under which name there."""


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(stream, "JPEG")
    return stream.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def sample(name: str, image: str | None) -> dict[str, Any]:
    asked = "What is it?" if image is None else "<image>\nWhat is it?"
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"It is {name}."}]
    return {"id": name, "conversations": turns} | ({"image": image} if image else {})


def questions(split: str) -> bytes:
    stream = io.BytesIO()
    columns = {
        "id": [f"{split}_Art_1", f"{split}_Art_2"],
        "question": ["Which?", "How many?"],
        "options": ["['red', 'blue']", "[]"],
        "answer": ["B", "7"],
        "question_type": ["multiple-choice", "open"],
    }
    parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


@pytest.fixture
def pictures() -> dict[str, bytes]:
    """By the names that the annotations give them."""
    named = [f"00{number}/{number:09d}.jpg" for number in range(12)]
    named += [f"{folder}/{number}.jpg" for folder in (*IMAGE_SETS, "ocr_vqa/images") for number in range(PER_SET)]
    return {name: picture(number) for number, name in enumerate(named)}


@pytest.fixture
def world(pictures: dict[str, bytes]) -> World:
    def below(folder: str) -> dict[str, bytes]:
        return {name.rpartition("/")[2]: data for name, data in pictures.items() if name.rpartition("/")[0] == folder}

    captions = [sample(name, name) for name in pictures if name.startswith("00")]
    talks = [sample(name, name) for name in pictures if not name.startswith("00")] + [sample("text", None)]
    packed = zipped({name: data for name, data in pictures.items() if name.startswith("00")})
    weights = {f"model-0000{number}-of-00002.safetensors": bytes(1000 + number) for number in (1, 2)}
    index = json.dumps({"metadata": {}, "weight_map": dict(zip("ab", weights, strict=True))}).encode()
    configs = {name: json.dumps(config).encode() for name, config in KNOWN.items()}
    language = {
        "config.json": configs["mistralai/Mistral-7B-Instruct-v0.3"],
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": index,
        **weights,
    }
    art = {f"Art/{split}-00000-of-00001.parquet": questions(split) for split in ("validation", "test")}
    annotations = json.dumps(
        {"images": [{"id": 7}], "annotations": [{"id": 1, "image_id": 7, "caption": "a"}]}
    ).encode()
    hub = {
        "mistralai/Mistral-7B-Instruct-v0.3": language | {"consolidated.safetensors": bytes(3000)},
        "openai/clip-vit-large-patch14-336": {
            "config.json": configs["openai/clip-vit-large-patch14-336"],
            "model.safetensors": bytes(500),
            "tf_model.h5": b"x",
        },
        "liuhaotian/LLaVA-Pretrain": {
            "blip_laion_cc_sbu_558k.json": json.dumps(captions).encode(),
            "blip_laion_cc_sbu_558k_meta.json": b"[]",
            "images.zip": packed,
        },
        "liuhaotian/LLaVA-Instruct-150K": {
            "llava_v1_5_mix665k.json": json.dumps(talks).encode(),
            "conversation_58k.json": b"[]",
        },
        "MMMU/MMMU": art,
    }
    files = {
        archive: zipped({f"{inside}/{name}": data for name, data in below(folder).items()})
        for folder, (archive, inside) in IMAGE_SETS.items()
    }
    files["val2014.zip"] = zipped({"val2014/COCO_val2014_000000000007.jpg": picture(7)})
    files["coco_karpathy_test_gt.json"] = annotations
    gated = {"mistralai/Mistral-7B-Instruct-v0.3"}
    return World(repositories={name: {"main": content} for name, content in hub.items()}, files=files, gated=gated)


@pytest.fixture
def folder(tmp_path: Path, pictures: dict[str, bytes]) -> Path:
    """A workspace whose `vlm` is the real one; OCR-VQA's pictures are there."""
    workspace = lay_out(tmp_path)
    command = workspace / ".venv/bin/vlm"
    command.write_text(command.read_text().replace(f'"{STAND_IN}"', "-m vlm.cli"))
    for name, data in pictures.items():
        if name.startswith("ocr_vqa/"):
            path = workspace / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return workspace


def run(workspace: Path, address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Snakemake with the full recipe, its plain hosts moved to this machine."""
    sets = {
        "coco": "train2017.zip",
        "gqa": "gqa/images.zip",
        "textvqa": "train_val_images.zip",
        "vg": ["vg/images.zip", "vg/images2.zip"],
    }

    def moved(names: str | list[str]) -> str | list[str]:
        return f"{address}/files/{names}" if isinstance(names, str) else [f"{address}/files/{name}" for name in names]

    overlay = {
        "run": "small",
        "data": {"sets": {"sft": {"image_sets": {name: moved(files) for name, files in sets.items()}}}},
        "evaluation": {"captions": {"source": moved(["val2014.zip", "coco_karpathy_test_gt.json"])}},
    }
    (workspace / "small.yaml").write_text(yaml.safe_dump(overlay))
    hub = {"HF_ENDPOINT": address, "HF_HOME": str(workspace / "hub"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_good"}
    line = [workspace / ".venv/bin/snakemake", "--configfile", "small.yaml", "--profile", "none", "-c2", *arguments]
    environ = {name: value for name, value in environment(workspace).items() if not name.startswith("HF_")} | hub
    return subprocess.run(
        line, cwd=workspace, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )


def packed_samples(folder: Path) -> dict[str, tuple[dict[str, Any], bytes | None]]:
    """Records and pictures of all shards by id."""
    members: dict[str, bytes] = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    texts = {name[:9]: json.loads(data) for name, data in members.items() if name.endswith(".json")}
    return {record["id"]: (record, members.get(f"{key}.jpg")) for key, record in texts.items()}


def test_everything_is_fetched_once_and_becomes_indexed_shards_and_scores(
    folder: Path, world: World, pictures: dict[str, bytes]
) -> None:
    with serve(world) as address:
        made = run(folder, address, "sources", *INDEXES)
        assert made.returncode == 0, made.stdout
        sources = folder / RUN / "sources"
        for name in ("pretrain", "sft"):
            held = packed_samples(folder / RUN / "data" / name)
            wanted = [one for one in pictures if one.startswith("00") == (name == "pretrain")]
            assert set(held) == {*wanted, *(["text"] if name == "sft" else [])}
            assert all(held[one] == (sample(one, one), pictures[one]) for one in wanted)
        assert (sources / "captions/val2014/COCO_val2014_000000000007.jpg").read_bytes() == picture(7)
        assert not list(sources.glob("*/images/coco/train2017")), "half a million files were unpacked"
        assert {path.name for path in (sources / "language").iterdir() if path.name[0] != "."} == {
            "config.json",
            "tokenizer.json",
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        }
        parts = json.loads((sources / "MMMU.manifest.json").read_text())["parts"]
        assert parts[0]["commit"] == commit_of("main") and list(parts[0]["files"]) == [
            "Art/validation-00000-of-00001.parquet"
        ]
        unread = ("consolidated", "_meta.json", "conversation_58k", "tf_model", "test-00000")
        assert not [one for one in world.requests if one.startswith("GET") and any(name in one for name in unread)]
        assert "Nothing to be done" in run(folder, address, "-n", "sources", *INDEXES).stdout

        world.requests.clear()
        again = run(folder, address, "sources", "--forcerun", "fetch_sft_data", "fetch_captions_data", "fetch_language")
        assert again.returncode == 0, again.stdout
        assert not [one for one in world.requests if one.startswith("GET") and "/api/" not in one], "fetched again"

        # What a model would answer; scored by the rules, against what was fetched.
        captions = [{"image_id": 7, "response": "a"}]
        choices = {
            "question_type": "multiple-choice",
            "all_choices": ["A", "B"],
            "index2ans": {"A": "red", "B": "blue"},
        }
        answers = [
            {"id": "validation_Art_1", **choices, "response": "(B) blue"},
            {"id": "validation_Art_2", "question_type": "open", "response": "8"},
        ]
        for task, records in (("captions", captions), ("mmmu", answers)):
            path = folder / RUN / f"generate/combined/{task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        scores = [f"{RUN}/scores/combined/{task}.json" for task in ("captions", "mmmu")]
        scored = run(folder, address, *scores, "--allowed-rules", "score_captions", "score_mmmu", "--show-failed-logs")
        assert scored.returncode == 0, scored.stdout
        captions_score, mmmu_score = (json.loads((folder / path).read_text()) for path in scores)
        assert captions_score["num_images"] == 1 and captions_score["metrics"]["Bleu_1"] == pytest.approx(1.0)
        assert mmmu_score["accuracy"] == 0.5 and mmmu_score["per_subject"]["Art"] == 0.5


def test_pictures_that_are_not_there_are_told_before_anything_is_fetched(folder: Path, world: World) -> None:
    with serve(world) as address:
        (folder / "data/ocr_vqa").rename(folder / "data/elsewhere")
        refused = run(folder, address, f"{RUN}/sources/LLaVA-Instruct-150K", "--show-failed-logs")
        assert refused.returncode != 0
        assert "images/ocr_vqa from ./data/ocr_vqa: there is no such folder or file" in refused.stdout
        assert not world.requests
