"""The exported folder: plain open_clip loads it, and it is whole or absent whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch

from cliptune.errors import DiskFullError, InvalidInputError, ModelNotFoundError
from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, load_exported, manifest_of, read_manifest
from cliptune_model.source import ModelSource

FILES = {"open_clip_config.json", "open_clip_model.safetensors", "cliptune.json"}


def test_an_export_comes_back_equal_with_its_manifest(clip: Clip, tmp_path: Path) -> None:
    manifest = manifest_of(clip, precision="bf16", job_id="job-1", metrics={"zero_shot/accuracy": 0.5})
    export_model(clip, tmp_path / "deep" / "export", manifest)
    folder = tmp_path / "deep" / "export"
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["export"]

    assert read_manifest(folder) == manifest
    plain = json.loads((folder / "cliptune.json").read_text())
    assert plain["architecture"] == "cliptune-test-vit"
    assert plain["image_size"] == [32, 32]
    assert plain["metrics"] == {"zero_shot/accuracy": 0.5}

    loaded = load_exported(folder)
    assert loaded.pretrained
    assert (loaded.architecture, loaded.context_length, loaded.embedding_dim, loaded.image_size) == (
        clip.architecture,
        clip.context_length,
        clip.embedding_dim,
        clip.image_size,
    )
    for name, tensor in clip.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name


def test_a_process_that_never_heard_of_cliptune_loads_the_export(clip: Clip, tmp_path: Path) -> None:
    export_model(clip, tmp_path / "export", manifest_of(clip))
    code = (
        "import sys, torch, open_clip\n"
        f"name = 'local-dir:{tmp_path / 'export'}'\n"
        "model, _, preprocess = open_clip.create_model_and_transforms(name)\n"
        "tokens = open_clip.get_tokenizer(name)(['a cat'])\n"
        "assert 'cliptune_model' not in sys.modules\n"
        f"torch.save(model.eval().encode_text(tokens).detach(), {str(tmp_path / 'vector.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)
    with torch.no_grad():
        ours = clip.encode_texts(clip.tokenize(["a cat"]))
    assert torch.allclose(torch.load(tmp_path / "vector.pt"), ours, rtol=0, atol=1e-6)


def test_an_export_replaces_an_older_one(clip: Clip, tmp_path: Path) -> None:
    export_model(clip, tmp_path / "export", manifest_of(clip, job_id="old"))
    other = build(ModelSource(name="cliptune-test-vit"), seed=8)
    export_model(other, tmp_path / "export", manifest_of(other, job_id="new"))
    assert read_manifest(tmp_path / "export").job_id == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    weights = load_exported(tmp_path / "export").model.state_dict()["text_projection"]
    assert torch.equal(weights, other.model.state_dict()["text_projection"])


def test_a_kill_at_any_system_call_leaves_a_whole_model_or_none(tmp_path: Path) -> None:
    """The exporting process kills itself at its k-th file operation, for every k until it survives."""
    script = tmp_path / "export.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from cliptune_model.clip import build\n"
        "from cliptune_model.exported import export_model, manifest_of\n"
        "from cliptune_model.source import ModelSource\n"
        "clip = build(ModelSource(name='cliptune-test-vit'))\n"
        "for moment in range(1, 200):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        seen = 0\n"
        "        def hook(event, arguments):\n"
        "            global seen\n"
        "            if event in ('open', 'os.rename', 'os.mkdir', 'os.rmdir', 'os.remove', 'os.chmod'):\n"
        "                seen += 1\n"
        "                if seen == moment:\n"
        "                    os.kill(os.getpid(), signal.SIGKILL)\n"
        "        sys.addaudithook(hook)\n"
        "        export_model(clip, Path(sys.argv[1]) / f'{moment}' / 'export', manifest_of(clip))\n"
        "        os._exit(0)\n"
        "    status = os.waitpid(child, 0)[1]\n"
        "    print(moment, status, flush=True)\n"
        "    if status == 0:\n"
        "        break\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "kills")],
        capture_output=True,
        text=True,
        timeout=150,
        env=environment,
    )
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) > 8, done.stderr
    assert lines[-1][1] == 0
    assert all(os.WTERMSIG(status) == signal.SIGKILL for _, status in lines[:-1])
    for moment, _ in lines:
        folder = tmp_path / "kills" / str(moment) / "export"
        if folder.exists():
            assert {path.name for path in folder.iterdir()} == FILES
    whole = load_exported(tmp_path / "kills" / str(lines[-1][0]) / "export")

    # The next export sweeps the leftovers of a killed one away.
    half = next(
        path
        for moment, _ in lines[:-1]
        for path in (tmp_path / "kills" / str(moment)).glob(".export.partial-*")
        if not (path.parent / "export").exists()
    )
    export_model(whole, half.parent / "export", manifest_of(whole))
    assert [path.name for path in half.parent.iterdir()] == ["export"]


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not enforce RLIMIT_FSIZE for mapped files")
def test_a_full_disk_is_told_and_leaves_the_old_model(clip: Clip, tmp_path: Path) -> None:
    import resource

    export_model(clip, tmp_path / "export", manifest_of(clip, job_id="old"))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(DiskFullError, match="no space left"):
            export_model(clip, tmp_path / "export", manifest_of(clip, job_id="new"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert read_manifest(tmp_path / "export").job_id == "old"


def test_tensors_under_two_names_are_exported_twice(tmp_path: Path) -> None:
    clip = build(ModelSource(name="cliptune-test-vit"))
    blocks = clip.model.visual.transformer.resblocks  # type: ignore[union-attr]
    blocks[1].mlp.c_fc.weight = blocks[0].mlp.c_fc.weight  # type: ignore[index,union-attr]
    export_model(clip, tmp_path / "export", manifest_of(clip))
    assert open_clip.create_model(f"local-dir:{tmp_path / 'export'}") is not None


def test_absent_damaged_and_newer_models_are_told_apart(clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        load_exported(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError):
        read_manifest(tmp_path / "absent")
    export_model(clip, tmp_path / "export", manifest_of(clip))
    path = tmp_path / "export" / "cliptune.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(InvalidInputError, match="damaged"):
        read_manifest(tmp_path / "export")
    path.write_text(json.dumps({**json.loads(text), "format_version": 99}))
    with pytest.raises(InvalidInputError, match="upgrade"):
        load_exported(tmp_path / "export")
    path.write_text(json.dumps({**json.loads(text), "added_later": 1}))
    assert read_manifest(tmp_path / "export").architecture == "cliptune-test-vit"
    (tmp_path / "export" / "open_clip_model.safetensors").write_bytes(b"short")
    with pytest.raises(InvalidInputError):
        load_exported(tmp_path / "export")
