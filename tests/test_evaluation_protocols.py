"""The protocols of the field's test sets, against restatements by definition, and `eval` on files of each kind."""

import json
import os
import pickle
import re
import resource
from collections import Counter
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat
from torch import nn

from sst_fast import data, evaluation
from sst_fast.evaluation import identification, targets
from sst_fast.evaluation.folds import fold_numbers
from sst_fast.train import evaluation_report, pages
from sst_fast.train.cli import main
from sst_fast.train.export import ProbeInfo

# --- folds ---


def facexzoo(scores, genuine, folds):
    """test_protocol/lfw of FaceX-Zoo in plain loops."""
    size, found = len(scores) // folds, []
    for fold in range(folds):
        test = np.zeros(len(scores), bool)
        test[fold * size : (fold + 1) * size] = True
        train_s, train_g = scores[~test], genuine[~test]
        step, best = (train_s.max() - train_s.min()) / 1000, (-2.0, 0.0)
        for k in range(1, 1001):
            t = train_s.min() + step * k
            gap = (train_s[train_g] > t).mean() - (train_s[~train_g] > t).mean()
            if gap > best[0]:
                best = gap, t
        t = best[1]
        found.append(((scores[test & genuine] > t).sum() + (scores[test & ~genuine] < t).sum()) / size)
    return np.array(found)


def pairs_in_runs(rng, folds, each):
    """Like LFW: in each fold genuine pairs, then impostors."""
    genuine = np.tile(np.repeat([True, False], each), folds)
    return rng.normal(size=len(genuine)) + 1.5 * genuine, genuine


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ties", [False, True])
def test_facexzoo_rule_as_its_code_has_it(seed, ties):
    scores, genuine = pairs_in_runs(np.random.default_rng(seed), 10, 12)
    scores = np.round(scores, 0 if ties else 9)
    found = evaluation.verify_in_folds(scores, genuine, rule="facexzoo")
    np.testing.assert_allclose(found.accuracy, facexzoo(scores, genuine, 10), rtol=1e-12)
    assert found.mean == pytest.approx(found.accuracy.mean())
    assert found.standard_error == pytest.approx(np.std(found.accuracy, ddof=1) / np.sqrt(10))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=6, max_size=40), st.integers(2, 3))
def test_the_threshold_is_the_most_accurate_of_the_other_folds(pairs, folds):
    scores, genuine = np.array([s for s, _ in pairs]) / 4, np.array([g for _, g in pairs])
    number = fold_numbers(genuine, folds)
    if any(genuine[number != f].all() or not genuine[number != f].any() for f in range(folds)):
        with pytest.raises(ValueError, match=r"hold no (genuine|impostor) pair"):
            evaluation.verify_in_folds(scores, genuine, folds=folds)
        return
    found = evaluation.verify_in_folds(scores, genuine, folds=folds)
    for fold, threshold in enumerate(found.thresholds):
        train, test = number != fold, number == fold
        assert ((scores[train] >= threshold) == genuine[train]).mean() == max(
            ((scores[train] >= t) == genuine[train]).mean() for t in np.arange(-1, 8) / 4
        )
        assert found.accuracy[fold] == ((scores[test] >= threshold) == genuine[test]).mean()


def test_folds_of_the_known_lists():
    lfw = np.tile(np.repeat([True, False], 300), 10)
    assert np.array_equal(fold_numbers(lfw, 10), np.arange(6000) // 600)
    cfp = np.tile(np.repeat([True, False], 350), 10)
    assert np.array_equal(fold_numbers(cfp, 10), np.arange(7000) // 700)
    calfw = fold_numbers(np.repeat([True, False], 3000), 10)  # 300 + 300
    assert np.array_equal(calfw, np.tile(np.arange(3000) // 300, 2))
    assert sorted(np.bincount(fold_numbers(np.array([True, False, True] * 7 + [True]), 10))) == [2] * 8 + [3] * 2


@pytest.mark.parametrize(
    ("scores", "genuine", "options", "message"),
    [
        ([1.0, 2.0], [True], {}, r"must be \[P\] both, got \[2\] and \[1\]"),
        ([1.0, 2.0], [True, False], {}, r"folds must be in \[2, number of pairs = 2\], got 10"),
        ([1.0, np.nan], [True, False], {"folds": 2}, "scores are not finite"),
        ([1.0] * 4, [True] * 4, {"folds": 2}, "the folds other than 1 hold no impostor pair"),
        (
            [1.0] * 4,
            [True, False] * 2,
            {"folds": 2, "rule": "best"},
            "rule must be 'accuracy' or 'facexzoo', got 'best'",
        ),
    ],
)
def test_impossible_folds_are_named(scores, genuine, options, message):
    with pytest.raises(ValueError, match=message):
        evaluation.verify_in_folds(scores, genuine, **options)


@pytest.mark.parametrize(
    ("text", "first", "folds"),
    [
        ("2\t1\nAnn\t1\t4\nAnn\t1\tBob_Lee\t12\nBob_Lee\t2\t12\nAnn\t4\tBob_Lee\t2\n", "Ann/Ann_0001.jpg", 2),
        ("Ann\t1\t4\nAnn\t1\tBob_Lee\t12\n", "Ann/Ann_0001.jpg", 10),
        ("a 1.jpg\tb.jpg\t1\na 1.jpg\tc.jpg\t-1\n", "a 1.jpg", 10),
        ("a.jpg 3\nb.jpg 3\na.jpg 0\nc.jpg 0\n", "a.jpg", 10),
    ],
)
def test_lists_of_pairs(tmp_path, text, first, folds):
    path = tmp_path / "pairs.txt"
    path.write_text(text)
    found = evaluation.read_pairs(path)
    assert found.paths[0] == first
    assert found.folds == folds
    assert found.genuine.tolist()[:2] == [True, False]
    assert [(found.paths[a], found.paths[b]) for a, b in zip(found.first, found.second, strict=True)][1][0] == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no pairs"),
        ("Ann 1 4\nAnn one 2 three\n", "line 2: expected 'name i j'"),
        ("a.jpg 1\nb.jpg 0\n", "line 1: the two lines of a pair have the labels 1 and 0"),
        ("a.jpg 1\n", "expected two lines for each pair, got 1 lines"),
        ("a.jpg x\nb.jpg x\n", "line 1: expected 'image label'"),
    ],
)
def test_bad_lists_of_pairs_are_named(tmp_path, text, message):
    path = tmp_path / "pairs.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        evaluation.read_pairs(path)


# --- identification ---


def unit(rng, n, dim=6, coarse=False):
    x = rng.integers(-2, 3, (n, dim)) / 2 if coarse else rng.normal(size=(n, dim))
    x = torch.tensor(x, dtype=torch.float32)
    return x if coarse else nn.functional.normalize(x)  # coarse: exact products with ties


def open_set(scores, same, far, rank):
    """By definition: over all thresholds."""
    known = same.any(0)
    best = 0.0
    for t in [*np.unique(scores), np.inf]:
        alarms = (scores[:, ~known].max(0) >= t).mean()
        if alarms <= far:
            right = [
                scores[same[:, i], i].max() >= t
                and (scores[~same[:, i], i] >= scores[same[:, i], i].max()).sum() < rank
                for i in np.flatnonzero(known)
            ]
            best = max(best, np.mean(right))
    return best


@pytest.mark.parametrize("coarse", [False, True])
def test_open_set_identification_by_definition(coarse):
    rng = np.random.default_rng(0)
    gallery, probes = unit(rng, 12, coarse=coarse), unit(rng, 50, coarse=coarse)
    gallery_labels = torch.tensor(rng.integers(8, size=12))
    labels = torch.tensor(rng.integers(14, size=50))
    probes[:20] += gallery[rng.integers(12, size=20)]
    found = evaluation.search(probes, gallery, labels, gallery_labels)
    scores = (gallery @ probes.T).numpy()
    same = gallery_labels.numpy()[:, None] == labels.numpy()[None]
    for rank in (1, 3):
        for far, rate in evaluation.dir_at_far(found, (0.0, 0.01, 0.1, 0.5, 1.0), rank).items():
            assert rate == pytest.approx(open_set(scores, same, far, rank)), (far, rank)


def test_open_set_needs_both_kinds_of_probes():
    x = torch.eye(3)
    found = evaluation.search(x, x, torch.arange(3), torch.arange(3))
    with pytest.raises(ValueError, match="probes with and without a partner, got 3 and 0"):
        evaluation.dir_at_far(found, [0.1])


def test_rank1_among_distractors_by_definition():
    rng = np.random.default_rng(1)
    labels = torch.tensor(rng.integers(6, size=25))
    x, distractors = unit(rng, 25, coarse=True), unit(rng, 40, coarse=True)
    found = evaluation.rank1_among_distractors(x, labels, distractors, (5, 20, 1000))
    assert list(found) == [5, 20, 40]
    for n, rate in found.items():
        won = [
            float(x[i] @ x[j]) > float((distractors[:n] @ x[i]).max())
            for i in range(25) for j in range(25) if i != j and labels[i] == labels[j]
        ]  # fmt: skip
        assert rate == pytest.approx(np.mean(won))
    with pytest.raises(ValueError, match="two images of one identity and a distractor are needed"):
        evaluation.rank1_among_distractors(x[:1], labels[:1], distractors)


def blufr_file(path, images, labels, rng, trials=3):
    """A configuration as MATLAB writes it, numbers from 1."""
    cells = {name: np.empty((trials, 1), object) for name in ("testIndex", "galIndex", "probIndex")}
    for trial in range(trials):
        order = rng.permutation(len(images)) + 1
        gallery = [next(i for i in order if labels[i - 1] == label) for label in sorted(set(labels))[:4]]
        cells["testIndex"][trial, 0] = order[:, None].astype(float)
        cells["galIndex"][trial, 0] = np.array(gallery, float)[:, None]
        cells["probIndex"][trial, 0] = np.array([i for i in order if i not in gallery], float)[:, None]
    names = np.empty((len(images), 1), object)
    names[:, 0] = images
    savemat(path, {"imageList": names, "labels": np.array(labels)[:, None], **cells})
    return cells


def test_blufr(tmp_path):
    rng = np.random.default_rng(2)
    labels = [i % 8 + 1 for i in range(40)]
    cells = blufr_file(tmp_path / "config.mat", [f"a_{i:04}.jpg" for i in range(40)], labels, rng)
    config = evaluation.read_blufr(tmp_path / "config.mat")
    assert config.images[3] == "a_0003.jpg"
    x = unit(rng, 40)
    found = evaluation.blufr(x, config, (0.1,), (0.1,))
    for trial in range(3):
        g, p = (cells[name][trial, 0].ravel().astype(int) - 1 for name in ("galIndex", "probIndex"))
        same = np.array(labels)[g][:, None] == np.array(labels)[p][None]
        expected = open_set((x[g] @ x[p].T).numpy(), same, 0.1, 1)
        assert found.identification[0.1][trial] == pytest.approx(expected)
        pairs = evaluation.all_pairs(x, torch.tensor(labels)).pairs  # all images are test images here
        assert found.verification[0.1][trial] == pairs.tar_at([0.1])[0.1].value
    rates = found.identification[0.1]
    assert found.figures()["DIR at FAR 0.1, rank 1"] == pytest.approx(rates.mean() - rates.std(ddof=1))


def test_bad_blufr_files_are_named(tmp_path):
    path = tmp_path / "config.mat"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no BLUFR configuration"):
        evaluation.read_blufr(path)
    savemat(path, {"labels": [1]})
    with pytest.raises(ValueError, match="has no variable imageList"):
        evaluation.read_blufr(path)


# --- templates ---


def ijb_files(folder, rng, images=24, templates=9):
    """Meta files as they are distributed; returns their rows."""
    meta = folder / "meta"
    meta.mkdir(parents=True)
    rows = [(f"{i}.png", i % templates + 1, i // 2 % 5) for i in range(images)]
    (meta / "ijbc_face_tid_mid.txt").write_text("".join(f"{n} {t} {m}\n" for n, t, m in rows))
    pairs = [(a, b, int(a % 3 == b % 3)) for a in range(1, templates + 1) for b in range(a + 1, templates + 1)]
    (meta / "ijbc_template_pair_label.txt").write_text("".join(f"{a} {b} {g}\n" for a, b, g in pairs))
    weights = rng.uniform(0.5, 1, images).round(3)
    points = " ".join(str(v) for v in (targets.LANDMARKS * 32 / 112).ravel())
    (meta / "ijbc_name_5pts_score.txt").write_text("".join(f"{i}.png {points} {w}\n" for i, w in enumerate(weights)))
    for name, members in (("gallery_G1", [1, 2]), ("gallery_G2", [3]), ("probe_mixed", range(4, templates + 1))):
        lines = [f"{t},{t % 3},x.png,7\n" * 2 for t in members]  # a line for each image
        (meta / f"ijbc_1N_{name}.csv").write_text("TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID\n" + "".join(lines))
    return rows, pairs, weights


def test_templates_by_definition(tmp_path):
    rng = np.random.default_rng(3)
    rows, pairs, weights = ijb_files(tmp_path, rng)
    ijb = evaluation.read_ijb(tmp_path)
    x = torch.tensor(rng.normal(size=(24, 5)), dtype=torch.float32)
    names, pooled = evaluation.pool_templates(x, ijb)
    for t in range(1, 10):
        total = np.zeros(5)
        for media in {m for _, owner, m in rows if owner == t}:
            total += np.mean([x[i].numpy() * weights[i] for i, (_, o, m) in enumerate(rows) if (o, m) == (t, media)], 0)
        np.testing.assert_allclose(pooled[list(names).index(t)], total / np.linalg.norm(total), rtol=1e-5, atol=1e-6)
    cosine = {(a, b): float(pooled[a - 1] @ pooled[b - 1]) for a, b, _ in pairs}
    found = evaluation.template_verification(names, pooled, ijb)
    expected = evaluation.PairScores.of(*([cosine[a, b] for a, b, g in pairs if g == kind] for kind in (1, 0)))
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
    assert np.array_equal(found.genuine, expected.genuine)
    identified = evaluation.template_identification(names, pooled, ijb, (0.5,))
    scores = (pooled[:3] @ pooled[3:].T).numpy()
    same = np.arange(1, 4)[:, None] % 3 == np.arange(4, 10)[None] % 3
    assert identified.cmc[0] == pytest.approx((scores.argmax(0) == same.argmax(0)).mean())
    expected = np.mean([open_set(scores[g], same[g], 0.5, 1) for g in (slice(0, 2), slice(2, 3))])
    assert identified.dir[0.5] == pytest.approx(expected)


def test_order_of_images_does_not_change_templates(tmp_path):
    rng = np.random.default_rng(4)
    ijb_files(tmp_path, rng)
    ijb = evaluation.read_ijb(tmp_path)
    x = torch.tensor(rng.integers(-4, 5, (24, 5)), dtype=torch.float32)
    pooled = evaluation.pool_templates(x, ijb)[1]
    path = tmp_path / "meta" / "ijbc_face_tid_mid.txt"
    lines = path.read_text().splitlines(keepends=True)
    order = rng.permutation(24)
    path.write_text("".join(lines[i] for i in order))
    torch.testing.assert_close(evaluation.pool_templates(x[order], evaluation.read_ijb(tmp_path))[1], pooled)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("face_tid_mid.txt", "a.png 1\n", "line 1: expected 'image template media', got 'a.png 1'"),
        ("face_tid_mid.txt", "", "is empty"),
        ("template_pair_label.txt", "1 77 0\n", "template 77 is compared, but there is no image of it"),
        ("name_5pts_score.txt", "0.png 1 2\n", "line 1: expected 'image, ten coordinates, score'"),
        ("1N_gallery_G1.csv", "T,S\nx,1\n", "line 2: expected 'TEMPLATE_ID,SUBJECT_ID,...', got 'x,1'"),
    ],
)
def test_bad_meta_files_are_named(tmp_path, file, text, message):
    ijb_files(tmp_path, np.random.default_rng(0))
    (tmp_path / "meta" / f"ijbc_{file}").write_text(text)
    with pytest.raises(ValueError, match=message):
        evaluation.read_ijb(tmp_path)


def test_alignment_puts_landmarks_where_they_belong():
    """A picture drawn around landmarks that are turned, scaled and moved."""
    turn = np.array([[0.8, -0.6], [0.6, 0.8]]) * 1.7
    given = (targets.LANDMARKS @ turn.T + [90, -20]).astype(np.float32)
    pixels = np.zeros((260, 260), np.uint8)
    for x, y in given:
        pixels[int(y) - 2 : int(y) + 4, int(x) - 2 : int(x) + 4] = 255
    crop = np.array(targets.align(Image.fromarray(pixels), given, 112))
    for x, y in targets.LANDMARKS:
        assert crop[round(y), round(x)] > 200
    assert (crop > 100).sum() < 5 * 30


@pytest.mark.parametrize("seed", range(3))
def test_shuffling_images_and_identities_changes_no_protocol(seed):
    """On exact cosines, of which very many tie: open-set search, distractors and BLUFR's trials."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy((rng.integers(0, 2, (120, 16)) - 0.5) / 2).float()
    labels = rng.integers(0, 30, 120)
    parts = [np.arange(0, 50), np.arange(50, 120)]  # gallery and probes

    def found(x, labels, gallery, probe):
        rows = [torch.from_numpy(part) for part in (probe, gallery)]
        names = torch.from_numpy(labels)
        searched = evaluation.search(*(x[r] for r in rows), *(names[r] for r in rows))
        config = identification.Blufr([""] * len(x), labels, [np.sort(probe)], [gallery], [probe])
        return (
            evaluation.dir_at_far(searched, (0.3, 0.1, 0.01)),
            evaluation.cmc(searched.rank).tolist(),
            evaluation.blufr(x, config, (0.1,), (0.1,)).figures(),
        )

    order, names = rng.permutation(120), rng.permutation(1000)[:30]
    back = np.argsort(order)  # where each image has gone
    first = found(x, labels, *parts)
    assert found(x[order], names[labels][order], *(rng.permutation(back[part]) for part in parts)) == first
    mates, others = x[:60], x[60:]
    shuffled = rng.permutation(60)
    sizes = {"sizes": (60,)}  # the first so many are taken: all, or their order matters
    assert evaluation.rank1_among_distractors(mates, torch.from_numpy(labels[:60]), others, **sizes) == (
        evaluation.rank1_among_distractors(
            mates[shuffled], torch.from_numpy(names[labels[:60]][shuffled]), others[shuffled], **sizes
        )
    )


# --- eval on files ---


class Pixels(nn.Module):
    """Takes an image of 32 pixels for its own embedding."""

    def forward(self, x):
        return (x - x.mean((1, 2, 3), keepdim=True)).flatten(1)


IDENTITIES, EACH = 6, 4


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder per identity; images of one are alike."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    for i in range(IDENTITIES):
        base = rng.integers(0, 200, (32, 32))
        (root / f"person{i}").mkdir()
        for k in range(1, EACH + 1):
            noisy = (base + rng.integers(0, 55, (32, 32))).astype(np.uint8)
            Image.fromarray(noisy).save(root / f"person{i}" / f"person{i}_{k:04}.jpg", quality=95)
    return root


def run(target, **options):
    (found,) = targets.evaluate_targets(Pixels(), 32, 1, [str(target)], targets.Options(**options))
    return found


def test_a_folder_of_identities(pictures, tmp_path):
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    found = run(pictures, distractors=str(tmp_path))
    assert found.figures["rank-1"] == found.figures["balanced accuracy"] == found.figures["TAR at FAR 0.1"] == 1
    assert found.figures["rank-1 among 5 distractors"] == 1
    assert found.figures["intra-class cosine"] > found.figures["inter-class cosine"] + 0.5
    assert "TAR at FAR 0.001" not in found.figures  # 240 impostor pairs cannot show it
    assert "TAR at FAR 0.1" in found.table()


def bin_file(pictures, path):
    """20 pairs of these pictures as insightface packs them."""
    images, same = [], []
    for k in range(20):
        a, b = f"person{k % 6}", f"person{(k if k % 2 else k + 1) % 6}"
        images += [(pictures / a / f"{a}_0001.jpg").read_bytes(), (pictures / b / f"{b}_0002.jpg").read_bytes()]
        same.append(a == b)
    path.write_bytes(pickle.dumps((images, same), 4))


@pytest.mark.parametrize("rule", ["accuracy", "facexzoo"])
@pytest.mark.parametrize("flip", [False, True])
def test_a_bin_file(pictures, tmp_path, rule, flip):
    bin_file(pictures, tmp_path / "set.bin")
    found = run(tmp_path / "set.bin", rule=rule, flip=flip, workers=0)
    assert found.figures["accuracy"] == 1
    assert found.figures["standard error"] == 0
    assert found.protocol.startswith("10-fold verification of 20 pairs")


def test_flipping_adds_the_mirror_images_features(pictures):
    file = next(pictures.glob("*/*.jpg"))
    options = targets.Options(flip=True)
    found, _ = targets.Embedder(Pixels(), 32, 1, options).features([file], ["x"])
    image = data.to_tensor(data.read(file, 32, 1))[None]
    torch.testing.assert_close(found, Pixels()(image) + Pixels()(image.flip(3)))


def test_more_batches_are_embedded_than_files_may_be_open(pictures):
    """A tensor that a reading process has sent keeps a file open for as long as it lives."""
    files = [next(pictures.glob("*/*.jpg"))] * 80
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        embedder = targets.Embedder(Pixels(), 32, 1, targets.Options(batch=1, workers=1))
        found, unreadable = embedder.features(files, ["x"] * 80)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(found) == 80
    assert not unreadable.any()


def test_pair_lists_and_their_folder(pictures, tmp_path):
    lines = [f"person{i}\t1\t2\nperson{i}\t1\tperson{(i + 1) % 6}\t3" for i in range(6)]
    (tmp_path / "pairs.txt").write_text("3\t2\n" + "\n".join(lines) + "\n")
    found = run(tmp_path / "pairs.txt", images=str(pictures))
    assert found.protocol.startswith("3-fold verification of 12 pairs")
    assert found.figures["accuracy"] == 1
    with pytest.raises(ValueError, match=r"person0_0001.jpg cannot be read as an image"):
        run(tmp_path / "pairs.txt")


def test_blufr_from_its_file(pictures, tmp_path):
    names = sorted(p.name for p in pictures.glob("*/*.jpg"))
    blufr_file(tmp_path / "blufr.mat", names, [int(n[6]) for n in names], np.random.default_rng(0))
    found = run(tmp_path / "blufr.mat", images=str(pictures))
    assert found.figures == {"VR at FAR 0.001": 1, "DIR at FAR 0.01, rank 1": 1}


def test_ijb_from_its_folder(pictures, tmp_path):
    ijb_files(tmp_path, np.random.default_rng(0), images=24, templates=9)
    for i in range(24):  # templates t and t + 3 are of one subject
        subject = (i % 9 + 1) % 3
        image = Image.open(sorted((pictures / f"person{subject}").iterdir())[i % EACH])
        (tmp_path / "loose_crop").mkdir(exist_ok=True)
        image.save(tmp_path / "loose_crop" / f"{i}.png")
    found = run(tmp_path)
    assert found.protocol == "IJB, 9 templates, 36 pairs"
    assert found.figures["equal error rate"] == 0
    assert found.figures["1:N rank-1"] == 1
    assert found.figures["1:N DIR at FAR 0.1, rank 1"] == 1
    assert run(tmp_path, aligned=True).figures == found.figures  # the landmarks are where they belong already


def test_unreadable_images_are_named_or_skipped(pictures, tmp_path):
    for person in list(pictures.iterdir())[:3]:
        (tmp_path / person.name).mkdir()
        for file in person.iterdir():
            (tmp_path / person.name / file.name).write_bytes(file.read_bytes())
    bad = tmp_path / person.name / "bad.jpg"
    bad.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"bad\.jpg cannot be read as an image"):
        run(tmp_path)
    found = run(tmp_path, on_error="skip")
    assert found.skipped == [str(bad)]
    assert found.figures["rank-1"] == 1
    assert "skipped, unreadable: " in found.table()
    bin_file(pictures, tmp_path / "set.bin")
    images, same = pickle.loads((tmp_path / "set.bin").read_bytes())
    (tmp_path / "set.bin").write_bytes(pickle.dumps(([b"", *images[1:]], same)))
    with pytest.raises(ValueError, match=r"set\.bin, image 0 cannot be read as an image"):
        run(tmp_path / "set.bin")
    found = run(tmp_path / "set.bin", on_error="skip")
    assert found.details["pairs"] == 19
    assert found.skipped == [f"{tmp_path / 'set.bin'}, image 0"]


def test_exif_orientation_is_honoured(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.array(data.read(tmp_path / "turned.png", 32, 1)), np.rot90(pixels, -1))
    encoded = (tmp_path / "turned.png").read_bytes()
    assert np.array_equal(np.array(data.decode(encoded, "turned", 1)), np.rot90(pixels, -1))


def test_what_is_no_target_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"target: .*none does not exist"):
        run(tmp_path / "none")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"target: .*x.zip: expected a folder, a list .*, .rec, .lmdb or .tar, got a file .*'.zip'"
    ):
        run(tmp_path / "x.zip")


def test_another_size_is_possible_or_refused(pictures):
    assert run(pictures, size=16).figures["rank-1"] == 1

    class Fixed(Pixels):
        def forward(self, x):
            return super().forward(x) @ torch.ones(32 * 32, 4)

    with pytest.raises(ValueError, match="size: the network cannot take 16 pixels"):
        targets.evaluate_targets(Fixed(), 32, 1, [str(pictures)], targets.Options(size=16))


def test_json_holds_everything(pictures):
    found = run(pictures)
    content = json.loads(json.dumps(targets.as_json("a run", [found], targets.Options()), allow_nan=False))
    assert content["results"][0]["figures"] == found.figures
    assert content["results"][0]["details"]["intervals"].keys() == {"TAR at FAR 0.1", "TAR at FAR 0.01"}
    assert len(content["results"][0]["details"]["cmc"]) == 100


@pytest.fixture
def probe(tmp_path):
    """An untrained network, exported."""
    info = ProbeInfo("mobilefacenet", 16, 0.125, 32, 1)
    torch.manual_seed(0)
    path = tmp_path / "probe.safetensors"
    save_file(info.build().state_dict(), path, metadata={"probe": json.dumps(asdict(info))})
    return path


def test_eval_takes_several_targets_and_writes_json(pictures, probe, tmp_path, capsys):
    bin_file(pictures, tmp_path / "set.bin")
    out = tmp_path / "found.json"
    arguments = ["eval", str(probe), str(pictures), str(tmp_path / "set.bin"), "--flip", "true", "--json", str(out)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["results"][0]["protocol"] == "all pairs, identification"
    assert content["results"][1]["protocol"].startswith("10-fold verification of 20 pairs")
    assert content["options"]["flip"] is True
    assert "rank-5" in shown
    assert "standard error" in shown


def test_eval_refuses_a_hostile_file_in_one_line(probe, tmp_path, capsys):
    (tmp_path / "set.bin").write_bytes(b"cos\nsystem\n(S'touch MARK'\ntR.")
    assert main(["eval", str(probe), str(tmp_path / "set.bin")]) == 1
    said = capsys.readouterr().err.strip()
    assert "the pickle wants os.system, which is not admitted" in said
    assert "\n" not in said
    assert not (tmp_path / "evaluation.json").exists()


@pytest.fixture
def report(pictures, probe, tmp_path):
    """The page and the JSON of two targets."""
    bin_file(pictures, tmp_path / "set.bin")
    assert main(["eval", str(probe), str(pictures), str(tmp_path / "set.bin"), "--json", str(tmp_path / "a.json")]) == 0
    return (tmp_path / "a.html").read_text(), json.loads((tmp_path / "a.json").read_text())


class Elements(HTMLParser):
    """Which elements a page has, those that lie outside of a box that scrolls, and what it would load."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tables, self.found, self.loads = [], [], Counter(), []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.found[tag] += 1
        self.found[attributes.get("aria-label")] += 1
        self.loads += [
            v
            for name, v in attributes.items()
            if name in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))
        ]
        if tag == "table":
            self.tables.append(self.open[-1] == ("div", "wide"))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append((tag, attributes.get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag  # all that is opened is closed in its turn

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)


def test_the_report_draws_what_was_found(report):
    page, content = report
    elements = Elements(page)
    assert not elements.open
    assert elements.loads == []  # self-contained
    assert elements.tables
    assert all(elements.tables)  # wide ones scroll in their own box
    for title, count in {
        "Receiver operating characteristic": 3,  # each target, and both together
        "Detection error trade-off": 3,
        "Cosines of genuine and impostor pairs": 2,
        "Cumulative match characteristic": 1,
        "Singular spectrum of the centred embeddings": 1,
        "Accuracy of each fold": 1,
    }.items():
        assert elements.found[title] == count, title
    for result in content["results"]:
        for name, value in result["figures"].items():
            assert f"<td>{name}</td><td>{targets.shown(name, value)}</td>" in page
    assert "@media (prefers-color-scheme: dark)" in page
    drawn = page[page.index("<svg") :]
    assert not {light for light, _ in pages.PALETTE.values()} & set(re.findall("#[0-9a-f]{6}", drawn))  # all by name


def test_the_report_of_a_run_has_its_training(report, tmp_path):
    _, content = report
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("epoch,step,loss,effective_rank,accuracy\n1,3,5.5,8.1,\n2,6,4.5,7.9,0.75\n")
    (run / "spectrum.csv").write_text("epoch,1,2\n1,0.75,0.25\n2,0.5,0.5\n")
    evaluation_report.write(tmp_path / "b.html", content | {"run": str(run)})
    found = Elements((tmp_path / "b.html").read_text()).found
    assert found["Loss"] == found["Effective rank"] == found["Singular spectrum"] == 1
    assert found["Balanced accuracy on the test identities"] == 1
    assert found["Uniformity (lower: more uniform)"] == 0


def test_names_in_the_report_are_no_markup(report, tmp_path):
    _, content = report
    content["results"][0]["target"] = content["run"] = "<b>&"
    evaluation_report.write(tmp_path / "b.html", content)
    assert "<b>" not in (tmp_path / "b.html").read_text()
    assert "&lt;b&gt;&amp;" in (tmp_path / "b.html").read_text()


def test_degenerate_results_are_drawn_and_valid_json(tmp_path):
    """A network that sees no difference: all scores tie, thresholds are infinite, the spectrum is zero."""

    class Blind(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 4)

    for i in range(12):
        (tmp_path / "set" / str(i // 2)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(tmp_path / "set" / str(i // 2) / f"{i}.png")
    results = targets.evaluate_targets(Blind(), 8, 1, [str(tmp_path / "set")], targets.Options(device="cpu"))
    content = json.loads(json.dumps(targets.as_json("x", results, targets.Options()), allow_nan=False))
    assert content["results"][0]["details"]["thresholds at FAR"]["0.1"] is None
    evaluation_report.write(tmp_path / "b.html", content | {"versions": {}})
    assert Elements((tmp_path / "b.html").read_text()).found["Detection error trade-off"] == 1


@pytest.mark.parametrize(
    ("out", "message"), [("x.txt", "json must end in .json"), ("none/x.json", "json: .*none is not a folder")]
)
def test_where_results_cannot_go_is_said_before_the_work(probe, tmp_path, out, message, capsys):
    assert main(["eval", str(probe), "nowhere", "--json", str(tmp_path / out)]) == 1
    assert re.search(message, capsys.readouterr().err)
