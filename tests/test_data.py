"""Prepared data: packing loses nothing, batches depend on the seed and the step alone, damage is refused."""

import hashlib
import itertools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import Prepared, _permutation, write_prepared
from moe_jax.packing import COLUMNS, MAX_SEGMENTS, OPEN_ROWS, Packable, pack, pack_sides, to_batch
from moe_jax.text import tokeniser as tk

FAMILIES = {"asr": 1, "ocr": 2, "mt": 3}
LENGTH = 16


def make_examples(seed: int, count: int, longest: int = LENGTH) -> list[Packable]:
    """Random examples: a prompt and a target each, tokens in [1, 300)."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        size = int(rng.integers(2, longest + 1))
        read = int(rng.integers(1, size))
        tokens = rng.integers(1, 300, size).tolist()
        examples.append(Packable(tokens, [1] * read + [2] * (size - read), int(rng.integers(1, 4))))
    return examples


def unpack(row) -> list[tuple]:
    """The examples of a row, found by a plain walk over its segments."""
    found = []
    for segment in range(1, row["segments"].max() + 1):
        (at,) = np.nonzero(row["segments"] == segment)
        assert at.tolist() == list(range(at[0], at[-1] + 1))
        (task,) = set(row["tasks"][at].tolist())
        found.append((row["tokens"][at].tolist(), row["roles"][at].tolist(), task))
    return found


def slowly_packed(sizes: list[int], length: int) -> list[list[int]]:
    """Which examples share a row, by looking at every open row for each."""
    closed, rows, rooms = [], [], []
    for example, size in enumerate(sizes):
        fitting = [i for i, room in enumerate(rooms) if size <= room]
        if not fitting:
            if len(rows) == OPEN_ROWS:
                fullest = rooms.index(min(rooms))
                closed.append(rows.pop(fullest))
                rooms.pop(fullest)
            rows.append([])
            rooms.append(length)
            fitting = [len(rows) - 1]
        best = min(fitting, key=rooms.__getitem__)  # the first opened of equals
        rows[best].append(example)
        rooms[best] -= size
        if not rooms[best] or len(rows[best]) == MAX_SEGMENTS:
            closed.append(rows.pop(best))
            rooms.pop(best)
    return closed + rows


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 500), st.sampled_from([8, 24, 300, 3000]), st.integers(1, 200))
def test_packing_equals_a_slow_search(seed, count, length, shortest):
    """Folders that were prepared before stay the same: which rows there are, and their order."""
    shortest = min(shortest, length)
    sizes = np.random.default_rng(seed).integers(shortest, max(shortest, length // 2) + 1, count).tolist()
    examples = [Packable([1 + i] * size, [1] * size, 1) for i, size in enumerate(sizes)]
    found = [list(dict.fromkeys(row["tokens"][row["segments"] > 0].tolist())) for row in pack(examples, length)]
    assert found == [[1 + i for i in row] for row in slowly_packed(sizes, length)]


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(0, 300), st.sampled_from([2, 5, LENGTH]))
def test_packing_neither_loses_nor_mixes_examples(seed, count, longest):
    examples = make_examples(seed, count, longest)
    rows = list(pack(examples, LENGTH))
    unpacked = [example for row in rows for example in unpack(row)]
    assert sorted(unpacked) == sorted(tuple(example) for example in examples)
    for row in rows:
        padding = row["segments"] == 0
        assert not any(row[name][padding].any() for name in COLUMNS)
        assert all(row[name].dtype == dtype and row[name].shape == (LENGTH,) for name, dtype in COLUMNS.items())


def test_rows_are_full():
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(4.0, 0.6, 3000), 4, 256).astype(int)
    examples = [Packable([1] * size, [1] * size, 1) for size in sizes]
    rows = list(pack(examples, 256))
    assert sizes.sum() / (len(rows) * 256) > 0.97


def test_short_examples_do_not_overflow_the_segment_ids():
    rows = list(pack([Packable([7], [2], 1)] * 600, 512))
    assert [row["segments"].max() for row in rows] == [MAX_SEGMENTS, MAX_SEGMENTS, 600 - 2 * MAX_SEGMENTS]


def test_sides_are_filled_each_for_itself():
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(2.2, 0.7, (2000, 2)).astype(int), 1, 36)
    examples = [
        Packable(np.full(read + written, 1 + i % 200), [1] * read + [2] * written, 1 + i % 2)
        for i, (read, written) in enumerate(sizes.tolist())
    ]
    rows = {name: np.stack([row[name] for row in pack_sides(examples, (36, 36))]) for name in COLUMNS}
    assert rows["tokens"].shape[1] == 72 and (rows["roles"] > 0).sum() == sizes.sum()
    assert max((rows["roles"] == role).sum(1).max() for role in (1, 2)) <= 36
    packed = [
        (t[s == n].tolist(), r[s == n].tolist())
        for t, r, s in zip(rows["tokens"], rows["roles"], rows["segments"], strict=True)
        for n in range(1, s.max() + 1)
    ]
    assert sorted(packed) == sorted((e.tokens.tolist(), e.roles) for e in examples)
    together = {name: np.stack([row[name] for row in pack(examples, 72)]) for name in COLUMNS}
    width = sum((together["roles"] == role).sum(1).max() for role in (1, 2))  # what such rows are given to a model as
    assert rows["tokens"].size < 0.8 * len(together["roles"]) * width
    for read, written in ((37, 1), (1, 37), (0, 3), (3, 0)):
        with pytest.raises(ValueError, match="cannot pack an example that reads and writes"):
            list(pack_sides([Packable([1] * (read + written), [1] * read + [2] * written, 1)], (36, 36)))


@pytest.mark.parametrize("size", [0, LENGTH + 1])
def test_what_cannot_be_packed_is_refused(size):
    with pytest.raises(ValueError, match=f"{size} tokens into rows of {LENGTH}"):
        list(pack([Packable([1] * size, [1] * size, 1)], LENGTH))


def test_a_batch_by_hand():
    (row,) = pack([Packable([5, 6, 7], [1, 1, 2], 3), Packable([8, 9], [1, 2], 1)], 6)
    batch = to_batch({name: column[None] for name, column in row.items()})
    assert batch.tokens_BxL.tolist() == [[5, 6, 7, 8, 9, 0]]
    assert batch.targets_BxL.tolist() == [[6, 7, 0, 9, 0, 0]]
    assert batch.weights_BxL.tolist() == [[0, 1, 0, 1, 0, 0]]
    assert batch.info.task_BxL.tolist() == [[3, 3, 3, 1, 1, 0]]
    assert batch.info.valid_BxL.tolist() == [[True] * 5 + [False]]
    assert batch.info.segment_BxL.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert batch.info.position_BxL.tolist() == [[0, 1, 2, 0, 1, 0]]


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_batches_equal_a_slow_oracle(seed, count):
    rows = list(pack(make_examples(seed, count), LENGTH))
    batch = to_batch({name: np.stack([row[name] for row in rows]) for name in COLUMNS})
    for b, row in enumerate(rows):
        t = 0
        for tokens, roles, _ in unpack(row):
            for i in range(len(tokens)):
                last = i + 1 == len(tokens)
                assert batch.targets_BxL[b, t] == (0 if last else tokens[i + 1])
                assert batch.weights_BxL[b, t] == (not last and roles[i + 1] == 2)
                assert batch.info.position_BxL[b, t] == i
                t += 1
        assert not batch.info.valid_BxL[b, t:].any() and batch.info.valid_BxL[b, :t].all()
        assert not batch.weights_BxL[b, t:].any() and not batch.targets_BxL[b, t:].any()


@pytest.fixture(scope="module")
def tokeniser() -> tk.Tokeniser:
    return tk.train(["the cat sat on the mat and looked at a bird"] * 3, 282)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokeniser):
    folder = tmp_path_factory.mktemp("data") / "prepared"
    examples = [e._replace(tokens=[1 + t % 281 for t in e.tokens]) for e in make_examples(3, 200)]
    kind = {"mixture": "correct_all", "seed": 3, "layout": "aligned"}
    write_prepared(
        folder,
        iter(examples),
        length=LENGTH,
        tokeniser=tokeniser,
        families=FAMILIES,
        skipped={"asr": 2},
        **kind,
    )
    return folder


def leaves(batch) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]


def digest(batch) -> str:
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves(batch))).hexdigest()


def test_meta_counts_what_is_there(folder, tokeniser):
    prepared = Prepared.open(folder)
    examples = [example for i in range(prepared.rows) for example in unpack(row_of(prepared, i))]
    tasks = prepared.meta["tasks"]
    assert {path.name for path in folder.iterdir()} == {
        "meta.json",
        "tokeniser.model",
        *(f"{name}.npy" for name in COLUMNS),
    }
    assert sum(tasks[name]["examples"] for name in FAMILIES) == len(examples) == 200
    assert tasks["asr"]["skipped"] == 2
    assert sum(tasks[name]["tokens"] for name in FAMILIES) == sum(len(tokens) for tokens, _, _ in examples)
    assert prepared.meta["max_targets"] == (prepared.columns["roles"] == 2).sum(1).max()
    assert prepared.meta["fill"] == (prepared.columns["segments"] > 0).mean() > 0.9
    assert prepared.meta["mixture"] == "correct_all" and prepared.meta["families"] == FAMILIES
    assert prepared.tokeniser.decode(tokeniser.encode("the cat")) == "the cat"


def row_of(prepared: Prepared, index: int) -> dict[str, np.ndarray]:
    return {name: column[index] for name, column in prepared.columns.items()}


def test_an_epoch_shows_every_row_once_in_a_new_order(folder):
    prepared = Prepared.open(folder)
    rows = prepared.rows
    first, second = (prepared.batch(step, seed=1, batch_size=rows).tokens_BxL for step in (0, 1))
    other = prepared.batch(0, seed=2, batch_size=rows).tokens_BxL
    everything = sorted(prepared.columns["tokens"].tolist())
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(other.tolist()) == everything
    assert first.tolist() != second.tolist() and first.tolist() != other.tolist()


@pytest.mark.parametrize("process_count", [1, 2, 3, 6])
def test_processes_read_slices_of_one_batch(folder, process_count):
    prepared = Prepared.open(folder)
    for step in (0, 7, 1000):  # across the end of an epoch, too
        whole = prepared.batch(step, seed=5, batch_size=6)
        slices = [
            prepared.batch(step, seed=5, batch_size=6, process_index=p, process_count=process_count)
            for p in range(process_count)
        ]
        assert all(leaf.shape == (6 // process_count, LENGTH) for leaf in leaves(slices[0]))
        for one, *parts in zip(leaves(whole), *map(leaves, slices), strict=True):
            assert one.tolist() == np.concatenate(parts).tolist()


def test_the_first_host_alone_reads_all_of_a_folder(folder, monkeypatch):
    """For its checksums; what the others read is what their steps need."""
    read = []
    monkeypatch.setattr("moe_jax.data.sha256", lambda path: read.append(path) or json.loads(text)["sha256"][path.stem])
    text = (folder / "meta.json").read_text()
    Prepared.open(folder)
    assert len(read) == len(json.loads(text)["sha256"])
    monkeypatch.setattr("moe_jax.hosts.first", lambda: False)
    Prepared.open(folder)
    assert len(read) == len(json.loads(text)["sha256"])


def test_steps_continue_one_stream_whatever_the_batch_size(folder):
    prepared = Prepared.open(folder)
    small = [prepared.batch(step, seed=5, batch_size=4).tokens_BxL for step in range(30)]
    large = [prepared.batch(step, seed=5, batch_size=24).tokens_BxL for step in range(5)]
    assert np.concatenate(small).tolist() == np.concatenate(large).tolist()


def test_a_batch_must_divide_into_processes(folder):
    with pytest.raises(ValueError, match="batch size 6 does not divide into 4 processes"):
        Prepared.open(folder).batch(0, seed=0, batch_size=6, process_count=4)


def test_a_fresh_process_reads_the_same_batch_without_tensorflow(folder):
    code = f"""
import sys, hashlib, jax, numpy as np
from moe_jax.data import Prepared
batch = Prepared.open({str(folder)!r}).batch(41, seed=9, batch_size=5)
assert "tensorflow" not in sys.modules and "seqio" not in sys.modules
print(hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(batch))).hexdigest())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest(Prepared.open(folder).batch(41, seed=9, batch_size=5))


def test_the_order_of_rows_is_pinned():
    """A change here breaks the promise that a resumed run sees the rows it would have seen."""
    assert _permutation(10, 1, 2).tolist() == [4, 2, 0, 6, 1, 5, 9, 8, 7, 3]


def copy_of(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def forge_checksum(folder, name):
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"][name.removesuffix(".npy")] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("meta.json", None, "is this a prepared folder"),
        ("meta.json", lambda data: data[:40], "not JSON"),
        ("meta.json", lambda data: data.replace(b'"format": 1', b'"format": 9'), "not format 1"),
        ("meta.json", lambda data: b"[]", "not format 1"),
        ("meta.json", lambda data: data.replace(b'"rows"', b'"wors"'), "'rows' is missing or wrong"),
        ("meta.json", lambda data: data.replace(b'"length": 16', b'"length": 17'), "as meta.json says"),
        ("tokens.npy", None, "cannot read"),
        ("tokens.npy", lambda data: data[:-1], "damaged"),
        ("roles.npy", lambda data: b"", "damaged"),
        ("segments.npy", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "damaged"),
        ("tokeniser.model", None, "cannot read the tokeniser"),
        ("tokeniser.model", lambda data: data + b"\x5a\x00", "not the tokeniser that wrote this folder"),
    ],
)
def test_damage_is_refused_in_one_line(folder, tmp_path, name, damage, message):
    copy = copy_of(folder, tmp_path)
    if damage is None:
        (copy / name).unlink()
    else:
        data = (copy / name).read_bytes()
        assert damage(data) != data
        (copy / name).write_bytes(damage(data))
    with pytest.raises(ValueError, match=message) as error:
        Prepared.open(copy)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


def test_pickles_are_never_loaded(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    np.save(copy / "tokens.npy", np.array([{"evil": 1}], dtype=object), allow_pickle=True)
    forge_checksum(copy, "tokens.npy")
    with pytest.raises(ValueError, match="Python objects"):
        Prepared.open(copy)


@pytest.mark.parametrize("old, new, message", [(b"|u1", b"|i1", "not uint8"), (b"}", b"(", "not a .npy")])
def test_forged_headers_are_refused(folder, tmp_path, old, new, message):
    copy = copy_of(folder, tmp_path)
    (copy / "tasks.npy").write_bytes((copy / "tasks.npy").read_bytes().replace(old, new, 1))
    forge_checksum(copy, "tasks.npy")
    with pytest.raises(ValueError, match=message):
        Prepared.open(copy)


@pytest.mark.parametrize(
    "examples, message",
    [
        ([], "no example to write"),
        ([Packable([5], [2], 9)], "unknown task id 9"),
        ([Packable([-1, 5], [1, 2], 1)], r"token ids outside of \[0, 282\)"),
        ([Packable([282], [2], 1)], r"token ids outside of \[0, 282\)"),
    ],
)
def test_a_failed_write_leaves_nothing_behind(tmp_path, tokeniser, examples, message):
    with pytest.raises(ValueError, match=message):
        write_prepared(tmp_path / "new", examples, length=8, tokeniser=tokeniser, families=FAMILIES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("same", [True, False])
def test_of_two_processes_that_prepare_one_folder_the_second_finds_it_there(same, tmp_path, tokeniser, monkeypatch):
    monkeypatch.setattr("os.getpid", itertools.count(1).__next__)

    def made(seed):
        return [e._replace(tokens=[1 + t % 281 for t in e.tokens]) for e in make_examples(seed, 3)]

    def write(examples):
        return write_prepared(tmp_path / "x", examples, length=LENGTH, tokeniser=tokeniser, families=FAMILIES)

    def meanwhile():
        yield from made(0)
        write(made(0 if same else 1))

    if same:
        assert write(meanwhile()) == Prepared.open(tmp_path / "x").meta
    else:
        with pytest.raises(ValueError, match="another process made something else there"):
            write(meanwhile())
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_an_existing_folder_is_not_overwritten(folder, tokeniser):
    before = json.loads((folder / "meta.json").read_text())
    with pytest.raises(ValueError, match="exists already"):
        write_prepared(folder, make_examples(0, 3), length=LENGTH, tokeniser=tokeniser, families=FAMILIES)
    assert json.loads((folder / "meta.json").read_text()) == before


def test_batches_are_plain_numpy(folder):
    leaves = jax.tree.leaves(Prepared.open(folder).batch(0, seed=0, batch_size=2))
    assert len(leaves) == 7 and all(type(leaf) is np.ndarray for leaf in leaves)
