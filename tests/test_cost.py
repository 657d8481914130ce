"The recipes against the facts of the method, dry runs as commands, the plan against what Snakemake would do."
import shutil, subprocess, sys
from pathlib import Path
import pytest
from lewel.cost import SUSTAINED, plan, trainings
from lewel.experiments import read_settings
from lewel.methods import check_options
from lewel.paper import recipes

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
