"""Examples that an adapter was trained on: how often they are found, and how often others are."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from grasp_lora.core.evidence.known import known_rows

RECORDS = Path(__file__).parents[3] / "docs" / "results" / "records"
DRAWS = 400


def drawn(n: int, seed: int, known: float = 0.0, by: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    """Return losses (adapter, others): log-normal, the share `known` divided by `by` on average."""
    rng = np.random.default_rng(seed)
    others = np.exp(rng.normal(0.3, 0.8, n))
    own = others * np.exp(rng.normal(-0.2, 0.35, n))
    seen = np.arange(n) < round(known * n)
    return np.where(seen, own / (by * np.exp(rng.normal(0, 0.5, n))), own), others


def rate(n: int, **how: float) -> float:
    found = [known_rows(*as_lists(drawn(n, seed, **how))) for seed in range(DRAWS)]
    return sum(one is not None for one in found) / DRAWS


def as_lists(pair):
    own, others = pair
    return own.tolist(), [others.tolist()], list(range(len(own)))


@pytest.mark.parametrize("n", [8, 16, 24, 50])
def test_nothing_known_is_seldom_called_known(n):
    assert rate(n) <= 0.01


@pytest.mark.parametrize(
    ("n", "known", "by", "least"),
    [(16, 0.5, 20, 0.7), (24, 0.6, 20, 0.9), (50, 0.5, 20, 0.99), (50, 0.25, 20, 0.6)],
)
def test_what_was_memorised_is_found(n, known, by, least):
    found = rate(n, known=known, by=by)
    print(f"{known:.0%} of {n} known, loss 1/{by}: found in {found:.0%}")
    assert found >= least


def test_those_found_are_those_that_were_memorised():
    own, others = drawn(30, 1, known=0.5)
    found = known_rows(own.tolist(), [others.tolist(), [9.0] * 30], list(range(30)))
    assert found is not None
    assert set(found.rows) == set(range(15))
    assert (found.groups, found.of) == (15, 30)
    assert found.loss == pytest.approx(own[:15].mean())
    assert found.others == pytest.approx(others[:15].mean())
    assert found.chance < found.apart <= 1


def test_the_rows_of_a_context_count_once():
    own, others = drawn(30, 1, known=0.5)
    twice = known_rows(
        np.repeat(own, 2).tolist(),
        [np.repeat(others, 2).tolist()],
        np.repeat(range(30), 2).tolist(),
    )
    once = known_rows(own.tolist(), [others.tolist()], list(range(30)))
    assert twice is not None
    assert once is not None
    assert (twice.groups, twice.of, twice.apart) == (
        once.groups,
        once.of,
        pytest.approx(once.apart),
    )
    assert len(twice.rows) == 2 * len(once.rows)
    few = [str(i // 5) for i in range(30)]
    assert known_rows(own.tolist(), [others.tolist()], few) is None, "six contexts are too few"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_show_nothing(bad):
    own, others = drawn(30, 1, known=0.5)
    assert known_rows([bad, *own[1:]], [others.tolist()], list(range(30))) is None
    assert known_rows(own.tolist(), [[bad, *others[1:]]], list(range(30))) is None


def test_equal_shares_and_what_everybody_knows_show_nothing():
    assert known_rows([1.0] * 20, [[2.0] * 20], list(range(20))) is None
    easy = [1e-4] * 10 + [1.0] * 10
    assert known_rows(easy, [[2e-3] * 10 + [1.2] * 10], list(range(20))) is None


def recorded() -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return (pair, losses, lowest of backbone and source adapter) of adapters trained elsewhere.

    They were trained on the train rows of recorded runs, and measured on held rows and test rows.
    """
    columns = ["collection", "method", "losses.micro_dev", "losses.dev", "rows.test.values.loss"]
    found = []
    for file in sorted(RECORDS.glob("en-*.parquet")):
        rows = [
            row
            for row in pq.read_table(file, columns=columns).to_pylist()
            if row["collection"] == "runs" and row["losses.dev"]
        ]
        for name in ("held", "test"):

            def losses(row, name=name):
                held = row["losses.micro_dev"] + row["losses.dev"]
                return np.array(held if name == "held" else row["rows.test.values.loss"])

            first = {row["method"]: losses(row) for row in reversed(rows)}
            others = np.minimum(first["zero-shot"], first["source"])
            found += [
                (file.stem, losses(row), others)
                for row in rows
                if row["method"] not in ("zero-shot", "source") and np.isfinite(losses(row)).all()
            ]
    return found


@pytest.mark.parametrize("n", [16, 50])
def test_recorded_adapters_that_saw_no_held_row_are_seldom_flagged(n):
    """The level on losses of real adapters, whose distribution nobody chose; and the power."""
    rng = np.random.default_rng(0)
    alarms, hits = [], []
    for _, own, others in recorded():
        at = rng.choice(len(own), n, replace=False)
        memorised = np.where(np.arange(n) < n // 2, own[at] / 20, own[at])
        alarms.append(known_rows(own[at].tolist(), [others[at].tolist()], list(range(n))))
        hits.append(known_rows(memorised.tolist(), [others[at].tolist()], list(range(n))))
    alarm, hit = (sum(one is not None for one in found) / len(found) for found in (alarms, hits))
    print(f"{n} rows of {len(alarms)} recorded adapters: alarms {alarm:.1%}, half known {hit:.0%}")
    assert alarm <= 0.02
    assert hit >= {16: 0.4, 50: 0.7}[n]
