"""docs/migration.md: both sides of every difference run, and train alike; every other block runs."""

import copy
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn, optim

import sst_fast
from bench import peers
from sst_fast.nn.compat import facex_zoo as compat_facex_zoo
from sst_fast.nn.compat import insightface as compat_insightface
from sst_fast.nn.compat import pytorch_metric_learning as compat_pml

TEXT = (Path(__file__).parent.parent / "docs" / "migration.md").read_text()
BLOCKS = {
    name: (kind, body) for name, kind, body in re.findall(r"<!-- executed: (.+?) -->\n```(\w+)\n(.*?)```", TEXT, re.S)
}
CLASSES, D = 40, 512


def side(body: str, sign: str) -> str:
    """The lines of one side of a difference."""
    lines = [line[1:] for line in body.splitlines() if line[:1] in (" ", sign) or not line]
    return "\n".join(lines)


def loader(steps=4, count=16):
    """Batches of images near their class's centre."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, 12, generator=generator)
    labels = [torch.randperm(CLASSES, generator=generator)[:count] for _ in range(steps)]
    return [(centres[label] + 0.3 * torch.randn(count, 12, generator=generator), label) for label in labels]


class Logits(nn.Module):
    """A restated head as its project has it: it gives logits."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x, label):
        return self.head.logits(self.head.cosine(x), x, label)


class Factory:
    """FaceX-Zoo's HeadFactory."""

    def __init__(self, kind, path):
        self.kind, self.arguments = kind, yaml.safe_load(Path(path).read_text())[kind]

    def get_head(self):
        arguments = dict(self.arguments)
        if self.kind == "SST_Prototype":
            theirs = peers.SSTPrototype(
                *(arguments[n] for n in ("feat_dim", "queue_size", "scale", "loss_type", "margin"))
            )
            return SSTLogits(theirs)
        return Logits(getattr(peers, self.kind)(arguments.pop("num_class"), arguments.pop("feat_dim"), **arguments))


class SSTLogits(nn.Module):
    """Its first and second result make the loss with the stand-in criterion: half of the restated loss each."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, p1, g2, p2, g1, ids):
        loss = self.head(p1, g2, p2, g1, ids, first=True)
        return loss, loss, None, {label for label in self.head.label_list if label != -1}


def module(monkeypatch, name, **content):
    made = ModuleType(name)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)


def plain(monkeypatch, folder):
    return {"network": nn.Linear(12, D), "loader": loader(), "classes": CLASSES}


def metric_learning(monkeypatch, folder):
    pytest.importorskip("pytorch_metric_learning")
    network = nn.Linear(12, D)
    return plain(monkeypatch, folder) | {"network": network, "optimizer": optim.SGD(network.parameters(), 0.01)}


def insightface(monkeypatch, folder):
    """First weights are drawn by each rank for itself: here from the same numbers."""
    drawn = torch.randn(CLASSES, D)
    monkeypatch.setattr(
        torch.Tensor, "normal_", lambda self, mean=0.0, std=1.0, generator=None: self.copy_(std * drawn)
    )

    def partial_fc(margin, embedding_size, num_classes, sample_rate, fp16):
        return peers.PartialFC(num_classes, embedding_size, *margin)

    module(monkeypatch, "losses", CombinedMarginLoss=lambda *numbers: numbers)
    module(monkeypatch, "partial_fc_v2", PartialFC_V2=partial_fc)
    cfg = Namespace(
        margin_list=(1.0, 0.5, 0.0), interclass_filtering_threshold=0, embedding_size=D, num_classes=CLASSES, sample_rate=1,
        fp16=False, lr=0.01, weight_decay=5e-4,
    )  # fmt: skip
    return {"cfg": cfg, "backbone": nn.Linear(12, D), "train_loader": loader()}


def facex_zoo(monkeypatch, folder):
    heads = {
        "ArcFace": {"feat_dim": D, "num_class": CLASSES, "margin_arc": 0.35, "margin_am": 0.0, "scale": 32},
        "SST_Prototype": {"feat_dim": D, "queue_size": 64, "scale": 30.0, "loss_type": "am_softmax", "margin": 0.35},
    }
    path = folder / "head_conf.yaml"
    path.write_text(yaml.safe_dump(heads))
    module(monkeypatch, "head", __path__=[])
    module(monkeypatch, "head.head_def", HeadFactory=Factory)
    conf = Namespace(head_type="ArcFace", head_conf_file=path, lr=0.1, momentum=0.9)
    network = nn.Linear(12, D)
    return {
        "conf": conf, "backbone_factory": Namespace(get_backbone=lambda: network), "data_loader": loader(), "optim": optim,
        "criterion": nn.CrossEntropyLoss(),
    }  # fmt: skip


def semi_siamese(monkeypatch, folder):
    names = facex_zoo(monkeypatch, folder)
    monkeypatch.setattr(
        sst_fast.SemiSiameseLoss, "_kept", lambda self, device: torch.tensor(1)
    )  # its coin, as told to both
    names["conf"] = Namespace(
        head_type="SST_Prototype", head_conf_file=names["conf"].head_conf_file, device=None, alpha=0.9
    )
    probe = nn.Linear(12, D)

    def moving_average(probe, gallery, alpha):
        with torch.no_grad():
            for p, g in zip(probe.parameters(), gallery.parameters(), strict=True):
                g.mul_(alpha).add_(p, alpha=1 - alpha)

    return names | {
        "data_loader": [(image, image + 0.1 * image.flip(0), label) for image, label in loader()], "probe_net": probe,
        "gallery_net": copy.deepcopy(probe), "moving_average": moving_average, "optimizer": optim.SGD(probe.parameters(), 0.1),
        "criterion": lambda output, label: output,
    }  # fmt: skip


def adaface(monkeypatch, folder):
    class Head(peers.AdaFace):
        def forward(self, embeddings, norms, label):
            return self.logits(self.cosine(embeddings), embeddings * norms, label)

    def build_head(kind, embedding_size, class_num, m, t_alpha, h, s):
        return Head(class_num, embedding_size, m, h, s, t_alpha)

    module(monkeypatch, "head", build_head=build_head)

    class Network(nn.Linear):
        def forward(self, image):
            x = 3 * super().forward(image)
            norm = x.norm(dim=1, keepdim=True)
            return x / norm, norm

    return plain(monkeypatch, folder) | {"network": Network(12, D), "cross_entropy_loss": F.cross_entropy}


def moco(monkeypatch, folder):
    """The random vectors that are in the queue at first are the same, [128, 64] there and [64, 128] here."""
    encoder, draw = nn.Linear(12, 128), torch.randn

    def randn(*shape, **_):
        drawn = draw(64, 128)
        return drawn if shape == (64, 128) else drawn.T

    views = [(image, image + 0.5 * image.flip(0)) for image, _ in loader()]
    monkeypatch.setattr(torch, "randn", randn)
    return {
        "nn": nn, "base_encoder": lambda num_classes: copy.deepcopy(encoder), "train_loader": views,
        "criterion": nn.CrossEntropyLoss(), "concat_all_gather": lambda keys: keys,
    }  # fmt: skip


def open_clip(monkeypatch, folder):
    def clip_loss(image_features, text_features, logit_scale, output_dict):
        logits = logit_scale * image_features @ text_features.T
        number = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, number) + F.cross_entropy(logits.T, number)) / 2
        return {"contrastive_loss": loss}

    try:
        import open_clip as _  # noqa: F401
    except ImportError:
        module(monkeypatch, "open_clip", ClipLoss=lambda: clip_loss)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = nn.Linear(12, D), nn.Linear(12, D)
            self.logit_scale = nn.Parameter(torch.tensor(2.66))

        def forward(self, images, texts):
            features = F.normalize(self.image(images)), F.normalize(self.text(texts))
            return {"image_features": features[0], "text_features": features[1], "logit_scale": self.logit_scale.exp()}

    model = Model()
    data = [(image, image.flip(1)) for image, _ in loader()]
    return {"model": model, "dataloader": data, "optimizer": optim.SGD(model.parameters(), 0.1)}


DIFFERENCES = {
    "plain": plain, "metric-learning": metric_learning, "insightface": insightface, "facex-zoo": facex_zoo,
    "semi-siamese": semi_siamese, "adaface": adaface, "moco": moco, "open_clip": open_clip,
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENCES)
def test_both_sides_train_alike(name, monkeypatch, tmp_path):
    """From the same seed, so from the same weights but for their rounding; peers that are not installed are restated."""
    for owner in (torch.Tensor, nn.Module):
        monkeypatch.setattr(owner, "cuda", lambda self, *_: self)
    kind, body = BLOCKS[name]
    assert kind == "diff"
    losses = []
    for sign in "-+":
        with monkeypatch.context() as patched:
            torch.manual_seed(5)
            names = DIFFERENCES[name](patched, tmp_path) | {"torch": torch, "losses": []}
            torch.manual_seed(6)
            exec(compile(side(body, sign), f"migration.md, {name}, {sign}", "exec"), names)
            losses.append(torch.tensor(names["losses"]))
    assert len(losses[0]) == 4
    assert torch.allclose(losses[0], losses[1], rtol=1e-4)
    assert losses[0].std() > 0


class Model(nn.Module):
    """A head within a model."""

    def __init__(self, head):
        super().__init__()
        self.head = head


def metric_learning_weights(folder):
    weight = torch.randn(D, CLASSES)
    torch.save({"W": weight}, folder / "loss_func.pt")
    return "loss_func", compat_pml.ArcFaceLoss(CLASSES, D), weight.T


def insightface_weights(folder):
    weight = torch.randn(CLASSES, D)
    for rank, part in enumerate(weight.tensor_split(8)):
        torch.save(
            {"state_dict_softmax_fc": {"weight": part.clone()}, "epoch": 3}, folder / f"checkpoint_gpu_{rank}.pt"
        )
    margin = compat_insightface.CombinedMarginLoss(64, 1.0, 0.5, 0.0)
    return "module_partial_fc", compat_insightface.PartialFC_V2(margin, D, CLASSES), weight


def facex_zoo_weights(folder):
    weight = torch.randn(D, CLASSES)
    torch.save({"state_dict": {"backbone.weight": torch.ones(3), "head.weight": weight}}, folder / "Epoch_17.pt")
    return "model", Model(compat_facex_zoo.ArcFace(D, CLASSES)), weight.T


WEIGHTS = {
    "metric-learning weights": metric_learning_weights, "insightface weights": insightface_weights,
    "facex-zoo weights": facex_zoo_weights,
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_taken_over(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    variable, model, weight = WEIGHTS[name](tmp_path)
    kind, body = BLOCKS[name]
    assert kind == "python"
    exec(compile(body, f"migration.md, {name}", "exec"), {"torch": torch, variable: model})
    assert any(torch.equal(value, weight) for value in model.state_dict().values())


def test_every_block_is_executed():
    assert len(re.findall("^```\\w", TEXT, re.M)) == len(BLOCKS)
    assert set(BLOCKS) == set(DIFFERENCES) | set(WEIGHTS)
