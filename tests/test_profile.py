"""Traces of training: a table of operations that adds up."""

import jax
import jax.numpy as jnp

from moe_jax import profile


def test_a_trace_of_some_steps_is_tabled(tmp_path):
    step = jax.jit(lambda x: jax.lax.fori_loop(0, 50, lambda i, x: jnp.sin(x) @ x, x))
    x = jnp.ones((64, 64))
    with profile.Steps(tmp_path, start=10, count=2) as tracing:
        for number in range(10, 20):
            tracing(number, x)
            x = step(x)
    found = profile.operations(tmp_path)
    assert any(times == 2 * 50 for _, times in found.values()), "two steps of 50 turns each"
    assert all(spent >= 0 for spent, _ in found.values())
    text = (tmp_path / "operations.md").read_text()
    assert "| operation | ms | share | times |" in text and " ms on cpu" in text


def test_a_run_that_ends_while_it_is_traced_keeps_its_table(tmp_path):
    with profile.Steps(tmp_path, start=0, count=100) as tracing:
        for number in range(5):
            tracing(number, None)
            jnp.sin(jnp.ones(8)).block_until_ready()
    assert (tmp_path / "operations.md").exists()


def test_nothing_is_traced_unasked(tmp_path):
    with profile.Steps(tmp_path, start=0, count=0) as tracing:
        for number in range(9):
            tracing(number, None)
    assert not list(tmp_path.iterdir())


def test_time_inside_an_operation_is_not_its_own(tmp_path, monkeypatch):
    class Event:
        def __init__(self, op, start, duration):
            self.stats, self.start_ns, self.duration_ns = [("hlo_op", op)] if op else [], start * 1e9, duration * 1e9

    class Holder:
        def __init__(self, **fields):
            self.__dict__ |= fields

    lines = [Holder(events=[Event("dot.2", 1, 2), Event("while.1", 0, 10), Event("dot.7", 4, 1), Event(None, 0, 99)])]
    data = Holder(planes=[Holder(lines=lines)])
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda path: data, raising=False)
    (tmp_path / "a.xplane.pb").touch()
    assert profile.operations(tmp_path) == {"while": (7.0, 1), "dot": (3.0, 2)}
    lines = profile.table(profile.operations(tmp_path), 20.0).splitlines()
    assert lines[4:] == [
        "| while | 7,000.0 | 35.0 % | 1 |",
        "| dot | 3,000.0 | 15.0 % | 2 |",
        "| not in the trace | 10,000.0 | 50.0 % |  |",
    ]
