"Small folders of images, and the commands, called in this process."
import os
os.environ["OMP_NUM_THREADS"] = "1"
from collections import namedtuple
import numpy as np, pytest, torch
from PIL import Image
from lewel import cli

torch.set_num_threads(1)
Done = namedtuple("Done", "code out err")

def draw(folder, n, sizes=((40, 40),), suffix=".png", tint=0):
    "Write `n` images of smooth noise into `folder`, going round the (width, height) of `sizes`."
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([n, tint])
    for i in range(n):
        noise = rng.integers(0, 256, (5, 5, 3)) // 2 + [tint, 60, 127 - tint]
        Image.fromarray(noise.astype(np.uint8)).resize(sizes[i % len(sizes)], Image.Resampling.BICUBIC).save(folder/f"{i:03}{suffix}")
    return folder

def options(data, out, *more):
    "Arguments of a small, quick lewel-pretrain."
    return [str(a) for a in ("--scale", "smoke", "--data", data, "--out", out, "--device", "cpu", "--workers", 0,
                             "--optimizer", "sgd", "--lr", 0.05, *more)]

@pytest.fixture
def run(capfd):
    "Call a command: run('export', folder) -> (code, out, err), with what its worker processes say."
    def call(command, *argv):
        capfd.readouterr()
        code = getattr(cli, f"{command}_command")([str(a) for a in argv])
        return Done(code, *capfd.readouterr())
    return call

@pytest.fixture
def train(run): return lambda data, out, *more: run("pretrain", *options(data, out, *more))

@pytest.fixture(scope="session")
def flat(tmp_path_factory): return draw(tmp_path_factory.mktemp("data")/"flat", 48)

@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    "train/ and val/, each with the class folders a and b, of images of one size."
    root = tmp_path_factory.mktemp("data")/"labelled"
    for split, n in ("train", 16), ("val", 6):
        for c, tint in ("a", 0), ("b", 127): draw(root/split/c, n, tint=tint)
    return root

@pytest.fixture(scope="session")
def finished(labelled, tmp_path_factory):
    "Folder of a finished run on `labelled`: to be read, not changed."
    out = tmp_path_factory.mktemp("runs")/"finished"
    assert cli.pretrain_command(options(labelled, out)) == 0
    return out

@pytest.fixture
def callbacks(monkeypatch):
    "Give lewel-pretrain more fastai callbacks for the rest of the test; none takes them away."
    def use(*cbs): monkeypatch.setattr(cli, "logger_callbacks", lambda name, out: list(cbs))
    return use
