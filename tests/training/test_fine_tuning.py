"""Fine-tuning: released weights or a folder, other classes, everything else kept."""

import pytest
import torch
from tiny_models import tiny_network

from adm_rt.errors import CheckpointError
from adm_rt.models import load_model, save_model
from adm_rt.training import train
from adm_rt.training.fine_tuning import read_initial, with_classes

TIME = torch.tensor([10.0, 500.0])


@pytest.fixture
def noisy():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_another_number_of_classes(noisy):
    old = tiny_network()  # five classes
    expected = {name: value.clone() for name, value in old.state_dict().items()}
    new, remarks = with_classes(old, True, 3)
    assert new.cfg == old.cfg.replace(num_classes=3)
    assert remarks == ["label_emb is new: 3 rows (it had 5)"]
    for name, value in new.state_dict().items():
        if name == "label_emb.weight":
            torch.testing.assert_close(value, expected[name].mean(0).expand(3, -1))
        else:
            assert torch.equal(value, expected[name]), name
    assert all(p.requires_grad for p in new.parameters()) and new.training


def test_the_same_classes_change_nothing():
    old = tiny_network()
    assert with_classes(old, True, 5) == (old, [])


def test_classes_for_an_unconditional_model_leave_its_output(noisy):
    old = tiny_network(class_cond=False)
    new, remarks = with_classes(old, True, 4)
    assert remarks == ["label_emb is new: 4 rows (it had none)"]
    with torch.no_grad():
        assert torch.equal(new.eval()(noisy, TIME, torch.tensor([0, 3])), old(noisy, TIME))


def test_a_null_class_is_added_and_stays(noisy):
    old = tiny_network().label_emb.weight.detach()
    new, remarks = with_classes(tiny_network(), True, 5, null_class=True)
    assert new.cfg.null_class and remarks == ["label_emb has a new row, the null class (5)"]
    torch.testing.assert_close(new.label_emb.weight, torch.cat([old, old.mean(0, True)]))
    again, remarks = with_classes(new, True, 5)
    assert again is new and not remarks


def test_a_null_class_does_not_take_the_row_of_a_lost_class():
    """Five classes, and four with a null class: as many rows."""
    old = tiny_network().label_emb.weight.detach()
    new, remarks = with_classes(tiny_network(), True, 4, null_class=True)
    assert remarks == ["label_emb is new: 5 rows (it had 5)"]
    torch.testing.assert_close(new.label_emb.weight.detach(), old.mean(0).expand(5, -1))


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_a_classifiers_last_layer(noisy, pool):
    old = tiny_network("classifier", pool=pool)
    expected = old.state_dict()
    torch.manual_seed(1)
    new, remarks = with_classes(old, False, 7)
    assert remarks == ["the last layer is new: 7 classes (it had 5)"]
    changed = [n for n, v in new.state_dict().items() if v.shape != expected[n].shape]
    assert {name.rsplit(".", 1)[1] for name in changed} == {"weight", "bias"} and len(changed) == 2
    for name, value in new.state_dict().items():
        assert name in changed or torch.equal(value, expected[name]), name
    with torch.no_grad():
        assert new.eval()(noisy, TIME).shape == (2, 7)


def test_released_weights_start_a_run_with_fewer_classes(tmp_path):
    """A .pt as released (a plain state_dict), fine-tuned on data of other classes."""
    network = tiny_network(use_new_attention_order=True)
    torch.save(network.state_dict(), tmp_path / "released.pt")
    flags = {
        "image_size": 16,
        "num_head_channels": 32,
        "use_new_attention_order": True,
        "noise_schedule": "linear",
        "rescale_timesteps": False,
        "learn_sigma": True,
    }
    told = []
    final = train(
        "diffusion",
        "digits",
        iterations=2,
        out=tmp_path / "run",
        init=tmp_path / "released.pt",
        lr=1e-6,
        batch_size=2,
        device="cpu",
        export_dtype="float32",
        dropout=0.3,  # may be changed
        sample_interval=0,
        progress=False,
        callback=lambda step, values: told.append(values["loss"]),
        **flags,
    )
    tuned = load_model(final)
    assert tuned.cfg.num_classes == 10 and tuned.cfg.dropout == 0.3
    assert tuned.info.class_names == tuple("0123456789") and len(told) == 2
    before, after = network.state_dict(), tuned.state_dict()
    for name in before:
        if name != "label_emb.weight":
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-4)
    moved = [name for name in before if not torch.equal(after[name], before[name])]
    assert len(moved) > len(before) / 2


def test_what_does_not_fit_is_refused(tmp_path):
    folder = save_model(tmp_path / "model", tiny_network())
    with pytest.raises(CheckpointError, match="num_channels=64.*disagrees"):
        read_initial(folder, "diffusion", num_channels=64)
    with pytest.raises(ValueError, match="of kind 'diffusion'; a classifier"):
        read_initial(folder, "classifier")
    with pytest.raises(ValueError, match="init='nothing'"):
        read_initial("nothing", "diffusion")
    with pytest.raises(ValueError, match="class-conditional .5 classes."):
        with_classes(tiny_network(), False, None)


def test_the_plan_says_what_is_new(tmp_path, capsys):
    folder = save_model(tmp_path / "model", tiny_network("classifier"))
    train(
        "classifier",
        "digits",
        iterations=1,
        out=tmp_path / "run",
        init=folder,
        batch_size=2,
        device="cpu",
    )
    text = capsys.readouterr().out
    assert f"init: {folder}" in text and "the last layer is new: 10 classes (it had 5)" in text
