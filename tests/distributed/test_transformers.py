"""A combined checkpoint gives the logits and features of `transformers` at every split of the model."""

from __future__ import annotations

from pathlib import Path

import folder_fixtures
import model_fixtures as fixtures
import pytest
import ranks
import torch
from model_fixtures import IMAGE_SIZE, IMAGE_TOKEN, NUM_PATCHES

SPLITS = {"alone": (1, 1), "tensor-2": (2, 1), "tensor-4": (4, 1), "pipeline-2": (1, 2), "tensor-2+pipeline-2": (2, 2)}
FEATURE_LAYERS = (-1, -2)
# Sizes that four ranks can share.
LANGUAGE = fixtures.LANGUAGE | {"num_hidden_layers": 4, "num_key_value_heads": 4}
VISION = fixtures.VISION | {"num_attention_heads": 4}
TOLERANCE = 1e-4
LENGTH = 40


def inputs():
    """Tokens [S] with two pictures, and their pixels."""
    generator = torch.Generator().manual_seed(3)
    tokens_S = torch.randint(11, 130, (LENGTH,), generator=generator)
    slots = torch.cat([torch.arange(4, 4 + NUM_PATCHES), torch.arange(20, 20 + NUM_PATCHES)])
    tokens_S[slots] = IMAGE_TOKEN
    pixels = torch.randint(0, 256, (2, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator, dtype=torch.uint8)
    return tokens_S, slots, pixels


def batch(*, pictures: bool):
    from vlm.batch import PackedBatch

    tokens_S, slots, pixels = inputs()
    return PackedBatch(
        tokens_S=tokens_S,
        positions_S=torch.arange(LENGTH),
        cu_seqlens=torch.tensor([0, LENGTH], dtype=torch.int32),
        max_seqlen=LENGTH,
        images=pixels if pictures else pixels[:0],
        image_positions=slots if pictures else slots[:0],
        trained_positions=torch.zeros(1, dtype=torch.int64),
        labels_R=tokens_S[1:2],
        sample_keys=("sample",),
    )


def whole_logits(model, packed):
    """[S, V] of one sequence through all stages of a pipeline; None before the last."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(batches, model):
        hidden_SBD = model.hidden(next(batches))
        return hidden_SBD, lambda hidden_SBD, non_loss_data: model.language_model.logits(hidden_SBD[:, 0])

    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([packed]),
            model=[model],
            num_microbatches=1,
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return found[0] if found else None


def worker(folder: Path, name: str) -> None:
    """Runs on every rank; each leaves what it knows in `folder/<split>-<feature layer>-<rank>.pt`."""
    from vlm import parallel
    from vlm.model import build_from_checkpoint

    tensor, pipeline = SPLITS[name]
    layout = fixtures.settings(tensor=tensor, pipeline=pipeline).parallel
    parallel.initialize(layout, seed=1)
    for feature_layer in FEATURE_LAYERS:
        model = build_from_checkpoint(folder / str(feature_layer) / "combined", parallel=layout)
        if pipeline > 1:
            with pytest.raises(ValueError, match=rf"parallel\.pipeline: is {pipeline}, generation needs"):
                model.logits(inputs()[0][None], torch.arange(LENGTH)[None])
        with torch.no_grad():
            features = model.image_features(inputs()[2]) if model.pre_process else None
        found = {
            "combined": whole_logits(model, batch(pictures=True)),
            "language": whole_logits(model, batch(pictures=False)),
            "vision": features,
        }
        torch.save(found, folder / f"{name}-{feature_layer}-{torch.distributed.get_rank()}.pt")


def theirs(folder: Path, feature_layer: int):
    """The same three of `transformers`' own models, read from the folders that were converted."""
    from transformers import CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration, MistralForCausalLM

    from vlm import checkpoint, images

    language = MistralForCausalLM.from_pretrained(folder / "hub/language")
    vision = CLIPVisionModel.from_pretrained(folder / "hub/vision")
    config = LlavaConfig(
        text_config=language.config,
        vision_config=vision.config,
        image_token_index=IMAGE_TOKEN,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=feature_layer,
        multimodal_projector_bias=True,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(vision.state_dict())
    projector = checkpoint.Tensors(folder / "combined")
    with torch.no_grad():
        for number in (1, 2):
            layer = getattr(model.model.multi_modal_projector, f"linear_{number}")
            layer.weight.copy_(projector.read(f"vision_projection.encoder.linear_fc{number}.weight"))
            layer.bias.copy_(projector.read(f"vision_projection.encoder.linear_fc{number}.bias"))
        tokens_S, _, pixels = inputs()
        statistics = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])  # of folder_fixtures.write_vision
        normal = images.normalise(pixels, *statistics, torch.float32)
        hidden = vision(normal, output_hidden_states=True).hidden_states
        return {
            "combined": model(input_ids=tokens_S[None], pixel_values=normal).logits[0],
            "language": language(input_ids=tokens_S[None]).logits[0],
            "vision": hidden[feature_layer][:, 1:],
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_fixtures, "LANGUAGE", LANGUAGE)
        patch.setattr(folder_fixtures, "VISION", VISION)
        for feature_layer in FEATURE_LAYERS:
            options = {"models__vision__feature_layer": feature_layer, "models__projector__init_std": 0.3}
            folder_fixtures.make_combined(folder / str(feature_layer), **options)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return {feature_layer: theirs(folder / str(feature_layer), feature_layer) for feature_layer in FEATURE_LAYERS}


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_equals_transformers(folder, expected, split):
    tensor, pipeline = SPLITS[split]
    ranks.launch(tensor * pipeline, worker, folder, split)
    for feature_layer in FEATURE_LAYERS:
        found = [torch.load(folder / f"{split}-{feature_layer}-{rank}.pt") for rank in range(tensor * pipeline)]
        for name, wanted in expected[feature_layer].items():
            assert wanted.std() > 0.3  # logits of constant models would agree too
            known = [one[name] for one in found if one[name] is not None]
            assert len(known) == tensor
            for one in known:
                torch.testing.assert_close(one, wanted, atol=TOLERANCE, rtol=0)
