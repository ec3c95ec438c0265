"""Engine files: what is loaded, what is built again, what is refused. No TensorRT is needed."""

import multiprocessing
import os
import stat
import time

import pytest

from adm_rt.engines.tensorrt_cache import EngineCache, ForeignEngineError, default_folder, key_of

FACTS = {"network": "unet", "weights": "a" * 64, "gpu": "NVIDIA H200 sm_90", "dtype": "float16"}
PLAN = bytes(range(256)) * 40


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "tensorrt")


def never():
    raise AssertionError("built although the engine was there")


def test_an_engine_is_built_once_and_kept_for_its_owner_alone(cache):
    assert cache.get(FACTS) is None
    assert cache.get_or_build(FACTS, lambda: PLAN) == PLAN
    assert EngineCache(cache.folder).get_or_build(FACTS, never) == PLAN
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(cache.path(FACTS).stat().st_mode) == 0o600
    assert not [p for p in cache.folder.iterdir() if p.suffix not in (".engine", ".lock")]


@pytest.mark.parametrize("name", FACTS)
def test_every_fact_decides_which_engine_it_is(cache, name):
    cache.put(FACTS, PLAN)
    other = {**FACTS, name: "other"}
    assert key_of(other) != key_of(FACTS)
    assert cache.get(other) is None


def test_a_file_with_the_name_of_one_engine_and_the_facts_of_another_is_not_used(cache):
    cache.put(FACTS, PLAN)
    other = {**FACTS, "gpu": "NVIDIA L4 sm_89"}
    cache.path(FACTS).rename(cache.path(other))
    assert cache.get(other) is None


def damage(path, how):
    data = path.read_bytes()
    if how == "truncated":
        data = data[:-1]
    elif how == "longer":
        data += b"x"
    elif how == "flipped":
        data = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    elif how == "header":
        data = data.replace(b'"sha256"', b'"sha257"')
    elif how == "magic":
        data = b"x" + data[1:]
    else:
        data = b""
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "longer", "flipped", "header", "magic", "empty"])
def test_a_damaged_file_is_built_again_and_noted(cache, how):
    cache.put(FACTS, PLAN)
    damage(cache.path(FACTS), how)
    assert cache.get_or_build(FACTS, lambda: b"new") == b"new"
    assert cache.get_or_build(FACTS, never) == b"new"
    assert "is not used and made again" in cache.notes[0]


@pytest.mark.parametrize("how", ["writable", "link"])
def test_a_file_that_somebody_else_could_have_made_is_not_loaded(cache, how, tmp_path):
    cache.put(FACTS, PLAN)
    path = cache.path(FACTS)
    if how == "writable":
        path.chmod(0o666)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    assert cache.get(FACTS) is None
    assert cache.get_or_build(FACTS, lambda: b"new") == b"new"


def test_a_folder_that_others_may_write_to_is_refused(cache):
    cache.put(FACTS, PLAN)
    cache.folder.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write to it .*0777.*ADM_RT_CACHE"):
        cache.get(FACTS)
    cache.folder.chmod(0o755)
    assert cache.get(FACTS) == PLAN
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


def test_a_link_in_the_folders_place_is_refused(cache, tmp_path):
    (tmp_path / "other").mkdir()
    cache.folder.symlink_to(tmp_path / "other")
    with pytest.raises(PermissionError, match="link"):
        cache.get_or_build(FACTS, never)


def test_a_folder_that_cannot_be_written_is_an_error_before_the_build():
    cache = EngineCache("/proc/adm_rt/tensorrt")
    with pytest.raises(OSError, match="/proc/adm_rt/tensorrt cannot be written.*ADM_RT_CACHE"):
        cache.get_or_build(FACTS, never)


def test_a_read_only_folder_still_gives_the_engines_it_has(cache, monkeypatch):
    cache.put(FACTS, PLAN)

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("adm_rt.engines.tensorrt_cache.tempfile.mkstemp", refuse)
    assert cache.get_or_build(FACTS, never) == PLAN
    with pytest.raises(OSError, match="Read-only file system"):
        cache.get_or_build({**FACTS, "dtype": "float32"}, never)


def test_without_a_folder_nothing_is_kept(monkeypatch):
    monkeypatch.setenv("ADM_RT_CACHE", "off")
    assert default_folder() is None
    cache = EngineCache(default_folder())
    assert cache.get_or_build(FACTS, lambda: PLAN) == PLAN
    assert cache.get(FACTS) is None
    assert cache.timing_cache("x") == b""
    cache.put_timing_cache("x", b"times")


def test_a_failed_build_leaves_nothing_behind(cache):
    with pytest.raises(RuntimeError, match="no memory"):
        cache.get_or_build(FACTS, lambda: (_ for _ in ()).throw(RuntimeError("no memory")))
    assert [p.suffix for p in cache.folder.iterdir()] == [".lock"]
    assert cache.get_or_build(FACTS, lambda: PLAN) == PLAN  # the lock was let go


def test_a_full_disk_does_not_cost_the_finished_build(cache, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adm_rt.engines.tensorrt_cache._write_aside", refuse)
    assert cache.get_or_build(FACTS, lambda: PLAN) == PLAN
    assert "No space left" in cache.notes[0]


def _slow_build(folder, started, results):
    def build():
        started.set()
        time.sleep(0.3)
        return b"by %d" % os.getpid()

    cache = EngineCache(folder)
    waited = []
    plan = cache.get_or_build(FACTS, build, lambda: waited.append(1))
    results.put((os.getpid(), plan, len(waited)))


def test_of_concurrent_builders_one_builds_and_the_others_wait(cache):
    context = multiprocessing.get_context("fork")
    started, results = context.Event(), context.Queue()
    builders = [
        context.Process(target=_slow_build, args=(cache.folder, started, results)) for _ in range(3)
    ]
    builders[0].start()
    assert started.wait(10)
    for builder in builders[1:]:
        builder.start()
    found = [results.get(timeout=20) for _ in builders]
    for builder in builders:
        builder.join(10)
    first = builders[0].pid
    assert {plan for _, plan, _ in found} == {b"by %d" % first}
    assert {pid: waited for pid, _, waited in found} == {
        builder.pid: int(builder.pid != first) for builder in builders
    }


def test_a_builder_that_dies_lets_the_next_one_build(cache):
    def die():
        os._exit(1)

    context = multiprocessing.get_context("fork")
    builder = context.Process(target=cache.get_or_build, args=(FACTS, die))
    builder.start()
    builder.join(10)
    assert builder.exitcode == 1
    assert cache.get_or_build(FACTS, lambda: PLAN) == PLAN


# ---- files from elsewhere ----


@pytest.fixture
def foreign(tmp_path):
    other = EngineCache(tmp_path / "other machine")
    other.put(FACTS, PLAN)
    return other.path(FACTS)


def test_a_foreign_engine_needs_trust(cache, foreign):
    with pytest.raises(ForeignEngineError, match="executable code: pass trust=True"):
        cache.adopt(foreign, FACTS)
    assert not cache.folder.exists()
    cache.adopt(foreign, FACTS, trust=True)
    assert cache.get_or_build(FACTS, never) == PLAN


@pytest.mark.parametrize("name", FACTS)
def test_a_foreign_engine_for_something_else_is_refused_by_name(cache, foreign, name):
    with pytest.raises(ValueError, match=f"{name}=.*adm-rt build-engine"):
        cache.adopt(foreign, {**FACTS, name: "other"}, trust=True)


def test_a_damaged_or_alien_file_is_not_adopted(cache, foreign, tmp_path):
    plain = tmp_path / "plan"
    plain.write_bytes(PLAN)
    with pytest.raises(ValueError, match="no engine file"):
        cache.adopt(plain, FACTS, trust=True)
    damage(foreign, "truncated")
    with pytest.raises(ValueError, match="damaged"):
        cache.adopt(foreign, FACTS, trust=True)


# ---- refit, timing ----


def test_engines_that_differ_in_one_fact_alone_are_found(cache):
    assert cache.similar(FACTS, ("weights",)) == []
    other = {**FACTS, "weights": "b" * 64}
    for facts in (FACTS, other, {**FACTS, "gpu": "another"}, {**other, "dtype": "float32"}):
        cache.put(facts, PLAN)
    (cache.folder / "junk.engine").write_bytes(b"junk")
    found = cache.similar(FACTS, ("weights",))
    assert sorted(f["weights"] for f in found) == ["a" * 64, "b" * 64]
    assert {f["gpu"] for f in found} == {FACTS["gpu"]}


def test_the_timing_cache_is_kept_per_library_and_gpu_and_ignored_when_damaged(cache):
    cache.put(FACTS, PLAN)
    assert cache.timing_cache("10.16 H200") == b""
    cache.put_timing_cache("10.16 H200", b"times\nof kernels")
    assert cache.timing_cache("10.16 H200") == b"times\nof kernels"
    assert cache.timing_cache("11.4 H200") == b""
    (path,) = cache.folder.glob("*.timing")
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.timing_cache("10.16 H200") == b""
