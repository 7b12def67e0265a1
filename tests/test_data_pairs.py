"""What training gets: augmentation by choice, exact repetition, and going on over images that cannot be read."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from sst_fast import data
from sst_fast.train.cli import main


def inverted(image, rng):
    """An augmentation of a user's own, as an image."""
    return Image.eval(image, lambda value: 255 - value)


def noise(image, rng):
    """Another one, as a tensor."""
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    return data.to_tensor(image) + torch.randn(1, *image.size, generator=generator)


def wrong(image, rng):
    return image.resize((3, 3))


def pairs(faces, channels=1, **options):
    return data.Pairs(data.faces(faces), 32, channels, seed=0, **options)


def plain(faces, i):
    """All images of identity ``i``, not augmented."""
    images, labels = data.all_images(data.faces(faces), 32, 1)
    return images[labels == i]


def test_none_and_flip_and_own_functions(faces):
    for i in range(12):
        originals = plain(faces, i)
        for image in pairs(faces, augment="none")[i][:2]:
            assert any(torch.equal(image, original) for original in originals)
        for image in pairs(faces, augment="flip")[i][:2]:
            assert any(torch.equal(x, original) for original in originals for x in (image, image.flip(-1)))
    flipped = [
        torch.equal(x, y)
        for x, y in zip(*([pairs(faces, augment=a)[i][0] for i in range(12)] for a in ("none", "flip")), strict=True)
    ]
    assert 0 < sum(flipped) < 12
    inverse = pairs(faces, augment=f"{__name__}:inverted")[3][0]
    torch.testing.assert_close(-inverse, pairs(faces, augment="none")[3][0])
    own = pairs(faces, augment=f"{__name__}:noise")
    assert torch.equal(own[3][0], pairs(faces, augment=f"{__name__}:noise")[3][0])
    with pytest.raises(
        ValueError, match=r"data.augment: expected a float32 tensor \[1, 32, 32\], got torch.float32 \[1, 3, 3\]"
    ):
        pairs(faces, augment=f"{__name__}:wrong")[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rotate", "data.augment must be 'sst', 'flip', 'none' or 'module:function', got 'rotate'"),
        ("no_such_module:f", "data.augment: 'no_such_module:f' cannot be imported: No module named"),
        ("random:nothing", "data.augment: 'random:nothing' cannot be imported"),
        ("math:pi", "data.augment: 'math:pi' is no function"),
    ],
)
def test_augmentations_that_do_not_exist_are_named(faces, name, message):
    with pytest.raises(ValueError, match=message):
        pairs(faces, augment=name)


def test_the_papers_augmentation_rotates_about_the_centre():
    cross = np.zeros((33, 33), np.uint8)
    cross[16, 16] = 255
    seen = set()
    for seed in range(200):
        rng = random.Random(seed)
        if rng.random() >= 0.5:  # no crop: the centre stays where it is
            image = np.asarray(data.augment(Image.fromarray(cross), random.Random(seed)))
            seen.add(np.unravel_index(image.argmax(), image.shape))
    assert seen == {(16, 16)}


def test_items_depend_on_seed_epoch_and_identity_alone(faces):
    found = data.faces(faces)
    whole = [pairs(faces, 3)[i] for i in range(12)]
    loader = torch.utils.data.DataLoader(pairs(faces, 3), 4, num_workers=2, sampler=list(range(11, -1, -1)))
    for a, b, identity in loader:
        for i, number in enumerate(identity.tolist()):
            assert torch.equal(a[i], whole[number][0])
            assert torch.equal(b[i], whole[number][1])
    shallow = data.Pairs(found.shallow(2, seed=1), 32, 3, seed=0)
    assert shallow[0][2] == 0


@pytest.fixture
def broken(faces):
    """One image of identity 0, two of 1, all of 2, and a text file's worth of one of 3."""
    for person, numbers in {"p0": [1], "p1": [0, 2], "p10": [0, 1, 2], "p11": [2]}.items():
        for number in numbers:
            (faces / person / f"{number}.png").write_bytes(b"broken")
    return faces


def test_skip_takes_the_images_and_identities_that_are_left(broken, tmp_path):
    names = data.faces(broken).names
    assert names[:4] == ["p0", "p1", "p10", "p11"]
    skipped = data.Unreadable(tmp_path / "run" / "unreadable.txt")
    for epoch in range(6):
        found = pairs(broken, augment="none", skipped=skipped)
        found.epoch = epoch
        items = [found[i] for i in range(12)]
        assert [item[2] for item in items] == [0, 1, 3, 3, *range(4, 12)]
        assert torch.equal(items[1][0], items[1][1])  # the one that is left
        assert not torch.equal(items[0][0], items[0][1])
    lines = skipped.path.read_text().splitlines()
    assert len(lines) == len(set(lines)) == len(skipped) == 7
    assert all("cannot be read as an image: it is none of" in line for line in lines)


def test_skip_is_the_same_in_workers_and_where_nothing_is_broken(broken, tmp_path):
    skipped = data.Unreadable(tmp_path / "unreadable.txt")
    here = [pairs(broken, skipped=skipped)[i] for i in range(12)]
    for _ in range(2):
        loader = torch.utils.data.DataLoader(pairs(broken, skipped=skipped), 3, num_workers=2)
        there = [(x, y, int(n)) for a, b, identity in loader for x, y, n in zip(a, b, identity, strict=True)]
        for one, other in zip(here, there, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
            assert one[2] == other[2]
    assert len(skipped.path.read_text().splitlines()) <= 7
    for i in range(4, 12):
        assert torch.equal(pairs(broken)[i][0], here[i][0])
    with pytest.raises(data.DataError, match=r"p10/\d.png cannot be read"):
        pairs(broken)[2]


def test_a_data_set_of_nothing_readable_ends(faces, tmp_path):
    for file in faces.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(data.DataError, match="all images of 12 identities cannot be read"):
        pairs(faces, skipped=data.Unreadable(tmp_path / "x.txt"))[4]


def test_batches_leave_out_what_is_skipped(broken, tmp_path):
    images, labels = data.flat(data.faces(broken))
    for workers in (0, 2):
        kept = []
        skipped = data.Unreadable(tmp_path / f"{workers}.txt")
        found = list(data.image_batches(images, 32, 1, batch=3, workers=workers, skipped=skipped, kept=kept))
        assert len(torch.cat(found)) == len(kept) == 36 - 7
        assert len(skipped) == 7
        assert torch.bincount(labels[kept]).tolist() == [2, 1, 0, 2] + [3] * 8
    with pytest.raises(data.DataError):
        list(data.image_batches(images, 32, 1))


def test_a_run_goes_on_over_broken_images_and_says_so(broken, tmp_path, capsys):
    assert main(["train", "--data.root", str(broken), "--data.size", "32", "--data.channels", "1", "--out", str(tmp_path / "r"),
                 "--epochs", "2", "--batch", "9", "--dim", "16", "--width", "0.125", "--queue_size", "9", "--device", "cpu",
                 "--data.test_share", "0.25", "--data.on_error", "skip", "--data.augment", f"{__name__}:inverted"]) == 0  # fmt: skip
    assert "7 images could not be read and were skipped" in capsys.readouterr().err
    assert len((tmp_path / "r" / "unreadable.txt").read_text().splitlines()) == 7
