"The graph of experiments: jobs, the lock, a cluster."
import os, re, runpy, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
from lewel.checkpoint import load_checkpoint
from lewel.core import atomic_write
from lewel.cost import condition_plan
from lewel.experiments import Settings, adopt, only_one
from lewel.paper import condition_runs
from lewel.results import read_records

root = Path(__file__).resolve().parent.parent

def call(*command, **environment):
    "Run a command in a folder of the repository's files; its (code, output, errors)."
    done = subprocess.run([str(c) for c in command], cwd=root,
                          env=os.environ | dict(PYTHONWARNINGS="ignore", OMP_NUM_THREADS="1") | environment,
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr

@pytest.fixture
def script(monkeypatch, capsys):
    "Run a script of the experiments in this process: script('run.py', ...) -> (code, output, errors)."
    def run(name, *argv, folder=root, **environment):
        with monkeypatch.context() as m:
            m.chdir(folder)
            m.setattr(sys, "argv", [name, *map(str, argv)])
            for variable, value in environment.items(): m.setenv(variable, value)
            with pytest.raises(SystemExit) as stop: runpy.run_path(f"experiments/{name}", run_name="__main__")
        return stop.value.code or 0, *capsys.readouterr()
    return run

@pytest.fixture
def refused(script):
    "What a script says to what it refuses: exit code 2 and one line."
    def run(*argv, **environment):
        code, out, err = script(*argv, **environment)
        assert code == 2 and out == "" and len(err.splitlines()) == 1, (code, out, err)
        return err
    return run

@pytest.mark.slow
def test_ablation_job(tmp_path):
    "One factor, from its notebook to records that name their pretraining, and a mark."
    out = tmp_path/"ablations"/"lewel_m-target-s0"
    code, _, err = call(sys.executable, "experiments/run.py", "experiments/ablation.ipynb", tmp_path/"copy.ipynb",
                        tmp_path/"mark", "scale=smoke", "method=lewel_m", "factor=target", "device=cpu", "seed=0",
                        f"out={out}")
    assert code == 0, err
    assert (tmp_path/"mark").read_text() == "done"
    trained, judged = (next(r for r in read_records(out) if r["kind"] == kind) for kind in ("pretrain", "evaluation"))
    assert judged["builds_on"] == [trained["id"]]
    assert trained["recipe"]["options"]["target_norm"] == "eman"     # the value that is not the default

@pytest.mark.parametrize("wrong, words", [("method=lewel_c", "did you mean 'lewel_"),
                                          ("sede=1", "did you mean 'seed'?"), ("seed=-1", "must be at least 0"),
                                          ("seed=one", "must be of type int"), ("scale=dem", "did you mean 'demo'?")])
def test_impossible_parameters_are_refused_before_a_kernel_starts(tmp_path, refused, wrong, words):
    assert words in refused("run.py", "experiments/pretrain.ipynb", tmp_path/"copy.ipynb", wrong)
    assert not (tmp_path/"copy.ipynb").exists()

@pytest.mark.parametrize("argv", [[], ["experiments/pretrain.ipynb"],
                                  ["experiments/pretrain.ipynb", "copy.ipynb", "--needs", "run"],
                                  ["a.ipynb", "b.ipynb", "mark", "run"]])
def test_run_says_how_it_is_used(argv, refused):
    "One line, not a traceback, where places are missing or too many."
    assert "usage: run.py NOTEBOOK EXECUTED-COPY" in refused("run.py", *argv, *(["seed=0"] if argv else []))

def test_a_job_without_its_folder_is_refused(tmp_path, refused):
    argv = "experiments/pretrain.ipynb", tmp_path/"copy.ipynb", tmp_path/"mark", "seed=0"
    assert "needs the parameter out" in refused("run.py", *argv)
    assert not (tmp_path/"mark").exists()

def test_arguments_that_run_nothing():
    "With them results stay where they are."
    asking = runpy.run_path(str(root/"experiments/reproduce.py"))["ASKING"].fullmatch
    assert all(map(asking, "-n -np -pn --dry-run --dryrun --dag --rulegraph --summary -S -l --list-rules --lint --report -h".split()))
    assert not any(map(asking, "-p -k -j4 --cores --keep-going --printshellcmds --profile --report-after-run --nolock".split()))

@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_job_that_is_asked_to_stop_saves(number, tmp_path):
    "In the middle of its training: the step at hand is finished and saved, one line, no mark, no failure."
    out = tmp_path/"runs"/"byol-s0"
    command = [sys.executable, "experiments/run.py", "experiments/pretrain.ipynb", tmp_path/"copy.ipynb", tmp_path/"mark",
               "scale=demo", "method=byol", "device=cpu", "seed=0", "data=scenes", f"out={out}"]
    process = subprocess.Popen(list(map(str, command)), cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=os.environ | dict(PYTHONWARNINGS="ignore", OMP_NUM_THREADS="1"))
    while not (out/"last.pt").exists(): time.sleep(0.2); assert process.poll() is None       # the first epoch
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err.splitlines()[-1].startswith(f"{out}: stopped by SIGTERM; saved {out/'last.pt'}"), err
    assert "Traceback" not in err
    state = load_checkpoint(out/"last.pt")
    assert state["epoch"] >= 1 and (state["epoch"], state["step"]) != (1, 0)
    assert not (tmp_path/"mark").exists() and not (out/"failed.json").exists() and not (out/"record.json").exists()

def test_a_second_reproduction_is_refused(refused):
    with only_one(root/"results"/"smoke"):
        assert refused("reproduce.py", "--cores", 1, LEWEL_SCALE="smoke").startswith("error: another reproduction is at work")

@pytest.mark.parametrize("setting, words", [(dict(LEWEL_SCALE="demmo"), "did you mean 'demo'?"),
                                            (dict(LEWEL_SEEDS="0"), "at least 1"),
                                            (dict(LEWEL_SCALE="paper"), "names no data for scale 'paper'")])
def test_wrong_settings_are_refused(refused, setting, words):
    assert words in refused("reproduce.py", "--cores", 1, **setting)

def test_a_job_without_its_mark_is_done_again(tmp_path):
    """Even where the tables are there: of a failed job, which is tried again with what depends on it and nothing
    else; and of all jobs, in a clone, which has tables and no marks."""
    shutil.copy(root/"settings.ini", tmp_path)
    def snakemake(*options):
        command = (Path(sys.executable).parent/"snakemake", "--snakefile", root/"experiments/Snakefile",
                   "--directory", tmp_path, "--cores", 1, "--nolock", "--rerun-triggers", "mtime", *options)
        code, out, err = call(*command, LEWEL_SCALE="smoke", LEWEL_SEEDS="1", LEWEL_ABLATION_SEEDS="0")
        assert code == 0, err
        return out + err
    def jobs(): return dict(re.findall(r"^(\w+) +(\d+)$", snakemake("--dry-run", "--quiet", "rules"), re.M))
    everything = jobs()
    assert (everything["pretrain"], everything["evaluate"], everything["evaluate_dense"]) == ("4", "6", "6")
    outputs = [tmp_path/f for f in re.findall(r"^(results/\S+)\t", snakemake("--summary"), re.M)]
    for age, kind in enumerate((".trained", ".evaluated", "")):
        for f in outputs:
            if f.suffix == kind or not kind and f.parent.name != "marks":
                atomic_write(f, "done")
                os.utime(f, (age, age))
    assert not jobs()
    (tmp_path/"results/smoke/marks/byol-s0.evaluated").unlink()
    again = jobs()
    assert again["evaluate"] == "1" and "pretrain" not in again and "table" in again
    shutil.rmtree(tmp_path/"results/smoke/marks")
    again = jobs()
    assert (again["pretrain"], again["supervised"], again["evaluate"], again["evaluate_dense"]) == ("4", "1", "6", "6")

def test_conditions_when_asked_for():
    "CONDITIONS=1 adds a job for each run under other conditions, each with its recipe's condition, and their figure."
    code, out, err = call(Path(sys.executable).parent/"snakemake", "--snakefile", "experiments/Snakefile", "--nolock",
                          "--dry-run", "--forceall", "--printshellcmds", LEWEL_SCALE="demo", LEWEL_CONDITIONS="1")
    assert code == 0, err
    assert ({tuple(found) for found in re.findall(r" condition=(\S+) method=(\S+) seed=(\d+) ", out + err)}
            == {(c, m, str(s)) for c, m, s in condition_runs()})
    assert "figure_conditions.ipynb results=results/demo" in out + err
    planned = [r["command"] for r in condition_plan(Settings("demo", conditions=1))]
    assert all(re.sub(" +", " ", command) in " ".join((out + err).split()) for command in planned) and len(planned) == len(condition_runs())

def test_slurm_profile(tmp_path, monkeypatch):
    """As `make reproduce` calls Snakemake with the profile: it accepts it,
    and every job would ask for a GPU, though the login node has none."""
    for name in "MAKEFLAGS", "GPUS", "SNAKEMAKE": monkeypatch.delenv(name, raising=False)
    nothing = tmp_path/"nvidia-smi"
    nothing.write_text("#!/bin/sh\nexit 1\n"); nothing.chmod(0o755)
    def options(*given):
        "What make passes on."
        code, out, err = call("make", "--no-print-directory", "-n", "reproduce", f"VENV={sys.prefix}",
                              "-o", f"{sys.prefix}/installed", *given, PATH=f"{tmp_path}:{os.environ['PATH']}")
        assert code == 0, err
        return shlex.split(out.split("experiments/reproduce.py")[1])
    profile = "SNAKEMAKE=--profile experiments/slurm"
    assert options()[:2] == ["--resources", "gpu=0"] and options(profile, "GPUS=3")[:2] == ["--resources", "gpu=3"]
    code, out, err = call(Path(sys.executable).parent/"snakemake", "--snakefile", "experiments/Snakefile",
                          *options(profile), "--nolock", "--dry-run", "--forceall", LEWEL_SCALE="imagenette",
                          LEWEL_SEEDS="3", LEWEL_DEVICE="auto")
    assert code == 0, err
    trainings = re.findall(r"^rule (?:pretrain|supervised|evaluate|ablation):.*?resources: (.*?)$", out + err, re.M | re.S)
    assert len(trainings) > 20 and all("slurm_partition=gpu" in r and r.endswith("gpu=1") for r in trainings)

def test_published_results_can_be_added_to(tmp_path):
    "KEEP=1: what has a record counts as done, and one more seed is one more job of each kind."
    shutil.copy(root/"settings.ini", tmp_path)
    shutil.copytree(root/"results/demo", tmp_path/"results/demo", ignore=shutil.ignore_patterns("marks", "*.pt"))
    place = dict(demo="scenes")
    settings = Settings("demo", seeds=4, data=place, segmentation=place, detection=place)
    assert len(adopt(tmp_path/"results/demo", settings)) > 300
    code, out, err = call(Path(sys.executable).parent/"snakemake", "--snakefile", root/"experiments/Snakefile",
                          "--directory", tmp_path, "--cores", 1, "--nolock",
                          "--rerun-triggers", "mtime", "input", "params", "--dry-run", "--quiet", "rules",
                          LEWEL_SCALE="demo", LEWEL_SEEDS="4", LEWEL_CONDITIONS="1")
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", out + err, re.M))
    missing = [run for run in condition_runs() if not (root/"results/demo/conditions/{}/{}-s{}/record.json".format(*run)).exists()]
    assert code == 0 and int(jobs.get("condition", 0)) == len(missing), err
    assert (jobs["pretrain"], jobs["supervised"]) == ("4", "1"), err
    assert (jobs["evaluate"], jobs["evaluate_dense"]) == ("6", "6"), err
    assert {"table", "figure", "figure_alignment", "figure_conditions"} <= jobs.keys()

def test_what_keep_would_do(tmp_path, script):
    "KEEP=1 DRY_RUN=1 lists what a fourth seed needs; fewer seeds than there are records of are refused, and nothing is touched."
    for name in "settings.ini", "experiments": (tmp_path/name).symlink_to(root/name)
    shutil.copytree(root/"results/demo", tmp_path/"results/demo", ignore=shutil.ignore_patterns("marks", "*.pt"))
    def files(): return {p: p.stat().st_mtime for p in (tmp_path/"results").rglob("*") if p.is_file() and p.name != ".lock"}
    before = files()
    def reproduce(*arguments, **asked):
        return script("reproduce.py", "--cores", 1, *arguments, folder=tmp_path, **dict(LEWEL_SCALE="demo", LEWEL_KEEP="1") | asked)
    code, out, err = reproduce(LEWEL_SEEDS="4", LEWEL_DRY_RUN="1")
    assert code == 0 and out.startswith("Plan of scale demo, 4 seeds: 36 runs"), out[:300] + err
    named = re.findall(r"^\S+?-s(\d)", out, re.M)
    assert set(named) == {"3"} and "mocov2-s3:" in out, named
    assert re.search(r"as recorded .* minutes for 36 of 36 runs\.", out, re.I), out[-500:]     # by those of the other seeds
    code, out, err = reproduce(LEWEL_SEEDS="3", LEWEL_DRY_RUN="1")
    assert code == 0 and out.startswith("Plan of scale demo, 3 seeds: 0 runs"), err
    code, out, err = reproduce(LEWEL_SCALE="smoke", LEWEL_DRY_RUN="1")                           # of which there are no records
    assert code == 0 and out.startswith("Plan of scale smoke") and ": 0 runs" not in out, err
    code, out, err = reproduce("-np", LEWEL_SEEDS="4")
    assert code == 2 and "KEEP=1 DRY_RUN=1 lists what is left" in err, err
    code, out, err = reproduce(LEWEL_SEEDS="2", LEWEL_DRY_RUN="0")
    assert code == 2 and "would no longer be in the tables: with KEEP=1 ask for as many seeds" in err, err
    assert files() == before
