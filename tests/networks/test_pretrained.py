import pickle
import random
import zipfile

import pytest
import torch
from torch import nn

from clinfuse.networks.pretrained import load_weights, read_weights, read_whole


def network(features=3):
    return nn.Sequential(nn.Conv2d(1, features, 3), nn.BatchNorm2d(features))


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 3, "state_dict": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_state_dict_is_read_by_itself_or_from_a_checkpoint(wrap, prefix, tmp_path):
    weights = network().state_dict()
    content = wrap({prefix + name: weight for name, weight in weights.items()})
    found = read_weights(saved(tmp_path / "weights.pth", content))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_file_of_before_torch_s_zip_format_is_read_too(tmp_path):
    weights = network().state_dict()
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = read_weights(tmp_path / "old.pth")
    assert torch.equal(found["0.weight"], weights["0.weight"])


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "gone.pth", tmp_path):  # a folder is no file either
        with pytest.raises(FileNotFoundError, match=f"file of weights, found no file at {path}"):
            read_weights(path)


class Program:
    """Something that pickles as a call."""

    def __reduce__(self):
        return print, ("this must not be run",)


def cut_in_half(path):
    content = saved(path, network().state_dict()).read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("write", "got"),
    [
        (lambda path: path.write_bytes(b"not weights at all"), "something else or a damaged file"),
        (cut_in_half, "something else or a damaged file"),
        (lambda path: path.write_bytes(b""), "an empty file"),
        (
            lambda path: path.write_bytes(pickle.dumps({"0.weight": Program()})),
            "something else or a damaged file",
        ),
        (lambda path: torch.save({"0.weight": Program()}, path), "pickled objects"),
        (lambda path: torch.save(network(), path), "pickled objects"),
    ],
    ids=["text", "truncated", "empty", "pickled program", "saved program", "whole module"],
)
def test_an_unreadable_file_gives_one_sentence_and_is_not_run(
    write, got, tmp_path, capsys, recwarn
):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(ValueError, match=rf"expected readable weights, got {got}.*weights\.pth"):
        read_weights(path)
    assert "must not be run" not in capsys.readouterr().out
    assert not recwarn.list  # which would be sentences more


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.eye(3).to_sparse(), "expected dense real tensors, got others in 1.weight"),
        (
            torch.eye(3, dtype=torch.complex64),
            "expected dense real tensors, got others in 1.weight",
        ),
        (torch.empty(3, device="meta"), "expected dense real tensors, got others in 1.weight"),
        (torch.tensor([0.0, torch.nan]), "expected finite weights, got NaN or inf in 1.weight"),
        (torch.tensor([0.0, -torch.inf]), "expected finite weights, got NaN or inf in 1.weight"),
    ],
    ids=["sparse", "complex", "meta", "nan", "inf"],
)
def test_weights_that_no_network_can_start_from_are_named(weight, said, tmp_path):
    path = saved(tmp_path / "weights.pth", {"0.weight": torch.zeros(3), "1.weight": weight})
    with pytest.raises(ValueError, match=f"{said}: .*weights.pth"):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (torch.zeros(3), "Tensor"),
        ({}, "dict"),
        ({"0.weight": torch.zeros(1), "seed": 3}, "seed among them"),
    ],
    ids=["tensor", "empty", "number"],
)
def test_a_file_of_something_else_than_tensors_by_name_is_refused(content, got, tmp_path):
    path = saved(tmp_path / "weights.pth", content)
    with pytest.raises(ValueError, match=f"expected tensors by name, got {got}: .*weights.pth"):
        read_weights(path)


def test_weights_arrive_whether_or_not_the_batches_of_a_norm_were_counted(tmp_path):
    one, other = network(), network()
    weights = one.state_dict()
    del weights["1.num_batches_tracked"]
    load_weights(other, weights, "a network", tmp_path)
    assert torch.equal(other[0].weight, one[0].weight)


def test_another_architecture_is_named_by_what_is_missing_too_much_and_of_another_shape(tmp_path):
    weights = network(features=4).state_dict()
    del weights["1.weight"], weights["1.bias"]
    weights |= {f"{layer}.weight": torch.zeros(1) for layer in range(2, 7)}
    ours = network()
    before = ours[0].weight.clone()
    with pytest.raises(ValueError) as refused:
        load_weights(ours, weights, "a network", tmp_path / "weights.pth")
    assert str(refused.value) == (
        "expected weights of a network, got no 1.weight, 1.bias; "
        "too many: 2.weight, 3.weight, 4.weight and 2 more; "
        "shapes: 0.weight (4, 1, 3, 3) for (3, 1, 3, 3), 0.bias (4,) for (3,), "
        f"1.running_mean (4,) for (3,) and 1 more: {tmp_path / 'weights.pth'}"
    )
    assert torch.equal(ours[0].weight, before)


def test_a_byte_that_changed_is_found_or_of_no_consequence(tmp_path):
    path, flips = tmp_path / "last.ckpt", random.Random(0)
    saved = {"weights": torch.randn(300), "names": ["a", "b"], "steps": 7}
    torch.save(saved, path)
    content, found = path.read_bytes(), 0
    for _ in range(300):
        changed = bytearray(content)
        changed[flips.randrange(len(content))] ^= 1 << flips.randrange(8)
        path.write_bytes(changed)
        try:
            read = read_whole(path)
        except Exception:
            found += 1
            continue
        assert torch.equal(read["weights"], saved["weights"])
        assert read["names"] == saved["names"] and read["steps"] == saved["steps"]
    assert found > 100  # 1200 of some 2500 bytes are weights


def test_weights_in_which_one_bit_is_another_are_refused(tmp_path):
    """Torch reads them as other weights, and says nothing."""
    weights = network().state_dict()
    path = saved(tmp_path / "w.pth", weights)
    content = path.read_bytes()
    place = content.index(weights["0.weight"].numpy().tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    other = torch.load(path, weights_only=True)["0.weight"]
    assert not torch.equal(other, weights["0.weight"]) and other.isfinite().all()
    with pytest.raises(ValueError, match=rf"readable weights, got something else or a .*: {path}"):
        read_weights(path)


def test_records_that_unpack_to_more_than_the_file_are_not_unpacked(tmp_path):
    path = saved(tmp_path / "w.pth", {"w": torch.zeros(1_000_000)})
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    assert path.stat().st_size < 20_000
    assert torch.load(path, weights_only=True)["w"].shape == (1_000_000,)  # by torch they are
    with pytest.raises(ValueError, match=r"its records unpack to 40\d{5} bytes"):
        read_whole(path)
