"A checkpoint of exactly the authors' form and size: ResNet-50, hidden layers of 4096, d = 256, with the names of their released files."
import numpy as np, pytest, torch
from lewel.checkpoint import load_checkpoint
from lewel.interop import load_official, official_names, read_weights
from lewel.methods import create_method
from lewel.results import read_record
from lewel.visualize import show_maps

SIZES = dict(dim=256, hidden_dim=4096)

@pytest.fixture(scope="module")
def method(): return create_method("lewel_b", "resnet50", **SIZES)

@pytest.fixture(scope="module")
def checkpoint(method, tmp_path_factory):
    """A file as the authors' script saves it: data parallel names, heads as 1-D convolutions;
    beside them optimizer and scaler after some steps, and the best accuracy as a numpy scalar."""
    torch.manual_seed(0)
    state = {}
    for theirs, ours in official_names(method).items():
        own = method.state_dict()[ours]
        value = (torch.rand(own.shape) + 0.5 if own.is_floating_point() and own.ndim == 1
                 else torch.randn(own.shape)*0.02 if own.is_floating_point() else torch.tensor(7))
        state[f"module.{theirs}"] = value[..., None] if ".mlp." in theirs and value.ndim == 2 else value
    path = tmp_path_factory.mktemp("official")/"checkpoint_0200.pth.tar"
    momentum = {i: dict(momentum_buffer=torch.randn_like(v)) for i, v in enumerate(list(state.values())[:4])}
    groups = [dict(lr=3.6, momentum=0.9, weight_decay=decay, eta=1e-3, nesterov=False, params=params)
              for decay, params in ((1.5e-6, [0, 1]), (0, [2, 3]))]
    scaler = dict(scale=65536., growth_factor=2., backoff_factor=0.5, growth_interval=2000, _growth_tracker=117)
    torch.save(dict(epoch=200, arch="LEWELB_EMAN", state_dict=state, best_acc1=np.float64(72.8),
                    optimizer=dict(state=momentum, param_groups=groups), scaler=scaler), path)
    return path

def test_names_and_shapes(checkpoint):
    state = read_weights(checkpoint)["state_dict"]
    shape = lambda name: tuple(state[f"module.{name}"].shape)
    assert shape("online_net.backbone.conv1.weight") == (64, 3, 7, 7) and shape("target_net.backbone.layer4.2.bn3.running_var") == (2048,)
    for head in "online_net.neck.proj", "online_net.neck.proj_obj", "target_net.neck.proj":
        assert (shape(f"{head}.mlp.0.weight"), shape(f"{head}.mlp.1.weight")) == ((4096, 2048, 1), (4096,))
        assert shape(f"{head}.mlp.3.weight") == (256, 4096, 1)
    for head in "predictor", "predictor_obj":
        assert (shape(f"{head}.mlp.0.weight"), shape(f"{head}.mlp.3.weight")) == ((4096, 256, 1), (256, 4096, 1))
    assert not any("fc" in k.split(".") for k in state)

@pytest.mark.parametrize("norm", ["eman", "params"])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_loads_strictly_and_is_used(checkpoint, norm, prefix):
    "Both variants of the target, with and without the data parallel prefix; then alignment maps, and a training step from there."
    content = read_weights(checkpoint)
    state = {prefix + k.removeprefix("module."): v for k, v in content["state_dict"].items()}
    method = load_official(create_method("lewel_b", "resnet50", target_norm=norm, **SIZES), content | dict(state_dict=state))
    own = method.state_dict()
    assert all(torch.equal(own[ours], state[prefix + theirs].squeeze(-1) if state[prefix + theirs].ndim == 3
                           else state[prefix + theirs]) for theirs, ours in official_names(method).items())
    if (norm, prefix) != ("eman", "module."): return
    maps = method.eval().alignment_maps(torch.randn(1, 3, 224, 224))
    assert maps.shape == (1, 256, 7, 7) and torch.allclose(maps.sum((2, 3)), torch.ones(1, 256))
    assert (len(show_maps(method, *torch.randn(2, 2, 3, 224, 224), n_maps=3).axes)
            == 2*8)                         # for each of 2 images 2 views, each with 3 maps
    optimizer = torch.optim.SGD(method.train().parameters(), 1e-3)
    method(*torch.randn(2, 2, 3, 64, 64)).loss.backward()
    optimizer.step(); method.update_target(0, 10)
    assert not torch.equal(own["online.backbone.conv1.weight"], state["module.online_net.backbone.conv1.weight"])

def test_evaluates(checkpoint, labelled, tmp_path, run):
    "The file is a start for lewel-evaluate."
    done = run("evaluate", checkpoint, "--data", labelled, "--protocol", "knn", "--preset", "smoke", "--size", 32,
               "--device", "cpu", "--out", tmp_path/"out")
    assert done.code == 0, done.err

def test_pretraining_goes_on_from_it(method, checkpoint, labelled, tmp_path, run):
    "The file is a start for lewel-pretrain, heads and predictors included: with a rate of nearly zero it is what comes out."
    argv = ("--scale", "paper", "--method", "lewel_b", "--precision", "float32", "--size", 64, "--batch-size", 16,
            "--epochs", 1, "--warmup-epochs", 0, "--lr", 1e-30, "--weight-decay", 0)
    done = run("pretrain", *argv, "--start", checkpoint, "--data", labelled, "--out", tmp_path/"out",
               "--device", "cpu", "--monitor-every", 0, "--workers", 0)
    assert done.code == 0, done.err
    assert read_record(tmp_path/"out")["builds_on"][0].startswith("checkpoint_0200.pth.tar ")
    theirs, ours = read_weights(checkpoint)["state_dict"], load_checkpoint(tmp_path/"out"/"last.pt")["method"]
    for name, own in official_names(method).items():
        if not own.startswith("target.") and own.endswith("weight"):
            assert torch.allclose(ours[own].flatten(), theirs[f"module.{name}"].flatten(), rtol=0, atol=1e-30), name
