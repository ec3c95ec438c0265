"""The CUDA benchmark of the ops, tried on the CPU: its cases compare, its rows are whole."""

import json

import pytest

from adm_rt.benchmarking import cuda_ops
from adm_rt.ops._library import extension_available

if not extension_available():
    pytest.skip("adm_rt._C is not built", allow_module_level=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contest_on_small_shapes(tmp_path, dtype):
    file = tmp_path / "rows.json"
    arguments = ["--device", "cpu", "--small", "--rounds", "1", "--dtype", dtype]
    assert cuda_ops.main([*arguments, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    found = {(row["name"], row["baseline"]) for row in rows}
    for name in ("ada_group_norm", "ada_group_norm_gradients", "guided_mean_update"):
        assert (name, "eager") in found
    for name in ("qkv_attention", "qkv_attention_gradients"):
        assert {(name, "sdpa"), (name, "eager")} <= found
    for row in rows:
        assert row["ours_ms"] > 0 and row["ratio"] > 0 and row["rate"] > 0
        assert row["rate_unit"] in ("TB/s", "TFLOP/s") and row["commit"]


def test_a_wrong_result_is_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cuda_ops.ops, "qkv_attention", lambda qkv, *_: qkv[:, : len(qkv[0]) // 3])
    arguments = ["--device", "cpu", "--small", "--rounds", "1", "--only", "qkv"]
    assert cuda_ops.main(arguments) == 1
    assert "failed: qkv_attention N=1 T=64" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(cuda_ops.torch.cuda, "is_available", lambda: False)
    assert cuda_ops.main([]) == 3
    assert "nothing was measured" in capsys.readouterr().err


def test_cases_are_of_the_sizes_that_claims_name():
    assert any(case.batch * case.channels * case.height**2 > 1e8 for case in cuda_ops.NORMS)
    assert {case.length for case in cuda_ops.ATTENTIONS} == {64, 256, 1024}
    assert any((case.batch, case.size) == (8, 256) for case in cuda_ops.UPDATES)
