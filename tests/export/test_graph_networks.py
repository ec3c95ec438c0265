"""Exported graphs against the modules, in ONNX Runtime: every option, every kind of network."""

import collections

import numpy as np
import pytest
from graph_checks import BATCHES, LIMITS, assert_parity, session, torch_output, unet_inputs
from tiny_models import tiny_network

from adm_rt.engines.base import LOSS_SCALES
from adm_rt.export.classifier_graph import classifier_gradient_graph
from adm_rt.export.initializers import initializer, is_weight, split_name
from adm_rt.export.nodes import NODES
from adm_rt.export.unet_graph import unet_graph
from adm_rt.models import list_presets, preset
from adm_rt.models.blocks import AttentionBlock, AttentionPool2d, FusedGroupNorm, ResBlock
from adm_rt.models.checkpoint import empty_module

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from adm_rt.export import functions  # noqa: E402
from adm_rt.export.exporter import export_model  # noqa: E402

UNETS = {
    "base": {"class_cond": False, "learn_sigma": False},
    "class-conditional": {},
    "null-class": {"null_class": True},
    "additive": {"use_scale_shift_norm": False},
    "strided": {"resblock_updown": False},
    "new-order": {"use_new_attention_order": True, "num_head_channels": 16},
    "heads-upsample": {"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4},
    "rescaled": {"rescale_residual": True},
    "groups-5-odd-width": {"norm_groups": 5, "num_channels": 15, "num_head_channels": 5},
    "three-levels": {"channel_mult": "1,1,2", "num_res_blocks": 2, "attention_resolutions": "8,4"},
    "one-level": {"channel_mult": "1", "attention_resolutions": ""},
    "four-channels-dropout": {"in_channels": 4, "use_checkpoint": True, "dropout": 0.3},
}
UPSAMPLERS = {"upsampler": {}, "upsampler-of-20": {"small_size": 20, "class_cond": False}}
CLASSIFIERS = {
    **{pool: {"pool": pool} for pool in ("attention", "adaptive", "spatial", "spatial_v2")},
    "strided": {"resblock_updown": False},
    "additive": {"use_scale_shift_norm": False},
    "additive-strided-spatial": {
        "use_scale_shift_norm": False,
        "resblock_updown": False,
        "pool": "spatial",
    },
    "new-order": {"use_new_attention_order": True, "num_head_channels": 16},
    "rescaled": {"rescale_residual": True, "pool": "adaptive"},
    "groups-8": {"norm_groups": 8, "num_channels": 24, "num_head_channels": 12},
    "three-levels": {"channel_mult": "1,1,2", "num_res_blocks": 2, "attention_resolutions": "8,4"},
}
CASES = {
    **{f"unet-{name}": ("diffusion", flags) for name, flags in UNETS.items()},
    **{name: ("upsampler", flags) for name, flags in UPSAMPLERS.items()},
    **{f"classifier-{name}": ("classifier", flags) for name, flags in CLASSIFIERS.items()},
}
# of each kind one, for what costs more
KINDS = {
    name: CASES[name]
    for name in ("unet-base", "unet-class-conditional", "upsampler", "classifier-attention")
}


@pytest.fixture(scope="session")
def guided():
    """The denoiser that a classifier is exported with."""
    return tiny_network("diffusion", class_cond=False)


def export(network, guided, folder, **options):
    """Export ``network`` (a classifier: with ``guided``); the path of its graph."""
    if network.cfg.kind != "classifier":
        return export_model(network, folder, **options) / "unet.onnx"
    return export_model(guided, folder, network, **options) / "classifier_gradient.onnx"


@pytest.mark.parametrize("name", CASES)
def test_float32_and_node_counts(name, guided, tmp_path):
    kind, flags = CASES[name]
    network = tiny_network(kind, seed=3, **flags)
    path = export(network, guided, tmp_path / "out")
    assert_parity(network, path, batches=BATCHES if name in KINDS else (2,))
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True, check_custom_domain=False)
    check_nodes(network, [(n.domain, n.op_type) for n in model.graph.node])


@pytest.mark.parametrize("name", list_presets())
def test_node_counts_of_the_released_models(name):
    network = empty_module(preset(name))
    made = classifier_gradient_graph if network.cfg.kind == "classifier" else unet_graph
    graph = made(network.cfg, "float16")
    check_nodes(network, [(o.domain, o.kind) for o in graph.operations])
    used = {w for o in graph.operations for w in o.inputs if w in graph.weights}
    assert used == set(graph.weights)
    assert {split_name(w)[0] for w in used} == set(network.state_dict())


def check_nodes(network, nodes):
    """Every normalisation and attention of the module is one node of ours; nodes: (domain, op)."""
    counts = collections.Counter(op for domain, op in nodes if domain == "adm_rt")
    modules = list(network.modules())

    def of(kind):
        return sum(isinstance(module, kind) for module in modules)

    attentions = of(AttentionBlock) + of(AttentionPool2d)
    by_op = collections.Counter()
    for name, count in counts.items():
        by_op[NODES[name].op, NODES[name].options["direction"]] += count
    norms, adaptive = of(FusedGroupNorm), of(ResBlock) * network.cfg.use_scale_shift_norm
    if network.cfg.kind == "classifier":
        expected = {
            ("ada_group_norm", "forward_with_moments"): norms,
            ("ada_group_norm", "backward"): norms,
            ("qkv_attention", "forward_with_stats"): attentions,
            ("qkv_attention", "backward"): attentions,
        }
    else:
        expected = {
            ("ada_group_norm", "forward"): norms,
            ("qkv_attention", "forward"): attentions,
        }
    assert by_op == {key: count for key, count in expected.items() if count}
    modulated = sum(count for name, count in counts.items() if NODES[name].options.get("modulated"))
    assert modulated == adaptive * (2 if network.cfg.kind == "classifier" else 1)
    standard = collections.Counter(op for domain, op in nodes if not domain)
    assert not any("Normalization" in op for op in standard)
    assert standard["Softmax"] == (network.cfg.kind == "classifier")  # of the logits


@pytest.mark.parametrize("name", KINDS)
def test_float16(name, guided, tmp_path):
    kind, flags = KINDS[name]
    network = tiny_network(kind, seed=3, **flags)
    path = export(network, guided, tmp_path / "out", dtype="float16")
    assert_parity(network, path, "float16")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    types = collections.Counter(t.data_type for t in model.graph.initializer if len(t.dims) == 4)
    assert types[onnx.TensorProto.FLOAT16] >= types.total() - 4  # the last convolution, the head


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16(name, guided, tmp_path):
    """ONNX Runtime has no bfloat16 convolution: its graph is run with the type read as float32.

    So the weights are rounded, as in the file, and every cast stands where it stood.
    """
    kind, flags = KINDS[name]
    network = tiny_network(kind, seed=3, **flags)
    path = export(network, guided, tmp_path / "out", dtype="bfloat16")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    half = onnx.TensorProto.BFLOAT16
    rounded = 0
    for tensor in model.graph.initializer:
        if tensor.data_type == half:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
            rounded += 1
    casts = [a for n in model.graph.node if n.op_type == "Cast" for a in n.attribute if a.i == half]
    for attribute in casts:
        attribute.i = onnx.TensorProto.FLOAT
    assert rounded > 10 and len(casts) >= 1
    assert_parity(network, model.SerializeToString(), "float16", batches=(2,))


# ---- the checks can fail ----

WRONG = {
    "ada_group_norm_silu": ("Sigmoid (v)", "Tanh (v)"),
    "ada_group_norm_modulated_silu": ("Add (scale_4d, one)", "Add (scale_4d, shift_4d)"),
    "qkv_attention_legacy": ("-0.25", "-0.2"),
    "ada_group_norm_with_moments_silu": ("Mul (centred, rstd_g)", "Mul (xg, rstd_g)"),
    "ada_group_norm_backward_silu": ("Sub (centred_adv, along_xhat)", "Identity (centred_adv)"),
    "qkv_attention_backward_legacy": ("Sub (dp, delta)", "Identity (dp)"),
    "qkv_attention_backward_new": ("[0, 3, 1, 2, 4]", "[0, 3, 2, 1, 4]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_function_body_is_seen(name, guided, tmp_path, monkeypatch):
    backward = NODES[name].options["direction"] != "forward"
    network = tiny_network("classifier" if backward else "diffusion", seed=3)
    right, wrong = WRONG[name]
    text = functions.function_text

    def seeded(asked):
        if asked != name:
            return text(asked)
        assert text(asked).count(right) == 1
        return text(asked).replace(right, wrong)

    monkeypatch.setattr(functions, "function_text", seeded)
    path = export(network, guided, tmp_path / "out")
    with pytest.raises(AssertionError, match="batch 2"):
        assert_parity(network, path, batches=(2,))


# ---- weights by name ----


@pytest.mark.parametrize("kind", ["diffusion", "classifier"])
def test_initializers_are_found_by_name_and_refit_a_graph(kind, guided, tmp_path):
    flags = {"resblock_updown": False, "pool": "spatial"} if kind == "classifier" else {}
    first, second = (tiny_network(kind, seed=seed, **flags) for seed in (3, 4))
    model = onnx.load(export(first, guided, tmp_path / "out"))
    state = {name: tensor.numpy() for name, tensor in second.state_dict().items()}
    used = set()
    for tensor in model.graph.initializer:
        if is_weight(tensor.name):
            values = initializer(tensor.name, state)
            assert values.size == np.prod(tensor.dims, dtype=int)
            tensor.raw_data = values.tobytes()
            used.add(tensor.name)
    assert set(state) <= used  # under their own names, every one
    assert_parity(second, model.SerializeToString(), batches=(2,))


def test_a_small_gradient_needs_the_loss_scale():
    """In float16 arithmetic: torch's, for ONNX Runtime computes float16 in float32 on a CPU."""
    network = tiny_network("classifier", seed=3).requires_grad_(False)
    network.out[2].c_proj.weight.mul_(0.02)
    given = unet_inputs(network.cfg, 2)
    expected = torch_output(network, given)
    network.half()
    errors = {
        scale: np.linalg.norm(torch_output(network, given, scale) - expected)
        / np.linalg.norm(expected)
        for scale in (1.0, LOSS_SCALES["float16"])
    }
    assert errors[LOSS_SCALES["float16"]] < 1e-2 < errors[1.0], errors


@pytest.mark.parametrize("dtype", LIMITS)
def test_the_loss_scale_is_taken_out_again(dtype, guided, tmp_path):
    network = tiny_network("classifier", seed=3)
    given = unet_inputs(network.cfg, 2)
    found = []
    for scale in (1.0, 1024.0):
        path = export(network, guided, tmp_path / f"{scale}", dtype=dtype, loss_scale=scale)
        found.append(session(path).run(None, given)[0])
    error = np.abs(found[0] - found[1]).max() / np.abs(found[0]).max()
    assert error <= LIMITS[dtype]
    assert [
        sum(n.op_type == "Mul" for n in onnx.load(tmp_path / s / path.name).graph.node)
        for s in ("1.0", "1024.0")
    ] == [5, 7]
