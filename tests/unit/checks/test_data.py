import json
import xml.etree.ElementTree as ET

import pytest
from mmengine.registry import DATASETS, init_default_scope

from mmevm.checks.data import compare_class_order, summarize, summarize_all
from mmevm.checks.explain import explain
from mmevm.errors import ConfigError

DATASET = 'train_dataloader.dataset'


def build(cfg, split='train'):
    init_default_scope(cfg.default_scope)
    return DATASETS.build(cfg[f'{split}_dataloader'].dataset)


def summary_of(cfg, split='train'):
    (summary,) = summarize_all({f'{split}_dataloader.dataset': build(cfg, split)})
    return summary


def refusal(cfg):
    with pytest.raises(ConfigError) as error:
        summary_of(cfg)
    return str(error.value)


def reading_error(cfg):
    """Return the explanation of an error of building the data loader."""

    def build_dataloader():  # the name of the runner's method in the traceback
        build(cfg)

    try:
        build_dataloader()
    except Exception as error:
        return explain(error, cfg)
    raise AssertionError('no error')


def test_counts_equal_those_of_mmdet(detector, edit):
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
    assert summary.skipped == {
        'of other classes': 2,
        'without area, outside their image, marked "ignore" or in skipped images': 3,
        'of images that are not listed': 1,
    }
    assert '1 images of 4 (3 skipped by filter_cfg=' in str(summary)


def test_objects_in_skipped_images(detector):
    detector.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True, min_size=1000)
    message = reading_error(detector)
    assert message.startswith(f'{DATASET}: none of the 4 images of ')
    assert 'or in skipped images)' in message


def test_no_object_left(detector, edit):
    edit(lambda coco: [annotation.update(category_id=7) for annotation in coco['annotations']] and None)
    assert reading_error(detector).startswith(f'{DATASET}: none of the 4 images of ')
    detector.train_dataloader.dataset.filter_cfg = None  # keeps all images
    assert refusal(detector).startswith(f'{DATASET}: none of the 4 images of ')


def test_other_class_names(detector):
    detector.train_dataloader.dataset.metainfo = dict(classes=('Shape',))
    message = reading_error(detector)
    assert message.startswith(f'{DATASET}: none of the 4 images of ')
    assert 'no object is annotated as Shape (1 of 1 classes); the annotations have shape' in message


@pytest.mark.parametrize('file', ['labels/a.txt', 'data.yaml', 'labels'])
def test_labels_in_yolo_format(detector, tmp_path, file):
    (tmp_path / 'labels').mkdir()
    (tmp_path / 'labels/a.txt').write_text('0 0.5 0.5 0.1 0.1\n')
    (tmp_path / 'data.yaml').write_text('names: [cat]\n')
    detector.train_dataloader.dataset.ann_file = f'{tmp_path}/{file}'
    assert reading_error(detector) == (
        f'{DATASET} cannot be read: {tmp_path}/{file} is not a JSON file in COCO format, as ann_file of CocoDataset '
        'must be. Convert labels in YOLO format, or use XMLDataset for Pascal VOC format (docs/your_data.md).'
    )


def test_one_other_class_name(check, detector):
    detector.train_dataloader.dataset.metainfo = dict(classes=('shape', 'Circle'))
    _, warnings = check(detector)
    assert any('no object is annotated as Circle (1 of 2 classes)' in warning for warning in warnings)
    too_few = f'model.roi_head.bbox_head.num_classes=1, but {DATASET} has 2 classes; 1 classes will not be learned'
    assert any(warning.startswith(too_few) for warning in warnings)
    assert not any('number their classes differently' in warning for warning in warnings)


def test_order_of_classes(detector, edit):
    """MMDetection numbers classes in the order of the categories in the file."""
    edit(lambda coco: coco['categories'].append(dict(id=99, name='other')))
    detector.train_dataloader.dataset.metainfo = dict(classes=('other', 'shape'))
    dataset = build(detector)
    labels = {instance['bbox_label'] for i in range(len(dataset)) for instance in dataset.get_data_info(i)['instances']}
    assert labels == {0}  # shapes, although classes[0] is 'other'
    (warning,) = summary_of(detector).warnings
    assert warning.startswith(f'{DATASET}.metainfo.classes has another order than the categories')


def test_boxes_as_corners(detector, edit):
    def change(coco):
        for annotation in coco['annotations']:
            x, y, width, height = annotation['bbox']
            annotation['bbox'] = [x, y, x + width, y + height]

    edit(change)
    (warning,) = summary_of(detector).warnings
    assert 'boxes exceed their image. A COCO bbox is x, y, width, height' in warning


@pytest.mark.parametrize(('content', 'problem'), [(None, 'missing'), (b'', 'empty')])
def test_image_files(detector, edit, content, problem, tmp_path):
    coco = edit(lambda coco: None)
    folder = tmp_path / 'images'
    folder.mkdir()
    for i, image in enumerate(coco['images']):
        if i or content is not None:
            (folder / image['file_name']).write_bytes(b'x' if i else content)
    detector.train_dataloader.dataset.data_prefix = dict(img=str(folder))
    path = folder / coco['images'][0]['file_name']
    assert refusal(detector).startswith(f'{DATASET}: 1 of 3 image files are {problem}: {path}')


@pytest.mark.parametrize(
    'loading',
    [dict(ignore_empty=True), dict(backend_args=dict(backend='http')), dict(backend_args=dict(backend='petrel'))],
)
def test_image_files_on_other_backends_are_not_checked(detector, loading):
    detector.train_dataloader.dataset.data_prefix = dict(img='/nowhere')
    detector.train_dataloader.dataset.pipeline[0] = dict(type='LoadImageFromFile')
    dataset = build(detector)
    with pytest.raises(ConfigError, match='3 of 3 image files are missing'):
        summarize(DATASET, dataset, training=True)
    loader = dataset.pipeline.transforms[0]
    for name, value in loading.items():
        setattr(loader, name, value)
    summarize(DATASET, dataset, training=True)


def test_objects_without_masks(detector, edit):
    edit(lambda coco: coco['annotations'][0].pop('segmentation') and None)
    assert f'{DATASET}: 1 of 10 objects have no segmentation, but the pipeline loads masks' in refusal(detector)
    detector.train_dataloader.dataset.pipeline[1] = dict(type='LoadEmptyAnnotations', with_bbox=True, with_mask=True)
    summary_of(detector)


def test_ignored_annotations_need_neither_area_nor_mask(detector, edit):
    def change(coco):
        coco['annotations'][0].update(ignore=1)
        del coco['annotations'][0]['area'], coco['annotations'][0]['segmentation']

    edit(change)
    assert summary_of(detector).warnings == []


def test_categories_of_images(detector, edit):
    edit(lambda coco: [image.update(categories=['day']) for image in coco['images']] and None)
    assert summary_of(detector).warnings == []


def test_indices(detector):
    detector.train_dataloader.dataset.indices = 2
    summary = summary_of(detector)
    assert summary.warnings == []
    assert str(summary).startswith(f'{DATASET} (CocoDataset): 2 images;')


@pytest.mark.parametrize(
    ('wrap', 'number'),
    [
        (lambda data: dict(type='RepeatDataset', times=3, dataset=data), 1),
        (lambda data: dict(type='ConcatDataset', datasets=[data, data]), 2),
        (lambda data: dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=data), 1),
    ],
)
def test_wrappers(detector, wrap, number):
    detector.train_dataloader.dataset = wrap(detector.train_dataloader.dataset.to_dict())
    summaries = summarize_all({DATASET: build(detector)})
    assert len(summaries) == number
    for summary in summaries:
        assert summary.warnings == []
        assert '(CocoDataset): 3 images of 4' in str(summary)


def test_check_that_fails_itself_is_skipped(detector, monkeypatch):
    dataset = build(detector)
    monkeypatch.setattr(dataset, 'get_data_info', lambda index: None)
    assert summarize_all({DATASET: dataset}) == []


def test_empty_annotation_file(detector, edit):
    edit(lambda coco: json.loads('{"images": [], "annotations": [], "categories": []}'))
    assert reading_error(detector).startswith(f'{DATASET}: none of the 0 images of ')


class TestVOC:
    def test_summary(self, voc):
        summary = summary_of(voc)
        assert summary.warnings == []
        assert str(summary) == f'{DATASET} (XMLDataset): 2 images; 4 objects'
        assert summary.per_class() == 'plate 2, cell 2'

    def test_misspelled_class(self, voc, tmp_path):
        voc.train_dataloader.dataset.metainfo.classes = ('cell', 'Plate')
        summary = summary_of(voc)
        (warning,) = summary.warnings
        assert 'no object is annotated as Plate (1 of 2 classes); the annotations have cell, plate' in warning
        assert summary.skipped == {'of other classes': 2}
        voc.train_dataloader.dataset.metainfo.classes = ('Cell', 'Plate')
        message = reading_error(voc)
        assert message.startswith(f'{DATASET}: none of the 2 images of {tmp_path}/sets/train.txt has an object')
        assert 'cell, plate' in message

    def test_missing_files(self, voc, tmp_path):
        (tmp_path / 'JPEGImages/b.jpg').unlink()
        assert f'1 of 2 image files are missing: {tmp_path}/JPEGImages/b.jpg' in refusal(voc)
        (tmp_path / 'Annotations/b.xml').unlink()
        path = f'{tmp_path}/Annotations/b.xml'
        assert reading_error(voc).startswith(f'{DATASET} cannot be read: {path} does not exist')

    def test_image_of_another_format(self, voc, tmp_path):
        (tmp_path / 'JPEGImages/b.jpg').rename(tmp_path / 'JPEGImages/b.png')
        assert '(found b.png, but XMLDataset reads b.jpg)' in refusal(voc)

    def test_unreadable_file(self, voc, tmp_path):
        path = tmp_path / 'Annotations/b.xml'
        path.write_text(path.read_text().replace('xmin', 'left'))
        assert reading_error(voc).startswith(f'{DATASET} cannot be read: {path}: AttributeError')

    def test_name_with_a_suffix(self, voc, tmp_path):
        (tmp_path / 'sets/train.txt').write_text('a.jpg')
        assert f'{tmp_path}/Annotations/a.jpg.xml does not exist' in reading_error(voc)

    def test_no_images(self, voc, tmp_path):
        (tmp_path / 'sets/train.txt').write_text('')
        assert reading_error(voc).startswith(f'{DATASET}: none of the 0 images of ')

    def test_boxes_without_area(self, voc, tmp_path):
        """XMLDataset keeps them, and the loss of a RetinaNet becomes infinite."""
        path = tmp_path / 'Annotations/b.xml'
        path.write_text(path.read_text().replace('<xmax>40', '<xmax>5', 1))
        (warning,) = summary_of(voc).warnings
        assert warning.startswith(f'{DATASET}: 1 of 4 boxes have no area')
        voc.train_dataloader.dataset.pipeline.insert(2, dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)))
        assert summary_of(voc).warnings == []

    def test_no_objects(self, voc, tmp_path):
        for path in (tmp_path / 'Annotations').glob('*.xml'):
            tree = ET.parse(path)
            for item in tree.getroot().findall('object'):
                tree.getroot().remove(item)
            tree.write(path)
        assert reading_error(voc).startswith(f'{DATASET}: none of the 2 images of')


class TestClassifier:
    def test_empty_folder(self, classifier, tmp_path):
        """MMPretrain numbers it as a class. Notebooks create such a folder, .ipynb_checkpoints."""
        (tmp_path / 'train/.ipynb_checkpoints').mkdir()
        assert summary_of(classifier).per_class() == 'dog 4, cat 4, .ipynb_checkpoints 0'

    def test_other_folders_in_evaluation(self, classifier, tmp_path):
        (tmp_path / 'val/cat').rename(tmp_path / 'val/bird')
        (warning,) = compare_class_order([summary_of(classifier), summary_of(classifier, 'val')])
        assert "differently: one has 'cat' where the other has 'bird'" in warning

    def test_empty_image(self, classifier, tmp_path):
        (tmp_path / 'train/cat/0.png').write_bytes(b'')
        assert f'1 of 8 image files are empty: {tmp_path}/train/cat/0.png' in refusal(classifier)
