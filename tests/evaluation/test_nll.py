"""Bits per dimension against a sum written out by hand, and the command around it."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_network

from adm_rt.cli import main
from adm_rt.data import glyphs
from adm_rt.diffusion import Diffusion
from adm_rt.evaluation.nll import NLL_NOISE, bits_per_dim, summary
from adm_rt.models import save_model
from adm_rt.ops.philox import image_seeds, philox_normal


def cdf(x):
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def by_hand(network, diffusion, image, label, index, clip):
    """(prior, vb [T], xstart_mse [T], mse [T]) of one image in NumPy float64."""
    betas, abar = diffusion.betas, diffusion.alphas_cumprod
    x0 = (image.astype(np.float64) / 127.5 - 1).transpose(2, 0, 1)
    seeds = image_seeds(7, 1, first=index)
    vb, xstart, mse = [], [], []
    for t in range(len(betas)):
        before = abar[t - 1] if t else 1.0
        noise = philox_normal(seeds, x0.shape, step=t, purpose=NLL_NOISE)[0].astype(np.float64)
        x_t = np.sqrt(abar[t]) * x0 + np.sqrt(1 - abar[t]) * noise
        with torch.no_grad():
            out = network(
                torch.from_numpy(x_t[None]).float(),
                torch.tensor([float(diffusion.timestep_map[t])]),
                torch.tensor([label]),
            )[0].double()
        eps, v = out[:3].numpy(), out[3:].numpy()
        clean = (x_t - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t])
        if clip:
            clean = clean.clip(-1, 1)
        c0 = np.sqrt(before) * betas[t] / (1 - abar[t])
        ct = np.sqrt(1 - betas[t]) * (1 - before) / (1 - abar[t])
        posterior = [b * (1 - p) / (1 - a) for b, a, p in zip(betas, abar, [1.0, *abar[:-1]])]
        posterior[0] = posterior[1]
        fraction = (v + 1) / 2
        log_variance = fraction * np.log(betas[t]) + (1 - fraction) * np.log(posterior[t])
        mean = c0 * clean + ct * x_t
        if t:
            true = c0 * x0 + ct * x_t
            nats = 0.5 * (
                log_variance
                - np.log(posterior[t])
                + (posterior[t] + (true - mean) ** 2) / np.exp(log_variance)
                - 1
            )
        else:
            scale = np.exp(-0.5 * log_variance)
            upper, lower = (cdf((x0 + s / 255 - mean) * scale) for s in (1, -1))
            p = np.where(x0 < -0.999, upper, np.where(x0 > 0.999, 1 - lower, upper - lower))
            nats = -np.log(np.maximum(p, 1e-12))
        vb.append(nats.mean() / math.log(2))
        xstart.append(((clean - x0) ** 2).mean())
        found = (x_t - np.sqrt(abar[t]) * clean) / np.sqrt(1 - abar[t])
        mse.append(((found - noise) ** 2).mean())
    last = abar[-1]
    prior = 0.5 * (last * x0**2 + (1 - last) - 1 - math.log(1 - last)) / math.log(2)
    return prior.mean(), np.array(vb), np.array(xstart), np.array(mse)


@pytest.mark.parametrize("clip", [True, False])
def test_the_bound_is_the_hand_written_sum(clip):
    network = tiny_network()
    diffusion = Diffusion(timestep_respacing="12")
    images, _ = glyphs(3, 16)
    labels = np.array([4, 0, 2])
    got = bits_per_dim(
        network, diffusion, images, labels, seed=7, batch_size=2, progress=False, clip_denoised=clip
    )
    for index in range(3):
        prior, vb, xstart, mse = by_hand(
            network, diffusion, images[index], labels[index], index, clip
        )
        assert got["prior_bpd"][index] == pytest.approx(prior, rel=1e-5)
        np.testing.assert_allclose(got["vb"][index], vb, rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(got["xstart_mse"][index], xstart, rtol=1e-3)
        np.testing.assert_allclose(got["mse"][index], mse, rtol=1e-3)
        assert got["total_bpd"][index] == pytest.approx(prior + vb.sum(), rel=1e-3)
    sums = got["vb"].sum(1) + got["prior_bpd"]  # the prior's term is too small for the line above
    np.testing.assert_allclose(got["total_bpd"], sums, rtol=1e-12)


def test_no_value_depends_on_the_batch_size():
    network, diffusion = tiny_network(), Diffusion(timestep_respacing="5")
    images, _ = glyphs(5, 16)
    first, second = (
        bits_per_dim(network, diffusion, images, [1] * 5, batch_size=size, progress=False)
        for size in (5, 2)
    )
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-4, atol=1e-6)


def test_an_upsampler_is_given_its_low_resolution_image():
    network, diffusion = tiny_network("upsampler"), Diffusion(timestep_respacing="3")
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    images, _ = glyphs(2, 32)
    got = bits_per_dim(network, diffusion, images, [0, 1], progress=False)
    assert got["vb"].shape == (2, 3) and np.isfinite(got["total_bpd"]).all()
    area = images.reshape(2, 16, 2, 16, 2, 3).mean((2, 4)) / 127.5 - 1
    np.testing.assert_allclose(seen[0].permute(0, 2, 3, 1), area, atol=1e-6)


def test_bad_input_is_named():
    network, diffusion = tiny_network(), Diffusion(timestep_respacing="2")
    images, _ = glyphs(2, 16)
    with pytest.raises(ValueError, match=r"labels\[1\]=5 is not a class of the model, 0 to 4"):
        bits_per_dim(network, diffusion, images, [0, 5], progress=False)
    with pytest.raises(ValueError, match="labels: the model is class-conditional"):
        bits_per_dim(network, diffusion, images, progress=False)
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, 16, 16, 3\]"):
        bits_per_dim(network, diffusion, images[:, :8], [0, 1], progress=False)
    with pytest.raises(ValueError, match="model is a classifier"):
        bits_per_dim(tiny_network("classifier"), diffusion, images, progress=False)


def test_summary_of_one_image_has_no_error_bar():
    values = {"total_bpd": np.ones(1), "prior_bpd": np.zeros(1)}
    values |= {name: np.full((1, 2), 0.5) for name in ("vb", "xstart_mse", "mse")}
    row = json.loads(json.dumps(summary(values)))
    assert row["bits_per_dim"] == 1 and row["bits_per_dim_stderr"] is None
    assert row["vb"] == [0.5, 0.5]


# ---- the command ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("nll") / "model", tiny_network())


def test_the_command_writes_what_it_says(folder, tmp_path, capsys):
    images, _ = glyphs(3, 16)
    np.savez(tmp_path / "set.npz", images, np.array([4, 0, 2]))
    json_file = tmp_path / "nll.json"
    command = ["evaluate", "nll", str(folder), "--data", str(tmp_path / "set.npz"), "--seed", "7"]
    command += ["--timestep-respacing", "4", "--json", str(json_file), "--batch_size", "2"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    record = json.loads(json_file.read_text())
    diffusion = Diffusion(timestep_respacing="4")
    expected = bits_per_dim(
        tiny_network(), diffusion, images, [4, 0, 2], seed=7, batch_size=2, progress=False
    )
    assert record["bits_per_dim"] == pytest.approx(expected["total_bpd"].mean(), rel=1e-6)
    assert record["vb"] == pytest.approx(expected["vb"].mean(0).tolist(), rel=1e-6)
    assert record["num_images"] == 3 and record["timesteps"] == [0, 333, 666, 999]
    assert f"{record['bits_per_dim']:.4f} bits per dim" in out and "12/12" in err
    assert [p.name for p in tmp_path.iterdir() if "nll" in p.name] == ["nll.json"]
    assert main([*command, "--quiet", "--clip_denoised", "False", "--num_samples", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and json.loads(json_file.read_text())["num_images"] == 1


def test_a_folder_may_lack_some_of_the_models_classes(tmp_path, monkeypatch):
    model = save_model(tmp_path / "model", tiny_network(), class_names=list("abcde"))
    for name in "eb":
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "set" / name / "0.png")
    seen = []

    def noted(network, diffusion, images, labels, **options):
        seen.extend(labels)
        return bits_per_dim(network, diffusion, images, labels, **options)

    monkeypatch.setattr("adm_rt.evaluation.nll.bits_per_dim", noted)
    command = ["evaluate", "nll", str(model), "--data", str(tmp_path / "set"), "--steps", "2"]
    assert main([*command, "--quiet"]) == 0
    assert seen == [1, 4]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("MODEL --data glyphs", "num_classes=5"),  # glyphs have 36
        ("MODEL --data nowhere", "data='nowhere'"),
        ("MODEL --data digits --num-samples 0", "num_samples=0"),
        ("MODEL --data digits --json nowhere/x.json", "--json nowhere/x.json"),
        ("MODEL --data glyphs --json /", "--json /: this is a folder"),
        ("MODEL --data digits --timestep-respacing ddim37", "ddim37"),
        ("glyphs32_classifier --data glyphs", "is a classifier"),
    ],
)
def test_the_commands_errors(folder, flags, said, capsys):
    command = ["evaluate", "nll", *(str(folder) if p == "MODEL" else p for p in flags.split())]
    assert main(command) == 1
    assert said in capsys.readouterr().err
