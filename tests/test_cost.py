"The recipes against the facts of the method, dry runs as commands, the plan against what Snakemake would do."
import json, shutil, subprocess, sys
from pathlib import Path
import pytest
from lewel.cost import SUSTAINED, compare_costs, cost_table, plan, print_plan, trainings, write_cost
from lewel.experiments import Settings, read_settings
from lewel.methods import check_options
from lewel.optim import warmup_cosine
from lewel.paper import get_recipe, recipes
from lewel.results import read_record, write_record
from lewel.target import momentum_schedule

root = Path(__file__).resolve().parent.parent

# --- the paper's recipes (method.md sections 2 to 5)

PAPER = { # epochs, warm-up, batch, lr, weight decay, m0, target norm, optimizer, views
    "lewel_b": (200, 10, 1024, 3.6, 1.5e-6, 0.98, "eman", "lars", "byol"),
    "lewel_b_syncbn": (400, 10, 4096, 7.2, 1e-6, 0.996, "params", "lars", "byol"),
    "byol": (200, 5, 512, 1.8, 1e-6, 0.98, "eman", "lars", "byol"),
    "mocov2": (200, 0, 256, 0.03, 1e-4, 0.999, "params", "sgd", "mocov2"),
    "lewel_m": (200, 0, 256, 0.03, 1e-4, 0.999, "params", "sgd", "mocov2")}

@pytest.mark.parametrize("name", PAPER)
def test_paper_recipe(name):
    r = recipes["paper"][name]
    o = check_options(r.method, r.options)
    assert (r.epochs, r.warmup_epochs, r.batch_size, r.lr, r.weight_decay, o["base_momentum"], o["target_norm"],
            r.optimizer, r.views) == PAPER[name]
    assert (r.backbone, r.size, r.momentum, r.view_options, r.adapt_head_norms) == ("resnet50", 224, 0.9, {}, name == "lewel_b_syncbn")

def test_paper_methods():
    "Heads, loss and queue."
    for name in "byol", "lewel_b":
        o = check_options(name, recipes["paper"][name].options)
        assert (o["dim"], o["hidden_dim"], o["symmetric"], o["cosine_momentum"]) == (256, 4096, True, True)
        assert recipes["paper"][name].precision == "float16"
    for name in "mocov2", "lewel_m":
        o = check_options(name, recipes["paper"][name].options)
        assert (o["dim"], o["queue_size"], o["temperature"], o["symmetric"], o["cosine_momentum"]) == (128, 65536, 0.2, False, False)
    for name in "lewel_b", "lewel_m":
        o = check_options(name, recipes["paper"][name].options)
        assert (o["groups"], o["scale"], o["global_weight"], o["coupled"]) == (4, 1, 0.5, True)

def test_published_log_follows_from_the_recipe():
    "The points of the 100-epoch log, with the recipe's own numbers."
    r = get_recipe("lewel_b", "paper", epochs=100)
    steps, m0 = 1_281_167//r.batch_size, check_options(r.method, r.options)["base_momentum"]
    assert steps == 1251
    lr = {e: round(warmup_cosine(e*steps - 1, steps, r.epochs, r.warmup_epochs, r.lr), 6) for e in (1, 10, 15, 50, 100)}
    assert lr == {1: 0.36, 10: 3.6, 15: 3.582483, 50: 2.174241, 100: 0.001097}
    momentum = [round(momentum_schedule(t, 100*steps, m0), 6) for t in (steps - 1, 50*steps, 100*steps)]
    assert momentum == [0.980005, 0.99, 1.0]

# --- dry runs

@pytest.mark.slow
def test_dry_run_of_pretraining_at_full_size(run, tmp_path, monkeypatch):
    "The paper's network, batch and schedule, without data or output folder, and nothing is written."
    monkeypatch.chdir(tmp_path)
    done = run("pretrain", "--dry-run", "--scale", "paper", "--method", "mocov2", "--device", "cpu", "--dry-batch", 2)
    assert done.code == 0, done
    for word in ("resnet50, 224 px, 200 epochs of 1,281,167 images", "1,000,800 steps", "a step of 256 images",
                 "measured at a batch of 2", f"assuming that a GPU sustains {SUSTAINED/1e12:g} T"):
        assert word in done.out, word
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("protocol", ["linear", "semi", "segmentation", "detection", "instance", "instance_c4"])
def test_dry_run_of_evaluations(run, protocol):
    done = run("evaluate", "--dry-run", "--preset", "smoke", "--protocol", protocol, "--device", "cpu")
    assert done.code == 0 and f"{protocol}, preset smoke, small" in done.out and "GPU-hours, assuming" in done.out, done

@pytest.mark.slow
@pytest.mark.parametrize("command,what", [*(("pretrain", m) for m in recipes["paper"]), *(("evaluate", p) for p in trainings)])
def test_every_configuration_of_the_paper_takes_two_steps(run, command, what):
    "At its full size; minutes on a CPU."
    names = ("--scale", "paper", "--method") if command == "pretrain" else ("--preset", "paper", "--backbone", "resnet50", "--protocol")
    done = run(command, "--dry-run", *names, what, "--device", "cpu", "--dry-batch", 2)
    assert done.code == 0 and "resnet50" in done.out and "assuming that a GPU sustains" in done.out, done

def test_dry_run_counts_images_of_a_folder(run, flat):
    done = run("pretrain", "--dry-run", "--scale", "smoke", "--method", "byol", "--device", "cpu", "--data", flat)
    assert done.code == 0 and "2 epochs of 48 images" in done.out and " 6 steps" in done.out, done

@pytest.mark.parametrize("argv,says", [(["--dry-run", "--method", "lewel_bb"], "lewel_b"),
                                       (["--dry-run", "--dry-batch", 1], "at least 2"),
                                       (["--dry-run", "--dry-batch", 10**8], "--dry-batch"),
                                       (["--out", "x"], "--data"),
                                       (["--dry-batch", 4, "--data", "x", "--out", "y"], "--dry-run")])
def test_dry_run_mistakes(run, argv, says):
    done = run("pretrain", "--scale", "smoke", "--device", "cpu", *argv)
    assert done.code == 2 and says in done.err and done.err.count("\n") == 1, done

# --- the plan

def test_plan_is_what_snakemake_would_do(tmp_path):
    "Every job of the Snakefile with the same command, and no other."
    shutil.copy(root/"settings.ini", tmp_path)
    env = dict(PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin", HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path),
               LEWEL_SCALE="smoke", LEWEL_SEEDS="2")
    said = subprocess.run(["snakemake", "--snakefile", root/"experiments/Snakefile", "--directory", tmp_path,
                           "--cores", "1", "--nolock", "--dry-run", "--forceall", "--printshellcmds",
                           "--resources", "gpu=1"], env=env, capture_output=True, text=True)
    jobs = {line[line.index("python experiments/run.py"):]
            for line in (said.stdout + said.stderr).splitlines() if ".ipynb" in line and "python experiments/run.py" in line}
    rows = plan(read_settings(root/"settings.ini", scale="smoke", seeds=2))
    commands = {r["command"] for r in rows}
    assert len(commands) == len(rows), said.stderr[-2000:]
    assert commands == {j for j in jobs if not any(f"experiments/{kind}_" in j
                                                   for kind in ("table", "figure"))}, said.stderr[-2000:]

def test_plan_of_the_paper_without_data(capsys):
    print_plan(Settings("paper", seeds=1, ablation_seeds=0))
    out = capsys.readouterr().out
    for word in ("lewel_b_syncbn-s0", "ImageNet-1k", "COCO 2017", "MISSING, set paper in [data]",
                 "assuming that a GPU sustains", "instance_2x instance_c4",
                 "torchrun --standalone --nproc-per-node 8 -m lewel.pretrain --scale paper --method lewel_b_syncbn",
                 "With the ablations of one seed"):
        assert word in out, word
    with pytest.raises(ZeroDivisionError): plan(Settings("smoke"), sustained=0)

# --- the table

def test_cost_table_is_a_function_of_the_record(tmp_path):
    record = compare_costs("smoke", "cpu", repeats=1, batch=8)
    write_record(tmp_path, record)
    for name in "a", "b": write_cost(read_record(tmp_path), tmp_path/name)
    for suffix in "csv", "md": assert (tmp_path/f"a.{suffix}").read_bytes() == (tmp_path/f"b.{suffix}").read_bytes()
    table = cost_table(json.loads((tmp_path/"record.json").read_text())).set_index("method")
    assert list(table.index) == ["mocov2", "lewel_m", "byol", "lewel_b"] and set(table.batch) == {8}
    for lewel, base in ("lewel_m", "mocov2"), ("lewel_b", "byol"):
        assert table.baseline[lewel] == base and table["time ratio"][lewel] == table["ms a step"][lewel]/table["ms a step"][base]
        assert table["multiply-adds ratio"][lewel] > 1 and table["multiply-adds ratio"][base] == 1
    assert "WIRING TEST ONLY" in (tmp_path/"a.md").read_text()
