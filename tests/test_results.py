"The records hold what the tables claim, and the page leads to them."
import shutil
from pathlib import Path
import pandas as pd
from lewel.experiments import published_results, write_page
from lewel.paper import ablation_factors
from lewel.results import PAIRS, read_records

root = Path(__file__).resolve().parent.parent
demo = published_results(root/"results"/"demo")

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
