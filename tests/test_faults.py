"What goes wrong on real machines: kills, signals, broken images, full disks, diverging losses."
import json, os, re, resource, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from conftest import draw, options
from fastai.callback.core import Callback
from lewel.cli import pretrain_command
from lewel.checkpoint import load_checkpoint
from lewel.core import atomic_write
from lewel.pretrain import StopAt
from lewel.results import read_curve, read_record
from test_commands import refused, weights

LEWEL_M = "--method", "lewel_m", "--epochs", 2, "--batch-size", 4, "--save-every", 1      # 12 steps in an epoch

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def all_finite(value):
    "Whether all numbers in nested dicts and sequences of tensors are finite."
    if isinstance(value, dict): return all(map(all_finite, value.values()))
    if isinstance(value, (list, tuple)): return all(map(all_finite, value))
    return not (torch.is_tensor(value) and value.is_floating_point()) or bool(value.isfinite().all())

def position(out): return (state := load_checkpoint(out/"last.pt"))["epoch"], state["step"]
def step_of(out, steps_per_epoch): return (p := position(out))[0]*steps_per_epoch + p[1]
def errors(err): return [line for line in err.splitlines() if not line.startswith("lewel: ")]      # what is not a warning
def leftovers(out): return [p.name for p in out.glob("*.tmp")]

def spawn(*argv):
    "lewel-pretrain in a process of its own."
    code = "import sys; from lewel.cli import pretrain_command; sys.exit(pretrain_command())"
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def wait_for(process, out, reached):
    "Until last.pt stands at a position (epoch, step) that `reached` accepts."
    limit = time.time() + 120
    while not ((out/"last.pt").exists() and reached(*position(out))):
        assert process.poll() is None and time.time() < limit, process.communicate() if process.poll() is not None else "too slow"
        time.sleep(.002)

class Act(Callback):
    "Call `do` before step `at` (from 0), after the schedules."
    order = 1
    def __init__(self, at, do): self.at, self.do = at, do
    def before_batch(self):
        if self.learn.step == self.at: self.do(self.learn)

# --- kills and signals

@pytest.fixture(scope="module")
def killed(flat, tmp_path_factory):
    "Folder of a run of LEWEL-M that was killed in the middle of its second epoch."
    out = tmp_path_factory.mktemp("killed")/"out"
    process = spawn(*options(flat, out, *LEWEL_M))
    wait_for(process, out, lambda epoch, step: epoch == 1 and step >= 2)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL and errors(err) == []
    return out

@pytest.fixture(scope="module")
def uninterrupted(flat, tmp_path_factory):
    "Weights of the same run without the kill."
    out = tmp_path_factory.mktemp("whole")/"out"
    assert pretrain_command(options(flat, out, *LEWEL_M)) == 0
    return weights(out)

def test_killed_run_goes_on_bit_for_bit(killed, uninterrupted, flat, tmp_path):
    "SIGKILL in an epoch, the same command again: all weights, target, queue and counters are equal."
    out = shutil.copytree(killed, tmp_path/"out")
    epoch, step = position(out)
    assert epoch == 1 and 2 <= step < 12 and not (out/"record.json").exists()
    process = spawn(*options(flat, out, *LEWEL_M))
    said, err = process.communicate()
    assert process.returncode == 0 and errors(err) == [] and f"resuming {out} at step {12 + step} of 24" in said
    assert same(weights(out), uninterrupted)
    assert list(read_curve(out).step) == [10, 12, 20, 24] and read_record(out)["metrics"]["loss"] > 0     # as if never stopped

def change_step(state): state["step"] -= 1
def change_queue(state): state["method"]["global_criterion.queue.pointer"] += 1
def change_momentum(state):
    for s in state["optimizer"]["state"].values(): s["momentum_buffer"].zero_()
def change_random(state): state["rng"]["torch"] = torch.Generator().manual_seed(1).get_state()

@pytest.mark.parametrize("change", [change_step, change_queue, change_momentum, change_random])
def test_position_queue_momentum_and_random_state_matter(change, killed, uninterrupted, flat, tmp_path, train):
    "The control: with one of them changed in the checkpoint, the weights differ."
    out = shutil.copytree(killed, tmp_path/"out")
    state = load_checkpoint(out/"last.pt")
    change(state)
    torch.save(state, out/"last.pt")
    assert train(flat, out, *LEWEL_M).code == 0
    assert not same(weights(out), uninterrupted)

SIGNALS = {"SIGTERM": (signal.SIGTERM, [(40, 40)], 0), "SIGINT": (signal.SIGINT, [(40, 40)], 0),
           "streamed": (signal.SIGTERM, [(40, 40), (48, 60)], 0), "workers": (signal.SIGTERM, [(40, 40), (48, 60)], 2)}

@pytest.mark.parametrize("number, sizes, workers", SIGNALS.values(), ids=SIGNALS)
def test_signal_stops_after_the_step(number, sizes, workers, tmp_path, train, callbacks):
    "The step at hand is finished and saved; one line, exit code 128 + signal; then the same command comes to the same weights."
    data, more = draw(tmp_path/"data", 24, sizes), ("--batch-size", 4, "--workers", workers)
    assert train(data, tmp_path/"whole", *more).code == 0
    callbacks(Act(7, lambda learn: os.kill(os.getpid(), number)))
    done = train(data, tmp_path/"out", *more)
    assert done.code == 128 + number
    assert errors(done.err) == [f"lewel-pretrain: stopped by {number.name}; saved {tmp_path/'out/last.pt'}: the same "
                                "command goes on from there"]
    assert position(tmp_path/"out") == (1, 2) and not (tmp_path/"out/record.json").exists()
    callbacks()
    assert train(data, tmp_path/"out", *more).code == 0 and same(weights(tmp_path/"out"), weights(tmp_path/"whole"))

def test_signal_leaves_handlers_as_they_were(tmp_path, flat, train, callbacks):
    "After a stop, SIGTERM and SIGINT do again what they did before."
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    callbacks(StopAt(1))
    assert train(flat, tmp_path/"out").code == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

def test_sigterm_to_the_process(flat, tmp_path):
    "From outside: exit code 143, one line, after the steps at hand."
    out = tmp_path/"out"
    process = spawn(*options(flat, out, *LEWEL_M, "--epochs", 200))
    wait_for(process, out, lambda epoch, step: epoch or step >= 2)
    seen = step_of(out, 12)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and len(errors(err)) == 1 and errors(err)[0].startswith("lewel-pretrain: stopped by SIGTERM")
    assert 0 <= step_of(out, 12) - seen <= 3 and not leftovers(out)

@pytest.mark.parametrize("sizes, workers", [([(40, 40)], 0), ([(40, 40), (48, 60)], 2)], ids=["memory", "workers"])
def test_stop_after_the_last_step_of_an_epoch_loses_nothing(sizes, workers, tmp_path, train, callbacks):
    "The monitor of that epoch, best.pt and the record are those of an uninterrupted run."
    data = tmp_path/"data"
    for c, tint in ("a", 0), ("b", 127): draw(data/c, 12, sizes, tint=tint)
    more = "--batch-size", 4, "--workers", workers
    assert train(data, tmp_path/"whole", *more).code == 0
    for at in 6, 12:
        callbacks(StopAt(at))
        done = train(data, tmp_path/"out", *more)
        assert done.code == 143 and step_of(tmp_path/"out", 6) == at
    callbacks()
    assert train(data, tmp_path/"out", *more).code == 0
    a, b = (read_record(tmp_path/n) for n in ("whole", "out"))
    assert a["metrics"] == b["metrics"] and same(weights(tmp_path/"whole"), weights(tmp_path/"out"))
    columns = ["step", "loss", "knn_top1"]
    assert read_curve(tmp_path/"whole")[columns].dropna().equals(read_curve(tmp_path/"out")[columns].dropna())
    assert (tmp_path/"out/best.pt").exists()

@pytest.fixture
def half(flat, tmp_path, train, callbacks):
    "A run that stopped in its first epoch, at step 2 of 6."
    callbacks(StopAt(2))
    assert train(flat, tmp_path/"out").code == 143
    callbacks()
    return tmp_path/"out"

def test_resume_in_a_terminal(flat, train, tmp_path, callbacks):
    "With the bars that a terminal shows, too, a run goes on from a later epoch than its first."
    callbacks(StopAt(4))
    assert train(flat, tmp_path/"out").code == 143 and load_checkpoint(tmp_path/"out/last.pt")["epoch"] == 1
    callbacks()
    done = train(flat, tmp_path/"out", "--progress", "bars")
    assert done.code == 0 and (tmp_path/"out/record.json").exists(), done.err

@pytest.mark.parametrize("more, words", [(["--lr", 0.5], ["lr: 0.05 -> 0.5"]),
                                         (["--option", "groups=8"], ["groups", "8"]),
                                         (["--method", "byol"], ["method: 'lewel_b' -> 'byol'"]),
                                         (["--seed", 1, "--epochs", 3], ["seed: 0 -> 1", "epochs: 2 -> 3"]),
                                         (["--accumulate", 4], ["accumulate 1, not 4"])],
                         ids=["lr", "option", "method", "two", "accumulate"])
def test_resume_refuses_another_recipe(more, words, half, flat, train):
    "All that changed is named, and the checkpoint stays."
    before = (half/"last.pt").read_bytes()
    refused(train(flat, half, *more), "pretrain", half, *words)
    assert (half/"last.pt").read_bytes() == before and not (half/"record.json").exists()

def test_resume_refuses_other_images(half, labelled, train):
    "Steps counted on one set mean nothing on another."
    refused(train(labelled, half), "pretrain", "other images")

def test_resume_refuses_another_start(half, finished, flat, tmp_path, train, callbacks):
    "Fresh weights for those of a file, and the other way round; with the same file it goes on, and the record names it."
    out, start = tmp_path/"started", ("--start", finished/"last.pt")
    callbacks(StopAt(2))
    assert train(flat, out, *start).code == 143
    callbacks()
    refused(train(flat, out), "pretrain", out/"last.pt", "started from last.pt ", "not fresh weights", "use the same start")
    refused(train(flat, out, "--start", half/"last.pt"), "pretrain", "started from last.pt ", ", not last.pt ")
    refused(train(flat, half, *start), "pretrain", half/"last.pt", "started from fresh weights, not last.pt ")
    named = load_checkpoint(out/"last.pt")["builds_on"]
    assert train(flat, out, *start).code == 0 and read_record(out)["builds_on"] == named != []
    refused(train(flat, out), "pretrain", f"started from {named[0]}, not fresh weights")
    refused(train(flat, out, *start, "--accumulate", 2), "pretrain", "accumulate 1, not 2")

def garble(path): path.write_bytes(b"garbage")
def truncate(path): path.write_bytes(path.read_bytes()[:-3000])
def empty_file(path): path.write_bytes(b"")
def other_content(path): torch.save(dict(weights=torch.zeros(2)), path)
def missing_key(path):
    torch.save({k: v for k, v in torch.load(path, weights_only=True).items() if k not in ("optimizer", "rng", "method")}, path)
class Evil:
    def __reduce__(self): return os.system, ("touch pwned",)
def evil(path): torch.save(dict(format=1, method=Evil()), path)

@pytest.mark.parametrize("damage", [garble, truncate, empty_file, other_content, missing_key, evil])
def test_damaged_checkpoint_is_refused(damage, finished, labelled, tmp_path, run, train, monkeypatch):
    "By all three commands, by its name, without running code from it and without overwriting it."
    monkeypatch.chdir(tmp_path)
    out = shutil.copytree(finished, tmp_path/"out", ignore=shutil.ignore_patterns("best.pt"))
    damage(out/"last.pt")
    before = (out/"last.pt").read_bytes()
    refused(run("evaluate", out, "--data", labelled, "--device", "cpu"), "evaluate", out/"last.pt")
    refused(run("export", out), "export", out/"last.pt")
    (out/"record.json").unlink()
    refused(train(labelled, out), "pretrain", out/"last.pt")
    assert (out/"last.pt").read_bytes() == before and not (tmp_path/"pwned").exists()
    assert sorted(p.name for p in out.iterdir()) == ["curve.csv", "last.pt"]

def test_damaged_record_is_refused(finished, labelled, tmp_path, run, train):
    "A record that is not JSON is named."
    out = shutil.copytree(finished, tmp_path/"out")
    (out/"record.json").write_text("{")
    refused(train(labelled, out), "pretrain", out/"record.json")
    refused(run("evaluate", out, "--data", labelled, "--device", "cpu"), "evaluate", out/"record.json")

# --- images that cannot be read

PATHS = dict(memory=([(40, 40)], 0), streamed=([(40, 40), (48, 60)], 0), workers=([(40, 40), (48, 60)], 2))

def broken(root, sizes, names=("cut.jpg", "text.jpg")):
    "18 good JPEG files and, between them, one that ends too early and one that holds text."
    draw(root, 18, sizes, ".jpg")
    if "cut.jpg" in names: (root/"005cut.jpg").write_bytes((root/"005.jpg").read_bytes()[:400])
    if "text.jpg" in names: (root/"010text.jpg").write_text("not an image")
    return root

@pytest.mark.parametrize("sizes, workers", PATHS.values(), ids=PATHS)
def test_unreadable_images_are_skipped(sizes, workers, tmp_path, train):
    "Each is named with the reason, counted, and listed in the record; the same weights come of it twice."
    data = broken(tmp_path/"data", sizes)
    for out in tmp_path/"1", tmp_path/"2":
        done, record = train(data, out, "--batch-size", 6, "--workers", workers), read_record(out)
        assert done.code == 0, done.err
        for name in "005cut.jpg", "010text.jpg":
            assert 1 <= done.err.count(f"skipped: {data/name} cannot be read (") <= max(workers, 1), done.err
        assert record["data"]["skipped"] == ["005cut.jpg", "010text.jpg"] and record["data"]["n"] == 18
        assert "2 unreadable images skipped" in done.out and int(weights(out)["updates"]) == 6
    assert same(weights(tmp_path/"1"), weights(tmp_path/"2"))

@pytest.mark.parametrize("name", ["cut.jpg", "text.jpg"])
@pytest.mark.parametrize("sizes, workers", PATHS.values(), ids=PATHS)
def test_strict_stops_at_an_unreadable_image(sizes, workers, name, tmp_path, train):
    "One line that names it, exit code 2; the steps before it, if there were any, are saved."
    data, out = broken(tmp_path/"data", sizes, [name]), tmp_path/"out"
    done = train(data, out, "--batch-size", 1 + 18//6, "--workers", workers, "--strict")
    assert done.code == 2 and len(said := errors(done.err)) == 1 and said[0].startswith("lewel-pretrain: error: ") and name in said[0], done
    assert (out/"last.pt").exists() == ("steps before it are saved" in done.err) and not (out/"record.json").exists()

def test_strict_keeps_the_steps_before(tmp_path, train):
    "The same command meets the image again at once; without --strict it goes on, to the weights of a run that never was strict."
    data, out = broken(tmp_path/"data", PATHS["streamed"][0], ["cut.jpg"]), tmp_path/"out"
    more = "--batch-size", 2, "--workers", 0
    assert train(data, tmp_path/"whole", *more).code == 0
    first, again = train(data, out, *more, "--strict"), train(data, out, *more, "--strict")
    assert first.code == 2 and f"steps before it are saved in {out}/last.pt" in first.err and position(out)[1] > 0
    assert again.code == 2 and "saved" not in again.err and "005cut.jpg" in again.err
    assert train(data, out, *more).code == 0 and same(weights(out), weights(tmp_path/"whole"))

def test_skipped_images_survive_a_resume(tmp_path, train, callbacks):
    "An image found broken before the stop is in the record, also if no step after it meets it."
    data, more = broken(tmp_path/"data", PATHS["streamed"][0]), ("--batch-size", 6)
    callbacks(StopAt(6))
    assert train(data, tmp_path/"out", *more).code == 143
    callbacks()
    assert train(data, tmp_path/"out", *more).code == 0
    assert read_record(tmp_path/"out")["data"]["skipped"] == ["005cut.jpg", "010text.jpg"]

@pytest.mark.parametrize("sizes, workers", PATHS.values(), ids=PATHS)
def test_evaluation_skips_unreadable_images(sizes, workers, finished, tmp_path, run):
    "Both protocols give numbers for the readable images; the broken ones of both splits are in the record; --strict refuses."
    for split in "train", "val":
        for c, tint in ("a", 0), ("b", 127): draw(tmp_path/"data"/split/c, 6, sizes, ".jpg", tint)
        (tmp_path/"data"/split/"a/002.jpg").write_text("not an image")
        path = tmp_path/"data"/split/"b/003.jpg"; path.write_bytes(path.read_bytes()[:400])
    argv = finished, "--data", tmp_path/"data", "--preset", "smoke", "--device", "cpu", "--out", tmp_path/"out"
    refused_line = run("evaluate", *argv, "--strict")
    assert refused_line.code == 2 and refused_line.err.count("\n") == 1
    assert ".jpg cannot be read" in refused_line.err and not (tmp_path/"out").exists()
    done = run("evaluate", *argv)
    assert done.code == 0, done.err
    record = read_record(tmp_path/"out")
    assert set(record["data"]["skipped"]) == {"a/002.jpg", "b/003.jpg"} and len(record["data"]["skipped"]) == 4
    assert record["metrics"]["knn_k"] == 10 and 0 <= record["metrics"]["linear_top1"] <= 100

# --- losses that are not finite

def set_lr(lr):
    "At step 8, the third of the second epoch, the learning rate becomes absurd."
    def do(learn):
        for group in learn.opt.opt.param_groups: group["lr"] = lr
    return Act(8, do)

def bad_gradient(learn):
    "At this step the predictor gets a gradient that is not a number."
    next(learn.model.global_criterion.predictor.parameters()).register_hook(lambda g: g*float("nan"))

EXPLOSIONS = {"lr 1e10": set_lr(1e10), "lr 1e30": set_lr(1e30), "predictor": Act(8, bad_gradient)}

@pytest.mark.parametrize("save_every", [0, 1], ids=["each epoch", "each step"])
@pytest.mark.parametrize("callback", EXPLOSIONS.values(), ids=EXPLOSIONS)
def test_diverging_run_stops_and_keeps_a_good_checkpoint(callback, save_every, flat, tmp_path, train, callbacks):
    "Exit code 1 and one line with the step; last.pt is finite in every number, and training goes on from it if it is older than the cause."
    out, more = tmp_path/"out", ("--batch-size", 8, "--epochs", 3, "--save-every", save_every, "--log-every", 1)
    callbacks(callback)
    done = train(flat, out, *more)
    lines = errors(done.err)
    assert done.code == 1 and len(lines) == 1 and lines[0].startswith("lewel-pretrain: error: "), done.err
    assert 8 <= int(re.search(r"step (\d+)", lines[0])[1]) < 12 and "learning rate" in lines[0]
    assert all_finite(load_checkpoint(out/"last.pt")) and position(out) >= (1, 0)
    assert not leftovers(out) and not (out/"record.json").exists()
    callbacks()
    if save_every == 0: assert train(flat, out, *more).code == 0 and all_finite(load_checkpoint(out/"last.pt"))

def test_absurd_learning_rate(flat, tmp_path, train):
    "--lr 1e30 from the start: exit code 1, one line with the step, and no checkpoint that is not finite."
    done = train(flat, tmp_path/"out", "--lr", "1e30", "--method", "mocov2")
    assert done.code == 1 and len(errors(done.err)) == 1 and "at step 1 " in done.err and "learning rate" in done.err, done
    assert not (tmp_path/"out/last.pt").exists()

# --- disks that are full

def check_full_disk(done, half, before):
    assert done.code == 1 and len(errors(done.err)) == 1 and "lewel-pretrain: error: " in done.err and str(half) in done.err, done
    assert (half/"last.pt").read_bytes() == before and not leftovers(half) and not (half/"record.json").exists()

@pytest.fixture
def whole(flat, tmp_path, train):
    assert train(flat, tmp_path/"whole").code == 0
    return weights(tmp_path/"whole")

@pytest.mark.parametrize("share", [.01, .5, .999], ids=["start", "half", "end"])
def test_file_size_limit(share, half, whole, flat, train):
    "Where a checkpoint does not fit, wherever in the file that shows: one line, the old one stays, and the run can go on from it."
    before, old = (half/"last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share*len(before)), old[1]))
        done = train(flat, half)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    check_full_disk(done, half, before)
    assert train(flat, half).code == 0 and same(weights(half), whole)

def test_full_file_system(half, whole, flat, tmp_path, train, callbacks):
    "Too little room is refused before the first step; a disk that fills up later costs what was not saved."
    before, disk = (half/"last.pt").read_bytes(), tmp_path/"disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={len(before)*3//2}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        out = shutil.copytree(half, disk/"out")
        done = train(flat, out)
        assert done.code == 2 and "has room for" in done.err and len(errors(done.err)) == 1 and (out/"last.pt").read_bytes() == before
        subprocess.run(["mount", "-o", f"remount,size={len(before)*9}", disk], check=True)
        callbacks(Act(2, lambda learn: (disk/"filler").write_bytes(bytes(shutil.disk_usage(disk).free - len(before)//2))))
        check_full_disk(train(flat, out), out, before)
        callbacks(); (disk/"filler").unlink()
        assert train(flat, out).code == 0 and same(weights(out), whole)
    finally: subprocess.run(["umount", disk], check=True)

@pytest.mark.parametrize("name", ["curve.csv", "record.json", "best.pt", "last.pt"])
def test_write_that_fails(name, labelled, tmp_path, train, monkeypatch):
    "No space left for one of the other files: one line, exit code 1, and the same command finishes the run."
    replace = os.replace
    def full(old, new):
        if str(new).endswith(name): raise OSError(28, "No space left on device", str(new))
        return replace(old, new)
    monkeypatch.setattr(os, "replace", full)
    done = train(labelled, tmp_path/"out")
    assert done.code == 1 and len(errors(done.err)) == 1 and "No space left" in done.err and not leftovers(tmp_path/"out")
    monkeypatch.setattr(os, "replace", replace)
    assert train(labelled, tmp_path/"out").code == 0
    assert load_checkpoint(tmp_path/"out/best.pt")["best"] == read_record(tmp_path/"out")["metrics"]["monitor_knn_top1_best"]

def test_best_checkpoint_survives_a_failure_between_the_two(labelled, tmp_path, train, monkeypatch):
    "Whichever epoch fails to write whichever file: at the end best.pt is there, and the one that the record speaks of."
    replace = os.replace
    for name in "best.pt", "last.pt":
        for epoch in 1, 2, 3:
            out, left = tmp_path/f"{name}{epoch}", [epoch]
            def full(old, new):
                if str(new).endswith(name): left[0] -= 1
                if not left[0]: left[0] = -1; raise OSError(28, "No space left on device", str(new))
                return replace(old, new)
            monkeypatch.setattr(os, "replace", full)
            codes = [train(labelled, out, "--epochs", 4).code for _ in range(2)]
            assert codes[-1] == 0, (name, epoch, codes)
            assert (load_checkpoint(out/"best.pt")["best"]
                    == read_record(out)["metrics"]["monitor_knn_top1_best"]), (name, epoch, codes)

def test_output_folder_that_cannot_be_written(flat, tmp_path, train, monkeypatch):
    "Refused before the first step, not after the first epoch."
    from lewel.pretrain import Pretraining
    monkeypatch.setattr(Pretraining, "fit", lambda *args: pytest.fail("it trains, and cannot save"))
    (tmp_path/"file").write_text("")
    for out in tmp_path/"file", tmp_path/"file/out":
        done = train(flat, out)
        assert done.code in (1, 2) and done.err.count("\n") == 1 and str(out) in done.err

def test_a_time_budget_saves_and_the_next_call_goes_on(labelled, tmp_path, run, train):
    "Exit code 142 and one line; then the same weights as without a budget."
    argv = "--epochs", 4, "--monitor-every", 0
    done = train(labelled, tmp_path/"out", *argv, "--max-minutes", 0.0001)
    assert done.code == 142 and "the end of its time budget" in done.err and len(errors(done.err)) == 1, done.err
    assert not (tmp_path/"out"/"record.json").exists() and (tmp_path/"out"/"last.pt").exists()
    for out in "out", "whole": assert train(labelled, tmp_path/out, *argv).code == 0
    assert same(weights(tmp_path/"out"), weights(tmp_path/"whole"))
    assert train(labelled, tmp_path/"out", *argv, "--max-minutes", -1).code == 2

def test_a_run_moves_to_another_place(labelled, tmp_path, train):
    "Folder and data copied elsewhere: the same command goes on there, to the same weights."
    argv = "--epochs", 4, "--monitor-every", 0
    assert train(labelled, tmp_path/"out", *argv, "--max-minutes", 0.0001).code == 142
    for old, new in (labelled, "data"), (tmp_path/"out", "moved"): shutil.copytree(old, tmp_path/"elsewhere"/new)
    shutil.rmtree(tmp_path/"out")
    done = train(tmp_path/"elsewhere"/"data", tmp_path/"elsewhere"/"moved", *argv)
    assert done.code == 0 and re.search(r"resuming .*moved at step [1-9]", done.out)
    assert train(labelled, tmp_path/"whole", *argv).code == 0
    assert same(weights(tmp_path/"elsewhere"/"moved"), weights(tmp_path/"whole"))

# --- a job of Slurm

STUBS = dict( # what the commands of Slurm do here, in the folder of the job
    srun='echo "$SRUN_CPUS_PER_TASK $*" > srun.asked; trap "exit 1" TERM; echo $$ > srun.pid; '
         'until [ -e fail ]; do sleep .02; done; exit 1',
    scancel='[ "$*" = "--signal=TERM 7" ] && kill -TERM "$(cat srun.pid)"',
    scontrol='if [ "$1" = show ]; then echo node0; echo node1; else echo "$*" >> requeued; fi')

@pytest.fixture
def slurm_job(tmp_path):
    "The script of the notebook as a job of its own, whose srun has begun."
    cells = json.loads((Path(__file__).parent.parent/"nbs/17_pretrain.ipynb").read_text())["cells"]
    script, = (m[1] for c in cells for m in re.finditer(r"```sh\n(#!/bin/bash\n#SBATCH.*?)```", "".join(c["source"]), re.S))
    for name, does in STUBS.items():
        (tmp_path/name).write_text(f"#!/bin/bash\n{does}\n"); (tmp_path/name).chmod(0o755)
    env = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7", SLURM_NNODES="2",
               SLURM_JOB_NODELIST="node[0-1]", SLURM_CPUS_PER_TASK="64")
    job = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=env)
    limit = time.time() + 60
    while not (tmp_path/"srun.pid").exists(): assert job.poll() is None and time.time() < limit; time.sleep(.02)
    yield job
    (tmp_path/"fail").touch(); job.wait(60)

@pytest.mark.parametrize("ends", ["the time is up", "finished just then", "a failure", "refused beside a record"])
def test_slurm_job_is_queued_again_only_after_a_stop(ends, slurm_job, tmp_path):
    """At its signal the script passes SIGTERM on, waits for srun, and asks for another turn;
    not of a run that is complete, nor after a failure. Its exit code is srun's, unless the run has just been completed."""
    if ends in ("finished just then", "refused beside a record"): atomic_write(tmp_path/"runs/lewel_b/record.json", "{}")
    if ends in ("a failure", "refused beside a record"): (tmp_path/"fail").touch()
    else: slurm_job.send_signal(signal.SIGUSR1)
    assert slurm_job.wait(60) == (0 if ends == "finished just then" else 1)        # srun's own, unless the run is complete
    assert (tmp_path/"srun.asked").read_text().startswith("64 torchrun --nnodes 2 ")
    assert "--rdzv-endpoint node0:20007" in (tmp_path/"srun.asked").read_text()
    asked = (tmp_path/"requeued").read_text() if (tmp_path/"requeued").exists() else ""
    assert asked == ("requeue 7\n" if ends == "the time is up" else "")
