"""What the README tells a person to write works as it stands there."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.config import JobConfig
from recsys.config import load_config
from recsys.data.prepare import prepare
from recsys.files import read_json

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_reads_a_persons_own_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(block.splitlines()) <= 11
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("own.yaml").write_text(block)
    start = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    rows = range(200)
    purchases = {
        "customer": [f"c{row % 20}" for row in rows],
        "sku": [f"s{row * 7 % 30}" for row in rows],
        "bought_at": [start + dt.timedelta(hours=row) for row in rows],
        "quantity": [1.0] * len(rows),
        "till": [3] * len(rows),
    }
    pq.write_table(pa.table(purchases), "data/purchases.parquet")
    names = [f"thing {row}" for row in range(30)]
    products = {"sku": [f"s{row}" for row in range(30)], "name": names, "weight": [1] * 30}
    pq.write_table(pa.table(products), "data/products.parquet")
    config = load_config(JobConfig, "own.yaml")
    dataset = prepare(config.data, config.seed, tmp_path / "prepared")
    assert (dataset.num_users, dataset.num_items, dataset.info.num_positives) == (20, 30, 200)
    assert dataset.items["title"][0].as_py().startswith("thing")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    assert load_config(JobConfig, path).name == path.stem
    assert yaml.safe_load(path.read_text())


def test_the_figures_of_the_readme_are_the_measured_ones() -> None:
    results = [read_json(path) for path in sorted((ROOT / "tests/benchmarks/results").glob("*.json"))]
    rows = {row["name"]: row for file in results for row in file}
    readme = (ROOT / "README.md").read_text()
    systems = rows["ndcg10_served_minus_best_baseline"]["details"]
    for name, interval in systems.items():
        assert f"| {interval['mean']:.4f} |" in readme, f"the README's table lacks {name}"
    for name, metrics in rows["beauty_id_ndcg10"]["details"]["systems"].items():
        assert f"{metrics['ndcg@10']:.4f}" in readme, f"the README's text lacks {name}"
    for name, row in rows.items():
        value = f"{row['value']:.4g}" if row["value"] < 1e6 else f"{row['value']:.3g}".replace("e+0", "e")
        outcome = "met" if row["passes"] else "**missed**"
        found = re.search(
            rf"^\| `{name}` \| {re.escape(value)}( \w+)? \| .* \| {re.escape(outcome)} \|$", readme, re.MULTILINE
        )
        assert found, f"the README's row of {name} is not {value}, {outcome}"
