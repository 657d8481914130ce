"The evaluations that fine-tune, as commands, on small folders in the layouts of CamVid, Pascal VOC and COCO."
import json, signal
from contextlib import contextmanager
import numpy as np, pytest, torch
from PIL import Image
from conftest import draw
from lewel.data import FolderSet
from lewel.evaluate import finetune, knn, linear
from lewel.results import read_record
from test_commands import refused

SMALL = "--backbone", "small", "--size", 64, "--preset", "smoke", "--device", "cpu"

def square(rng, size=64, side=24):
    "A dark image with a light square: pixels, and x1, y1, x2, y2."
    x, y = rng.integers(2, size - side - 2, 2).tolist()
    image = rng.integers(0, 60, (size, size, 3)).astype(np.uint8)
    image[y:y + side, x:x + side] += 150
    return Image.fromarray(image), (x, y, x + side, y + side)

def camvid(root, n=6):
    rng = np.random.default_rng(0)
    for split in "train", "val", "test":
        for part in "images", "labels": (root/part/split).mkdir(parents=True)
        for i in range(n):
            image, (x1, y1, x2, y2) = square(rng)
            mask = np.zeros((64, 64), np.uint8); mask[y1:y2, x1:x2] = 1; mask[0] = 2          # 2: ignored
            image.save(root/f"images/{split}/{i}.png"); Image.fromarray(mask).save(root/f"labels/{split}/{i}.png")
    (root/"codes.txt").write_text("ground\nsquare\n")
    return root

def voc(root, n=6):
    rng = np.random.default_rng(1)
    for part in "JPEGImages", "Annotations", "ImageSets/Main": (root/part).mkdir(parents=True)
    for split in "train", "val", "test":
        names = [f"{split}{i}" for i in range(n)]
        (root/f"ImageSets/Main/{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            image, box = square(rng)
            image.save(root/f"JPEGImages/{name}.jpg")
            corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), (box[0] + 1, box[1] + 1, box[2], box[3])))
            (root/f"Annotations/{name}.xml").write_text(
                f"<annotation><filename>{name}.jpg</filename>"
                "<size><width>64</width><height>64</height><depth>3</depth></size>"
                "<object><name>square</name><difficult>0</difficult>"
                f"<bndbox>{corners}</bndbox></object></annotation>")
    return root

def coco(root, n=6):
    rng = np.random.default_rng(2)
    (root/"annotations").mkdir(parents=True)
    for split in "train2017", "val2017":
        (root/split).mkdir()
        images, annotations = [], []
        for i in range(n):
            image, (x1, y1, x2, y2) = square(rng)
            image.save(root/split/f"{i}.jpg")
            images.append(dict(id=i, file_name=f"{i}.jpg", width=64, height=64))
            annotations.append(dict(id=i + 1, image_id=i, category_id=7, iscrowd=0, area=(x2 - x1)*(y2 - y1),
                                    bbox=[x1, y1, x2 - x1, y2 - y1], segmentation=[[x1, y1, x2, y1, x2, y2, x1, y2]]))
        (root/f"annotations/instances_{split}.json").write_text(json.dumps(dict(
            images=images, annotations=annotations, categories=[dict(id=7, name="square")])))
    return root

LAYOUTS = dict(segmentation=(camvid, "miou"), detection=(voc, "box_ap"), instance=(coco, "instance_mask_ap"))

@pytest.mark.parametrize("protocol", LAYOUTS)
def test_dense_protocol(protocol, tmp_path, run):
    "From a folder to a record and a picture; called again, nothing is done again."
    make, metric = LAYOUTS[protocol]
    argv = "random", "--data", make(tmp_path/"data"), "--protocol", protocol, "--out", tmp_path/"out", *SMALL
    done = run("evaluate", *argv)
    assert done.code == 0, done.err
    record = read_record(tmp_path/"out")
    assert 0 <= record["metrics"][metric] <= 100 and record["method"] == "random" and record["data"]["n"] == 6
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == sorted([f"{protocol}.png", "record.json"])
    assert run("evaluate", *argv).code == 0 and read_record(tmp_path/"out") == record

@pytest.mark.parametrize("protocol", ["linear", "semi"])
def test_training_stopped_and_resumed(protocol, labelled, tmp_path, run, monkeypatch):
    "SIGTERM while training: exit code 143; the same command goes on and ends with the same numbers, without repeating kNN."
    argv, trained, fit = ("random", "--data", labelled, "--protocol", f"knn,{protocol}", *SMALL), [], linear.fit_linear
    monkeypatch.setattr(linear, "fit_linear", lambda *a: trained.append(fit(*a)) or trained[-1])
    assert run("evaluate", *argv, "--out", tmp_path/"whole").code == 0
    class Later(list):
        "Signals that arrive after a few looks."
        looks = 0
        def __bool__(self): self.looks += 1; return self.looks > 4
    @contextmanager
    def noting(): yield Later([signal.SIGTERM])
    with monkeypatch.context() as m:
        m.setattr(finetune, "noting_signals", noting)
        done = run("evaluate", *argv, "--out", tmp_path/"out")
    assert done.code == 143 and "stopped by SIGTERM" in done.err.splitlines()[-1]
    assert list(json.loads((tmp_path/"out/partial.json").read_text())) == ["knn"]
    done = run("evaluate", *argv, "--out", tmp_path/"out")
    assert done.code == 0 and "resuming" in done.out and "knn, scale" not in done.out
    assert read_record(tmp_path/"out")["metrics"] == read_record(tmp_path/"whole")["metrics"]
    assert [p.name for p in (tmp_path/"out").iterdir()] == ["record.json"]
    assert protocol == "semi" or torch.equal(trained[0].weight, trained[1].weight) and torch.equal(trained[0].bias, trained[1].bias)

def stop_when(monkeypatch, owner, name, number=signal.SIGTERM):
    "From now on the first call of a function brings a signal."
    function, calls = getattr(owner, name), []
    def call(*args, **kw):
        calls.append(1)
        if len(calls) == 1: signal.raise_signal(number)
        return function(*args, **kw)
    monkeypatch.setattr(owner, name, call)

@pytest.mark.parametrize("owner, name", [(knn, "center_view"), (knn, "count_votes"), (FolderSet, "fingerprint")],
                         ids=["features", "votes", "opening"])
def test_stopped_where_nothing_is_saved(owner, name, tmp_path, run, monkeypatch):
    "One line, exit code 143, no lock and no folder left; the same command then does it all."
    for split in "train", "val":
        for c, tint in ("a", 0), ("b", 127): draw(tmp_path/"data"/split/c, 5, [(40, 50), (44, 40)], tint=tint)
    argv = "random", "--data", tmp_path/"data", "--protocol", "knn", *SMALL, "--out", tmp_path/"out"
    with monkeypatch.context() as m:
        stop_when(m, owner, name)
        done = run("evaluate", *argv)
    assert done.code == 143 and not (tmp_path/"out").exists()
    assert done.err == "lewel-evaluate: stopped by SIGTERM; saved nothing: the same command goes on from there\n"
    assert run("evaluate", *argv).code == 0

@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_while_passes_are_cached(workers, tmp_path, run, monkeypatch):
    "What was done before is named and kept, also where the process itself decodes the images: no image is taken for a broken one."
    for split in "train", "val":
        for c, tint in ("a", 0), ("b", 127): draw(tmp_path/"data"/split/c, 9, [(40, 50), (44, 40)], tint=tint)
    argv = "random", "--data", tmp_path/"data", *SMALL, "--workers", workers, "--out", tmp_path/"out"
    with monkeypatch.context() as m:
        stop_when(m, linear, "collected")
        done = run("evaluate", *argv)
    assert done.code == 143 and f"saved {tmp_path/'out/partial.json'}: the same" in done.err and "skipped" not in done.err
    assert [p.name for p in (tmp_path/"out").iterdir()] == ["partial.json"]
    done = run("evaluate", *argv)
    assert done.code == 0 and "knn, scale" not in done.out and read_record(tmp_path/"out")["data"]["skipped"] == []

def test_a_time_budget_stops_an_evaluation(labelled, tmp_path, run):
    "At once, not when its protocol is over."
    done = run("evaluate", "random", "--data", labelled, "--protocol", "knn", *SMALL, "--out", tmp_path/"out", "--max-minutes", 1e-6)
    assert done.code == 142 and "stopped by the end of its time budget; saved nothing" in done.err and not (tmp_path/"out").exists()

def test_cache_that_does_not_fit(labelled, tmp_path, run, monkeypatch):
    "Refused with the remedy, before the protocol ahead of it is begun."
    monkeypatch.setattr(linear, "free_memory", lambda: 30_000)
    argv = "random", "--data", labelled, "--backbone", "small", "--size", 64, "--device", "cpu", "--preset", "demo", "--out", tmp_path/"out"
    done = run("evaluate", *argv)
    assert done.code == 2 and "cache 1 (--protocol linear --option cached_passes=1), or none" in done.err, done.err
    assert len(done.err.splitlines()) == 1, done.err
    assert "knn, scale" not in done.out and not (tmp_path/"out").exists()
    for few in 1, "none":
        assert run("evaluate", *argv[:-1], tmp_path/f"{few}", "--protocol", "linear",
                   "--option", f"cached_passes={few}", "--option", "epochs=2").code == 0

def test_published_lists(labelled, tmp_path, run):
    """--option labels_file: a missing list, one for two parts and a protocol without labels are refused before anything
    is computed; the record names list and content, no folder."""
    file = tmp_path/"10percent.txt"
    file.write_text("a/000.png\nb/001.png\nb/002.png\n")
    def evaluated(lists, out, protocol="semi"):
        return run("evaluate", "random", "--data", labelled, "--protocol", protocol,
                   *SMALL, "--option", f"labels_file={lists}", "--out", tmp_path/out)
    refused(evaluated(f"none,{tmp_path}/none.txt", "bad", "knn"), "evaluate", "unknown option of knn")
    for lists, words in ((f"none,{tmp_path}/none.txt", "no list of labelled images at"),
                         (file, "names 1 for 2 parts of the labels (1%, 10%)")):
        refused(evaluated(lists, "out"), "evaluate", words)
    assert evaluated(f"none,{file}", "out").code == 0
    part = read_record(tmp_path/"out")["recipe"]["protocols"]["semi"]["parts"][1]
    assert part["labels_file"].split()[0] == "10percent.txt" and str(tmp_path) not in json.dumps(read_record(tmp_path/"out"))
    file.write_text("a/000.png\nc/001.png\n")
    done = evaluated(f"none,{file}", "other")
    assert done.code == 2 and f"{file} line 2: no image 'c/001.png'" in done.err and "step" not in done.out

def test_preset_of_the_run(finished, labelled, tmp_path, run):
    "Unless it is named, the preset is that of the scale whose network the run has."
    done = run("evaluate", finished, "--data", labelled, "--protocol", "linear", "--device", "cpu", "--out", tmp_path/"out")
    assert done.code == 0 and "preset smoke" in done.out
    assert read_record(tmp_path/"out")["recipe"]["protocols"]["linear"]["epochs"] == linear.LINEAR["smoke"].epochs

def test_record_of_a_checkpoint(finished, labelled, tmp_path, run):
    "It says what was evaluated; the record of a finished run has no such key."
    for start, out in (finished, "run"), (finished/"best.pt", "best"):
        assert run("evaluate", start, "--data", labelled, "--protocol", "knn", "--device", "cpu", "--out", tmp_path/out).code == 0
    trained, known = read_record(finished), read_record(tmp_path/"best")["checkpoint"]
    assert known["run"] == trained["id"] and known["recipe"] == trained["recipe"] and known["git"] == trained["git"]
    assert known["step"] == 0 and known["epoch"] in (1, 2)
    assert "checkpoint" not in read_record(tmp_path/"run")

def test_weight_file(finished, labelled, tmp_path, run):
    "An exported backbone is evaluated like the run it came from; one that lacks a tensor is refused by its name."
    file = tmp_path/"net.safetensors"
    assert run("export", finished, "--format", "safetensors", "--out", file).code == 0
    size = read_record(finished)["recipe"]["size"]
    argv = "--data", labelled, "--protocol", "knn", "--preset", "smoke", "--device", "cpu"
    assert run("evaluate", finished, *argv, "--out", tmp_path/"run").code == 0
    assert run("evaluate", file, *argv, "--backbone", "small", "--size", size, "--out", tmp_path/"file").code == 0
    a, b = read_record(tmp_path/"run"), read_record(tmp_path/"file")
    assert a["metrics"] == b["metrics"] and b["method"] == "file" and b["recipe"]["file"] == file.name and b["recipe"]["fingerprint"]
    from safetensors.torch import load_file
    state = load_file(file); state.pop("layer2.conv1.weight")
    torch.save(state, tmp_path/"part.pth")
    refused(run("evaluate", tmp_path/"part.pth", *argv, "--backbone", "small", "--out", tmp_path/"x"),
            "evaluate", tmp_path/"part.pth", "missing layer2.conv1.weight")

def rewrite(file, old, new): file.write_text(file.read_text().replace(old, new, 1))

def bad_mask(root): camvid(root); Image.fromarray(np.full((64, 64), 9, np.uint8)).save(root/"labels/train/3.png")
def other_classes(root): voc(root); rewrite(root/"Annotations/test2.xml", "<name>square", "<name>circle")
def outside(root): voc(root); file = root/"Annotations/train1.xml"; file.write_text(file.read_text().replace("<xmax>", "<xmax>9"))
def no_image(root): coco(root); (root/"train2017/4.jpg").unlink()

@pytest.mark.parametrize("protocol, make, words", [("segmentation", bad_mask, ("3.png", "9")),
                                                   ("detection", other_classes, ("circle",)),
                                                   ("detection", outside, ("train1.xml", "leaves its image")),
                                                   ("detection", no_image, ("4.jpg",))],
                         ids=["unlisted class in a mask", "class only in the test part", "box outside its image", "missing image"])
def test_bad_annotations(protocol, make, words, tmp_path, run):
    "One line that names file and field, and no record."
    make(tmp_path/"data")
    done = run("evaluate", "random", "--data", tmp_path/"data", "--protocol", protocol, "--out", tmp_path/"out", *SMALL)
    lines = done.err.splitlines()
    assert done.code == 2 and len(lines) == 1 and all(w in lines[0] for w in words), done.err
    assert not (tmp_path/"out/record.json").exists()

def test_box_of_zero_area_is_dropped_and_counted(tmp_path, capfd):
    from lewel.boxes import open_boxes
    root = voc(tmp_path/"data")
    file = root/"Annotations/train0.xml"
    x1 = file.read_text().split("<xmin>")[1].split("<")[0]; x2 = file.read_text().split("<xmax>")[1].split("<")[0]
    rewrite(file, f"<xmax>{x2}<", f"<xmax>{x1}<")
    images = open_boxes(root, "train")
    assert "1 box without area left out" in capfd.readouterr().err and len(images.with_boxes()) == len(images) - 1
