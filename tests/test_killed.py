"""Writers that are killed at any moment leave the old state or the new one, and no remains."""

import subprocess
import sys
import textwrap

import pytest

WRITERS = {
    "save": "pk.save(model, None, out, force=True)",
    "nested": "save_nested(model, None, out, scores, force=True)",
    "stream": "stream_prune(Checkpoint(dense, load_shape(dense)), plan, out, force=True)",
    "gguf": "save_gguf(model, words, file, force=True)",
}
SCRIPT = """
    import os, random, signal, sys, threading, time
    from pathlib import Path

    import torch
    from tqdm import tqdm

    os.fsync = lambda descriptor: None  # a kill loses nothing that was written; disks are slow
    tqdm.set_lock(threading.RLock())  # its own would be held for ever by who was killed with it
    torch.set_num_threads(1)  # so that there are none that a fork would lose
    import prunekit as pk
    from prunekit.arch import find_mlps
    from prunekit.checkpoint import verify
    from prunekit.checkpoint.gguf import save_gguf
    from prunekit.checkpoint.gguf_read import read_gguf
    from prunekit.checkpoint.nested import save_nested
    from prunekit.checkpoint.stream import Checkpoint, stream_prune
    from prunekit.integrations.loading import load_shape
    from tests.models import tiny_model
    from tests.vocabularies import byte_level

    root, trials = Path(sys.argv[1]), int(sys.argv[2])
    out, file, dense = root / "out", root / "out.gguf", str(root / "dense")
    model, words = tiny_model("llama", vocab_size=400), byte_level("qwen2", 400)
    scores = [torch.rand(v.width) for v in find_mlps(model)]
    plan = pk.plan(scores, 0.5, multiple_of=8)
    model.save_pretrained(dense, max_shard_size="40KB")
    draw = random.Random(0)
    WRITE
    took = time.perf_counter()
    WRITE
    took = time.perf_counter() - took
    found = {"whole": 0}
    for _ in range(trials):
        child = os.fork()
        if not child:
            while True:
                WRITE
        time.sleep(draw.uniform(0, 2 * took))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if file.exists():
            assert all(read_gguf(file).read(name) is not None for name in read_gguf(file).tensors)
        else:
            assert verify(out)
    WRITE
    names = sorted(p.name for p in root.iterdir())
    assert names in (["dense", "out"], ["dense", "out.gguf"]), names
    print("done")
"""


@pytest.mark.parametrize("writer", WRITERS)
def test_a_kill_leaves_the_old_or_the_new(writer, tmp_path):
    code = textwrap.dedent(SCRIPT).replace("WRITE", WRITERS[writer])
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "50"], capture_output=True, text=True
    )
    assert run.stdout.strip().endswith("done"), run.stderr[-2000:]
