import json
import shutil

import pytest

from glalm.data.shards import TokenSet
from glalm.data.tokenizer import Tokenizer
from glalm.prepare.inspection import inspect_set
from glalm.prepare.pipeline import prepare_data


def test_inspect(prepared, tmp_path, capsys):
    out = shutil.copytree(prepared, tmp_path / "set")
    assert inspect_set(out) == 0
    shown = capsys.readouterr().out
    tokens = TokenSet(out, "train")
    assert (
        f"{tokens.num_tokens:,}" in shown
        and "60 documents read = 60 written" in shown
        and "counts are consistent" in shown
    )
    assert "The SHA-256 of every file matches the manifest" in shown
    assert (out / "lengths.png").read_bytes().startswith(b"\x89PNG")
    text = Tokenizer(tokens.tokenizer_path).decode(tokens.read_document(tokens.num_documents // 2))
    assert text.split("\n")[0] in shown
    path = out / "train/corpus/00000.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"00000\.npy is damaged"):
        inspect_set(out)
    assert inspect_set(out, verify=False) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["books"]["corpus"]["written"] -= 1
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert inspect_set(out, verify=False) == 1 and "ERROR: These counts are inconsistent" in capsys.readouterr().out


def test_a_set_without_room_for_the_plot_is_verified(tmp_path, prepared, capsys):
    (tmp_path / "a.txt").write_text("a b c")
    options = {"tokenizer": prepared / "tokenizer.model", "held_out": {}, "progress": False}
    prepare_data([tmp_path / "a.txt"], tmp_path / "set", **options)
    (tmp_path / "set/lengths.png").mkdir()  # Writing it fails, as on a read-only disk.
    assert inspect_set(tmp_path / "set") == 0
    shown = capsys.readouterr()
    assert "The SHA-256 of every file matches the manifest" in shown.out
    assert "The lengths of the documents are not plotted (" in shown.err
    ids = TokenSet(tmp_path / "set", "train").read_document(0).tolist()
    assert len(ids) < 15 and f"\nids: {' '.join(map(str, ids))}\n" in shown.out
