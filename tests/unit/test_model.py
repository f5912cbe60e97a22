"""What the model refuses, what freezing does, and the names it writes to checkpoints."""

from __future__ import annotations

import model_fixtures as fixtures
import pytest
import torch

import vlm_kernels
from vlm import parallel
from vlm.model import build
from vlm.model.sizes import language_sizes, vision_sizes
from vlm.model.specs import provider

LANGUAGE, VISION = fixtures.LANGUAGE, fixtures.VISION


@pytest.fixture(autouse=True, scope="module")
def groups():
    fixtures.initialize()
    yield
    parallel.destroy()


@pytest.fixture
def model(groups):
    parallel.seed_everything(3)
    return build(LANGUAGE, VISION, fixtures.settings())


def saved_tensors(loss):
    """Names of the autograd nodes of a graph, with how often each occurs."""
    seen, names, stack = set(), [], [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        stack += [parent for parent, _ in node.next_functions]
    return names


def test_freeze_leaves_gradients_to_the_trainable_parts(model):
    batch = fixtures.packed([(31, 1), (20, 0)])
    for trainable in (["projector"], ["projector", "language"], ["vision", "projector", "language"]):
        model.freeze(trainable)
        model.zero_grad(set_to_none=True)
        assert [part.training for part in model.parts.values()] == [name in trainable for name in model.parts]
        model.train()
        model(batch).sum().backward()
        for name, part in model.parts.items():
            chosen = name in trainable
            assert part.training == chosen
            gradients = [p.grad for p in part.parameters()]
            assert all((g is not None and bool(g.any())) == chosen for g in gradients), (trainable, name)


@pytest.mark.parametrize("trainable", [["projector"], ["projector", "language"]], ids="+".join)
def test_recomputation_runs_language_layers_again_and_changes_nothing(trainable):
    batch, found = fixtures.packed([(31, 1), (20, 0)]), []
    for recompute in (False, True):
        parallel.seed_everything(3)
        model = build(LANGUAGE, VISION, fixtures.settings(recompute=recompute))
        model.freeze(trainable)
        calls = []
        for part in (model.vision_model, model.language_model):
            for layer in part.decoder.layers:
                layer.register_forward_hook(lambda *_, part=part, calls=calls: calls.append(part))
        losses = model(batch)
        losses.sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((losses, gradients))
        assert calls.count(model.language_model) == 3 * (1 + recompute)
        assert calls.count(model.vision_model) == 3
        calls.clear()
        model.eval()(batch)
        assert calls.count(model.language_model) == 3, "evaluation has no backward pass to save for"
    (losses, gradients), (losses_again, gradients_again) = found
    assert torch.equal(losses, losses_again) and gradients.keys() == gradients_again.keys()
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def test_frozen_vision_model_builds_no_graph(model):
    batch = fixtures.packed([(31, 1)])
    model.freeze(["projector"])
    assert not any("Convolution" in name or "LayerNorm" in name for name in saved_tensors(model(batch).sum()))
    model.freeze(["vision"])
    assert any("Convolution" in name for name in saved_tensors(model(batch).sum()))


def test_no_grad_means_no_graph(model):
    batch = fixtures.packed([(31, 1)])
    with torch.no_grad():
        assert not model.image_features(batch.images).requires_grad
        assert not model(batch).requires_grad


def test_text_alone_keeps_the_projector_in_the_graph(model):
    batch = fixtures.packed([(20, 0), (9, 0)])
    model.freeze(["projector"])
    model(batch).sum().backward()
    for parameter in model.vision_projection.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_head_runs_at_trained_positions_only(model):
    batch = fixtures.packed([(31, 1), (20, 0)])
    seen = []
    original = model.language_model._specs.linear_cross_entropy
    model.language_model._specs.linear_cross_entropy = lambda hidden, *rest, **options: (
        seen.append(hidden.shape),
        original(hidden, *rest, **options),
    )[1]
    losses = model(batch)
    assert seen == [(len(batch.trained_positions), LANGUAGE["hidden_size"])]
    assert losses.dtype == torch.float32
    assert losses.shape == batch.trained_positions.shape


def test_unknown_part_is_refused_by_name(model):
    with pytest.raises(
        ValueError, match=r"trainable: \['head'\] are not parts, allowed are vision, projector, language"
    ):
        model.freeze(["head"])


def test_checkpoint_keys_are_the_parameters_names(model):
    """Layers by number, not stacked: a vision model of fewer blocks reads the checkpoint of the whole."""
    keys = {key: item.key for key, item in model.sharded_state_dict().items() if "_extra_state" not in key}
    assert keys == {name: name for name, _ in model.named_parameters()}
    shorter = build(LANGUAGE, VISION, fixtures.settings(feature_layer=-2)).vision_model.sharded_state_dict()
    whole = model.vision_model.sharded_state_dict()
    assert set(shorter) < set(whole)
    weight = "decoder.layers.1.mlp.linear_fc1.weight"
    assert shorter[weight].global_shape == whole[weight].global_shape


def test_projector_starts_from_the_settings_and_the_seed(model):
    weight = model.vision_projection.encoder.linear_fc2.weight
    assert weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert not model.vision_projection.encoder.linear_fc1.bias.any()
    parallel.seed_everything(3)
    again = build(LANGUAGE, VISION, fixtures.settings())
    assert torch.equal(again.vision_projection.encoder.linear_fc2.weight, weight)
    without = build(LANGUAGE, VISION, fixtures.settings(bias=False)).vision_projection
    assert [name for name, _ in without.named_parameters()] == [
        "encoder.linear_fc1.weight",
        "encoder.linear_fc2.weight",
    ]


def test_the_triton_backend_takes_our_functions_and_the_torch_backend_their_twins():
    ours, plain = provider("triton"), provider("torch")
    assert ours.linear_cross_entropy is vlm_kernels.linear_cross_entropy
    assert ours.project_image_tokens is vlm_kernels.project_image_tokens
    assert ours.core_attention.attention is vlm_kernels.attention
    assert plain.linear_cross_entropy is vlm_kernels.reference.linear_cross_entropy
    assert plain.project_image_tokens is vlm_kernels.reference.project_image_tokens
    assert plain.core_attention.attention is vlm_kernels.reference.attention


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it may be there")
def test_transformer_engine_without_a_gpu_is_refused_by_name():
    with pytest.raises(RuntimeError, match="kernels.backend: transformer_engine needs a GPU"):
        build(LANGUAGE, VISION, fixtures.settings(backend="transformer_engine"))


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"architectures \['GPT2LMHeadModel'\].*allowed are MistralForCausalLM",
        ),
        ({"head_dim": None, "hidden_size": 50}, "hidden_size 50 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, received 'many'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.rope_type 'linear' is not supported"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.rope_type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor must be a positive number, received None"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "rope_scaling.high_freq_factor 4 is not above low_freq_factor 4",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"sliding_window": 128}, "sliding_window 128 is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
)
def test_language_models_that_cannot_be_built_are_refused_by_key(change, message):
    with pytest.raises(ValueError, match="config.json of the language model: " + message):
        language_sizes(LANGUAGE | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["SiglipVisionModel"]},
            r"architectures \['SiglipVisionModel'\].*allowed are CLIPVisionModel",
        ),
        ({"num_attention_heads": 3}, "hidden_size 32 is not a multiple of num_attention_heads 3"),
        ({"patch_size": 7}, "image_size 24 is not a multiple of patch_size 7"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
    ],
)
def test_vision_models_that_cannot_be_built_are_refused_by_key(change, message):
    with pytest.raises(ValueError, match="config.json of the vision model: " + message):
        vision_sizes(VISION | change)


def test_sizes_are_those_of_the_files():
    """Both places of rope_theta; the whole CLIP model's file; keys that older files leave out."""
    assert language_sizes(LANGUAGE).rope_theta == 5000.0
    nested = without(LANGUAGE, "rope_theta") | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert language_sizes(nested).rope_theta == 1e6
    llama = without(LANGUAGE, "num_key_value_heads", "head_dim", "sliding_window")
    sizes = language_sizes(llama | {"architectures": ["LlamaForCausalLM"]})
    assert (sizes.num_kv_heads, sizes.head_dim) == (4, 12)
    whole = {"architectures": ["CLIPModel"], "vision_config": without(VISION, "architectures", "hidden_act")}
    assert vision_sizes(whole) == vision_sizes(VISION)
    assert vision_sizes(whole).num_image_tokens == 9


def test_pipeline_stages_must_divide_the_layers():
    with pytest.raises(ValueError, match="num_hidden_layers 3 is not a multiple of parallel.pipeline 2"):
        language_sizes(LANGUAGE, pipeline=2)
    assert language_sizes(LANGUAGE, pipeline=3).num_layers == 3


def test_tensor_ranks_must_divide_the_sizes():
    with pytest.raises(ValueError, match="num_key_value_heads 2 is not a multiple of parallel.tensor 4"):
        language_sizes(LANGUAGE, tensor=4)
    with pytest.raises(ValueError, match="vocab_size 135 is not a multiple of parallel.tensor 2"):
        language_sizes(LANGUAGE | {"vocab_size": 135}, tensor=2)
    with pytest.raises(ValueError, match="num_attention_heads 2 is not a multiple of parallel.tensor 4"):
        vision_sizes(VISION, tensor=4)


@pytest.mark.parametrize("layer", [0, -4])
def test_feature_layer_must_exist(layer):
    with pytest.raises(ValueError, match=f"feature_layer: {layer} is not between -3 and -1"):
        vision_sizes(VISION).num_built_layers(layer)
