"The commands, end to end: what they write, and what they refuse."
import json, shutil
from functools import partial
from importlib.metadata import entry_points
import pytest, torch
from conftest import draw
from torchvision.models import resnet18
from lewel import cli, data
from lewel.checkpoint import load_checkpoint, load_run
from lewel.pretrain import Pretraining, open_pair
from lewel.results import read_curve, read_record

def weights(out): return load_checkpoint(out/"last.pt")["method"]

def refused(done, command, *words):
    "Exit code 2 and one line on standard error that has all the words."
    assert done.code == 2 and done.out == "", done
    assert done.err.count("\n") == 1 and done.err.startswith(f"lewel-{command}: error: "), done.err
    for word in words: assert str(word) in done.err, (word, done.err)

# --- help and installation

@pytest.mark.parametrize("command", ["pretrain", "evaluate", "export", "bench"])
def test_command_is_installed_and_has_help(command, capsys):
    "The entry point is this function, and --help exits 0."
    script = entry_points(group="console_scripts")[f"lewel-{command}"]
    assert script.load() is getattr(cli, f"{command}_command")
    with pytest.raises(SystemExit) as stop: script.load()(["--help"])
    assert stop.value.code == 0 and "(default: " in capsys.readouterr().out

# --- mistakes of the user

MISTAKES = {
    "no data": ([], "--data"),
    "unknown method": (["--method", "lewel_bb"], "lewel_bb", "lewel_b"),
    "unknown scale": (["--scale", "smok"], "smok", "smoke"),
    "unknown backbone": (["--backbone", "resnet19"], "resnet19", "resnet18"),
    "unknown option": (["--option", "foo=1"], "foo"),
    "option of another method": (["--method", "byol", "--option", "groups=4"], "groups"),
    "option without a value": (["--option", "groups"], "NAME=VALUE"),
    "unknown view option": (["--view-option", "flop=0"], "flop", "flip"),
    "unknown flag": (["--epoch", "3"], "--epoch"),
    "not a number": (["--epochs", "many"], "--epochs", "many"),
    "unknown optimizer": (["--optimizer", "adam"], "adam", "sgd"),
    "unknown precision": (["--precision", "float61"], "float61", "float16"),
    "unknown device": (["--device", "gpu"], "gpu"),
    "unknown logger": (["--logger", "paper"], "paper"),
    "groups do not divide the channels": (["--option", "groups=3", "--option", "dim=12"], "groups=3", "128"),
    "groups do not divide d": (["--option", "groups=32"], "groups=32", "16"),
    "batch larger than the set": (["--batch-size", 33], "33", "32"),
    "batch of one": (["--batch-size", 1], "batch_size=1"),
    "maps of one position": (["--size", 16], "size=16", "single position"),
    "negative learning rate": (["--lr=-0.1"], "lr=-0.1"),
    "warm-up longer than the training": (["--warmup-epochs", 2], "warmup_epochs=2"),
}

@pytest.mark.parametrize("argv, words", [(v[0], v[1:]) for v in MISTAKES.values()], ids=MISTAKES)
def test_pretrain_refuses(argv, words, labelled, tmp_path, run, train):
    "One line that names the mistake, exit code 2, nothing trained."
    done = train(labelled, tmp_path/"out", *argv) if argv else run("pretrain", "--out", tmp_path/"out")
    refused(done, "pretrain", *words)
    assert not (tmp_path/"out").exists()

IMPOSSIBLE = {
    "negative seed": ["--seed=-1"], "negative momentum": ["--momentum=-1"],
    "negative weight decay": ["--weight-decay=-1"], "infinite learning rate": ["--lr", "inf"],
    "negative workers": ["--workers=-1"], "no logging": ["--log-every", "0"],
    "negative save interval": ["--save-every=-1"], "negative monitor interval": ["--monitor-every=-1"],
    "scale is a word": ["--option", "scale=big"], "weight is a word": ["--option", "global_weight=half"],
    "no dim": ["--option", "dim=none"],
    "temperature is a word": ["--method", "lewel_m", "--option", "temperature=hot"],
    "view option is a word": ["--view-option", "jitter=often"], "coupled is a number": ["--option", "coupled=7"],
}

@pytest.mark.parametrize("argv", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_pretrain_refuses_impossible_values(argv, tmp_path, train):
    "A value of the wrong kind or out of range is the user's mistake, not a traceback: also where files are streamed."
    data = draw(tmp_path/"data", 16, [(40, 40), (44, 50)])
    *_, option, value = argv if len(argv) > 1 else argv[0].split("=")
    name = (value.split("=")[0] if option.endswith("option") else option[2:]).replace("-", "_")
    done = train(data, tmp_path/"out", *argv)
    refused(done, "pretrain")
    assert f"{name}=" in done.err and not (tmp_path/"out/last.pt").exists()

def empty(root): root.mkdir()
def one_class(root): draw(root/"only", 20)
def one_image(root): draw(root, 1)
def a_file(root): root.write_text("images")
def no_train(root): draw(root/"val/a", 4)
def hopeless(root): root.mkdir(); (root/"a.jpg").write_text("text"); (root/"b.jpg").write_text("text")

@pytest.mark.parametrize("make, words", [(lambda root: None, "does not exist"), (empty, "no images"),
                                         (one_class, "one class folder 'only'"), (one_image, "single image"),
                                         (a_file, "not a folder"), (no_train, "no train split")],
                         ids=["missing", "empty", "one class", "one image", "a file", "no train"])
def test_pretrain_refuses_folder(make, words, tmp_path, train):
    "A folder that cannot be what was meant is refused by its name."
    make(tmp_path/"data")
    refused(train(tmp_path/"data", tmp_path/"out"), "pretrain", tmp_path/"data", words)
    assert not (tmp_path/"out").exists()

def test_pretrain_refuses_folder_without_a_readable_image(tmp_path, train):
    "Warnings for the files, then one line for the folder."
    hopeless(tmp_path/"data")
    done = train(tmp_path/"data", tmp_path/"out")
    assert done.code == 2 and "none of the 2 images" in done.err.splitlines()[-1] and not (tmp_path/"out").exists()

def test_evaluate_refuses(finished, labelled, flat, tmp_path, run):
    "No validation split, no labels, no run, unknown protocol or preset: one line, no record."
    shutil.copytree(labelled/"train", tmp_path/"split/train")
    shutil.copytree(flat, tmp_path/"bare/train"); shutil.copytree(flat, tmp_path/"bare/val")
    out = "--device", "cpu", "--out", tmp_path/"out"
    refused(run("evaluate", finished, "--data", tmp_path/"split", *out), "evaluate", tmp_path/"split", "validation")
    refused(run("evaluate", finished, "--data", tmp_path/"bare", *out), "evaluate", tmp_path/"bare", "labels")
    refused(run("evaluate", finished, "--data", tmp_path/"nowhere", *out), "evaluate", tmp_path/"nowhere")
    refused(run("evaluate", tmp_path/"none", "--data", labelled, *out), "evaluate", tmp_path/"none", "nothing to start from")
    refused(run("evaluate", "random", "--data", labelled), "evaluate", "random", "out")
    refused(run("evaluate", finished, "--data", labelled, "--protocol", "knm", *out), "evaluate", "knm", "knn")
    refused(run("evaluate", finished, "--data", labelled, "--preset", "demos", *out), "evaluate", "demos", "demo")
    for protocol in "segmentation", "detection", "instance":
        refused(run("evaluate", finished, "--data", labelled, "--protocol", protocol, *out), "evaluate", labelled, "layout")
    assert not (tmp_path/"out").exists()

def test_export_refuses(finished, tmp_path, run):
    "A backbone that torchvision does not have, an unknown format, no run: no file."
    file = tmp_path/"backbone.pth"
    refused(run("export", finished, "--out", file), "export", "torchvision", "resnet18")
    refused(run("export", finished, "--out", file, "--format", "torchvison"), "export", "torchvison", "torchvision")
    refused(run("export", tmp_path/"none", "--out", file), "export", tmp_path/"none")
    assert not file.exists()

# --- what the commands do

@pytest.mark.parametrize("workers", [0, 2])
def test_pretrains_on_nested_images_of_different_sizes(workers, tmp_path, train):
    "No labels, no monitor, hidden files left out; all the steps are made."
    draw(tmp_path/"data", 8, [(40, 50), (60, 33)], tint=1)
    draw(tmp_path/"data/x/y", 16, [(33, 70), (48, 48)], ".jpg", tint=2)
    draw(tmp_path/"data/.hidden", 4)
    done = train(tmp_path/"data", tmp_path/"out", "--batch-size", 8, "--workers", workers)
    record = read_record(tmp_path/"out")
    assert done.code == 0, done.err
    assert record["data"]["n"] == 24 and record["data"]["skipped"] == [] and record["id"] in done.out
    assert int(weights(tmp_path/"out")["updates"]) == 2*3 and "monitor_knn_top1" not in record["metrics"]
    assert not (tmp_path/"out/best.pt").exists()

def test_streaming_does_not_depend_on_workers(tmp_path, train):
    "Decoding in processes gives the same weights as decoding here."
    data = draw(tmp_path/"data", 16, [(40, 50), (60, 33)])
    for workers in 0, 2: assert train(data, tmp_path/f"{workers}", "--epochs", 1, "--batch-size", 8, "--workers", workers).code == 0
    a, b = weights(tmp_path/"0"), weights(tmp_path/"2")
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_class_folders_give_a_monitor(finished):
    "kNN accuracy after every epoch, in the record, the curve and best.pt."
    metrics, curve = read_record(finished)["metrics"], read_curve(finished)
    accuracy = curve.dropna(subset="knn_top1").set_index("epoch").knn_top1
    assert list(accuracy.index) == [1, 2] and accuracy.between(0, 100).all()
    assert metrics["monitor_knn_top1"] == accuracy[2]
    assert metrics["monitor_knn_top1_best"] == accuracy.max() == load_checkpoint(finished/"best.pt")["best"]

def test_first_line_says_what_the_monitor_looks_at(labelled, tmp_path, train):
    "The validation split, though both splits have the folder's name; without one, a part of the training images."
    assert "kNN monitor: 12 validation images of labelled\n" in train(labelled, tmp_path/"both").out
    said = train(labelled/"train", tmp_path/"one").out
    assert "kNN monitor: 6 images of train, left out of its memory (there are no labelled validation images)\n" in said

def test_each_split_is_listed_once(labelled, monkeypatch):
    "The classes of the validation split are known from the training split, which is not listed again for them."
    listed, list_images = [], data.list_images
    monkeypatch.setattr(data, "list_images", lambda folder: listed.append(folder.name) or list_images(folder))
    train, val = open_pair(labelled, 32, False)
    assert listed == ["train", "val"] and val.classes == train.classes == ["a", "b"]

@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(
    not shutil.which("c++"), reason="torch's default needs a C++ compiler")])])
def test_compiled(backend, labelled, finished, tmp_path, train, monkeypatch):
    """--compile: the losses of the first epoch to 1e-3, the same names in the checkpoint, and the record says so.
    aot_eager traces forward and backward as the default does, and leaves out minutes of C++."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    assert train(labelled, tmp_path/"out", "--compile").code == 0
    ours, plain = (read_curve(out).loss[:1] for out in (tmp_path/"out", finished))
    assert (ours - plain).abs().max() < 1e-3 and list(weights(tmp_path/"out")) == list(weights(finished))
    assert [read_record(out)["compiled"] for out in (tmp_path/"out", finished)] == [True, False]

def test_compile_without_a_compiler(labelled, tmp_path, train, monkeypatch):
    def broken(f): raise RuntimeError("no compiler\nand more")
    monkeypatch.setattr(torch, "compile", broken)
    refused(train(labelled, tmp_path/"out", "--compile"), "pretrain", "compile=True", "no compiler", "leave it out")
    assert not (tmp_path/"out").exists()

def test_second_call_redoes_nothing(labelled, finished, tmp_path, train, monkeypatch):
    "A finished run is recognized: no step is made, no file is written."
    out = shutil.copytree(finished, tmp_path/"out")
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()}
    monkeypatch.setattr(Pretraining, "fit", lambda *args: pytest.fail("it trains again"))
    done = train(labelled, out)
    assert done.code == 0 and read_record(finished)["id"] in done.out
    assert before == {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()}

def test_finished_run_refuses_other_recipe_and_images(flat, labelled, finished, tmp_path, train):
    "A folder is not overwritten by another run."
    out = shutil.copytree(finished, tmp_path/"out")
    before = (out/"last.pt").read_bytes()
    refused(train(labelled, out, "--epochs", 3), "pretrain", "epochs: 2 -> 3")
    refused(train(flat, out), "pretrain", "other images")
    refused(train(labelled, out, "--accumulate", 2), "pretrain", "accumulate 1, not 2")
    assert (out/"last.pt").read_bytes() == before and read_record(out) == read_record(finished)

def test_record_without_weights_is_trained_again(labelled, finished, tmp_path, train):
    "What record.json says is not believed if last.pt is gone."
    out = shutil.copytree(finished, tmp_path/"out")
    (out/"last.pt").unlink()
    assert train(labelled, out).code == 0
    a, b = weights(finished), weights(out)
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_checkpoint_of_an_unfinished_run(labelled, finished, tmp_path, run):
    "What a stopped run has learned can be evaluated and exported; the folder of one is refused, and says how."
    out = shutil.copytree(finished, tmp_path/"out")
    asked = "--data", labelled, "--protocol", "knn", "--preset", "smoke", "--device", "cpu"
    whole = run("evaluate", out, *asked, "--out", tmp_path/"whole")
    (out/"record.json").unlink()
    refused(run("evaluate", out, *asked), "evaluate", f"take its weights as they are from {out/'last.pt'}")
    refused(run("evaluate", out/"last.pt", *asked), "evaluate", "say where the record goes (--out FOLDER")
    part = run("evaluate", out/"last.pt", *asked, "--out", tmp_path/"part")
    assert whole.code == part.code == 0, part.err
    a, b = (read_record(tmp_path/name) for name in ("whole", "part"))
    assert a["metrics"] == b["metrics"]
    assert (b["recipe"]["file"], b["recipe"]["epochs"]) == ("last.pt", 2.0)
    assert (b["method"], b["builds_on"]) == (a["method"], [])
    done = run("export", out/"best.pt", "--format", "safetensors")
    assert done.code == 0 and done.out.strip() == str(out/"best-safetensors.safetensors") and (out/"best-safetensors.md").exists()

def test_pretrain_evaluate_export(labelled, tmp_path, run, train):
    "ResNet-18 from images to numbers and to torchvision, where it computes the same features."
    out = tmp_path/"out"
    assert train(labelled, out, "--backbone", "resnet18", "--size", 64, "--epochs", 1, "--batch-size", 16, "--monitor-every", 0).code == 0
    done = run("evaluate", out, "--data", labelled, "--preset", "smoke", "--device", "cpu")
    record = json.loads((out/"evaluation/record.json").read_text())
    assert done.code == 0, done.err
    assert record["id"] in done.out and record["builds_on"] == [read_record(out)["id"]] and record["data"]["n"] == 12
    for name in "knn_top1", "knn20_top1", "linear_top1": assert 0 <= record["metrics"][name] <= 100
    assert record["metrics"]["knn_k"] == 32 and record["metrics"]["linear_top5"] == 100

    done = run("export", out)
    assert done.code == 0 and done.out.strip() == str(out/"backbone-torchvision.pth")
    model, method = resnet18(weights=None), load_run(out)[0]
    keys = model.load_state_dict(torch.load(done.out.strip(), weights_only=True), strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"] and keys.unexpected_keys == []
    model.fc, x = torch.nn.Identity(), torch.randn(2, 3, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(model.eval()(x), method.backbone(x).mean((2, 3)))
