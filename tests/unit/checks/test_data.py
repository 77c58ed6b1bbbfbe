"""Data sets are counted as MMDetection reads them; only what cannot be trained on is refused."""

import json
import xml.etree.ElementTree as ET

import pytest
from mmengine.registry import DATASETS, init_default_scope

from mmevm.checks.data import summarize
from mmevm.errors import ConfigError

DATASET = 'train_dataloader.dataset'


def images(coco):
    return {image['id']: image for image in coco['images']}


def refusal(check, cfg):
    with pytest.raises(ConfigError) as error:
        check(cfg)
    return str(error.value)


def build(cfg, scope='mmdet'):
    init_default_scope(scope)
    return DATASETS.build(cfg.train_dataloader.dataset)


def test_summary(check, detector):
    summary, warnings = check(detector)
    assert warnings == []
    assert 'train_dataloader.dataset (CocoDataset): 3 images of 4 (1 left out by filter_cfg=' in summary
    assert 'input: 192 × 192 pixels' in summary
    assert 'model.backbone (EfficientViM) returns 128, 192, 320 channels at stride 16, 32, 64' in summary
    assert 'model.rpn_head (RPNHead) takes 64 channels at stride 4, 8, 16, 32, 64' in summary
    assert 'model.roi_head.bbox_head (Shared2FCBBoxHead) takes 64 channels of 7×7 for each region' in summary
    assert 'weights: random' in summary
    assert 'optimizer: AdamW, learning rate 0.0007' in summary
    assert 'training: 1000 iterations of 4 images per process' in summary
    assert 'param_scheduler.0: LinearLR from iteration 0 to 100' in summary


def test_nothing_is_written(check, detector, tmp_path):
    check(detector)
    assert not (tmp_path / 'work').exists()


def test_counts_are_those_of_mmdet(detector, edit, capsys):
    """Objects of every fate: kept, ignored, without area, outside, of another class, of an unknown image."""

    def change(coco):
        first = coco['images'][0]
        base = dict(coco['annotations'][0], image_id=first['id'], iscrowd=0)
        coco['categories'].append(dict(id=99, name='other'))
        coco['annotations'] = [
            dict(base, id=1),
            dict(base, id=2, iscrowd=1),
            dict(base, id=3, area=0),
            dict(base, id=4, bbox=[1000, 10, 30, 30]),
            dict(base, id=5, category_id=99),
            dict(base, id=6, image_id=12345),
            dict(base, id=7, ignore=1),
            dict(base, id=8, image_id=coco['images'][1]['id'], category_id=99),
        ]

    edit(change)
    dataset = build(detector)
    summary = summarize(DATASET, dataset, training=True)
    instances = [instance for i in range(len(dataset)) for instance in dataset.get_data_info(i)['instances']]
    assert summary.images == len(dataset) == 1
    assert summary.objects.total() == sum(not instance['ignore_flag'] for instance in instances) == 1
    assert summary.ignored == 1
    assert summary.total_images == 4
    assert summary.left_out == {
        'of other classes': 2,
        'without area or thinner than a pixel': 1,
        'outside their image or without area': 1,
        'of images that are not listed': 1,
        'marked "ignore"': 1,
    }
    assert '1 images of 4 (3 left out by filter_cfg=' in str(summary)


def test_no_object_left(check, detector, edit):
    edit(lambda coco: [annotation.update(category_id=7) for annotation in coco['annotations']] and None)
    message = refusal(check, detector)
    assert message.startswith(f'{DATASET}: none of the 4 images of ')
    detector.train_dataloader.dataset.filter_cfg = None  # all images are kept
    assert refusal(check, detector).startswith(f'{DATASET}: none of the 4 ')


def test_classes_of_other_names(check, detector):
    detector.train_dataloader.dataset.metainfo = dict(classes=('Shape',))
    message = refusal(check, detector)
    assert message.startswith(f'{DATASET}: none of the 4 images of ')
    assert 'no object is annotated as Shape, 1 of its 1 classes; the annotations have shape' in message


def test_some_classes_of_other_names(check, detector):
    detector.train_dataloader.dataset.metainfo = dict(classes=('shape', 'Circle'))
    _, warnings = check(detector)
    assert any('no object is annotated as Circle, 1 of its 2 classes' in warning for warning in warnings)
    assert any(
        f'model.roi_head.bbox_head.num_classes=1, but {DATASET} has 2 classes; objects of the last 1 ' in warning
        for warning in warnings
    )
    assert not any('number their classes differently' in warning for warning in warnings)  # 0 is a shape in both


def test_more_outputs_than_classes(check, detector):
    detector.model.roi_head.bbox_head.num_classes = detector.model.roi_head.mask_head.num_classes = 80
    _, warnings = check(detector)
    assert warnings == [
        f'model.roi_head.{head}.num_classes=80, but {DATASET} has 1 classes; 79 outputs will never be trained.'
        for head in ('bbox_head', 'mask_head')
    ]


def test_order_of_classes(check, detector, edit):
    """MMDetection numbers classes in the order of the file's categories, whatever the order of their names is."""

    def change(coco):
        coco['categories'] += [dict(id=99, name='other')]

    edit(change)
    detector.model.roi_head.bbox_head.num_classes = detector.model.roi_head.mask_head.num_classes = 2
    detector.train_dataloader.dataset.metainfo = dict(classes=('other', 'shape'))
    dataset = build(detector)
    labels = {instance['bbox_label'] for i in range(len(dataset)) for instance in dataset.get_data_info(i)['instances']}
    assert labels == {0}  # a shape, though the name of 0 is 'other'
    _, warnings = check(detector)
    assert any('metainfo.classes is not in the order of the categories' in warning for warning in warnings)


def test_boxes_of_corners(check, detector, edit):
    def change(coco):
        for annotation in coco['annotations']:
            x, y, width, height = annotation['bbox']
            annotation['bbox'] = [x, y, x + width, y + height]

    edit(change)
    _, warnings = check(detector)
    assert any('boxes leave their image. In COCO format a bbox is x, y, width, height' in line for line in warnings)


def test_repeated_ids(check, detector, edit):
    edit(lambda coco: coco['images'].append(dict(coco['images'][0])))
    _, warnings = check(detector)
    assert any('1 image ids occur more than once' in warning for warning in warnings)


@pytest.mark.parametrize(('content', 'what'), [(None, 'missing'), (b'', 'empty')])
def test_image_files(check, detector, edit, content, what, tmp_path):
    coco = edit(lambda coco: None)
    folder = tmp_path / 'images'
    folder.mkdir()
    for i, image in enumerate(coco['images']):
        if i or content is not None:
            (folder / image['file_name']).write_bytes(b'x' if i else content)
    detector.train_dataloader.dataset.data_prefix = dict(img=str(folder))
    message = refusal(check, detector)
    path = folder / coco['images'][0]['file_name']
    assert message.startswith(f'{DATASET}: 1 of its 3 image files are {what}: {path}')


@pytest.mark.parametrize(
    'loading',
    [dict(ignore_empty=True), dict(backend_args=dict(backend='http')), dict(backend_args=dict(backend='petrel'))],
)
def test_image_files_that_may_be_elsewhere(detector, loading):
    """Only the loading transform knows; nothing is said of a file that it may find."""
    detector.train_dataloader.dataset.data_prefix = dict(img='/nowhere')
    detector.train_dataloader.dataset.pipeline[0] = dict(type='LoadImageFromFile')
    dataset = build(detector)
    with pytest.raises(ConfigError, match='3 of its 3 image files are missing'):
        summarize(DATASET, dataset, training=True)
    loader = dataset.pipeline.transforms[0]
    for name, value in loading.items():
        setattr(loader, name, value)
    summarize(DATASET, dataset, training=True)


def test_objects_without_masks(check, detector, edit):
    edit(lambda coco: coco['annotations'][0].pop('segmentation') and None)
    assert '1 objects have no segmentation, but the pipeline loads masks' in refusal(check, detector)
    edit(lambda coco: [annotation.pop('segmentation') for annotation in coco['annotations']] and None)
    assert 'its objects have no segmentation' in refusal(check, detector)


def test_empty_annotations_need_no_masks(detector, edit):
    """As unlabeled images have them, though the transform has a with_mask."""
    edit(lambda coco: [annotation.pop('segmentation') for annotation in coco['annotations']] and None)
    steps = detector.train_dataloader.dataset.pipeline
    dataset = build(detector)
    with pytest.raises(ConfigError, match='its objects have no segmentation'):
        summarize(DATASET, dataset, training=True)
    steps[1] = dict(type='LoadEmptyAnnotations', with_bbox=True, with_mask=True)
    summarize(DATASET, build(detector), training=True)


def test_ignored_annotations_need_no_area(check, detector, edit):
    """Nor a mask: MMDetection does not read them."""

    def change(coco):
        coco['annotations'][0].update(ignore=1)
        del coco['annotations'][0]['area'], coco['annotations'][0]['segmentation']

    edit(change)
    assert check(detector)[1] == []


def test_images_with_categories_of_their_own(check, detector, edit):
    edit(lambda coco: [image.update(categories=['day']) for image in coco['images']] and None)
    assert check(detector)[1] == []


def test_indices(check, detector):
    """Images beyond the chosen ones may be missing."""
    detector.train_dataloader.dataset.indices = 2
    summary, warnings = check(detector)
    assert warnings == []
    assert f'{DATASET} (CocoDataset): 2 images' in summary


@pytest.mark.parametrize(
    'wrap',
    [
        lambda data: dict(type='RepeatDataset', times=3, dataset=data),
        lambda data: dict(type='ConcatDataset', datasets=[data, data]),
        lambda data: dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=data),
    ],
)
def test_wrappers(check, detector, wrap):
    detector.train_dataloader.dataset = wrap(detector.train_dataloader.dataset.to_dict())
    summary, warnings = check(detector)
    assert warnings == []
    assert '(CocoDataset): 3 images of 4' in summary


def test_voc(check, voc):
    summary, warnings = check(voc)
    assert warnings == []
    assert f'{DATASET} (XMLDataset): 2 images; 4 objects' in summary
    assert 'per class: plate 2, cell 2' in summary


def test_voc_misspelled_class(check, voc, tmp_path):
    voc.train_dataloader.dataset.metainfo.classes = ('cell', 'Plate')
    voc.val_dataloader.dataset.metainfo.classes = ('cell', 'Plate')
    summary, warnings = check(voc)
    assert any(
        'no object is annotated as Plate, 1 of its 2 classes; the annotations have cell (2), plate (2)' in line
        for line in warnings
    )
    assert '2 of other classes' in summary
    voc.train_dataloader.dataset.metainfo.classes = ('Cell', 'Plate')
    message = refusal(check, voc)
    assert message.startswith(f'{DATASET}: none of the 2 images of {tmp_path}/sets/train.txt is left')
    assert 'cell (2), plate (2)' in message


def test_voc_missing_files(check, voc, tmp_path):
    (tmp_path / 'JPEGImages/b.jpg').unlink()
    assert f'1 of its 2 image files are missing: {tmp_path}/JPEGImages/b.jpg' in refusal(check, voc)
    (tmp_path / 'Annotations/b.xml').unlink()
    message = refusal(check, voc)
    assert message.startswith(f'{DATASET} cannot be read: there is no {tmp_path}/Annotations/b.xml')


def test_voc_image_of_another_format(check, voc, tmp_path):
    (tmp_path / 'JPEGImages/b.jpg').rename(tmp_path / 'JPEGImages/b.png')
    assert '(there is b.png, but XMLDataset looks for b.jpg)' in refusal(check, voc)


def test_voc_file_that_cannot_be_read(check, voc, tmp_path):
    path = tmp_path / 'Annotations/b.xml'
    path.write_text(path.read_text().replace('xmin', 'left'))
    assert refusal(check, voc).startswith(f'{DATASET} cannot be read: {path}: AttributeError')


def test_voc_name_with_a_suffix(check, voc, tmp_path):
    (tmp_path / 'sets/train.txt').write_text('a.jpg')
    assert f'no {tmp_path}/Annotations/a.jpg.xml, which {tmp_path}/sets/train.txt names' in refusal(check, voc)


def test_voc_without_images(check, voc, tmp_path):
    (tmp_path / 'sets/val.txt').write_text('')
    assert refusal(check, voc).startswith('val_dataloader.dataset has no images: none are listed in ')


def test_voc_classes_as_a_string(check, voc):
    voc.train_dataloader.dataset.metainfo.classes = 'cell'
    assert refusal(check, voc).startswith(f"{DATASET}.metainfo.classes='cell' is a string")


def test_voc_boxes_without_area(check, voc, tmp_path):
    """MMDetection's XMLDataset keeps them, and the loss of a RetinaNet becomes infinite."""
    path = tmp_path / 'Annotations/b.xml'
    path.write_text(path.read_text().replace('<xmax>40', '<xmax>5', 1))
    _, warnings = check(voc)
    assert len(warnings) == 1
    assert warnings[0].startswith(f'{DATASET}: 1 of 4 boxes have no area')
    voc.train_dataloader.dataset.pipeline.insert(2, dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)))
    _, warnings = check(voc)
    assert warnings == []


def test_voc_without_objects(check, voc, tmp_path):
    for path in (tmp_path / 'Annotations').glob('*.xml'):
        tree = ET.parse(path)
        for item in tree.getroot().findall('object'):
            tree.getroot().remove(item)
        tree.write(path)
    assert refusal(check, voc).startswith(f'{DATASET}: none of the 2 images of')


class TestClassifier:
    def test_summary(self, check, classifier):
        summary, warnings = check(classifier)
        assert warnings == []
        assert f'{DATASET} (CustomDataset): 8 images' in summary
        assert 'per class: dog 4, cat 4' in summary

    def test_empty_folder(self, check, classifier, tmp_path):
        """MMPretrain warns and numbers it as a class; a notebook's checkpoints are such a folder."""
        (tmp_path / 'train/.ipynb_checkpoints').mkdir()
        (tmp_path / 'val/.ipynb_checkpoints').mkdir()
        classifier.model.head.num_classes = classifier.data_preprocessor.num_classes = 3
        summary, warnings = check(classifier)
        assert [warning for warning in warnings if not warning.startswith('Found no valid file')] == []
        assert 'dog 4, cat 4, .ipynb_checkpoints 0' in summary

    def test_other_folders_in_evaluation(self, check, classifier, tmp_path):
        (tmp_path / 'val/cat').rename(tmp_path / 'val/bird')
        _, warnings = check(classifier)
        assert any("differently: 0 is 'cat' in one and 'bird' in the other" in warning for warning in warnings)

    def test_more_choices_than_classes(self, check, classifier):
        classifier.val_evaluator.topk = (1, 5)
        assert refusal(check, classifier).startswith(
            'val_evaluator.topk=(1, 5), but the head has num_classes=2. Set topk=(1,)'
        )

    def test_empty_image(self, check, classifier, tmp_path):
        (tmp_path / 'train/cat/0.png').write_bytes(b'')
        assert f'1 of its 8 image files are empty: {tmp_path}/train/cat/0.png' in refusal(check, classifier)


class TestSchedule:
    def test_short_training(self, check, detector):
        detector.train_cfg.max_iters = 50
        _, warnings = check(detector)
        assert any(line.startswith('param_scheduler.0 (LinearLR) is a warm-up of 100 iterations') for line in warnings)
        assert any('param_scheduler.1 (CosineAnnealingLR) begins at 100 of 50' in line for line in warnings)

    def test_milestones(self, check, detector):
        detector.param_scheduler = [dict(type='MultiStepLR', milestones=[2000], by_epoch=False)]
        _, warnings = check(detector)
        assert warnings == [
            'param_scheduler.0 (MultiStepLR) has its first milestone at 2000 of 1000 iterations: the learning rate is '
            'never lowered.'
        ]


def test_json_of_another_shape(check, detector, edit):
    edit(lambda coco: json.loads('{"images": [], "annotations": [], "categories": []}'))
    assert refusal(check, detector).startswith(f'{DATASET} has no images: none are listed in ')
