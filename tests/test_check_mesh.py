"""What a step costs on machines that are not here; and that devices send each other what their mesh asks for."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import PartitionSpec

from moe_jax import check_mesh, main, optim, sharding
from moe_jax.check_mesh import Collective, GiB
from moe_jax.moe import dispatch

ROOT = Path(__file__).parents[1]
H100 = check_mesh.machines("h100-8")


def plan(**changes) -> check_mesh.Plan:
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tiny.batch())
    given = {"model": tiny.configured(tiny.moe()), "optimizer": lambda: optim.adamw(lambda step: 1e-3)}
    given |= {"mesh": sharding.make_mesh, "batch": batch, "vocab": tiny.VOCAB, "max_targets": 12, "batch_size": 8}
    return check_mesh.Plan(**given | changes)


# --- what a step sends, on virtual devices ----------------------------------------------------------------------------

# Of a step of two layers with AdamW. One more than here is a mistake, one fewer is progress: then change the number.
GOLDEN = {
    "data": ({"data": 8}, {"all-reduce over data": 7}),
    "fsdp": (
        {"fsdp": 8},
        {"all-gather over fsdp": 28, "all-reduce over fsdp": 9, "reduce-scatter over fsdp": 6},
    ),
    "experts": (
        {"data": 2, "expert": 4},
        {
            "all-reduce over data": 2,  # gradients of experts
            "all-reduce over data+expert": 9,
            "all-reduce over expert": 2,  # how many turns an exchange needs
            "all-to-all over expert": 10,
        },
    ),
    "slices": (
        {"slices": 2, "fsdp": 2, "expert": 2},
        {
            "all-gather over fsdp": 28,
            "all-reduce over expert": 2,
            "all-reduce over fsdp": 7,
            "all-reduce over slice": 2,  # gradients of experts, of the part that a device has
            "all-reduce over slice+expert": 3,
            "all-reduce over slice+fsdp+expert": 9,
            "all-to-all over expert": 10,
            "reduce-scatter over fsdp": 6,
        },
    ),
    "slots": (
        {"data": 2, "expert": 4},
        {
            "all-reduce over data": 2,
            "all-reduce over data+expert": 9,
            "all-reduce over expert": 2,
            "all-to-all over expert": 8,
        },
    ),
    "model": ({"data": 4, "model": 2}, {"all-reduce over data": 7, "all-reduce over model": 10}),
}


@functools.cache
def program(mesh: str):
    made = sharding.make_mesh(**GOLDEN[mesh][0])
    given = {"model": tiny.configured(tiny.moe(to=dispatch.slots))} if mesh == "slots" else {}
    return made, check_mesh.compiled(plan(**given), made, 8)[1].as_text()


@pytest.mark.parametrize("mesh", GOLDEN)
def test_a_step_sends_what_its_mesh_says_and_no_more(mesh):
    made, text = program(mesh)
    assert check_mesh.counts(check_mesh.collectives(text, made)) == GOLDEN[mesh][1]


@pytest.mark.parametrize("mesh", GOLDEN)
def test_no_device_gathers_activations(mesh):
    """What is gathered has no dim of positions: 8 rows of 12 tokens."""
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", program(mesh)[1])
    assert not [shape for shape in gathered if "12" in shape.split(",")]


def test_between_slices_gradients_are_summed_and_nothing_else():
    made, text = program("slices")
    across = [one for one in check_mesh.collectives(text, made) if "slice" in one.axes]
    assert across and {one.name for one in across} == {"all-reduce"}


# --- reading programs -------------------------------------------------------------------------------------------------


def test_collectives_are_counted_by_loop_axis_and_bytes():
    mesh = sharding.make_mesh(data=2, expert=4)

    def layer(x, _):
        return jax.lax.psum(x, "expert") / 4, None

    def step(x):
        y, _ = jax.lax.scan(layer, x, None, length=5)
        return jax.lax.all_gather(y, "data")

    spec = PartitionSpec(("data", "expert"))
    call = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(None, spec[0]), check_vma=False)
    text = jax.jit(call).lower(jax.ShapeDtypeStruct((16, 100), jnp.float32)).compile().as_text()
    found = {one.name: one for one in check_mesh.collectives(text, mesh)}
    assert found["all-reduce"] == Collective("all-reduce", ("expert",), 5, 2 * (3 / 4) * 2 * 100 * 4)
    assert found["all-gather"] == Collective("all-gather", ("data",), 1, (1 / 2) * 2 * 2 * 100 * 4)


@pytest.mark.parametrize(
    ("said", "group"),
    [
        ("replica_groups={{0,1},{2,3}}", [0, 1]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [0, 1]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [0, 2]),
        ("source_target_pairs={{0,2},{2,0}}", [0, 2]),
        ("no groups at all", list(range(8))),
    ],
)
def test_groups_are_read_however_they_are_written(said, group):
    assert check_mesh._group(said, 8).tolist() == group


def test_a_loop_that_only_its_condition_bounds_is_counted_and_one_of_unknown_length_left_out():
    text = """
%bound (p: (s32[], f32[8])) -> pred[] {
  %c.1 = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %c.1), direction=LT
}
%open (p: (s32[], f32[8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
%rare (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = f32[8]{0} all-to-all(%x), replica_groups={{0,1,2,3,4,5,6,7}}
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%bound, body=%body
  %v = (s32[], f32[8]) while(%t), condition=%open, body=%rare
}
"""
    found = check_mesh.collectives(text, sharding.make_mesh(data=8))
    assert check_mesh.counts(found) == {"all-reduce over data": 7, "all-to-all over data": 0}


# --- machines ---------------------------------------------------------------------------------------------------------


def test_names_of_machines():
    where = check_mesh.machines("2xv5p-128")
    assert (where.chips, where.slices, where.on_tpu) == (64, 2, True)
    assert check_mesh.machines("v6e-16").chips == 16 and not H100.on_tpu
    assert check_mesh.machines("v5litepod-16").chip == check_mesh.CHIPS["v5e"]
    hosts = check_mesh.machines("2xh100-8")
    assert (hosts.chips, hosts.slices) == (8, 2)
    shapes = {
        (1, 2): [1, 1],
        (8, 2): [2, 4],
        (64, 2): [8, 8],
        (4, 3): [2, 2, 1],
        (16, 3): [2, 2, 4],
        (64, 3): [4, 4, 4],
    }
    assert {key: check_mesh.wired(*key) for key in shapes} == shapes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p", "not of the form v5p-128"),
        ("x9-8", "known: v4, v5e"),
        ("v5p-3", "counts 2 cores a chip"),
        ("v6e-12", "only powers of two"),
        ("h100-16", "a host has 8 GPUs; of several hosts write 2xh100-8"),
        ("2xa100-16", "write 4xa100-8"),
    ],
)
def test_machines_that_are_none(name, message):
    with pytest.raises(ValueError, match=message):
        check_mesh.machines(name)


def test_slices_are_those_that_tpus_say_they_are_of():
    tpus = [SimpleNamespace(platform="tpu", slice_index=i // 4, id=i) for i in range(8)]
    with pytest.raises(ValueError, match="mesh slice=1, but these devices are of 2: change SLICES"):
        sharding.make_mesh(data=8, devices=tpus)


# --- the report -------------------------------------------------------------------------------------------------------


def test_what_fits_is_found_and_what_does_not_is_said(monkeypatch):
    monkeypatch.setattr(check_mesh, "devices", lambda where: jax.devices())
    found = check_mesh.check(plan(), H100)
    step = found["step"]
    assert found["mesh"] == {"data": 8} and step["fits"] and found["largest"] > 8 and found["largest"] % 8 == 0
    assert step["parameters"] == sum(x.size for x in jax.tree.leaves(tiny.model(tiny.moe())))
    small = check_mesh.dataclasses.replace(H100.chip, memory=step["state"] + step["temporary"] - 1)
    less = check_mesh.check(plan(), check_mesh.dataclasses.replace(H100, chip=small))
    assert not less["step"]["fits"] and less["largest"] is None
    assert "does NOT fit" in check_mesh.report(less) and "no batch fits" in check_mesh.report(less)
    assert "fits; the largest batch that fits is" in check_mesh.report(found)


def test_without_the_compiler_of_tpus_virtual_devices_stand_in(monkeypatch):
    monkeypatch.setattr(check_mesh.importlib.util, "find_spec", lambda name: None)
    found = check_mesh.check(plan(), check_mesh.machines("v5p-16"), once=True)
    assert found["compiler"] == "CPU" and found["devices"] == 8 and found["step"]["fits"]
    assert "virtual CPU devices: memory is another compiler's; pip install 'moe_jax[tpu-aot]'" in check_mesh.report(
        found
    )


@pytest.fixture
def compiler(monkeypatch):
    """One that needs so many bytes a row and 1 GiB besides, and raises, as that of TPUs does, above 4."""
    monkeypatch.setattr(check_mesh, "devices", lambda where: jax.devices())
    tried = []

    def use(a_row, said="Ran out of memory in memory space hbm. Used {used:.2f}G of 4.00G hbm. Exceeded by it."):
        def compiled(plan, mesh, batch_size):
            tried.append(batch_size)
            used = 1 + batch_size * a_row / GiB
            if used > 4:
                raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: XLA:TPU compile error. {said.format(used=used)}")
            memory = SimpleNamespace(argument_size_in_bytes=GiB, temp_size_in_bytes=int(batch_size * a_row))
            program = SimpleNamespace(memory_analysis=lambda: memory, as_text=lambda: "")
            return jax.eval_shape(lambda: tiny.model(tiny.moe())), program

        monkeypatch.setattr(check_mesh, "compiled", compiled)
        chip = check_mesh.dataclasses.replace(check_mesh.CHIPS["v5e"], memory=int(4 * GiB / check_mesh.SHARE))
        return check_mesh.Machines("v5e-8", chip, 8)

    use.tried = tried
    return use


@pytest.mark.parametrize("figure", [True, False])
def test_where_the_compiler_gives_up_the_largest_batch_is_found_all_the_same(figure, compiler):
    where = compiler(GiB / 30, *([] if figure else ["Ran out of memory in memory space hbm."]))
    found = check_mesh.check(plan(batch_size=512), where)
    assert not found["step"]["fits"] and found["largest"] == 88  # 3 GiB for 90 rows, in multiples of 8
    said = check_mesh.report(found)
    assert "the largest batch that fits is 88 (3.93 GiB a chip; multiples of 8)" in said
    assert ("memory a chip   18.07 GiB, as the compiler says; there are 4.00 to use" in said) == figure
    assert ("does NOT fit: 14.07 GiB too much" in said) == figure
    assert len(compiler.tried) == len(set(compiler.tried)) <= 7  # a program may take minutes to compile
    once = check_mesh.check(plan(batch_size=512), where, once=True)
    assert once["largest"] is None and "largest" not in check_mesh.report(once)


def test_where_no_batch_compiles_it_is_said_what_the_smallest_takes(compiler):
    found = check_mesh.check(plan(batch_size=64), compiler(GiB))
    assert found["largest"] is None and compiler.tried == [64, 32, 16, 8]
    assert "no batch fits: 8 takes 9.00 GiB a chip (multiples of 8)" in check_mesh.report(found)
    found = check_mesh.check(plan(batch_size=8), compiler(GiB, "Ran out of memory in memory space hbm."))
    assert "does NOT fit; no batch fits: 8 is too large" in check_mesh.report(found)


@pytest.mark.parametrize(
    ("said", "memory"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 2G of 1G hbm.", True),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.", True),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.1M of 16M vmem.", False),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack", False),
        ("RESOURCE_EXHAUSTED: too many requests", False),
        ("INTERNAL: a memory layout that is not supported", False),
    ],
)
def test_only_want_of_a_chips_memory_is_called_so(said, memory, monkeypatch):
    def compiled(*_):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(check_mesh, "compiled", compiled)
    monkeypatch.setattr(check_mesh, "devices", lambda where: jax.devices())
    if memory:
        assert not check_mesh.check(plan(), H100)["step"]["fits"]
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match=said[:20]):
            check_mesh.check(plan(), H100)


def test_a_batch_that_does_not_divide_names_one_that_does(monkeypatch):
    monkeypatch.setattr(check_mesh, "devices", lambda where: jax.devices())
    with pytest.raises(ValueError, match=r"multiple of 16, such as --gin.BATCH=32"):
        check_mesh.check(plan(batch_size=20, micro=2), H100)


# --- the network ------------------------------------------------------------------------------------------------------


def test_what_goes_to_other_hosts_is_charged_at_the_networks_rate(monkeypatch):
    monkeypatch.setattr(check_mesh, "devices", lambda where: jax.devices())
    near = check_mesh.check(plan(), H100, once=True)["step"]
    where = check_mesh.dataclasses.replace(check_mesh.machines("2xh100-4"))
    far = check_mesh.check(plan(), where, once=True)["step"]
    assert near["across"] == 0 and "network" not in near["seconds"]
    total = sum(far["sent"].values())
    assert far["across"] == pytest.approx(total / 4)  # a ring through two hosts of four, in four rings
    assert far["seconds"]["network"] == pytest.approx(total / 4 / H100.chip.network)
    assert far["seconds"]["links"] == pytest.approx(total * 3 / 4 / H100.chip.link) and not far["estimated"]


def test_of_an_exchange_all_that_is_for_another_host_crosses():
    line = "ENTRY %m (p: f32[8]) -> f32[8] {\n %r = f32[8]{0} all-to-all(%x), replica_groups={{0,1,2,3,4,5,6,7}}\n}\n"
    (one,) = check_mesh.collectives(line, sharding.make_mesh(data=8), parts=2)
    assert one.sent == 32 * 7 / 8 and one.across == 32 * 4 / 8


def test_between_tpu_slices_a_sum_of_gradients_is_estimated(compiler):
    where = check_mesh.dataclasses.replace(compiler(GiB / 30), slices=2, chips=4)
    mesh = lambda devices: sharding.make_mesh(slices=2, data=4, devices=devices)  # noqa: E731
    found = check_mesh.check(plan(mesh=mesh), where, once=True)
    n = sum(x.size for x in jax.tree.leaves(tiny.model(tiny.moe())))
    assert found["step"]["sent"] == {"slice": 4 * n} and found["step"]["estimated"]  # twice a half of 4 bytes
    assert found["step"]["seconds"]["network"] == pytest.approx(4 * n / where.chip.network)
    assert "over slice: an estimate" in check_mesh.report(found)


def test_memory_is_laid_along_a_line():
    first, second = ({"batch": b, "used": 100 + 10 * b} for b in (8, 16))
    assert check_mesh.largest(first, second, room=1000, multiple=8) == 88


def test_flops_are_those_of_the_trainer_and_attention():
    model = jax.eval_shape(lambda: tiny.model())
    work = check_mesh.flops(model, plan(), [])  # nothing moves: two passes in place of three
    attention = 3 * 2 * 12 * 2 * tiny.D
    from moe_jax import train

    assert work == 12 * (4 * train.active_params(model) + attention)


def test_a_plan_is_what_gin_binds_and_needs_no_data(tmp_path):
    given, prepared = main.planned(["runs/quickstart.gin", "mesh/experts.gin"], [f"DATA={tmp_path}/none", "BATCH=32"])
    made = check_mesh.plan(given, prepared)
    assert (made.batch_size, made.batch.tokens_BxL.shape, made.max_targets) == (32, (256,), 256)
    assert made.mesh().shape["expert"] == 8
    with pytest.raises(ValueError, match="the tokeniser: not there; give --vocab and --length"):
        check_mesh.plan(given, None)
    jobs = 'include "data/correct_all.gin"\nmain.run.jobs = [@valid_data/prepare.prepare]\n'
    imports = ["from __gin__ import dynamic_registration", "from moe_jax import main", "from moe_jax import prepare"]
    (tmp_path / "data.gin").write_text("\n".join([*imports, jobs]))
    with pytest.raises(main.ConfigError, match=r"data.gin: no job trains; its jobs are prepare\.prepare"):
        main.planned([str(tmp_path / "data.gin")], [])


COMPILER = Path(sys.prefix) / "tpu"  # where `make test` puts it


@pytest.mark.skipif(
    not (importlib.util.find_spec("libtpu") or (COMPILER / "libtpu").exists()),
    reason="needs the TPU compiler: pip install '.[tpu-aot]'",
)
def test_a_step_for_64_tpus_sends_what_it_should(tmp_path):
    """The real compiler, in a process of its own."""
    command = [sys.executable, "-m", "moe_jax.cli", "check-mesh", "--gin_file=runs/shape.gin"]
    command += ["--gin_file=mesh/experts.gin", "--topology=v5p-128", f"--json={tmp_path / 'found.json'}"]
    command += [f"--gin.{name}" for name in ("LAYERS=2", "D=512", "HEADS=8", "HIDDEN=512", "BATCH=64")]
    command += ["--vocab=1024", "--length=256", "--max_targets=64", "--once"]
    paths = os.pathsep.join(filter(None, [str(COMPILER), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["mesh"] == {"fsdp": 8, "expert": 8} and found["compiler"] == "TPU"
    assert found["step"]["collectives"] == {
        "all-gather over fsdp": 44,
        "all-reduce over expert": 5,
        "all-reduce over fsdp": 9,
        "all-reduce over fsdp+expert": 14,
        "all-to-all over expert": 16,
    }
