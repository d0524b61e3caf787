"""Detectors and CLIP of transformers with random weights: what they find is what the library's own code finds."""

from __future__ import annotations

import json
from types import SimpleNamespace

import detectors
import numpy as np
import pytest
import torch
from detectors import LABELS, tiny_color_clip, tiny_mask2former, tiny_yolos
from PIL import Image
from published import pictures, tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from corefit.errors import ModelError
from corefit_rewards import detector
from corefit_rewards.detector import around, blank, check_clip, check_detector, crop, labels, read_clip, read_detector
from corefit_rewards.geneval_rules import COLORS, Found

CPU = torch.device("cpu")
NAMES = {0: "dog", 1: "cat", 2: "computer mouse"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("detectors")


@pytest.fixture(scope="module")
def masks(folder):
    return {kind: getattr(detectors, f"tiny_{kind}")(folder / kind) for kind in ("mask2former", "maskformer")}


@pytest.fixture(scope="module")
def boxes(folder):
    return tiny_yolos(folder / "yolos")


@pytest.fixture(scope="module")
def clip(folder):
    return tiny_color_clip(folder / "clip")


@pytest.fixture(scope="module")
def media():
    return (pictures(48, 40) * 255).round().byte()


def outputs(found, media):
    """What the network gives for pictures that the library prepares from PIL's."""
    opened = [Image.fromarray(one.movedim(0, -1).numpy()) for one in media]
    inputs = found.processor(images=opened, return_tensors="pt")
    with torch.no_grad():
        return found.network(**inputs)


@pytest.mark.parametrize("kind", ["mask2former", "maskformer"])
@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.45])
def test_objects_with_masks_are_those_of_the_library(kind, threshold, masks, media):
    made = read_detector(str(masks[kind]), CPU)
    expected = made.processor.post_process_instance_segmentation(
        outputs(made, media), threshold=threshold, target_sizes=[(48, 40)] * 3, return_binary_maps=True
    )
    found = made.find(media, threshold)
    total = 0
    for picture, one in zip(found, expected, strict=True):
        segments = [
            (LABELS[info["label_id"]], info["score"], mask.bool())
            for info, mask in zip(one["segments_info"], one["segmentation"], strict=False)
        ]
        for number, name in NAMES.items():
            own = sorted(picture.get(name, []), key=lambda each: each.score)
            theirs = sorted((each for each in segments if each[0] == LABELS[number]), key=lambda each: each[1])
            assert [each.score for each in own] == pytest.approx([score for _, score, _ in theirs], abs=1e-5)
            assert {key(each.mask) for each in own} == {key(mask) for _, _, mask in theirs}
            total += len(own)
        assert picture.keys() <= set(NAMES.values())  # N/A is no class
    assert total or threshold > 0.3


def key(mask):
    return mask.numpy().tobytes()


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.9])
def test_objects_with_boxes_are_those_of_the_library(threshold, boxes, media):
    made = read_detector(str(boxes), CPU)
    expected = made.processor.post_process_object_detection(
        outputs(made, media), threshold=threshold, target_sizes=[(48, 40)] * 3
    )
    for picture, one in zip(made.find(media, threshold), expected, strict=True):
        for number, name in NAMES.items():
            own = sorted(picture.get(name, []), key=lambda each: each.score)
            mine = one["labels"] == number
            order = one["scores"][mine].argsort()
            assert [each.score for each in own] == pytest.approx(one["scores"][mine][order].tolist(), abs=1e-5)
            theirs = one["boxes"][mine][order].clamp(min=0)
            theirs = torch.minimum(theirs, torch.tensor([40.0, 48.0, 40.0, 48.0]))
            torch.testing.assert_close(torch.tensor([each.box for each in own]).reshape(-1, 4), theirs)


def test_some_objects_are_found(masks, boxes, media):
    """Or the tests above would compare nothing."""
    for path in (*masks.values(), boxes):
        found = read_detector(str(path), CPU).find(media, 0.2)
        assert sum(len(each) for picture in found for each in picture.values()) > 3


def test_a_query_may_be_two_objects():
    """The library ranks pairs of query and class: of one query, two classes can be probable enough."""
    logits = torch.tensor([[[2.0, 2.0, 0.0], [0.0, 0.0, 9.0], [1.0, 0.0, 9.0]]])
    masks = torch.ones(1, 3, 4, 4) * torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    kept = detector.promising(SimpleNamespace(class_queries_logits=logits, masks_queries_logits=masks), 0, 0.3)
    assert kept is not None
    assert kept.class_queries_logits.shape == (1, 2, 3)
    assert kept.masks_queries_logits[0, 0].unique().tolist() == [1]
    none = detector.promising(SimpleNamespace(class_queries_logits=logits, masks_queries_logits=masks), 0, 0.99)
    assert none is None


def test_boxes_are_around_masks():
    mask = torch.zeros(9, 12, dtype=torch.bool)
    mask[2:5, 3] = mask[4, 3:8] = True
    assert around(mask) == (3, 2, 8, 5)
    mask[:] = True
    assert around(mask) == (0, 0, 12, 9)


@pytest.mark.parametrize("box", [(3, 2, 8, 5), (2.4, 1.6, 8.3, 5.4), (0, 0, 12, 9)])
def test_crops_are_pils(box):
    """Of the picture on gray #999, as GenEval makes them."""
    draw = np.random.default_rng(0)
    picture = torch.from_numpy(draw.integers(0, 256, (3, 9, 12), dtype=np.uint8))
    mask = torch.from_numpy(draw.random((9, 12)) > 0.5)
    image = Image.fromarray(picture.movedim(0, -1).numpy())
    blank = Image.new("RGB", image.size, color="#999")
    for shape, whole in ((None, image), (mask, Image.composite(image, blank, Image.fromarray(mask.numpy())))):
        expected = np.array(whole.crop(box))
        assert np.array_equal(crop(picture, Found(box, 1.0, shape)).movedim(0, -1).numpy(), expected)


def test_a_crop_has_at_least_one_pixel():
    picture = torch.zeros(3, 9, 12, dtype=torch.uint8)
    for box in ((3, 2, 3.2, 2.2), (12, 9, 12, 9), (0, 0, 0, 0)):
        assert crop(picture, Found(box, 1.0)).shape == (3, 1, 1)


def test_colors_are_those_of_zero_shot_classification(clip, media):
    """The mean of the directions of three phrases, and the color whose direction is nearest to that of the crop."""
    judge = read_clip(str(clip), CPU)
    found = [Found((2, 3, 30, 40), 1.0), Found((0, 0, 40, 48), 0.9), Found((10, 4, 24, 24), 0.8)]
    own = [color for picture in media for color in judge.colors(picture, "dog", found)]
    network, processor = CLIPModel.from_pretrained(clip), AutoImageProcessor.from_pretrained(clip, use_fast=True)
    tokenizer = AutoTokenizer.from_pretrained(clip)
    expected = []
    with torch.no_grad():
        directions = []
        for color in COLORS:
            texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
            features = tensor(network.get_text_features(**tokenizer(texts, return_tensors="pt", padding=True)))
            mean = (features / features.norm(dim=1, keepdim=True)).mean(0)
            directions.append(mean / mean.norm())
        for picture in media:
            image = Image.fromarray(picture.movedim(0, -1).numpy())
            crops = [image.crop(tuple(map(round, one.box))) for one in found]
            features = tensor(network.get_image_features(**processor(images=crops, return_tensors="pt")))
            expected += [COLORS[i] for i in (features @ torch.stack(directions).T).argmax(1).tolist()]
    assert own == expected
    assert len(set(own)) > 1
    assert judge.colors(media[0], "dog", []) == []


# files


def test_labels_are_read_without_weights(boxes, tmp_path):
    (tmp_path / "config.json").write_text((boxes / "config.json").read_text())
    assert labels(str(tmp_path)) == NAMES


def test_blank_networks_have_no_data(masks, clip):
    network = blank(str(masks["mask2former"]), str(clip))
    assert {p.device.type for p in network.parameters()} == {"meta"}
    real = read_detector(str(masks["mask2former"]), CPU).network, read_clip(str(clip), CPU).network
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for n in real for p in n.parameters())


def test_networks_are_read_once_and_frozen(masks, clip):
    one = read_detector(str(masks["mask2former"]), CPU)
    assert one is read_detector(str(masks["mask2former"]), CPU)
    for network in (one.network, read_clip(str(clip), CPU).network):
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())


def test_complete_folders_pass(masks, boxes, clip):
    for path in (*masks.values(), boxes):
        check_detector(str(path))
    check_clip(str(clip))
    check_detector("facebook/mask2former-swin-small-coco-instance")  # a name on the hub is not looked up


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("config.json", "has no config.json"),
        ("preprocessor_config.json", "preprocessor"),
        ("model.safetensors", "model"),
    ],
)
def test_incomplete_folders_are_refused(file, said, tmp_path):
    tiny_yolos(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ModelError, match=said):
        check_detector(str(tmp_path))


def test_other_models_are_refused(clip, boxes, tmp_path):
    with pytest.raises(ModelError, match="its model_type is 'clip', which is no detector"):
        check_detector(str(clip))
    with pytest.raises(ModelError, match="its model_type is 'yolos'"):
        check_clip(str(boxes))
    with pytest.raises(ModelError, match=r"detector = '.*no such folder"):
        check_detector(str(tmp_path / "missing"))


def test_missing_weights_are_refused(tmp_path):
    """The library would draw them at random."""
    from safetensors.torch import load_file, save_file

    tiny_yolos(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(next(name for name in weights if "class_labels_classifier" in name))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="its weights lack class_labels_classifier"):
        read_detector(str(tmp_path), CPU)


def test_a_missing_package_is_said(boxes, tmp_path, monkeypatch):
    tiny_mask2former(tmp_path)

    def needs_timm(*arguments, **keys):
        raise ImportError("\nDetr requires the timm library: pip install timm\n")

    monkeypatch.setattr(detector, "read", needs_timm)
    with pytest.raises(ModelError, match=r"needs a package that is not installed: .*pip install timm"):
        read_detector(str(tmp_path), CPU)


def test_a_config_without_names_is_refused(tmp_path):
    tiny_yolos(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {}}))
    with pytest.raises(ModelError, match="it has no id2label"):
        check_detector(str(tmp_path))
