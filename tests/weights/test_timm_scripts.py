"""What timm's train.py and validate.py do with a model, step by step: they are in no wheel, only in its repository."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from small import same, state
from torch import nn
from with_timm import import_timm

import t2t_ref
from t2t_ref.inspection import frozen_entries
from t2t_ref.train.evaluate import evaluate

timm = import_timm()
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.models import load_checkpoint, model_parameters  # noqa: E402
from timm.optim import create_optimizer_v2, optimizer_kwargs  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy, dispatch_clip_grad  # noqa: E402

import t2t_ref.timm  # noqa: E402

SMALL = {  # one of each way to make tokens, a ViT, a pyramid; what the scripts take as --model-kwargs
    "t2t_vit_7": dict(embed_dim=24, depth=2, token_dim=8),
    "t2t_vit_t_14": dict(embed_dim=24, depth=2, token_dim=8),
    "vit_small_patch16": dict(embed_dim=24, depth=2),
    "pvt_tiny": dict(embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1)),
}
every_model = pytest.mark.parametrize("name", SMALL)


def create(name, **changes):
    """As both scripts call it: what was not said is None, and timm leaves it out."""
    unsaid = dict.fromkeys(("global_pool", "drop_block_rate", "bn_momentum", "bn_eps"))
    said = dict(num_classes=5, in_chans=3, img_size=32, drop_rate=0.0, drop_path_rate=0.1)
    ways = dict(pretrained=False, scriptable=False, checkpoint_path="")
    torch.manual_seed(0)
    return timm.create_model(name, **(ways | unsaid | said | SMALL[name] | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty images of noise in five classes."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(20):
        path = root / "train" / f"class {number % 5}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(path)
    return root


def loader_for(model, folder, training):
    config = resolve_data_config({"img_size": 32}, model=model)
    data = create_dataset("", root=str(folder), split="train", is_training=training, batch_size=10)
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct")
    how = {key: config[key] for key in keys} | dict(num_workers=0, use_prefetcher=False, batch_size=10)
    how["persistent_workers"] = False
    return create_loader(data, is_training=training, **how)


@every_model
def test_a_step_of_train(name, folder, tmp_path):
    model = create(name).train()
    model.set_grad_checkpointing(enable=True)
    before = state(model)
    arguments = Namespace(opt="adamw", lr=1e-2, weight_decay=0.05, momentum=0.9, layer_decay=0.75, model=name)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=arguments))
    asked = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == asked
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2, warmup_epochs=0)
    rates = {round(group["lr"], 8) for group in optimizer.param_groups}
    assert len(rates) > 1 and max(rates) == pytest.approx(1e-2)
    average = ModelEmaV3(model, decay=0.5)
    mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    loss_of = SoftTargetCrossEntropy()
    for images, labels in loader_for(model, folder, training=True):
        images, targets = mix(images, labels)
        assert targets.shape == (10, 5) and images.shape == (10, 3, 32, 32)
        loss = loss_of(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model_parameters(model, exclude_head=True), 0.1, mode="agc")
        optimizer.step()
        average.update(model)
    scheduler.step(1)
    assert loss.isfinite() and max(group["lr"] for group in optimizer.param_groups) < 1e-2
    after, averaged, frozen = state(model), state(average.module), frozen_entries(model)
    for key in before:
        if key in frozen:
            assert torch.equal(after[key], before[key]) and torch.equal(averaged[key], before[key]), key
    assert not torch.equal(after["head.weight"], before["head.weight"])
    assert not torch.equal(averaged["head.weight"], after["head.weight"])

    CheckpointSaver(
        model, optimizer, args=arguments, model_ema=average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    ).save_checkpoint(0, metric=20.0)
    (path,) = tmp_path.glob("checkpoint-0*")
    for use_ema, expected in ((False, after), (True, averaged)):
        again = create(name)
        load_checkpoint(again, str(path), use_ema=use_ema)
        assert same(state(again), expected)
    ours = create(name)
    t2t_ref.load_checkpoint(ours, path)  # which takes the average, as for the authors' files
    assert same(state(ours), averaged)


@every_model
def test_validate_counts_what_we_count(name, folder):
    model = create(name).eval()
    nn.init.normal_(model.head.weight)  # or all images get nearly the same answer
    batches, logits = list(loader_for(model, folder, training=False)), []
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in batches])
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    top1, top3 = accuracy(logits, labels, topk=(1, 3))
    found = evaluate(model, list(zip(images, labels.tolist(), strict=True)), lambda images: images, 5, batch_size=8)
    assert 100 * found.top1 == pytest.approx(top1.item())
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    right = logits.topk(3).indices == labels[:, None].expand(-1, 3)
    assert top3.item() == pytest.approx(100 * right.any(dim=1).double().mean().item())


@every_model
def test_what_the_scripts_read_off_a_model(name):
    model = create(name)
    assert [key for key, _ in model.named_parameters()][-2:] == ["head.weight", "head.bias"]  # what exclude_head drops
    assert model.num_classes == 5 and model.get_classifier() is model.head
    config = resolve_data_config({"img_size": 32}, model=model, use_test_size=True)
    assert config["input_size"] == (3, 32, 32) and config["mean"] == model.pretrained_cfg["mean"]
    grey = create(name, in_chans=1, num_classes=2)
    assert grey(torch.zeros(2, 1, 32, 32)).shape == (2, 2)


def test_initial_checkpoint_and_pooling():
    with pytest.raises(FileNotFoundError):
        create("t2t_vit_7", checkpoint_path="nowhere.pth")
    assert create("t2t_vit_7", global_pool="avg").global_pool == "avg"
    with pytest.raises(ValueError, match="unknown global_pool"):
        create("t2t_vit_7", global_pool="max")
