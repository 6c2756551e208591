"""How far a reader travels: the files that one image passes on its way from pixels to logits.

In a process of its own: here the checks of the test run would stand between any two functions.
"""

import subprocess
import sys

TRACE = """
import itertools, sys, torch, t2t_ref
model = t2t_ref.create_model({name!r}, img_size=64).eval()
image = torch.randn(1, 3, 64, 64)
calls = []  # (file, function), in the order of the run

def watch(frame, event, argument):
    file = frame.f_code.co_filename.replace("\\\\", "/")
    if event == "call" and "/t2t_ref/" in file:
        calls.append((file.rpartition("/t2t_ref/")[2], frame.f_code.co_name))

with torch.no_grad():
    sys.setprofile(watch)
    model(image)
    sys.setprofile(None)
print("files", *(file for file, _ in itertools.groupby(calls, key=lambda call: call[0])))
print("calls", *(name for _, name in calls))
"""


def trace(name):
    code = TRACE.format(name=name)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files, calls = (line.split()[1:] for line in done.stdout.splitlines())
    return files, calls


def test_an_image_changes_files_a_dozen_times():
    files, calls = trace("t2t_vit_7")
    assert len(files) - 1 <= 12, files
    assert files[0] == files[-1] == "models/classifier.py"  # where the whole forward is read
    assert "models/position.py" not in files and not {"grid_of", "token_grid"} & set(calls)  # the table is looked up
    assert calls.count("check_image") == calls.count("check_channels") == 1


def test_a_vit_takes_the_same_way():
    files, _ = trace("vit_small_patch16")
    assert len(files) - 1 <= 7, files
