"Two processes under torchrun, connected by gloo, against one: the same images, weights and queues; stopping and dying together."
import os, runpy, signal, socket, subprocess, sys, time
from pathlib import Path
import pytest, torch
from conftest import draw, options
from fastai.callback.core import Callback
from lewel.checkpoint import load_checkpoint
from lewel.cli import pretrain_command
from lewel.core import UserError, atomic_write
from lewel.paper import get_recipe
from lewel.pretrain import StopAt, pretrain
from lewel.running import Stopped, from_all_ranks, lock_output, process_group
from lewel.results import read_curve, read_record
from lewel.scenes import scenes
from lewel.target import synchronize_norms, world

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes to kill in /proc")
SGD = dict(size=32, batch_size=8, epochs=1, optimizer="sgd", lr=0.05)
BYOL, MOCO = dict(dim=16, hidden_dim=32, target_norm="params"), dict(dim=16, queue_size=20, target_norm="params")
RECIPES = dict(
    byol=get_recipe("byol", "smoke", **SGD, options=BYOL),
    lewel_b=get_recipe("lewel_b", "smoke", **SGD | dict(optimizer="lars", lr=1.), options=BYOL),
    mocov2=get_recipe("mocov2", "smoke", **SGD, options=MOCO),
    lewel_m=get_recipe("lewel_m", "smoke", **SGD, options=MOCO | dict(symmetric=True)))
LONG = RECIPES["lewel_b"].changed(epochs=2)

class Exactly(Callback):
    "Float64, synchronized BatchNorm for every method, and a note of which images came in each step."
    def after_create(self):
        synchronize_norms(self.model.double(), "cpu")
        for net in self.model.online, self.model.target: net.register_forward_pre_hook(lambda module, args: (args[0].double(),))
        self.served = []

    def before_batch(self): self.served.append((self.learn.step, self.yb[0].tolist()))

def run(recipe, out, *cbs, **more):
    "Train on 24 images for three steps an epoch; returns which images each step had."
    exactly = Exactly()
    try:
        pretrain(recipe, scenes("train", n=24, size=32), out, "cpu", monitor_every=0, log_every=1, progress="none",
                 cbs=[exactly, *cbs], **more)
    except Stopped as e: assert cbs and e.exit_code == 128 + signal.SIGTERM
    shares = from_all_ranks(exactly.served)
    return {step: sum((dict(share)[step] for share in shares), []) for step, _ in shares[0]}

class KeepModel(Callback):
    def after_fit(self): self.state = {k: v.clone() for k, v in self.model.state_dict().items()}

class OverflowInOne(KeepModel):
    "In the second step the loss of the second process is too large for float16; notes the scale after each step."
    def __init__(self): self.scales = []
    def after_loss(self): self.learn.loss_grad = self.loss_grad*(1e30 if self.learn.step == 1 and world()[0] else 1)
    def after_batch(self): self.scales.append(self.precision.scaler.get_scale())

def long_run(root):
    return options(root/"data", root/"killed", "--method", "lewel_m", "--epochs", 100, "--batch-size", 4,
                   "--save-every", 1, "--monitor-every", 0)

def short_run(root, out):
    return options(root/"data", out, "--method", "lewel_b", "--option", "target_norm=params", "--epochs", 1, "--batch-size", 8)

def work(root):
    "What each of the two processes does."
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        rank = world()[0]
        seen = {name: run(recipe, root/name) for name, recipe in RECIPES.items()}
        seen["stopped"] = run(LONG, root/"stopped", *([StopAt(4)] if rank else [Callback()]))       # only the second one is told
        seen["begun"] = run(LONG, root/"begun")                                                     # by one process, see `job`
        run(RECIPES["lewel_b"], root/"parts", accumulate=2)
        half = OverflowInOne()
        pretrain(RECIPES["lewel_m"].changed(precision="float16"), scenes("train", n=24, size=32), root/"half", "cpu",
                 monitor_every=0, progress="none", cbs=[half])
        (a, scales), (b, others) = from_all_ranks((half.state, half.scales))
        assert all(torch.equal(v, b[k]) for k, v in a.items()) and scales == others and scales[1] == scales[0]/2, (scales, others)
        for name, norm in ("lewel_m", "eman"), ("mocov2", "params"):                                # BatchNorm per process
            kept, recipe = KeepModel(), RECIPES[name].changed(options=RECIPES[name].options | dict(target_norm=norm))
            pretrain(recipe, scenes("train", n=24, size=32), root/f"{name}_{norm}", "cpu", monitor_every=1, progress="none", cbs=[kept])
            states = from_all_ranks(kept.state)
            assert all(torch.equal(v, states[1][k]) for k, v in states[0].items()), name
        for wrong, batch in (dict(accumulate=3), 8), ({}, 9), (dict(accumulate=4), 8):
            try: run(RECIPES["byol"].changed(batch_size=batch), root/"wrong", **wrong); assert False
            except UserError as e: assert "\n" not in str(e)
        try: run(RECIPES["byol"], root/"held"); assert False
        except UserError as e: assert "another process is writing" in str(e)                       # both are told
        assert pretrain_command(short_run(root, root/"one node")) == 0
        if rank == 0: atomic_write(root/"seen.pt", lambda f: torch.save(seen, f))                  # whoever waits for it never sees a part
        # python -m lewel.pretrain, until the second process is killed
        sys.argv[1:] = long_run(root)
        runpy.run_module("lewel.pretrain", run_name="__main__")

def rank_of(pid):
    "A process's rank, as torchrun has told it."
    return dict(line.partition("=")[::2] for line in Path(f"/proc/{pid}/environ").read_text().split("\0")).get("RANK")

def children(pid): return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task/"children").read_text().split()]

def wait_for(process, file, reached=lambda state: True):
    "Until a file is there and accepted."
    limit = time.time() + 600      # of a machine that hangs; on a slow one with other work it takes minutes
    while not (file.exists() and reached(torch.load(file, weights_only=True))):
        assert process.poll() is None and time.time() < limit, process.communicate()[0] if process.poll() is not None else "too slow"
        time.sleep(.05)

@pytest.fixture(scope="module")
def job(tmp_path_factory):
    "What two processes did until the second was killed: their folder, torchrun's exit code, and what they said."
    root = tmp_path_factory.mktemp("two")
    draw(root/"data", 48)
    run(LONG, root/"begun", StopAt(4))
    lock = lock_output(root/"held")
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, root],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(PYTHONWARNINGS="ignore"))
    try:
        wait_for(process, root/"seen.pt")
        wait_for(process, root/"killed/last.pt", lambda state: state["step"] >= 2)
        second, = (pid for pid in children(process.pid) if rank_of(pid) == "1")
        os.kill(second, signal.SIGKILL)
        return root, process.wait(60), process.stdout.read()
    finally: process.terminate(); lock.close()

@pytest.fixture
def two(job): return job[0]

def method(out): return load_checkpoint(out/"last.pt")["method"]

def gap(a, b):
    "Largest difference of all parameters, statistics, queues and counters."
    a, b = method(a), method(b)
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)

@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "Folder of the same with one process, and the images of its steps."
    root = tmp_path_factory.mktemp("one")
    return root, {name: run(recipe, root/name) for name, recipe in RECIPES.items()}

@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_equal_one(name, one, two):
    "Images, losses and all of the method's state after three steps."
    root, seen = one
    assert torch.load(two/"seen.pt")[name] == seen[name] and len(seen[name]) == 3
    assert gap(root/name, two/name) < 1e-9
    a, b = (read_curve(r/name)[["loss", "global_loss", "aligned_loss"]] for r in (root, two))
    assert len(a) == 3 and (a - b).abs().max().max() < 1e-6
    assert (read_record(root/name)["processes"], read_record(two/name)["processes"]) == (1, 2)

def test_control(one, tmp_path):
    "Another seed leads elsewhere, so that agreement says something; so does a mean gradient that is off by the world size."
    class Half(Callback):
        def before_backward(self): self.learn.loss_grad = self.loss_grad/2
    run(RECIPES["byol"].changed(seed=1), tmp_path/"seed")
    run(RECIPES["byol"], tmp_path/"half", Half())
    assert gap(one[0]/"byol", tmp_path/"seed") > 1e-3 and gap(one[0]/"byol", tmp_path/"half") > 1e-6

def test_parts_of_two_processes_equal_parts_of_one(two, tmp_path):
    "accumulate=2: the second half of each process's share comes after the first halves of both."
    run(RECIPES["lewel_b"], tmp_path/"parts", accumulate=2)
    assert gap(tmp_path/"parts", two/"parts") < 1e-9 < 1e-6 < gap(two/"lewel_b", two/"parts")

def test_stops_together_and_goes_on_alone(two, tmp_path):
    """One process is asked to stop, both stop after that step;
    a single process goes on, with the same images in each step, to the same weights."""
    state, seen = load_checkpoint(two/"stopped/last.pt"), torch.load(two/"seen.pt")["stopped"]
    assert (state["epoch"], state["step"]) == (1, 1) and list(seen) == [0, 1, 2, 3] and not (two/"stopped/record.json").exists()
    whole = run(LONG, tmp_path/"whole")
    rest = run(LONG, two/"stopped")
    assert list(rest) == [4, 5] and seen | rest == whole
    assert gap(two/"stopped", tmp_path/"whole") < 1e-9

def test_begins_alone_and_goes_on_with_two(two, tmp_path):
    "One process stops in the second epoch, two go on: the images of the remaining steps, and the weights, of a run that never stopped."
    whole, rest = run(LONG, tmp_path/"whole"), torch.load(two/"seen.pt")["begun"]
    assert list(rest) == [4, 5] and all(rest[step] == whole[step] for step in rest)
    assert gap(two/"begun", tmp_path/"whole") < 1e-9 and read_record(two/"begun")["processes"] == 2

def test_an_overflow_in_one_process_is_everybodys(two):
    "float16: both skip the step and halve the scale (asserted there), and the target does not move for it."
    state = load_checkpoint(two/"half/last.pt")
    assert state["method"]["updates"] == 2 and all(t.isfinite().all() for t in state["method"].values())

def test_only_the_first_process_writes(two):
    "One curve, one record, and the monitor's column; nothing is left over."
    out = two/"lewel_m_eman"
    assert sorted(p.name for p in out.iterdir()) == ["best.pt", "curve.csv", "last.pt", "record.json"]
    assert read_curve(out).knn_top1.notna().sum() == 1 and not (two/"wrong").exists()
    assert [p.name for p in (two/"held").iterdir()] == [".lock"]                                    # its holder's, still there

@pytest.mark.slow
def test_two_nodes(two):
    """Two launchers with one process each, which find each other by torchrun's rendezvous as on two machines:
    the weights of one launcher with two processes."""
    with socket.socket() as s: s.bind(("localhost", 0)); port = s.getsockname()[1]
    argv = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "test",
            "--local-addr", "localhost", "-m", "lewel.pretrain"]
    nodes = [subprocess.Popen([*argv, *short_run(two, two/"two nodes")], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True,
                              env=os.environ | dict(PYTHONWARNINGS="ignore", OMP_NUM_THREADS="1"))
             for _ in range(2)]
    try: said = [n.communicate(timeout=600)[0] for n in nodes]
    finally:
        for n in nodes: n.terminate()      # and with it its process
    assert [n.returncode for n in nodes] == [0, 0], said
    assert read_record(two/"two nodes")["processes"] == 2
    assert gap(two/"one node", two/"two nodes") == 0

def test_killed_process_ends_the_job(job, callbacks):
    """SIGKILL to the second process: torchrun ends the first, says why, and exits with an error;
    the checkpoint is whole, and one process goes on from it."""
    root, code, said = job
    assert code != 0 and "SIGKILL" in said and "resuming" not in said and not (root/"killed/record.json").exists()
    state = load_checkpoint(root/"killed/last.pt")
    callbacks(StopAt(state["epoch"]*12 + state["step"] + 2))
    assert state["step"] >= 2 and pretrain_command(long_run(root)) == 143
    assert load_checkpoint(root/"killed/last.pt")["method"]["updates"] == state["method"]["updates"] + 2

if __name__ == "__main__": work(Path(sys.argv[1]))

def test_bad_input_is_said_once(tmp_path):
    "By the first process of a node, for all of them."
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "lewel.pretrain", "--data", "scenes", "--out", str(tmp_path/"run"), "--device", "cpu",
            "--method", "lewel_c"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
                          env=os.environ | dict(PYTHONWARNINGS="ignore", OMP_NUM_THREADS="1"))
    assert done.returncode == 1, done.stdout
    assert done.stdout.count("lewel-pretrain: error:") == 1 and "unknown method 'lewel_c'" in done.stdout, done.stdout
