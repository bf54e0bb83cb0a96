"""The input: examples into packed rows, rows into batches, what a training step waits for them, and going on.

    python -m benchmarks.input_pipeline --json input.json        # about a minute on two cores

Examples are made up: families in the shares, and lengths by the log-normal laws, that the embedded corpus has. One
thread does all the work. Goals are 5,000 rows of 512 tokens a second, a hundredth of a training step, 1 kB of state.

    pack     seconds for 1,000 rows: by `pack`, and by `write_prepared`, which checks and writes them too; beside the
             goal. "padding" is its share, beside that of rows that close at the first example that does not fit
    read     milliseconds of `Prepared.batch` from the page cache, beside the goal; and ("gather") beside copying the
             rows out of plain arrays in 5 bytes a token: less no program can do (a batch has 25)
    wait     the same and `put_batch`, beside the quickstart's step that it feeds (`corrector_tiny`, 16 rows of 256)
    resume   bytes in a checkpoint that say where in the data a run is, beside the goal; milliseconds to the first batch
             at step 10^7, beside those at step 0
    tf.data  rows, state and going on of a tf.data stream on one thread that shuffles as it goes and computes nothing
             (only where TensorFlow is installed)
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.measure import interleaved, main, row
from moe_jax import data, optim, sharding, train
from moe_jax.data import Prepared, write_prepared
from moe_jax.layers.attention import Attention
from moe_jax.layers.param import Rngs
from moe_jax.main import shipped
from moe_jax.models.corrector import Corrector
from moe_jax.moe.layer import MoeFfn
from moe_jax.moe.task_routers import TaskMapped
from moe_jax.packing import Packable, pack
from moe_jax.text.prompt import READ, WRITE
from moe_jax.text.tokeniser import Tokeniser

# Of each family in the embedded corpus: share of the examples, mean and standard deviation of log(tokens).
LAWS = {"asr": (0.21, 3.70, 0.38), "ocr": (0.23, 3.77, 0.47), "mt": (0.25, 4.57, 0.50), "gec": (0.31, 3.99, 0.61)}
FAMILIES = {family: number for number, family in enumerate(LAWS, 1)}
SHORTEST, WRITTEN = 8, 0.34  # tokens of an example; their share that is to be written
LENGTH, EXAMPLES = 512, 40_000
ROWS_A_SECOND, STATE_BYTES, WAIT = 5000, 1000, 0.01  # goals
FAR = 10_000_000  # steps
SHUFFLED = 1000  # rows that the stream holds


def made_up(count: int, length: int, vocab: int) -> list[Packable]:
    """Examples of at most `length` tokens; the same at every call."""
    rng = np.random.default_rng(0)
    shares, means, deviations = np.transpose(list(LAWS.values()))
    family = rng.choice(len(LAWS), count, p=shares)
    sizes = np.exp(rng.normal(means[family], deviations[family])).astype(int).clip(SHORTEST, length)
    tokens: Any = np.split(rng.integers(1, vocab, sizes.sum(), dtype=np.int32), sizes.cumsum()[:-1])
    read = sizes - np.ceil(WRITTEN * sizes).astype(int)
    roles: Any = (np.where(np.arange(size) < r, READ, WRITE) for size, r in zip(sizes, read, strict=True))
    return [Packable(*example) for example in zip(tokens, roles, (family + 1).tolist(), strict=True)]


def in_order(sizes: Iterable[int], length: int) -> int:
    """How many rows there are when each takes examples until one does not fit."""
    rows, room = 0, 0
    for size in sizes:
        if size > room:
            rows, room = rows + 1, length
        room -= size
    return rows


@contextlib.contextmanager
def prepared(length: int, count: int) -> Generator[Prepared]:
    tokeniser = Tokeniser.load(shipped("tokeniser.model"))
    examples = made_up(count, length, tokeniser.vocab_size)
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "data"
        write_prepared(folder, examples, length=length, tokeniser=tokeniser, families=FAMILIES)
        yield Prepared.open(folder)


def packing() -> Iterator[dict[str, Any]]:
    tokeniser = Tokeniser.load(shipped("tokeniser.model"))
    examples = made_up(EXAMPLES, LENGTH, tokeniser.vocab_size)
    tokens, rows = sum(len(e.tokens) for e in examples), sum(1 for _ in pack(examples, LENGTH))
    numbers = itertools.count()
    with tempfile.TemporaryDirectory() as home:

        def write() -> None:
            folder = Path(home) / str(next(numbers))
            write_prepared(folder, examples, length=LENGTH, tokeniser=tokeniser, families=FAMILIES)

        times = interleaved({"pack": lambda: sum(1 for _ in pack(examples, LENGTH)), "write": write})
    for name, seconds in times.items():
        yield row(name, 1000 * seconds / rows, 1000 / ROWS_A_SECOND, 1.0, unit="s", **{"rows/s": rows / seconds})
    plain = in_order((len(e.tokens) for e in examples), LENGTH)
    yield row("padding", 1 - tokens / (rows * LENGTH), 1 - tokens / (plain * LENGTH), 1.0, unit="share")


def reading(batch_size: int) -> Iterator[dict[str, Any]]:
    with prepared(LENGTH, EXAMPLES) as folder:
        steps = itertools.count()
        plain = {name: np.array(column) for name, column in folder.columns.items()}
        rows = np.random.default_rng(0).integers(0, folder.rows, batch_size)
        times = interleaved(
            {
                "ours": lambda: folder.batch(next(steps), seed=0, batch_size=batch_size),
                "gather": lambda: {name: column[rows] for name, column in plain.items()},
            },
            rounds=500,
        )
    ours = times["ours"]
    more = {"unit": "ms", "rows/s": batch_size / ours}
    yield row("batch", 1e3 * ours, 1e3 * batch_size / ROWS_A_SECOND, 1.0, **more)
    yield row("gather", 1e3 * ours, 1e3 * times["gather"], None, **more)


def quickstart(vocab: int) -> Corrector:
    """The model of gin/experiments/neko/neko.gin."""
    ffn = partial(MoeFfn, num_experts=4, hidden=512, router=partial(TaskMapped, k=2))
    return Corrector(
        d=192,
        layers=4,
        vocab=vocab,
        attention=partial(Attention, heads=3, block=64),
        ffn=ffn,
        auxiliary={"task_map": 0.05},
        unroll=4,
        rngs=Rngs(params=0),
    )


def waiting() -> Iterator[dict[str, Any]]:
    transform = optim.muon_adam(lambda count: 1e-3, adam_scale=0.5)
    mesh, steps = sharding.make_mesh(), itertools.count()
    with prepared(256, EXAMPLES) as folder, sharding.use(mesh):
        model = quickstart(folder.tokeniser.vocab_size)
        kinds: dict[str, Any] = {"seed": 0, "micro": 1, "dtype": "float32", "max_targets": folder.meta["max_targets"]}
        step_fn = train.make_step(model, transform, **kinds)
        state = train.start(model, transform, mesh)

        def fetch() -> Any:
            batch = folder.batch(next(steps), seed=0, batch_size=16)
            return jax.block_until_ready(sharding.put_batch(batch, mesh))

        batch = fetch()

        def step() -> None:
            state.params, state.opt, metrics = step_fn(state.params, state.opt, np.int32(0), batch)
            jax.block_until_ready(metrics)

        times = interleaved({"fetch": fetch, "step": step}, seconds=5, rounds=5)
    yield row("step", 1e3 * times["fetch"], 1e3 * times["step"], WAIT, unit="ms")


def resuming() -> Iterator[dict[str, Any]]:
    with prepared(LENGTH, EXAMPLES) as folder:
        yield row("state", position_bytes(folder), STATE_BYTES, 1.0, unit="bytes")
        times = interleaved({"far": partial(cold, folder, FAR), "first": partial(cold, folder, 0)}, rounds=50)
    yield row("first batch", 1e3 * times["far"], 1e3 * times["first"], 1.1, unit="ms")


def position_bytes(folder: Prepared) -> int:
    """Of what a checkpoint's meta says about the input. The step alone is the position; the rest is compared
    (`train._resume`), so that a run goes on with the same rows or not at all.
    """
    return len(json.dumps({"data": {"sha256": folder.meta["sha256"]}, "batch_size": 16, "seed": 0, "step": FAR}))


def cold(folder: Prepared, step: int) -> Any:
    """A batch in a process that has read none before."""
    data._permutation.cache_clear()
    return folder.batch(step, seed=0, batch_size=16)


def streamed(batch_size: int = 16) -> Iterator[dict[str, Any]]:
    """The peer gives columns, not batches: it has less to do."""
    from moe_jax.tasks.quiet import tf

    with prepared(LENGTH, EXAMPLES) as folder, tempfile.TemporaryDirectory() as home:
        one_thread = tf.data.Options()
        one_thread.threading.private_threadpool_size = 1
        columns = {name: np.array(column) for name, column in folder.columns.items()}
        stream = tf.data.Dataset.from_tensor_slices(columns).shuffle(SHUFFLED, seed=0).repeat().batch(batch_size)
        stream, steps = stream.with_options(one_thread), itertools.count()
        iterator = iter(stream)
        times = interleaved(
            {
                "ours": lambda: folder.batch(next(steps), seed=0, batch_size=batch_size),
                "stream": lambda: jax.tree.map(lambda x: x.numpy(), next(iterator)),
            },
            rounds=500,
        )
        more = {"unit": "ms", "rows/s": batch_size / times["ours"]}
        yield row("batch", 1e3 * times["ours"], 1e3 * times["stream"], 1.0, **more)

        saved = tf.train.Checkpoint(iterator=iterator).write(f"{home}/state")
        expected = next(iterator)["tokens"].numpy()

        def again() -> np.ndarray:
            restored = iter(stream)
            tf.train.Checkpoint(iterator=restored).read(saved)
            return next(restored)["tokens"].numpy()

        if not np.array_equal(again(), expected):
            raise ValueError("the restored stream goes on elsewhere: it is no peer")
        size = sum(path.stat().st_size for path in Path(home).iterdir())
        yield row("state", position_bytes(folder), size, 1.0, unit="bytes")
        times = interleaved({"ours": partial(cold, folder, FAR), "stream": again})
    yield row("first batch", 1e3 * times["ours"], 1e3 * times["stream"], 1.0, unit="ms")


CASES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {"pack": packing}
CASES |= {f"read B{size}": partial(reading, size) for size in (8, 16, 64)}
CASES |= {"wait": waiting, "resume": resuming}
if importlib.util.find_spec("tensorflow"):
    CASES["tf.data"] = streamed

if __name__ == "__main__":
    main(str(__doc__), CASES)
