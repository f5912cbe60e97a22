"""megatron-core's own LLaVAModel takes exported rank files as they are, and says what our model says."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

import torch
from torch import distributed, multiprocessing
from torch.nn import functional

FIXTURES = Path(__file__).parents[1] / "unit"
sys.path.insert(0, str(FIXTURES))
TEXT_TOKENS, IMAGE_AT = 12, 5


def read(folder: Path, rank: int):
    file = folder / f"iter_0000001/mp_rank_{rank:02d}/model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, weights_only=True)


def inputs():
    """Tokens [1, S] around one picture, and the picture as uint8 [1, 3, H, W]."""
    from model_fixtures import IMAGE_SIZE

    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(11, 300, (1, TEXT_TOKENS), generator=generator)
    return tokens, torch.randint(256, (1, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator).to(torch.uint8)


def normalised(picture, model):
    from vlm import images

    return images.normalise(picture, model.image_mean, model.image_std, torch.float32)


def our_logits(model):
    from model_fixtures import IMAGE_TOKEN, NUM_PATCHES

    tokens, picture = inputs()
    before, after = tokens[:, :IMAGE_AT], tokens[:, IMAGE_AT:]
    tokens = torch.cat([before, torch.full((1, NUM_PATCHES), IMAGE_TOKEN), after], dim=1)
    slots = torch.arange(IMAGE_AT, IMAGE_AT + NUM_PATCHES)
    positions = torch.arange(tokens.shape[1])[None]
    return model.logits(tokens, positions, images=picture, image_positions=slots, last_only=False)


def their_model(args):
    """Built from the `args` in the file, from megatron-core's local specs; the vision tower as `vision_model_type clip`
    has it. Changed is what keeps the specs from running without CUDA or from being CLIP (see vlm.model.vision)."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.multimodal import llava_model
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig
    from model_fixtures import IMAGE_SIZE, PATCH_SIZE, VISION

    common = {
        "tensor_model_parallel_size": args.tensor_model_parallel_size,
        "use_cpu_initialization": True,
        "params_dtype": args.params_dtype,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }
    language = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        activation_func=functional.silu,
        gated_linear_unit=args.swiglu,
        add_bias_linear=args.add_bias_linear,
        **common,
    )
    vision = TransformerConfig(
        num_layers=VISION["num_hidden_layers"] - 1,  # the features are the layer before last
        hidden_size=VISION["hidden_size"],
        ffn_hidden_size=VISION["intermediate_size"],
        num_attention_heads=VISION["num_attention_heads"],
        layernorm_epsilon=VISION["layer_norm_eps"],
        activation_func=lambda x: x * torch.sigmoid(1.702 * x),
        **common,
    )
    vision.vision_model_type = "clip"
    projector = TransformerConfig(
        num_layers=1,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        activation_func=functional.gelu,
        **common,
    )
    vit = get_vit_layer_with_local_spec()
    vit.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    clip = functools.partial(llava_model.CLIPViTModel, ln_pre_impl=WrappedTorchNorm)
    original, llava_model.CLIPViTModel = llava_model.CLIPViTModel, clip
    move, torch.Tensor.cuda = torch.Tensor.cuda, lambda self: self
    try:
        return llava_model.LLaVAModel(
            language,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            args.padded_vocab_size,
            args.max_position_embeddings,
            vision,
            vit,
            drop_vision_class_token=True,
            vision_projection_config=projector,
            vision_projection_layer_spec=vit.submodules.mlp.submodules,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            language_position_embedding_type=args.position_embedding_type,
            language_rotary_base=args.rotary_base,
            img_h=IMAGE_SIZE,
            img_w=IMAGE_SIZE,
            patch_dim=PATCH_SIZE,
        ).eval()
    finally:
        llava_model.CLIPViTModel, torch.Tensor.cuda = original, move


def their_logits(model, pixels):
    from megatron.core.models.common.embeddings import rotary_pos_embedding
    from model_fixtures import NUM_PATCHES

    from vlm.model.cpu import _CpuTorch

    rotary_pos_embedding.torch = _CpuTorch()  # asks for the current CUDA device
    tokens, _ = inputs()
    tokens = torch.cat([tokens[:, :IMAGE_AT], torch.tensor([[-200]]), tokens[:, IMAGE_AT:]], dim=1)
    length = TEXT_TOKENS + NUM_PATCHES
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    positions = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        logits, _ = model(pixels, tokens, positions, hidden, runtime_gather_output=True)
    return logits


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT="0")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    import model_fixtures as fixtures

    from vlm import parallel
    from vlm.model import build_from_checkpoint

    fixtures.initialize(2)
    ours = build_from_checkpoint(folder / "combined", parallel=fixtures.settings(tensor=2).parallel)
    content = read(folder / "legacy", rank)
    theirs = their_model(content["args"])
    theirs.load_state_dict(content["model"], strict=True)
    logits = their_logits(theirs, normalised(inputs()[1], ours))
    torch.save((our_logits(ours), logits), folder / f"{rank}.pt")
    parallel.destroy()


def test_megatron_core_loads_two_rank_files_and_agrees(tmp_path):
    from folder_fixtures import VOCABULARY, make_combined

    from vlm.export.legacy import export

    combined = make_combined(tmp_path, models__vision__feature_layer=-2)
    export(combined, tmp_path / "legacy", tensor=2, transformer_impl="local")
    multiprocessing.spawn(worker, args=(tmp_path,), nprocs=2)
    for rank in (0, 1):
        ours, theirs = torch.load(tmp_path / f"{rank}.pt")
        assert ours.shape[-1] == VOCABULARY < theirs.shape[-1] == 512
        assert ours.abs().max() > 1
        torch.testing.assert_close(theirs[..., :VOCABULARY], ours, atol=1e-4, rtol=0)
