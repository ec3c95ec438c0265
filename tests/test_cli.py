"""The command ``adm-rt``: what it writes, its aliases, its report, its exit codes."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_network

import adm_rt
from adm_rt import SampleResult
from adm_rt.cli import COMMANDS, build_parser, main
from adm_rt.commands.info import build_report
from adm_rt.commands.sample import default_outputs, parse_classes, sample_arguments
from adm_rt.models import save_model
from adm_rt.models.checkpoint import convert, read_info


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(*arguments):
    return build_parser("sample").parse_args(["sample", *arguments])


# ---- sample ----


def test_ctrl_c_between_two_files_says_which_is_there(tiny_folder, workplace, capsys, monkeypatch):
    real = SampleResult.save

    def save(self, path):
        if str(path).endswith(".npz"):
            raise KeyboardInterrupt
        return real(self, path)

    monkeypatch.setattr(SampleResult, "save", save)
    assert main(["sample", "--model", str(tiny_folder), "-n", "2", "--steps", "2"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "adm-rt: interrupted; written: samples/tiny_steps2_seed0.png"
    assert os.listdir("samples") == ["tiny_steps2_seed0.png"]


def default_stem(*arguments):
    args = parse(*arguments)
    return default_outputs(args, sample_arguments(args))[0].stem


def test_default_names_differ_where_the_images_do():
    runs = (
        "",
        "--classes A",
        "--classes A,B",
        "--classes a,b",
        "--classes 1,-2",
        f"--classes {','.join('ABCDEFGHIJKLMNOPQRSTUVWXYZ')}",
        f"--classes {','.join('ABCDEFGHIJKLMNOPQRSTUVWXYA')}",
        "--seed 1",
        "--seeds 1,2",
        "--seeds 1,3",
        "--steps 10",
        "--steps 90,60,60,20,20",
        "--sampler ddim",
        "--sampler ddim --eta 0.5",
        "--guidance-scale 0",
        "--guidance-interval all",
        "--guidance-interval 0,500",
        "--guidance-every 2",
        "--cfg-scale 1.5",
        "--thresholding dynamic",
        "--upsampler glyphs64_upsampler",
        "--upsampler glyphs64_upsampler --upsampler-steps 5",
        "--upsampler glyphs64_upsampler --upsampler-sampler ddim",
    )
    stems = [default_stem(*run.split()) for run in runs]
    assert stems[0] == "glyphs32_steps25_seed0" and stems[2] == "glyphs32_steps25_classA-B_seed0"
    assert len(set(stems)) == len(runs)
    for stem in stems:
        assert len(stem) < 120 and re.fullmatch(r"[A-Za-z0-9_.-]+", stem), stem
    assert default_stem("--classes", "é/x").startswith("glyphs32_steps25_class-")


def test_sample_writes_a_grid_and_an_npz_and_says_where(tiny_folder, workplace, capsys):
    command = ["sample", "--model", str(tiny_folder), "-n", "4", "--steps", "2", "--classes", "A,C"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    names = ["tiny_steps2_classA-C_seed0.npz", "tiny_steps2_classA-C_seed0.png"]
    assert sorted(os.listdir("samples")) == names
    for name in names:
        assert f"samples/{name}" in out
    assert "4 images in" in out and "sampling: 100%" in err
    result = SampleResult.load(f"samples/{names[0]}")
    assert result.images.shape == (4, 16, 16, 3) and result.labels.tolist() == [0, 2, 0, 2]
    assert result.metadata["guidance_scale"] == 2.0 and len(result.metadata["timesteps"]) == 2
    with Image.open(f"samples/{names[1]}") as image:
        assert image.size == (38, 38)
    again = SampleResult.load(f"samples/{names[0]}")
    assert main([*command, "--quiet", "-o", "again.npz"]) == 0
    assert capsys.readouterr().err == ""
    assert np.array_equal(SampleResult.load("again.npz").images, again.images)


def test_guided_diffusions_command_line(tiny_folder, workplace, capsys):
    """classifier_sample.py's flags, as its README writes them."""
    code = main(
        f"sample --model_path {tiny_folder} --classifier_path {tiny_folder}/classifier "
        "--classifier_scale 1.5 --timestep_respacing ddim4 --use_ddim True --num_samples 3 "
        "--batch_size 2 --clip_denoised False --output x.npz --quiet".split()
    )
    assert code == 0, capsys.readouterr().err
    told = SampleResult.load("x.npz").metadata
    expected = {
        "guidance_scale": 1.5,
        "steps": "ddim4",
        "sampler": "ddim",
        "thresholding": "none",
        "batch_size": 2,
        "timesteps": [750.0, 500.0, 250.0, 0.0],
    }
    assert {k: told[k] for k in expected} == expected


def test_structure_flags_describe_a_pt(workplace, capsys):
    import torch

    torch.save(tiny_network().state_dict(), "model.pt")
    flags = (
        "--image_size 16 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 "
        "--attention_resolutions 8 --num_head_channels 32 --class_cond True --learn_sigma True "
        "--num_classes 5 --resblock_updown True --use_new_attention_order False --num_heads 4 "
        "--noise_schedule linear --rescale_timesteps False --diffusion_steps 1000 --use_fp16 True"
    ).split()
    command = ["sample", "--model", "model.pt", "-n", "2", "--steps", "2", "-o", "x.npz"]
    assert main([*command, *flags]) == 0
    assert "note: the model asks for use_fp16; float32 is used" in capsys.readouterr().err
    network = adm_rt.Pipeline(tiny_network())(2, steps=2, progress=False)
    assert np.array_equal(SampleResult.load("x.npz").images, network.images)
    wrong = ["64" if f == "32" else f for f in flags]
    assert main([*command[:-1], "y.npz", *wrong]) == 1
    assert "num_channels" in capsys.readouterr().err and not os.path.exists("y.npz")


def test_image_size_is_also_the_classifiers(workplace, capsys):
    """A pool without positions does not tell it, and guided-diffusion has one flag for both."""
    network = tiny_network("classifier", pool="adaptive", num_head_channels=64, channel_mult="1,2")
    torch.save(network.state_dict(), "guide.pt")
    torch.save(tiny_network().state_dict(), "model.pt")
    command = (
        "sample --model model.pt --classifier guide.pt -n 1 --steps 1 --num_head_channels 32 "
        "--use_new_attention_order False --noise_schedule linear --rescale_timesteps False -o x.npz"
    ).split()
    assert main([*command, "--image_size", "16"]) == 0, capsys.readouterr().err


def test_warnings_are_one_line(tiny_folder, workplace, capsys):
    command = f"sample --model {tiny_folder} -n 1 --steps 2,1 --sampler unipc -o x.npz --quiet"
    assert main(command.split()) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("adm-rt: warning: steps='2,1': 'unipc' spaces its 3 steps evenly")


def test_aliases_that_disagree():
    with pytest.raises(ValueError, match="--use_ddim True and --sampler unipc disagree"):
        sample_arguments(parse("--use_ddim", "True", "--sampler", "unipc"))
    with pytest.raises(ValueError, match="--clip_denoised False and --thresholding static"):
        sample_arguments(parse("--clip_denoised", "False", "--thresholding", "static"))
    both = parse("--clip_denoised", "True", "--thresholding", "dynamic", "--use_ddim", "no")
    assert sample_arguments(both)["thresholding"] == "dynamic"
    assert sample_arguments(both)["sampler"] == "ddpm"


@pytest.mark.parametrize(
    ("text", "steps"), [("25", 25), ("ddim25", "ddim25"), ("90,60,60,20,20",) * 2, ("", "")]
)
def test_steps_may_be_respacing_strings(text, steps):
    assert sample_arguments(parse("--timestep_respacing", text))["steps"] == steps


def test_classes_by_name_before_index():
    assert parse_classes("B, 1,-1,no", ["1", "B"]) == ["B", "1", -1, "no"]
    assert parse_classes("3,4", None) == [3, 4]
    assert parse_classes("3", None) == 3 and parse_classes("B", ["A", "B"]) == "B"


@pytest.mark.parametrize(
    ("flags", "labels"),
    [
        ("--classes B,D", [1, 3]),
        ("--classes E", [4] * 16),
        ("--classes A,B -n 3", [0, 1, 0]),
        ("--seeds 1,2,3 --classes 2", [2, 2, 2]),
    ],
)
def test_how_many_images(tiny_folder, workplace, flags, labels):
    command = f"sample --model {tiny_folder} --steps 1 --guidance-scale 0 -o x.npz --quiet {flags}"
    assert main(command.split()) == 0
    assert SampleResult.load("x.npz").labels.tolist() == labels


def test_lists_of_numbers():
    args = sample_arguments(parse("--seeds", "5,4294967297", "--guidance-interval", "100,900.5"))
    assert args["seeds"] == [5, 4294967297] and args["guidance_interval"] == [100.0, 900.5]
    assert sample_arguments(parse())["guidance_interval"] == "auto"
    assert sample_arguments(parse("--guidance-interval", "all"))["guidance_interval"] is None
    with pytest.raises(ValueError, match="--seeds '1;2': numbers separated by commas"):
        sample_arguments(parse("--seeds", "1;2"))


def test_folder_output_names_seed_and_class(tiny_folder, workplace, capsys):
    command = f"sample --model {tiny_folder} --seeds 7,9 --classes E --steps 1 -o out --quiet"
    assert main(command.split()) == 0
    names = ["00000_seed7_class4.png", "00001_seed9_class4.png", "metadata.json"]
    assert sorted(os.listdir("out")) == names
    assert main(command.split()) == 1
    assert "not empty" in capsys.readouterr().err


# ---- upscale ----


def test_sample_then_upscale_is_the_stack(tiny_folder, tiny_upsampler_folder, workplace, capsys):
    base = f"sample --model {tiny_folder} -n 3 --steps 2 --seed 3 --quiet"
    assert main(f"{base} -o base.npz".split()) == 0
    assert main(f"{base} --upsampler {tiny_upsampler_folder} -o stack.npz".split()) == 0
    up = f"upscale --model {tiny_upsampler_folder} --input base.npz --steps 2 --quiet"
    assert main(up.split()) == 0
    assert sorted(os.listdir("samples")) == ["base_upscaled.npz", "base_upscaled.png"]
    ours, stack = (SampleResult.load(p) for p in ("samples/base_upscaled.npz", "stack.npz"))
    assert ours.images.shape == (3, 32, 32, 3)
    assert np.array_equal(ours.images, stack.images) and np.array_equal(ours.labels, stack.labels)
    assert main(f"{up} --base_samples base.npz -n 1 --seed 8 -o one.npz".split()) == 0
    one = SampleResult.load("one.npz")
    assert len(one) == 1 and not np.array_equal(one.images[0], stack.images[0])


def test_upscale_errors(tiny_folder, tiny_upsampler_folder, workplace, capsys):
    np.savez("plain.npz", np.zeros((2, 16, 16, 3), np.uint8))
    for arguments, message in [
        (f"--model {tiny_upsampler_folder} --input nothing.npz", "nothing.npz: cannot be read"),
        (f"--model {tiny_upsampler_folder} --input plain.npz", "labels are missing"),
        (f"--model {tiny_folder} --input plain.npz", "tiny has no upsampler"),
    ]:
        assert main(["upscale", *arguments.split()]) == 1
        assert message in capsys.readouterr().err
    assert os.listdir() == ["plain.npz"]
    assert (
        main(
            f"upscale --model {tiny_upsampler_folder} --input plain.npz --classes 1,2 "
            "--steps 1 -o x.npz --quiet".split()
        )
        == 0
    )


# ---- convert ----


def test_convert_both_ways(tiny_folder, workplace, capsys):
    assert main(["convert", str(tiny_folder), "half", "--dtype", "float16"]) == 0
    assert "-> half" in capsys.readouterr().out
    assert main(["convert", str(tiny_folder), "model.pt"]) == 0
    flags = "--image_size 16 --num_heads 4 --noise_schedule linear --rescale_timesteps False "
    flags += "--num_head_channels 32 --use_new_attention_order False --num_classes 5"
    assert main(["convert", "model.pt", "back", *flags.split()]) == 0, capsys.readouterr().err
    loaded = adm_rt.load("back")
    run = {"num_images": 2, "steps": 2, "guidance_scale": 0, "progress": False}
    assert np.array_equal(loaded(**run).images, adm_rt.load(tiny_folder)(**run).images)
    assert os.path.getsize("half/model.safetensors") < 0.6 * os.path.getsize(
        "back/model.safetensors"
    )
    capsys.readouterr()
    assert main(["convert", str(tiny_folder), "half"]) == 1
    assert "half" in capsys.readouterr().err


# ---- info ----


def test_convert_takes_the_parts_of_a_pipeline_along(tiny_folder, workplace, capsys):
    assert main(["convert", str(tiny_folder), "copy", "--dtype", "float16"]) == 0
    assert sorted(os.listdir("copy")) == sorted(os.listdir(tiny_folder))
    for folder in ("copy", "copy/classifier"):
        assert read_info(folder).dtype == "float16"
    pipeline = adm_rt.load("copy")
    assert pipeline.classifier is not None
    assert len(pipeline(1, steps=1, guidance_scale=1.0, progress=False)) == 1
    convert(tiny_folder, "copy", overwrite=True)
    assert read_info("copy/classifier").dtype == "float32"
    assert os.listdir() == ["copy"]


def test_convert_follows_no_part_out_of_the_folder(tiny_folder, workplace):
    save_model("a/guide", tiny_network("classifier"))
    save_model("a/model", tiny_network(), metadata={"classifier": "../guide"})
    convert("a/model", "b/model")
    assert os.listdir("b") == ["model"] and "guide" not in os.listdir("b/model")


def test_info_has_every_section_and_passes_its_self_test(capsys):
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    sections = (
        "adm_rt system build cpu_kernels torch cuda engines packed_weights zoo dependencies "
        "environment self_test"
    )
    assert list(report) == sections.split()
    assert report["adm_rt"]["version"] == adm_rt.__version__
    assert report["engines"]["auto"] == "native" and report["engines"]["why"]
    assert report["self_test"]["passed"] is True
    assert 0 < report["self_test"]["max_error"] < 1e-4
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for line in ("engines:", "  auto: native", "self_test:", "  passed: True"):
        assert line in text.splitlines()


BROKEN = {
    "no kernels": "sys.modules['adm_rt._C'] = None",
    "no torch": "sys.modules['torch'] = None",
    "no numpy": "sys.modules['numpy'] = None",
    "no safetensors": "sys.modules['safetensors'] = None",
    "no /proc": "import builtins; real = open\n"
    "builtins.open = lambda p, *a, **k: (_ for _ in ()).throw(FileNotFoundError(p)) "
    "if str(p).startswith('/proc') else real(p, *a, **k)",
    "odd kernels": "import types; sys.modules['adm_rt._C'] = types.ModuleType('adm_rt._C')",
    "bad isa": "import os; os.environ['ADM_RT_CPU_ISA'] = 'mmx'",
}


@pytest.mark.parametrize("how", BROKEN)
def test_info_reports_whatever_is_broken(how, tmp_path):
    program = f"import sys\n{BROKEN[how]}\nfrom adm_rt.cli import main\n"
    program += "sys.exit(main(['info', '--json']))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": "/nonexistent"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report) == 12 and report["adm_rt"]["version"] == adm_rt.__version__
    if how == "no torch":
        assert "torch" in report["torch"]["error"] and "torch" in report["self_test"]["error"]
    if how == "no kernels":
        assert "error" in report["cpu_kernels"] and "error" in report["self_test"]


def test_a_wrong_kernel_fails_the_self_test(monkeypatch):
    from adm_rt.engines.native_engine import NativeEngine

    right = NativeEngine.classifier_gradient
    monkeypatch.setattr(
        NativeEngine,
        "classifier_gradient",
        lambda *arguments: right(*arguments) * 1.5,
    )
    test = build_report()["self_test"]
    assert test["passed"] is False and test["max_error"] > test["limit"]


def test_info_about_a_model(tiny_folder, capsys):
    assert main(["info", str(tiny_folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    network = tiny_network()
    assert report["parameters"] == sum(p.numel() for p in network.parameters())
    assert report["keys"] == len(network.state_dict())
    assert report["config"]["image_size"] == 16
    assert report["default_settings"]["guidance_scale"] == 2.0
    assert report["torch_engine_activations_per_image_MB_estimate"]["forward"] > 0
    assert min(report["native_engine_memory_MB"].values()) > 0


def test_info_about_a_preset_without_weights(capsys):
    assert main(["info", "256x256_diffusion", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["parameters"], report["keys"]) == (553_838_086, 567)
    assert "not here" in report["weights"]
    assert report["published_settings"]["ddim_guidance_scale"] == 2.5
    assert main(["info", "256x256_diffusoin"]) == 1
    assert "256x256_diffusion" in capsys.readouterr().err


# ---- the frame ----


def test_usage_errors_exit_with_2(capsys):
    for arguments in (
        [],
        ["paint"],
        ["sample", "--paint"],
        ["sample", "--num-images", "many"],
        ["sample", "--use_ddim", "perhaps"],
        ["upscale"],
        ["convert", "one"],
        ["sample", "--classifier_width", "wide"],
        ["train", "diffusion", "--out", "x", "--iterations", "1", "--export-dtype", "int8"],
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("adm-rt") and "error: " in line and line.endswith("--help)")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--output", ""], "output '': the path is empty"),
        (["--classes", "\N{SUPERSCRIPT TWO}"], "is not a class of tiny"),
        (["--threads", "100000"], r"threads=100000 is out of range; allowed: 1\.\.1024"),
        (["--classifier_width", "64"], "flag classifier_width=64 disagrees"),
        (["--guidance-interval", "5"], "--guidance-interval '5': LOW,HIGH is needed, or all"),
    ],
)
def test_odd_values_are_named_and_nothing_is_written(tiny_folder, workplace, capsys, flags, says):
    threads = torch.get_num_threads()
    assert main(["sample", "--model", str(tiny_folder), "--steps", "1", "-n", "1", *flags]) == 1
    assert re.search(says, capsys.readouterr().err)
    assert os.listdir(workplace) == [] and torch.get_num_threads() == threads


def test_convert_to_a_name_that_would_mislead(tiny_folder, workplace, capsys):
    for name in ("x.safetensors", "", "x.ckpt"):
        assert main(["convert", str(tiny_folder), name]) == 1
        assert "give a new folder, or a name that ends in .pt" in capsys.readouterr().err
    assert os.listdir(workplace) == []


def test_upscaling_more_images_than_there_are(tiny_upsampler_folder, workplace, capsys):
    np.savez("base.npz", arr_0=np.zeros((2, 16, 16, 3), np.uint8), arr_1=[0, 1])
    command = ["upscale", "--model", str(tiny_upsampler_folder), "--input", "base.npz"]
    assert main([*command, "-n", "3"]) == 1
    assert "num_images=3 is out of range; allowed: 1..2" in capsys.readouterr().err
    assert main([*command, "--classes", "1,2,3"]) == 1
    assert "labels holds 3 classes for num_images=2" in capsys.readouterr().err
    assert os.listdir(workplace) == ["base.npz"]


def test_help_and_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"adm-rt {adm_rt.__version__}"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert name in text
    for name in ("sample", "upscale", "info", "convert", "export"):
        assert main([name, "--help"]) == 0
        usage, *rest = capsys.readouterr().out.splitlines()
        assert f"adm-rt {name}" in usage and not rest[0]  # one line, not a screen of flags


def test_a_command_that_is_missing_says_so(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "fly", ("adm_rt.flying", "-"))
    assert main(["fly"]) == 1
    assert capsys.readouterr().err == "adm-rt: error: adm-rt fly is not in this build yet\n"


def test_no_traceback_unless_asked_for(monkeypatch, capsys):
    assert main(["info", "nothing_here"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("adm-rt: error: model='nothing_here'") and err.count("\n") == 1
    monkeypatch.setenv("ADM_RT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="nothing_here"):
        main(["info", "nothing_here"])


def test_importing_is_light():
    """Neither the package nor the command line imports torch before it is needed."""
    program = (
        "import sys, adm_rt, adm_rt.cli, adm_rt.models, adm_rt.diffusion, adm_rt.ops\n"
        "adm_rt.__version__, adm_rt.models.preset('64x64_diffusion'), adm_rt.SampleResult\n"
        "adm_rt.Pipeline, adm_rt.sample\n"
        "heavy = {'torch', 'PIL', 'tqdm', 'adm_rt._C', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import adm_rt"], capture_output=True, text=True
    )
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "adm_rt" in imported and not imported & {"numpy", "torch"}


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "adm_rt", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"adm-rt {adm_rt.__version__}"
