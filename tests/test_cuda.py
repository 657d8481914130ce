"""On a GPU: the images and losses of the CPU, steps that nobody waits in, all precisions,
runs that move between the two, and every command. Skipped where there is none, or it is pretended (`pretend_gpu`)."""
import subprocess, sys
from functools import partial
import pytest, torch
from conftest import draw
from fastai.callback.core import Callback
from test_evaluations import LAYOUTS
from lewel.bench import bench
from lewel.checkpoint import load_checkpoint
from lewel.core import METHODS
from lewel.data import open_folder
from lewel.evaluate.knn import extract_features
from lewel.paper import get_recipe, views_of
from lewel.pretrain import Curve, Precision, Pretraining, StopAt, Steps, create_optimizer, make_loader, prepare_method, pretrain
from lewel.running import Stopped
from lewel.results import read_curve, read_record
from lewel.scenes import scenes
from lewel.views import ViewLoader

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
real = pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_name() == "pretended", reason="needs a real GPU")
TRAINED = METHODS[1:5]
images = lambda: scenes("train", n=96, size=32)
weights = lambda out: torch.cat([v.flatten().double().cpu() for v in load_checkpoint(out/"last.pt")["method"].values()])

def train(recipe, out, device=DEVICE, **more):
    return pretrain(recipe, images(), out, str(device), monitor_every=0, log_every=1, progress="none", **more)

@pytest.fixture(autouse=True)
def exact():
    "Full float32, as on the CPU, and the same kernels each time."
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False): yield

def test_devices_do_not_mix():
    with pytest.raises(RuntimeError, match="on the same device"): torch.zeros(2, device=DEVICE) + torch.zeros(2)

# --- the same as on the CPU

@pytest.mark.parametrize("method", ["byol", "mocov2"])
@pytest.mark.parametrize("stream", [False, True])
def test_views(method, stream, tmp_path):
    """Order, crops and colors are those of the CPU: to 1e-5 on average, and 0.02 at most
    (standardized values; a value at the edge of solarization may fall on either side)."""
    views = views_of(get_recipe(method, "demo", size=48))
    source = open_folder(draw(tmp_path, 24, sizes=((60, 50), (50, 64)))) if stream else images()
    ours, theirs = (list(ViewLoader(source, views, 8, 3, d, workers=2*stream)) for d in (DEVICE, "cpu"))
    assert len(ours) == len(theirs) > 1
    for (*on_gpu, i), (*on_cpu, j) in zip(ours, theirs):
        assert torch.equal(i, j) and i.device.type == "cpu"
        for a, b in zip(on_gpu, on_cpu):
            assert a.device.type == DEVICE.type
            gap = (a.cpu() - b).abs()
            assert gap.mean() < 1e-5 and gap.max() < 0.02

@pytest.mark.parametrize("method", TRAINED)
def test_losses(method, tmp_path):
    "The first steps' losses, before rounding has grown: to 1e-3."
    recipe = get_recipe(method, "smoke").changed(optimizer="sgd", lr=1e-4, epochs=1)
    for d in (DEVICE, "cpu"): train(recipe, tmp_path/str(d), d)
    ours, theirs = (read_curve(tmp_path/str(d)).loss[:3] for d in (DEVICE, "cpu"))
    assert (ours - theirs).abs().max() < 1e-3, (ours, theirs)

def test_features():
    "What the evaluations see of a backbone: to 1e-4."
    method = prepare_method(get_recipe("byol", "smoke"))
    (ours, labels), (theirs, same) = (extract_features(method.backbone.to(d), images(), 32, torch.device(d)) for d in (DEVICE, "cpu"))
    assert torch.equal(labels.cpu(), same) and (ours.cpu() - theirs).abs().max() < 1e-4

# --- nobody waits

class Strict(Callback):
    "Waiting for the device is an error from the third step to the last."
    order = 60
    def before_batch(self):
        if self.learn.step == 2: torch.cuda.set_sync_debug_mode("error")
    def after_batch(self):
        if self.learn.step == self.total_steps - 1: torch.cuda.set_sync_debug_mode("default")

class Reads(Callback):
    def after_pred(self): self.pred.loss.item()

def strict_training(method, optimizer, accumulate=1, *more, source=None, workers=0):
    recipe = get_recipe(method, "smoke").changed(batch_size=8, epochs=1, optimizer=optimizer, precision="bfloat16")
    model = prepare_method(recipe).to(DEVICE, memory_format=torch.channels_last)
    learn = Pretraining(make_loader(source or images(), recipe, DEVICE, workers, accumulate), model,
                        create_optimizer(model, recipe), recipe, DEVICE,
                        [Steps(), Precision(recipe.precision, DEVICE), Curve(1000, lines=False), Strict(), *more], accumulate)
    try:
        with learn.no_logging(): learn.fit(1)
    finally: torch.cuda.set_sync_debug_mode("default")
    assert learn.step == 12 and len(learn.curve.rows) == 1     # whose losses are finite, or it would have been refused

@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("method", TRAINED)
def test_steps_wait_for_nothing(method, optimizer): strict_training(method, optimizer)

def test_parts_wait_for_nothing(): strict_training("lewel_m", "sgd", 2)

def test_steps_from_files_wait_for_nothing(tmp_path):
    "Crops come over from pinned memory."
    strict_training("byol", "sgd", source=open_folder(draw(tmp_path, 96)), workers=2)

def test_waiting_is_noticed():
    with pytest.raises(RuntimeError, match="synchroniz"): strict_training("byol", "sgd", 1, Reads())

# --- precision

@real
@pytest.mark.parametrize("method", TRAINED)
def test_precisions(method, tmp_path, monkeypatch):
    """Losses of bfloat16 and float16 beside float32: the first, of the same weights, to 1%;
    the mean of the second half to 10% (float16 from a loss scale at which no step is skipped)."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.**10))
    recipe = get_recipe(method, "smoke").changed(epochs=4, optimizer="sgd", lr=1e-3)
    for p in "float32", "bfloat16", "float16": train(recipe.changed(precision=p), tmp_path/p)
    full, *half = (read_curve(tmp_path/p).loss for p in ("float32", "bfloat16", "float16"))
    for loss in half:
        assert abs(loss[0]/full[0] - 1) < 0.01 and abs(loss[12:].mean()/full[12:].mean() - 1) < 0.1, (loss, full)

# --- stopping, and moving to another machine

@pytest.mark.parametrize("method", ["lewel_m", "lewel_b"])
@pytest.mark.parametrize("there, here", [(DEVICE, DEVICE), (DEVICE, "cpu"), ("cpu", DEVICE)], ids=["gpu-gpu", "gpu-cpu", "cpu-gpu"])
def test_resumes(method, there, here, tmp_path):
    "Stopped in the middle of an epoch on one device, ended on another: the weights of a whole run, to rounding."
    recipe = get_recipe(method, "smoke").changed(optimizer="sgd", lr=1e-4)       # small, so that rounding does not grow
    train(recipe, tmp_path/"whole", here)
    with pytest.raises(Stopped): train(recipe, tmp_path/"parted", there, cbs=[StopAt(8)])
    record = train(recipe, tmp_path/"parted", here)
    assert record["peak_memory_mb"] > 0 and len(read_curve(tmp_path/"parted")) == 12
    assert torch.allclose(weights(tmp_path/"whole"), weights(tmp_path/"parted"), rtol=0, atol=1e-4 if there == here else 1e-2)

# --- the commands

@real
def test_commands(tmp_path, run):
    "Pretrain from streamed files, evaluate frozen and fine-tuned, export, estimate."
    labelled = tmp_path/"mixed"
    for split, n in ("train", 16), ("val", 6):
        for c, tint in ("a", 0), ("b", 127): draw(labelled/split/c, n, tint=tint, sizes=((60, 50), (50, 64)))
    argv = "--scale", "smoke", "--data", labelled, "--out", tmp_path/"run", "--device", DEVICE, "--precision", "bfloat16", "--workers", 2
    done = run("pretrain", *argv)
    assert done.code == 0, done.err
    record = read_record(tmp_path/"run")
    assert record["hardware"]["device"] == torch.cuda.get_device_name()
    assert 1 < record["peak_memory_mb"] < 4000 and "monitor_knn_top1" in record["metrics"]
    done = run("evaluate", tmp_path/"run", "--data", labelled, "--protocol", "knn,linear,semi", "--preset", "smoke",
               "--device", DEVICE, "--out", tmp_path/"evaluated")
    assert done.code == 0, done.err
    assert run("export", tmp_path/"run", "--format", "safetensors", "--out", tmp_path/"backbone.safetensors").code == 0
    done = run("pretrain", "--dry-run", "--scale", "smoke", "--device", DEVICE)
    assert done.code == 0 and "cuda" in done.out, done

@pytest.mark.parametrize("protocol", LAYOUTS)
def test_dense_protocol(protocol, tmp_path, run):
    make, metric = LAYOUTS[protocol]
    done = run("evaluate", "random", "--data", make(tmp_path/"data"), "--protocol", protocol, "--out", tmp_path/"out",
               "--backbone", "small", "--size", 64, "--preset", "smoke", "--device", DEVICE)
    assert done.code == 0, done.err
    assert 0 <= read_record(tmp_path/"out")["metrics"][metric] <= 100

@real
def test_compiled(tmp_path):
    "torch.compile: the same first losses, and a checkpoint like any other."
    recipe = get_recipe("lewel_m", "smoke").changed(optimizer="sgd", lr=0.01, epochs=1)
    for compile in False, True: record = train(recipe, tmp_path/str(compile), compile=compile)
    plain, compiled = (read_curve(tmp_path/str(c)).loss[:3] for c in (False, True))
    assert record["compiled"] and (plain - compiled).abs().max() < 1e-3
    assert list(load_checkpoint(tmp_path/"True"/"last.pt")["method"]) == list(load_checkpoint(tmp_path/"False"/"last.pt")["method"])

@real
def test_bench(tmp_path):
    "A small bench writes its report for this card."
    record = bench("resnet18", 32, 4, 1, str(DEVICE), tmp_path, dim=16, hidden_dim=32, workers=2)
    assert record["device"] == "cuda" and record["ratios"]["lewel_b: bare backbone / step"] > 0
    assert len(list(tmp_path.glob("*.md"))) == 1

# --- several GPUs

@real
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("target_norm", ["params", "eman"])      # synchronized BatchNorm or shuffled keys; averaged statistics
@pytest.mark.parametrize("method", TRAINED)
def test_nccl(method, target_norm, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lewel.pretrain"]
    subprocess.run([*command, "--scale", "smoke", "--data", "scenes", "--method", method, "--option", f"target_norm={target_norm}",
                    "--device", "cuda", "--precision", "float16", "--out", tmp_path/"run"], check=True, timeout=600)
    assert read_record(tmp_path/"run")["processes"] == 2
