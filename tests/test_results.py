"Tables, README and records agree."
import shutil
from pathlib import Path
import pandas as pd
import pytest
from lewel.cost import write_cost
from lewel.core import read_failures
from lewel.experiments import published_results, write_page
from lewel.paper import ablation_factors
from lewel.results import PAIRS, ablation_table, make_table, read_record, read_records, write_table

root = Path(__file__).resolve().parent.parent
demo = published_results(root/"results"/"demo")
TABLES = "linear", "semi", "segmentation", "detection", "ablations", "cost"

def rebuild(name, stem, caption):
    "Make a table of the demo again from its records."
    if name == "cost": return write_cost(read_record(demo/"cost"), stem)
    if name == "ablations":
        records = read_records(demo/"ablations")
        runs, evaluations = ([r for r in records if r["kind"] == kind] for kind in ("pretrain", "evaluation"))
        return write_table(ablation_table(runs, evaluations, dict(knn_top1="kNN top-1", linear_top1="linear top-1"), "demo"), stem, caption)
    return write_table(make_table(read_records(demo/"evaluations"), name, read_failures(demo/"evaluations")), stem, caption)

@pytest.mark.parametrize("name", TABLES)
def test_table_is_what_the_records_say(name, tmp_path):
    "Rebuilding a table from the committed records gives the committed bytes."
    rebuild(name, tmp_path/name, (demo/"tables"/f"{name}.md").read_text().splitlines()[0])
    for suffix in ".csv", ".md": assert (tmp_path/f"{name}{suffix}").read_bytes() == (demo/"tables"/f"{name}{suffix}").read_bytes()

@pytest.mark.parametrize("name, labels", [("linear", ["kNN-20 top-1", "linear top-1"]), ("semi", ["1% top-1", "10% top-1"]),
                                          ("segmentation", ["mIoU"]), ("detection", ["AP"])])
def test_readme_shows_the_numbers_of_the_tables(name, labels):
    "Every method's mean and standard deviation stand in the README as they are in results/."
    rows = [line.split("|")[1:] for line in (root/"README.md").read_text().splitlines() if line.startswith("|") and "±" in line]
    shown = {method.strip(): cells for method, *cells in rows}
    columns = "kNN-20 top-1", "linear top-1", "1% top-1", "10% top-1", "mIoU", "AP"
    for r in pd.read_csv(demo/"tables"/f"{name}.csv").to_dict("records"):
        for label in labels:
            assert shown[r["method"]][columns.index(label)].strip() == f"{r[f'{label} mean']:.1f} ± {r[f'{label} std']:.1f}"

def test_evaluations_build_on_runs_that_are_there():
    "Every evaluation names a pretraining run whose record is committed, made of the same recipe and seed."
    runs = {r["id"]: r for r in read_records(demo/"runs")}
    for e in read_records(demo/"evaluations"):
        assert e["method"] == "random" or [runs[i]["seed"] for i in e["builds_on"]] == [e["seed"]]
        assert e["scale"] == "demo"

def test_numbers_mean_something():
    "Every method is well above chance (10%) and above the random backbone in linear classification."
    table = pd.read_csv(demo/"tables"/"linear.csv").set_index("method")
    assert set(table.index) == {"random", "mocov2", "lewel_m", "byol", "lewel_b", "supervised"}
    for method in table.index.drop("random"):
        assert table.loc[method, "linear top-1 mean"] > max(20, table.loc["random", "linear top-1 mean"])

def test_every_value_of_every_factor_was_run():
    "Table 5 holds the whole grid of ablations, and the plain baselines."
    table = pd.read_csv(demo/"tables"/"ablations.csv", dtype=dict(value=str))
    there = set(zip(table.method, table.factor, table.value))
    for method, baseline in PAIRS.items():
        assert (method, "baseline", baseline) in there
        assert {(method, f, v) for f, values in ablation_factors(method).items() for v in values} <= there

def test_at_least_three_seeds():
    "Tables 1 to 3 rest on three seeds or more for each method."
    for name in "linear", "semi", "segmentation", "detection": assert (pd.read_csv(demo/"tables"/f"{name}.csv")["n"] >= 3).all()

def test_page_leads_to_the_records(tmp_path):
    """Every run that a table rests on is linked, evaluation and pretraining, and so is the record of the costs;
    what the notebooks print as a table is one."""
    page = write_page(shutil.copytree(demo, tmp_path/"demo")).read_text()
    for kind in "runs", "evaluations", "ablations", "cost":
        for path in (demo/kind).rglob("record.json"): assert f'href="{path.relative_to(demo).as_posix()}"' in page
    assert "<li>|" not in page and ">default-uniform</td>" in page
    assert "<strong>LEWEL_B: no gain over BYOL could be shown under any of these conditions</strong>" in page
