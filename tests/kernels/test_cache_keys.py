"""A kernel's key in Triton's disk cache is the same whatever else a process has compiled before.

Triton 3.6 and 3.7 put the global constants of a function that a kernel calls into the kernel's key
only if that function's own key was asked for earlier (triton-lang/triton#10494): a kernel that uses
such a constant would be compiled again by the next process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Each function's key as the first one that a process asks for, then with all others asked for.
SCRIPT = """
import importlib, json, os, pathlib
functions = {}
for file in pathlib.Path("kernels").glob("*.py"):
    for name, value in vars(importlib.import_module(f"sepconv.kernels.{file.stem}")).items():
        if hasattr(type(value), "cache_key"):
            functions[f"{value.__module__}.{name}"] = value
keys = {}
for name, function in functions.items():
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, function.cache_key.encode())
        os._exit(0)
    os.close(writer)
    keys[name] = [os.read(reader, 1000).decode()]
    os.wait()
for function in functions.values():
    function.cache_key
for name, function in functions.items():
    function.hash = None
    keys[name].append(function.cache_key)
print(json.dumps(keys))
"""


def test_keys_do_not_depend_on_what_was_compiled_before():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    keys = json.loads(done.stdout)
    assert sum(name.endswith("_kernel") for name in keys) >= 8
    assert not [name for name, (alone, after) in keys.items() if alone != after]
